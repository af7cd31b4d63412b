"""Turn masks of colours or other values into masks of class indices (`prepare.py masks`)."""

import argparse
import collections
import os
import pathlib
import re
import shlex
import unicodedata
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import datasets
import readers
from common import IGNORE_INDEX, UserError, printable
from readers import VOC_BORDER, colour_table, mask_values, name_of, opened, read_lines, upright, voc_palette
from result_files import png_text, refuse_links_out
from run_folder import atomic_write, check_folder

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
ENDINGS = r"([_.-](masks?|labels?|l|gt|seg|segmentation|annotations?|label(train)?ids|colou?rs?|png|jpe?g))+$"  # of names
BROKEN = ("cannot be read as an image", "replace it")
UNKNOWN = 256  # in a table of class indices
WRITTEN = "mgd prepare.py masks"  # the PNG text `Software`; predictions have another, and so never replace masks


class Classes(NamedTuple):
    """The classes that values or colours of masks stand for."""

    indices: dict[int, int]  # a grey value, or a colour as `packed`, -> class index or 255
    names: list[str]
    palette: list[tuple[int, int, int]]
    coloured: bool  # whether the keys of `indices` are colours


def packed(colour) -> int:
    red, green, blue = (int(channel) for channel in colour)
    return red << 16 | green << 8 | blue


def shown(key: int, coloured: bool) -> str:
    return f"{key >> 16},{key >> 8 & 255},{key & 255}" if coloured else str(key)


def colour_of(text: str) -> tuple[int, int, int] | None:
    """`R,G,B` or `R G B` as a colour; None for other texts."""
    channels = [int(part) for part in re.split(r"[\s,]+", text.strip()) if re.fullmatch(r"[0-9]+", part)]
    return tuple(channels) if re.fullmatch(r"\d+([\s,]+\d+){2}", text.strip()) and max(channels) < 256 else None


def read_colour_file(path: str) -> list[tuple[tuple[int, int, int], str | None]]:
    """[(colour, class name or None)] from palette.txt (`R G B`), CamVid's label_colors.txt (`R G B NAME`) or CVAT's
    labelmap.txt (`NAME:R,G,B:PARTS:ACTIONS`). Raises UserError."""
    entries = []
    for line in read_lines(pathlib.Path(path), "colour 'R G B'"):
        if line.startswith("#"):
            continue
        cvat = re.fullmatch(r"(.*?):(\d+,\d+,\d+):[^:]*:[^:]*", line)
        plain = re.fullmatch(r"(\d+[\s,]+\d+[\s,]+\d+)(?:[\s,]+(\S.*))?", line)
        colour = colour_of(cvat[2] if cvat else plain[1]) if cvat or plain else None
        if colour is None:
            raise UserError(
                f"{path}: '{line}' is not a colour; write one 'R G B' per line, each from 0 to 255, or give CVAT's "
                "labelmap.txt, with lines such as 'road:128,64,128::'"
            )
        entries.append((colour, cvat[1] if cvat else plain[2]))
    twice = [colour for colour, count in collections.Counter(colour for colour, _ in entries).items() if count > 1]
    if twice or not entries:
        reason = f"holds the colour {','.join(map(str, twice[0]))} twice" if twice else "holds no colour"
        raise UserError(f"{path}: {reason}; give every class a colour of its own")
    return entries


def has_colours(path: pathlib.Path) -> bool:
    """Whether a mask file has colours, not only grey values."""
    with opened(path, *BROKEN) as file:
        pixels = np.asarray(file.convert("RGB"))
    return bool((pixels != pixels[..., :1]).any())


def read_entries(args: argparse.Namespace, names: list[str] | None, mask: pathlib.Path):
    """[(value or colour, class)] from `--values`, `--palette`, or, if `mask` has colours, a file beside the masks.
    A class is a name, an index or `ignore`; `names` are the lines of classes.txt. Raises UserError."""
    palette = args.palette
    if not palette and not args.values and has_colours(mask):
        source = args.masks.resolve()
        nearby = (args.out.resolve().parent / "palette.txt", source / "labelmap.txt", source.parent / "labelmap.txt")
        palette = next((str(path) for path in nearby if path.exists()), None)
    if palette == "voc":
        return [*zip(voc_palette(21), datasets.VOC_CLASSES, strict=True), (VOC_BORDER, "ignore")]
    if palette == "cityscapes":
        return [*zip(datasets.CITYSCAPES_PALETTE, datasets.CITYSCAPES_CLASSES, strict=True), ((0, 0, 0), "ignore")]
    if palette:
        return [(colour, str(i) if name is None else name) for i, (colour, name) in enumerate(read_colour_file(palette))]
    if not args.values:  # the values are the indices
        return [*((i, str(i)) for i in range(len(names) if names else IGNORE_INDEX)), (IGNORE_INDEX, "ignore")]
    entries = {}
    for pair in args.values:
        text, equals, name = pair.partition("=")
        key = int(text) if re.fullmatch(r"[0-9]{1,5}", text) and int(text) < 1 << 16 else colour_of(text)
        if not equals or name in ("", "CLASS") or key is None:
            raise UserError(f"--values {pair}: give VALUE=NAME or R,G,B=NAME, such as 255=1, 128,0,0=road or 0=ignore")
        if key in entries:
            raise UserError(f"--values: gives {text} two classes; give it one")
        entries[key] = name
    if len(set(map(type, entries))) > 1:
        raise UserError("--values: give either values or colours, not both")
    return list(entries.items())


def read_classes(args: argparse.Namespace, mask: pathlib.Path) -> Classes:
    """The classes of classes.txt beside OUT, or else of `read_entries`, with their values or colours in the masks. Raises
    UserError."""
    path = args.out.resolve().parent / "classes.txt"
    names = read_lines(path) if path.exists() else None
    entries = [(key, unicodedata.normalize("NFC", name)) for key, name in read_entries(args, names, mask)]
    absent = set(args.ignore) - {name for _, name in entries}
    if absent:
        raise UserError(f"--ignore {min(absent)}: no such class; there are {', '.join(name for _, name in entries)}")
    ignored = {"ignore", str(IGNORE_INDEX), *args.ignore}
    called = list(dict.fromkeys(name for _, name in entries if name not in ignored))
    if names is None:
        numbers = [int(name[:9]) for name in called if name.isdecimal()]
        if numbers and len(numbers) < len(called):
            raise UserError(f"{path}: no such file, so give every class as an index, or every class by its name")
        names = [f"class {i}" for i in range(min(1 + max(numbers), 256))] if numbers else called
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise UserError("--values and --palette: 2 to 255 classes are possible, with indices from 0 to 254")
    where = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    absent = [name for name in called if name not in where]
    if absent:
        raise UserError(
            f"{path}: names no class '{absent[0]}'; add it there (one name per line), or leave it out with "
            f"--ignore {shlex.quote(absent[0])}"
        )
    coloured = isinstance(entries[0][0], tuple)
    indices, palette = {}, voc_palette(len(names))
    for key, name in entries:
        index = IGNORE_INDEX if name in ignored else where[name]
        indices[packed(key) if coloured else key] = index
        if coloured and index != IGNORE_INDEX:
            palette[index] = key
    return Classes(indices, names, palette, coloured)


def find_masks(folder: pathlib.Path, images: set[str], ending: str | None):
    """{image name: mask file} in `folder` and its subfolders, and a list of the files that belong to no image.

    With `ending` (--suffix), masks are the files NAME + ending. Otherwise a mask's name begins with the name of one of
    `images`; without images, the usual endings are removed. Raises UserError.
    """
    masks, others = {}, []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")):
        stem = unicodedata.normalize("NFC", path.stem)
        if ending is not None:
            name = stem.removesuffix(ending) if stem.endswith(ending) and stem != ending else None
        elif images:
            cuts = (stem[:i] for i in range(len(stem), 0, -1) if i == len(stem) or not stem[i].isalnum())
            name = next((cut for cut in cuts if cut in images), None)
        else:
            name = re.sub(ENDINGS, "", name_of(path.name), flags=re.IGNORECASE) or stem
        if name is None or (images and name not in images):
            others.append(path)
        elif name in masks:
            raise UserError(
                f"{path}: is a mask of '{name}', and so is {masks[name]}; choose the masks, for example "
                f"with --suffix {shlex.quote(stem.removeprefix(name))}"
            )
        else:
            masks[name] = path
    if not masks:
        found = f"; the first file is {others[0].name}" if others else ""
        raise UserError(
            f"--masks {folder}: holds no mask of an image{found}; give the folder of the masks, and --images "
            "with the folder of the images (--suffix _mask: files are called NAME_mask.png)"
        )
    return masks, others


def rgb_of(file: Image.Image, path: pathlib.Path) -> np.ndarray:
    """(H, W, 3) uint8: the colours of an opened mask, upright, without transparency. Raises UserError where only transparency
    shows the classes."""
    image = upright(file)
    pixels = np.asarray(image.convert("RGB"))
    if "A" in image.getbands() and np.ptp(np.asarray(image.getchannel("A"))) > 0 and (pixels == pixels[0, 0]).all():
        raise UserError(f"{path}: has one colour and shows its classes by transparency; flatten it onto another colour")
    return pixels


def read_keys(path: pathlib.Path, classes: Classes) -> np.ndarray:
    """(H, W) int64: the grey value of each pixel, or its colour as `packed`. Raises UserError."""
    with opened(path, *BROKEN) as file:
        if classes.coloured and not file.mode.startswith("I"):
            pixels = rgb_of(file, path).astype(np.int64)
            return pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
        if file.mode in ("L", "P", "1") or file.mode.startswith("I"):
            white = IGNORE_INDEX if file.mode == "1" and 1 not in classes.indices else 1  # one bit: 0 and 1, or 0 and 255
            return mask_values(file).astype(np.int64) * white
        pixels = rgb_of(file, path)
    if (pixels != pixels[..., :1]).any():
        raise UserError(f"{path}: has colours; say which colour is which class: {readers.flags_for_file(path)}")
    return pixels[..., 0].astype(np.int64)


def convert_masks(args: argparse.Namespace) -> int:
    """Write class indices to OUT/NAME.png for every mask, and classes.txt and palette.txt beside OUT where they are missing.
    Returns the number of unknown values or colours; if there is one, nothing is written. Raises UserError."""
    if not args.masks.is_dir():
        raise UserError(f"--masks {args.masks}: no such folder")
    masks, others = find_masks(args.masks, {*find_images(args)}, args.suffix)
    classes = read_classes(args, next(iter(masks.values())))
    refuse_foreign_masks(args, masks)

    table = np.full(1 << 24 if classes.coloured else 1 << 16, UNKNOWN, np.uint16)
    table[list(classes.indices)] = list(classes.indices.values())
    unknown, example, pixels = collections.Counter(), {}, 0
    for path in tqdm(masks.values(), "read", disable=None):
        keys = read_keys(path, classes)
        if keys.max(initial=0) >= len(table) or keys.min(initial=0) < 0:
            raise UserError(f"{path}: holds the value {keys.max()}; masks of 16 bits at most can be converted")
        indices = table[keys]
        pixels += keys.size
        for key, count in zip(*np.unique(keys[indices == UNKNOWN], return_counts=True), strict=True):
            unknown[int(key)] += int(count)
            example.setdefault(int(key), path)
    nearest = {key: nearest_key(key, classes) for key in unknown}
    if unknown and args.unknown == "error":
        flag = "--values" if args.values else "the palette" if classes.coloured else "classes.txt"
        report_unknown(classes, unknown, nearest, example, pixels, flag)
        return len(unknown)
    for key, near in nearest.items():
        table[key] = IGNORE_INDEX if args.unknown == "ignore" else classes.indices[near]

    lines = {"classes.txt": classes.names} if args.values or classes.coloured else {}  # {}: val's labels count them
    if classes.coloured:
        lines["palette.txt"] = [" ".join(map(str, colour)) for colour in classes.palette]
    changed = f"; {sum(unknown.values())} pixels of unknown values: {args.unknown}" if unknown else ""
    notes = [f"{len(others)} file(s) belong to no image and were left out, first {printable(others[0])}"] if others else []
    write_masks(args, masks, lambda name: table[read_keys(masks[name], classes)], classes.palette, lines, notes, changed)
    return 0


def channels(key, coloured: bool) -> np.ndarray:
    key = np.asarray(key)
    return np.stack([key >> 16, key >> 8 & 255, key & 255], -1) if coloured else key[..., None]


def nearest_key(key: int, classes: Classes) -> int:
    known = np.array(list(classes.indices))
    distance = ((channels(known, classes.coloured) - channels(key, classes.coloured)) ** 2).sum(-1)
    return int(known[distance.argmin()])


def report_unknown(classes: Classes, unknown, nearest, example, pixels: int, flag: str):
    """Print the values or colours without a class, and the fix; `flag` gives the classes of the others."""
    total, kind = sum(unknown.values()), "colour" if classes.coloured else "value"
    what = f"1 {kind} belongs" if len(unknown) == 1 else f"{len(unknown)} {kind}s belong"
    print(f"{what} to no class, {total} pixels ({100 * total / pixels:.2f}%):")
    for key, count in unknown.most_common(10):
        near = nearest[key]
        index = classes.indices[near]
        name = "ignored" if index == IGNORE_INDEX else classes.names[index]
        print(
            f"    {shown(key, classes.coloured):12} {count:9} pixels, nearest {shown(near, classes.coloured)} "
            f"({printable(name)}), first in {printable(example[key])}"
        )
    if len(unknown) > 10:
        print(f"    and {len(unknown) - 10} more")
    blends = sum(count for key, count in unknown.items() if is_between(key, classes))
    if blends >= 0.8 * total and (classes.coloured or len(unknown) > 8):
        print(
            "problem: most lie between two known ones, as at anti-aliased (soft) edges; add --unknown nearest to give each "
            "the nearest class, or, with more than two classes, --unknown ignore to make the edges 255"
        )
    elif len(unknown) > 32:
        print("problem: there are many, as in a JPEG; save the masks again as PNG, or add --unknown nearest")
    else:
        print(f"problem: add what is missing to {flag}, or add --unknown ignore to make it 255, or --unknown nearest")


def is_between(key: int, classes: Classes) -> bool:
    """Whether a value or colour lies, within 3 levels, on the line between two known ones, or beyond its ends by up to an
    eighth of its length: bicubic and Lanczos filters overshoot, and what leaves 0 to 255 is cut."""
    known, x = channels(list(classes.indices), classes.coloured).astype(float), channels(key, classes.coloured).astype(float)
    a, b = known[:, None], known[None, :]
    length = ((b - a) ** 2).sum(-1)
    t = ((x - a) * (b - a)).sum(-1) / np.maximum(length, 1)
    distance = np.abs(np.clip(a + t[..., None] * (b - a), 0, 255) - x).max(-1)
    return bool(((length > 0) & (np.abs(t - 0.5) < 0.625) & (distance <= 3)).any())


# ---- what conversions of all kinds share ----


def find_images(args: argparse.Namespace) -> dict[str, pathlib.Path]:
    """{name: image} in --images, or in images/ beside OUT, or none. Raises UserError for a wrong folder of the command line."""
    source, out = args.masks.resolve(), args.out.resolve()
    if source == out or source in out.parents or out in source.parents:
        raise UserError(f"--out {args.out}: is, holds or lies in the folder of --masks, which must not change; give another")
    if args.images and not args.images.is_dir():
        raise UserError(f"--images {args.images}: no such folder")
    folder = args.images or out.parent / "images"
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {name_of(path.name): path for path in files if path.suffix.lower() in readers.SUFFIXES}


def refuse_foreign_masks(args: argparse.Namespace, names: Iterable[str]):
    """Raises UserError if the mask of one of `names` in OUT was not written by this command, or would lie outside OUT."""
    targets = [args.out / f"{name}.png" for name in names]
    refuse_links_out(args.out, targets, "--out")
    foreign = [path for path in targets if path.exists() and not is_converted(path)]
    if foreign and not args.overwrite:
        raise UserError(
            f"--out: {foreign[0]} exists and was not written by this command; give another folder, or add "
            "--overwrite to replace it"
        )


def write_masks(args, names: Collection[str], mask_of, palette, lines: dict[str, list[str]], notes: list[str], changed=""):
    """Write mask_of(name), (H, W) class indices, to OUT/NAME.png for each of `names`, and `lines` (file name -> lines) beside
    OUT where that file is missing, if OUT belongs to a data set. Then print the notes, and what to do next."""
    check_folder("--out", args.out)
    out, flat = args.out.resolve(), colour_table(palette)
    chunk = PngInfo()
    chunk.add_text("Software", WRITTEN)
    for name in tqdm(names, "write", disable=None):
        image = Image.fromarray(mask_of(name).astype(np.uint8))
        image.putpalette(flat.ravel().tolist())
        with atomic_write(args.out / f"{name}.png") as temporary:
            image.save(temporary, format="PNG", pnginfo=chunk)
    beside = (out.parent / "images").is_dir()
    for file, content in lines.items() if out.name == "masks" or beside else ():
        if content and not os.path.lexists(out.parent / file):  # a link to nothing is not followed
            with atomic_write(out.parent / file) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
            print(f"{args.out.parent / file}: {len(content)} lines")
    for note in notes:
        print(f"note: {note}")
    print(f"{args.out}: {len(names)} masks{changed}")
    if beside:
        split = not (out.parent / "train.txt").exists()
        more = "split" if split else "check --dataset folder --part 1"
        print(f"next: python prepare.py {more} --data {shlex.quote(str(args.out.parent))}")


def is_converted(path: pathlib.Path) -> bool:
    try:
        return png_text(path).get("Software") == WRITTEN
    except UserError:
        return False
