"""Turn the outlines of labeling tools, LabelMe's and COCO's JSON files, into masks of class indices (`prepare.py masks`).

A mask has the size of its image as it is shown, upright. Outlines are drawn by Pillow, as LabelMe's own converter does: pixels
on the border of a polygon belong to it. What reaches beyond the image is cut off.
"""

import argparse
import base64
import collections
import contextlib
import io
import json
import math
import pathlib
import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from common import IGNORE_INDEX, UserError, printable
from convert import BROKEN, find_images, refuse_foreign_masks, write_masks
from readers import (
    MAX_PIXELS,
    SWAPS_SIDES,
    name_of,
    opened,
    read_lines,
    read_text,
    turn_of,
    upright_size,
    voc_palette,
    why_refused,
)

IGNORED = ("ignore", "__ignore__")  # labels that become 255; the second is LabelMe's
FARTHEST = 2**20  # coordinates beyond are moved to this one, since Pillow's are 32-bit integers


class Shape(NamedTuple):
    """One outlined object."""

    label: str
    paint: Callable[[Image.Image, int], None]  # paint(mask, class index)
    area: float  # in pixels; 0 where the order of drawing is that of the file
    box: tuple[float, float, float, float]  # left, top, right, bottom


class Annotated(NamedTuple):
    """What one image's outlines are in a file."""

    source: pathlib.Path
    size: tuple[int, int] | None  # (width, height) that the file states
    shapes: list[Shape]  # in the order of drawing: later ones cover earlier ones


# ---- shapes ----


def polygons(label: str, rings: list[np.ndarray]) -> Shape:
    """The union of the insides of `rings`, each (K, 2) floats x, y."""
    for ring in rings:
        if not np.isfinite(ring).all():
            raise ValueError("a coordinate that is not finite")
    twice = [np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)) for x, y in (ring.T for ring in rings)]
    points = np.concatenate(rings)

    def paint(mask: Image.Image, index: int):
        for ring in rings:
            ImageDraw.Draw(mask).polygon(ring.clip(-FARTHEST, FARTHEST).ravel().tolist(), fill=index)

    return Shape(label, paint, sum(map(abs, twice)) / 2, (*points.min(0), *points.max(0)))


def circle(label: str, centre: np.ndarray, border: np.ndarray) -> Shape:
    """A disk around `centre` with the point `border`, both (2,), on its border."""
    radius = math.dist(centre, border)
    box = (*(centre - radius), *(centre + radius))
    if not np.isfinite(box).all():
        raise ValueError("a coordinate that is not finite")

    def paint(mask: Image.Image, index: int):
        ImageDraw.Draw(mask).ellipse(np.clip(box, -FARTHEST, FARTHEST).tolist(), fill=index)

    return Shape(label, paint, math.pi * radius**2, box)


def bitmap(label: str, pixels: np.ndarray, left: int, top: int) -> Shape:
    """The pixels (h, w) bool that are true, where the first one lies at `left`, `top`."""

    def paint(mask: Image.Image, index: int):
        mask.paste(index, (left, top), Image.fromarray(pixels))

    height, width = pixels.shape
    return Shape(label, paint, int(pixels.sum()), (left, top, left + width, top + height))


def runs(label: str, counts: list[int], size: tuple[int, int]) -> Shape:
    """COCO's run-length encoding of an image of `size` (width, height): the runs go down its columns, outside first."""
    width, height = size
    if min(counts) < 0 or sum(counts) != height * width:
        raise ValueError(f"runs of {sum(counts)} pixels for {width}x{height}")

    def paint(mask: Image.Image, index: int):
        inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
        mask.paste(index, (0, 0), Image.fromarray(np.ascontiguousarray(inside)))

    return Shape(label, paint, sum(counts[1::2]), (0, 0, width, height))


def run_lengths(text: str) -> list[int]:
    """COCO's compressed run lengths as numbers.

    A number is written in pieces of 5 bits, the lowest first, each as the character 48 + piece; 32 is added to all pieces but
    the last, and the highest bit of the last one is the sign. From the fourth on, a number is the difference to the one two
    before it.
    """
    counts, value, shift = [], 0, 0
    for piece in (ord(character) - 48 for character in text):
        value |= (piece & 31) << shift
        shift += 5
        if piece & 32:
            continue
        if piece & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value, shift = 0, 0
    return counts


def clean(label) -> str:
    """A label as the name of a class; LabelMe's own name of the background becomes the usual one."""
    text = unicodedata.normalize("NFC", label).strip()
    if not text or len(text.splitlines()) > 1:
        raise ValueError(f"a label {label!r}")
    return "background" if text == "_background_" else text


# ---- files ----


@contextlib.contextmanager
def reading(path: pathlib.Path, problem: str, fix: str):
    """While a part of a file is read, any exception becomes a UserError of one line with the file's name: what an export holds
    in place of a number or a list can raise almost anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
        raise UserError(f"{path}: {problem} ({reason}); {fix}") from error


def json_files(source: pathlib.Path) -> list[pathlib.Path]:
    """The JSON files that `--masks` gives: a file, or those of a folder and its subfolders."""
    if source.is_file():
        return [source]
    return sorted(path for path in source.rglob("*") if path.suffix.lower() == ".json" and not path.name.startswith("."))


def read_files(paths: list[pathlib.Path], left_out: dict) -> tuple[dict[str, Annotated], list[str] | None]:
    """{image name: its outlines} of one file of COCO or of any number of LabelMe's, and COCO's categories (None of LabelMe).
    `left_out` gets, for each reason, the files of the shapes without an area. Raises UserError."""
    found, where = {}, {}
    for path in tqdm(paths, "read", disable=None):
        with reading(path, "cannot be read as JSON", "export it again, or remove it"):
            content = json.loads(read_text(path))
        keys = content.keys() if isinstance(content, dict) else set()
        if {"images", "annotations", "categories"} <= keys:
            if len(paths) > 1:
                raise UserError(
                    f"{path}: is one of {len(paths)} JSON files, and all of COCO must be in one; give it as --masks"
                )
            return read_coco(path, content, left_out)
        if "shapes" not in keys:
            raise UserError(
                f"{path}: holds neither the shapes of LabelMe nor the images, annotations and categories of COCO; export it in "
                "one of the two forms, or, if the masks are images, move it out of their folder"
            )
        name = name_of(path.stem)
        if name in found:
            raise UserError(f"{path}: has the name of {where[name]}; keep one of the two, or rename one and its image")
        found[name], where[name] = read_labelme(path, content, left_out), path
    return found, None


def read_labelme(path: pathlib.Path, content: dict, left_out: dict) -> Annotated:
    """The outlines of a file of LabelMe, in its order. Raises UserError."""
    shapes = []
    with reading(path, "holds a shape that cannot be read", "fix it in LabelMe"):
        size = content.get("imageWidth"), content.get("imageHeight")
        for shape in content["shapes"]:
            label, kind = clean(shape["label"]), shape.get("shape_type") or "polygon"
            points = np.array(shape["points"], float).reshape(-1, 2)
            if kind == "polygon" and len(points) > 2:
                shapes.append(polygons(label, [points]))
            elif kind == "rectangle" and len(points) == 2:
                (left, top), (right, bottom) = points
                shapes.append(polygons(label, [np.array([(left, top), (right, top), (right, bottom), (left, bottom)])]))
            elif kind in ("rectangle", "rotation", "oriented_rectangle") and len(points) == 4:
                shapes.append(polygons(label, [points]))
            elif kind == "circle" and len(points) == 2:
                shapes.append(circle(label, *points))
            elif kind == "mask" and len(points) == 2:
                with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as file:
                    if reason := why_refused(file):
                        raise ValueError(f"a mask that {reason}")
                    shapes.append(bitmap(label, np.array(file.convert("L")) > 0, *map(int, points[0])))
            else:
                what = f"a {kind} of {len(points)} points" if kind in ("polygon", "rectangle", "circle") else f"a {kind}"
                left_out[what].append(path)
        return Annotated(path, checked_size(size), shapes)


def checked_size(size) -> tuple[int, int] | None:
    if None in size:
        return None
    if not all(type(side) is int and side > 0 for side in size) or size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"an image size of {size[0]}x{size[1]}")
    return tuple(size)


def read_coco(path: pathlib.Path, content: dict, left_out: dict) -> tuple[dict[str, Annotated], list[str]]:
    """The outlines of a file of COCO, the larger ones first, and the categories in the order of their numbers. Raises
    UserError."""
    with reading(path, "holds an image or category that cannot be read", "export it again"):
        categories = {entry["id"]: clean(entry["name"]) for entry in sorted(content["categories"], key=lambda e: e["id"])}
        images, found, files = {}, {}, {}
        for entry in content["images"]:
            file = entry["file_name"]
            if re.match(r"[/\\]|[A-Za-z]:", file) or ".." in re.split(r"[/\\]", file):
                raise UserError(f"{path}: the image '{file}' lies outside the folder of the images; write its path within")
            name = name_of(file)
            if name in found or entry["id"] in images:
                other = files.get(name, images.get(entry["id"]))
                raise UserError(f"{path}: '{file}' and '{other}' have one name or number; give each image a name of its own")
            images[entry["id"]], files[name] = name, file
            found[name] = Annotated(path, checked_size((entry.get("width"), entry.get("height"))), [])
        annotations = list(content["annotations"])
    if len(categories) < len(content["categories"]):
        raise UserError(f"{path}: two categories have one number; give each a number of its own")
    for entry in annotations:
        with reading(
            path, f"annotation {entry.get('id') if isinstance(entry, dict) else entry} cannot be read", "export it again"
        ):
            for key, known in (("image_id", images), ("category_id", categories)):
                if entry[key] not in known:
                    raise ValueError(f"there is no {key} {entry[key]}")
            name, label, outline = images[entry["image_id"]], categories[entry["category_id"]], entry.get("segmentation")
            if isinstance(outline, dict):
                counts, size = outline["counts"], checked_size(outline["size"][::-1])
                if found[name].size not in (None, size):
                    raise ValueError(f"runs for {size[0]}x{size[1]} pixels")
                found[name] = found[name]._replace(size=size)
                found[name].shapes.append(runs(label, counts if isinstance(counts, list) else run_lengths(counts), size))
                continue
            if outline and not isinstance(outline[0], list):
                outline = [outline]
            rings = [np.array(ring, float).reshape(-1, 2) for ring in outline or []]
            if any(len(ring) > 2 for ring in rings):
                found[name].shapes.append(polygons(label, [ring for ring in rings if len(ring) > 2]))
            else:
                left_out["a polygon of fewer than 3 points" if rings else "a box without an outline"].append(path)
    for annotated in found.values():
        annotated.shapes.sort(key=lambda shape: -shape.area)
    return found, list(dict.fromkeys(categories.values()))


# ---- classes ----


def class_names(args: argparse.Namespace, labels: list[str], categories: list[str] | None) -> list[str]:
    """The classes in their order: the lines of --classes or of classes.txt beside OUT, or else the background and then COCO's
    categories by number or LabelMe's labels by the alphabet. Raises UserError."""
    beside = args.out.resolve().parent / "classes.txt"
    path = args.classes or (beside if beside.exists() else None)
    if path is not None:
        names = read_lines(path, "class")  # all of them, ignored or not: they keep their indices
        if args.classes:  # as LabelMe has it, with __ignore__ and _background_
            names = [name for name in dict.fromkeys(map(clean, names)) if name not in IGNORED]
        if args.classes and beside.exists() and names != read_lines(beside):
            raise UserError(f"--classes {args.classes}: differs from {beside}; remove one of the two")
        if args.background != "ignore" and args.background not in names:
            raise UserError(
                f"{path}: names no class '{args.background}' for the pixels outside all outlines; add it there, or pass "
                "--background CLASS, or --background ignore to make them 255"
            )
    else:
        spellings = collections.defaultdict(set)
        for label in [args.background, *(categories or []), *labels]:
            spellings[label.casefold()].add(label)
        for same in spellings.values():
            if len(same) > 1:
                raise UserError(
                    f"{args.masks}: the labels {' and '.join(map(repr, sorted(same)))} differ in capital letters alone; name "
                    "the classes in a file for --classes, one per line, and either spelling will do"
                )
        names = [] if args.background == "ignore" else [args.background]
        names += [name for name in categories or sorted(labels) if name not in {*names, *IGNORED, *args.ignore}]
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise UserError(f"{path or args.masks}: holds {len(names)} class(es) ({', '.join(names[:9])}); 2 to 255 are needed")
    return names


def class_indices(args: argparse.Namespace, labels: list[str], names: list[str]) -> dict[str, int]:
    """{label: class index or 255}; UserError for an --ignore that is no label. Labels of no class are left out. Capital letters
    matter only where they distinguish two classes."""
    absent = set(args.ignore) - {*labels, *names}
    if absent:
        raise UserError(f"--ignore {min(absent)}: no such label; there are {', '.join(sorted(labels))}")
    indices = dict.fromkeys([*IGNORED, *args.ignore], IGNORE_INDEX)
    folded = collections.Counter(name.casefold() for name in names)
    loose = {name.casefold(): i for i, name in enumerate(names) if folded[name.casefold()] == 1}
    exact = {name: i for i, name in enumerate(names)}
    for label in labels:
        index = exact.get(label, loose.get(label.casefold()))
        if label not in indices and index is not None:
            indices[label] = index
    return indices


# ---- masks ----


def image_turn(name: str, annotated: Annotated, images: dict[str, pathlib.Path]):
    """(size, turn): the (width, height) that the outlines of an image belong to, and how a mask of that size is turned upright,
    or None.

    They belong to the image as it is shown, unless the file states the size of the image as it is stored. Raises UserError
    where no size is known, or that of the file is neither.
    """
    stated = annotated.size
    if name not in images:
        if stated is None:
            raise UserError(f"{annotated.source}: states no size of the image '{name}'; give the folder of it with --images")
        return stated, None
    size = upright_size(images[name])
    if stated in (None, size):
        return size, None
    with opened(images[name], *BROKEN) as file:
        stored, turn = file.size, turn_of(file)
    if stated == stored and turn in SWAPS_SIDES:
        inside = all(shape.box[2] <= stored[0] + 2 and shape.box[3] <= stored[1] + 2 for shape in annotated.shapes)
        if inside:
            return stored, turn
    raise UserError(
        f"{annotated.source}: states {stated[0]}x{stated[1]} pixels for '{name}', but {images[name]} has {size[0]}x{size[1]}"
        f"{' when its EXIF orientation is applied' if turn else ''}; export outlines of these images"
    )


def convert_outlines(args: argparse.Namespace, files: list[pathlib.Path]) -> int:
    """Draw the outlines in `files` and write class indices to OUT/NAME.png, and classes.txt beside OUT where it is missing.
    Returns the number of labels that are no class; if there is one, nothing is written. Raises UserError."""
    args.background = clean(args.background or "background")
    images = find_images(args)
    left_out = collections.defaultdict(list)
    found, categories = read_files(files, left_out)
    absent = [name for name in found if images and name not in images]
    found = {name: annotated for name, annotated in found.items() if name not in set(absent)}
    shapes = [(shape.label, annotated.source) for annotated in found.values() for shape in annotated.shapes]
    if not shapes:
        raise UserError(
            f"--masks {args.masks}: holds no outline of an image"
            + (f"; its first image is '{absent[0]}', but --images has no such one" if absent else "")
            + (f"; it has {len(next(iter(left_out.values())))} times {next(iter(left_out))}" if left_out else "")
        )
    labels = list(dict.fromkeys(label for label, _ in shapes))
    names = class_names(args, labels, categories)
    indices = class_indices(args, labels, names)
    unknown = [label for label in labels if label not in indices]
    if unknown and args.unknown == "error":
        report_labels(unknown, shapes, args.classes or args.out.parent / "classes.txt")
        return len(unknown)
    background = IGNORE_INDEX if args.background == "ignore" else names.index(args.background)
    empty = [name for name, annotated in found.items() if not annotated.shapes]
    skip = args.background == "ignore" or args.empty == "skip"
    if skip:
        found = {name: annotated for name, annotated in found.items() if annotated.shapes}
        stale = [path for path in (args.out / f"{name}.png" for name in empty) if path.exists()]
        if stale:
            raise UserError(f"{stale[0]}: is a mask of an image that has no outline now; remove it, or give another --out")
    refuse_foreign_masks(args, found)
    turns = {name: image_turn(name, annotated, images) for name, annotated in found.items()}

    def mask_of(name):
        size, turn = turns[name]
        mask = Image.new("L", size, background)
        for shape in found[name].shapes:
            shape.paint(mask, indices.get(shape.label, IGNORE_INDEX))
        return np.array(mask if turn is None else mask.transpose(turn))

    notes = [f"{len(where)} times {what}, left out, first in {printable(where[0])}" for what, where in left_out.items()]
    turned = [name for name, (_, turn) in turns.items() if turn is not None]
    if turned:
        notes.append(
            f"{len(turned)} mask(s) turned as the EXIF orientation of the image says, first '{turned[0]}'; look at them"
        )
    if absent:
        notes.append(f"{len(absent)} image(s) are not in the folder of the images and were left out, first '{absent[0]}'")
    if empty and skip:
        notes.append(f"{len(empty)} image(s) without an outline get no mask, first '{empty[0]}'")
    elif empty:
        notes.append(
            f"{len(empty)} image(s) without an outline are all {args.background}, first '{empty[0]}'; add --empty skip if "
            "nobody has labeled them yet"
        )
    changed = f"; outlines of unknown labels became 255: {', '.join(unknown)}" if unknown else ""
    write_masks(args, found, mask_of, voc_palette(len(names)), {"classes.txt": names}, notes, changed)
    return 0


def report_labels(unknown: list[str], shapes: list[tuple[str, pathlib.Path]], path: pathlib.Path):
    """Print the labels without a class, and the fix."""
    print(f"{len(unknown)} label(s) are no class of {printable(path)}:")
    for label in unknown[:10]:
        sources = [source for other, source in shapes if other == label]
        print(f"    {printable(label):24} {len(sources)} outline(s), first in {printable(sources[0])}")
    if len(unknown) > 10:
        print(f"    and {len(unknown) - 10} more")
    print(
        f"problem: add what is missing to {printable(path)}, or add --ignore LABEL, or --unknown ignore to make all of them 255"
    )
