"""Checks for faults that make results meaningless, before training and evaluation, and for `prepare.py check`."""

import collections
import functools
import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import IGNORE_INDEX, UserError
from readers import MOST_UNNAMED, PALETTE, flags_for


class Look(NamedTuple):
    """The content of a data set's files. The groups are labeled, unlabeled, val, and others that are named after what they
    hold; unlabeled masks are never opened."""

    sizes: collections.Counter  # images of each (height, width)
    pixels: dict[str, np.ndarray]  # group -> (256,) int64: pixels of each label
    images: dict[str, np.ndarray]  # group -> (256,) int64: images that show each label
    palettes: dict[bytes, dict[int, str]]  # palette of mask files -> index that occurs -> the first file that shows it
    problems: dict[str, str]  # name -> what is wrong with its image or mask


def look_at(dataset, groups: dict[str, list[str]], whole: bool) -> Look:
    """Look at the images and masks of `groups` (group -> names).

    With `whole`, images are decoded, problems are collected, and a progress bar is shown. Otherwise only the headers of the
    images are read, and the first problem raises UserError.
    """
    masked = [group for group in groups if group != "unlabeled"]
    pixels, images = ({group: np.zeros(256, np.int64) for group in masked} for _ in range(2))
    look = Look(collections.Counter(), pixels, images, {}, {})

    def look_at_one(group, name):
        try:
            height, width = dataset.image(name).shape[:2] if whole else dataset.image_size(name)
            if group not in masked:
                return (height, width), None, None
            mask = dataset.mask(name)
            colours = None
            if name in dataset.masks:  # files
                if mask.shape != (height, width):
                    raise UserError(
                        f"{dataset.masks[name]}: is {mask.shape[1]}x{mask.shape[0]}, its image {width}x{height}; image and "
                        "mask must have the same size"
                    )
                colours = dataset.colours(name)
            return (height, width), np.bincount(mask.ravel(), minlength=256), colours
        except UserError as error:
            if not whole:
                raise
            return str(error)

    with ThreadPoolExecutor() as pool:
        for group, names in groups.items():
            seen = pool.map(functools.partial(look_at_one, group), names)
            for name, found in zip(names, tqdm(seen, group, len(names), disable=None if whole else True), strict=True):
                if isinstance(found, str):
                    look.problems[name] = found
                    continue
                size, counts, colours = found
                look.sizes[size] += 1
                if counts is not None:
                    look.pixels[group][:] += counts
                    look.images[group][:] += counts > 0
                if colours is not None:
                    first = look.palettes.setdefault(colours, {})
                    for label in counts.nonzero()[0].tolist():
                        first.setdefault(label, str(dataset.masks[name]))
    return look


def faults(dataset, look: Look) -> list[str]:
    """The faults that make training or evaluation with these masks meaningless, each as one line."""
    if dataset.drawn:
        return []
    found, labels = [], {group: set(pixels.nonzero()[0].tolist()) for group, pixels in look.pixels.items()}
    every = set().union(*labels.values())
    binary = dataset.fix("--values 0=0 255=1") if every == {0, IGNORE_INDEX} and "labeled" in labels else ""  # of others: harm
    for group, shown in labels.items():
        task = "learn" if group == "labeled" else "evaluate"
        where, classes = f"{dataset.root}: the {group} masks", sorted(shown - {IGNORE_INDEX})
        if not shown:
            continue  # none could be read
        if not classes:
            found.append(
                f"{where} hold only 255, which is ignored, so there is nothing to {task}; use images whose masks show "
                f"classes{binary and ', or '}{binary}"
            )
        elif binary:
            found.append(f"{where} hold only 0 and 255, and 255 is ignored; {binary}")
        elif len(classes) == 1:
            found.append(
                f"{where} show only one class, '{dataset.classes[classes[0]]}', so there is nothing to {task}; use "
                "images that also show others (a larger --part, other lists), or fix the masks"
            )
    ignored, every = " 255=ignore" * (IGNORE_INDEX in every), sorted(every - {IGNORE_INDEX})
    gap = sorted(set(range(max(every, default=0))) - set(every))
    counted = not dataset.named and "labeled" in labels  # val by itself may lack a class
    if counted and len(every) > 1 and (gap or len(every) > MOST_UNNAMED):
        pixels = sum(look.pixels.values())
        flags = flags_for(pixels.nonzero()[0], pixels[pixels > 0], 2)
        if max(every) <= MOST_UNNAMED:
            flags = "--values " + " ".join(f"{label}={i}" for i, label in enumerate(every)) + ignored
        if len(every) > 8:
            what = f"{len(every)} different labels{', with gaps,' if gap else ''}, as from soft edges or levels of grey"
        else:
            what = f"the labels {', '.join(map(str, every))} but not {gap[0]}"
        found.append(
            f"{dataset.root / 'masks'}: hold {what}; name every class in classes.txt, one per line in the order of "
            f"the labels, or {dataset.fix(flags)}"
        )
    clash = palette_clash(dataset, look.palettes)
    if clash:
        found.append(clash)
    return found


def palette_clash(dataset, palettes: dict[bytes, dict[int, str]]) -> str | None:
    """The fault, or None, that one colour stands for two indices that occur, in two mask files or in one and `dataset.palette`,
    and that one of the two palettes has another colour at the other's index: the indices then mean different things.

    The same is assumed if one index that occurs has two colours in two files, since programs that choose a palette per file
    number the colours anew. Other programs give new colours to right indices; only `dataset.palette` tells which it was.
    """
    first = {}  # index -> colour in the first file that shows it, and the file
    known = {}  # colour -> index -> a palette that has it there, and its file
    official = bytes(channel for colour in dataset.palette for channel in colour) if dataset.palette_from else b""
    place = dataset.palette_from
    if not official and dataset.named and dataset.classes[0].lower() == "background":  # black by custom
        official, place = bytes(3), "the name background of class 0"
    reference = (official, dict.fromkeys(range(len(official) // 3), place))
    for palette, labels in [reference, *palettes.items()]:
        for label, path in labels.items():
            colour = palette[3 * label : 3 * label + 3]
            same = known.setdefault(colour, {}) if len(colour) == 3 else {}
            for other, (theirs, where) in same.items():
                both = theirs[3 * label : 3 * label + 3], palette[3 * other : 3 * other + 3]
                if other != label and any(len(each) == 3 and each != colour for each in both):
                    fix = dataset.fix(PALETTE, pathlib.Path(path))
                    return (
                        f"{path}: its palette gives the colour {tuple(colour)} to index {label}, but {where} to index "
                        f"{other}, so indices do not mean the same everywhere; {fix}"
                    )
            same.setdefault(label, (palette, path))
            theirs, where = first.setdefault(label, (colour, path)) if path != place else (colour, path)
            if theirs != colour and min(len(theirs), len(colour)) == 3 and label != IGNORE_INDEX and not dataset.palette_from:
                return (
                    f"{path}: its palette gives index {label} the colour {tuple(colour)}, but {where} the colour "
                    f"{tuple(theirs)}, so the index may stand for two classes; if the indices are right, run this command "
                    f"without --palette; if the colours are, {dataset.fix(PALETTE)}"
                )
    return None


def refuse_faults(dataset, groups: dict[str, list[str]]):
    """Raises UserError for the first unreadable file, wrong size, wrong label, or fault of the masks. It reads the headers of
    the images and every mask of `groups` (see `look_at`)."""
    if not dataset.drawn:
        problems = faults(dataset, look_at(dataset, groups, whole=False))
        if problems:
            raise UserError(problems[0])


def refuse_wrong_pseudo_labels(pseudo_labels, labeled: list[str]):
    """Raises UserError for the first map of `datasets.PseudoLabels` that cannot be read, has another size than its image, or
    holds other labels than the classes; if all are 255 everywhere; and if a palette of theirs disagrees with the data set's,
    which is that of the masks of `labeled` where nothing else names it."""
    look = look_at(pseudo_labels, {"maps": [*pseudo_labels.masks]}, whole=False)
    if not look.pixels["maps"][:IGNORE_INDEX].any():
        raise UserError(f"{pseudo_labels.root}: the maps hold only 255, which is ignored; give maps that show classes")
    dataset = pseudo_labels.dataset
    ours = bytes(channel for colour in dataset.palette for channel in colour)  # which predict.py writes
    palettes = {palette: labels for palette, labels in look.palettes.items() if palette[: len(ours)] != ours[: len(palette)]}
    if palettes and not dataset.palette_from:
        of_masks = look_at(dataset, {"labeled": labeled}, whole=False).palettes
        palettes = {key: palettes.get(key, {}) | of_masks.get(key, {}) for key in (*of_masks, *palettes)}
    if clash := palette_clash(pseudo_labels, palettes):
        raise UserError(clash)
