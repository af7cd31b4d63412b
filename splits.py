"""Divide the images of a folder into train.txt and val.txt (`prepare.py split`)."""

import argparse
import collections
import pathlib
import re
import shlex

import numpy as np
from tqdm import tqdm

from common import IGNORE_INDEX, UserError, printable
from datasets import digest
from readers import SUFFIXES, by_name, open_mask, read_lines, read_names
from run_folder import atomic_write

FRAME = r"(.*?)[\W_]*[0-9]+"  # a name with a number at its end; the prefix is what stands before it


def split_data(args: argparse.Namespace):
    """Write DATA/train.txt and DATA/val.txt. Raises UserError.

    Images with masks are divided, those without go into train.txt, and those that unlabeled.txt names into neither. A group is
    a single image, or all images of one prefix; those without masks go into neither list if their prefix is in val.txt. Groups
    are ordered by a hash of seed and name, so the split is the same on every machine, and go into val.txt as long as that
    brings its size nearer to the fraction --val.
    """
    root, lists = args.data, (args.data / "train.txt", args.data / "val.txt")
    if not 0 < args.val < 1:
        raise UserError(f"--val {args.val:g}: must be above 0 and below 1, such as 0.2 for a fifth of the images with masks")
    for folder in (root, root / "images", root / "masks"):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; --data must hold images/ and masks/")
    exists = [path for path in lists if path.exists()]
    if exists and not args.overwrite:
        raise UserError(f"{exists[0]}: exists; keep it, or add --overwrite to replace train.txt and val.txt")
    images = by_name(path for path in (root / "images").iterdir() if path.suffix.lower() in SUFFIXES)
    masks = by_name(path for path in (root / "masks").iterdir() if path.suffix.lower() == ".png")
    kept = set(read_names(root / "unlabeled.txt", images)) if (root / "unlabeled.txt").exists() else set()
    names = sorted(images.keys() - kept)
    masked = [name for name in names if name in masks]
    if len(masked) < 2:
        raise UserError(
            f"{root}: {len(masked)} of {len(names)} images have a mask (masks/NAME.png for images/NAME.jpg or .png); two are "
            "needed, one for each list (python prepare.py masks converts masks of other names and forms)"
        )

    groups = group_names(masked, args)
    val = choose_val(groups, args.val, args.seed)
    of_val = {prefix for prefix, group in groups.items() if val & {*group}}
    alike = {name for name in names if name not in masks and prefix_of(name, args) in of_val}  # such as frames between
    train = [name for name in names if name not in val | alike]
    warnings = class_warnings({"train": [name for name in masked if name not in val], "val": sorted(val)}, masks, root)
    videos = like_frames(masked) if len(groups) == len(masked) else []
    if videos:
        warnings.append(
            f"names look like frames of {len(videos)} videos, first '{printable(videos[0])}'; add --by prefix (and "
            "--overwrite) to keep the frames of each on one side"
        )
    for path, lines in zip(lists, (train, sorted(val)), strict=True):
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in lines), encoding="utf-8")
    print(f"{lists[0]}: {len(masked) - len(val)} images with masks and {len(names) - len(masked) - len(alike)} without")
    print(f"{lists[1]}: {len(val)} images ({100 * len(val) / len(masked):.1f}% of those with masks)")
    if alike:
        print(f"{len(alike)} images without masks have a prefix of {lists[1]}, and are in neither list")
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"next: python prepare.py check --dataset folder --part 1 --data {shlex.quote(str(root))}")


def group_names(names: list[str], args: argparse.Namespace) -> dict[str, list[str]]:
    """{prefix: its names} with `--by prefix` or `--prefix`, otherwise {name: [name]}. Raises UserError."""
    try:
        re.compile(args.prefix or "")
    except re.error as error:
        raise UserError(f"--prefix '{args.prefix}': is no regular expression ({error}); such as '[^_]+'") from None
    groups = collections.defaultdict(list)
    for name in names:
        if args.prefix is not None and not re.match(args.prefix, name):
            raise UserError(f"--prefix '{args.prefix}': does not match the beginning of '{printable(name)}'; change it")
        groups[prefix_of(name, args)].append(name)
    if len(groups) == 1:
        raise UserError(
            f"--by prefix: all {len(names)} images with masks have the prefix '{next(iter(groups))}'; give --prefix with a "
            "regular expression that matches a part of the name which differs, or --by name"
        )
    return dict(groups)


def prefix_of(name: str, args: argparse.Namespace) -> str | None:
    """The prefix of a name by `--by prefix` or `--prefix`; the name itself where it has none, or with `--by name`."""
    if args.prefix is not None:
        found = re.match(args.prefix, name)
        return found[min(1, found.re.groups)] if found else name
    found = re.fullmatch(FRAME, name) if args.by == "prefix" else None
    return found[1] if found else name


def like_frames(names: list[str]) -> list[str]:
    """The prefixes of `names` if at least two occur, and most names share theirs with another one; otherwise none."""
    counts = collections.Counter(found[1] for name in names if (found := re.fullmatch(FRAME, name)) and found[1])
    shared = [prefix for prefix, count in counts.items() if count > 1]
    return shared if len(shared) > 1 and 2 * sum(counts[prefix] for prefix in shared) > len(names) else []


def choose_val(groups: dict[str, list[str]], fraction: float, seed: int) -> set[str]:
    """The names of val: at least one group and not all, as near to `fraction` of the names as going once through the groups
    gets."""
    total = sum(map(len, groups.values()))
    target, val = fraction * total, set()
    order = sorted(groups, key=lambda group: digest(f"{seed} {group}"))
    for group in order:
        size = len(val) + len(groups[group])
        if abs(size - target) < abs(len(val) - target) and size < total:
            val.update(groups[group])
    return val or set(groups[min(order, key=lambda group: len(groups[group]))])


def class_warnings(lists: dict[str, list[str]], masks: dict[str, pathlib.Path], root: pathlib.Path) -> list[str]:
    """One line for each list in which a class is missing that the masks of the other one show. Raises UserError."""
    shown = {key: set() for key in lists}
    for key, names in lists.items():
        for name in tqdm(names, key, disable=None):
            shown[key].update(np.unique(open_mask(masks[name])).tolist())
    classes = read_lines(root / "classes.txt") if (root / "classes.txt").exists() else []
    found = []
    for key, other in (("train", "val"), ("val", "train")):
        missing = sorted(shown[other] - shown[key] - {IGNORE_INDEX})
        if missing:
            labels = ", ".join(printable(classes[i]) if i < len(classes) else f"class {i}" for i in missing)
            found.append(f"no image of {key}.txt shows {labels}; try another --seed or --val, and --overwrite")
    return found
