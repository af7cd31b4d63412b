"""Prepare a data set: look at it before training, build VOC's augmented masks, or
turn masks of any form into class indices.

    python prepare.py check --dataset folder --data data/mine --picture look.png
    python prepare.py voc --data data/voc --download
    python prepare.py masks --masks old --out data/mine/masks --values 0=0 255=1
    python prepare.py masks --masks old --out data/mine/masks --palette map.txt

check    opens every image and mask of the data set, and prints what is wrong.
         The exit code is 1 if anything is.
voc      builds SegmentationClassAug from VOC 2012 and SBD.
masks    writes masks of class indices from masks of colours (palette.txt,
         CVAT's labelmap.txt, CamVid's label_colors.txt) or of other values.
         Their names may end in _mask, _L, ... The input is never changed.
"""

import argparse
import collections
import pathlib
import re
import shlex
import sys
import unicodedata
from typing import NamedTuple

import numpy as np
import torchvision
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import checks
import datasets
import readers
from common import IGNORE_INDEX, ArgumentParser, UserError, cli, printable
from datasets import VOC_FOLDERS, Voc, voc_root
from pictures import class_labels, save_figure
from readers import VOC_BORDER, colour_table, mask_values, name_of, open_mask, opened, read_lines, upright, voc_palette
from recipes import METHODS, add_flags
from result_files import png_text, refuse_outputs, save_png
from run_folder import atomic_write, check_folder

# ---- check ----


def check_data(args: argparse.Namespace) -> int:
    """Look at every file, and print what the data set holds and what is wrong. Returns the number of problems."""
    pictures = (("--picture", args.picture), ("--chart", args.chart))
    for flag, path in pictures:
        if path and path.suffix.lower() != ".png":
            raise UserError(f"{flag} {path}: give a file name that ends in .png")
    refuse_outputs(pictures, [], args.overwrite)
    dataset = datasets.open_dataset(args.dataset, args.data, args.cache)
    part = datasets.partition_of(dataset, args)
    groups = {"labeled": part.labeled, "unlabeled": part.unlabeled, "val": dataset.val}
    look = checks.look_at(dataset, groups, whole=True)
    problems = [*look.problems.values(), *checks.faults(dataset, look)]
    if dataset.missing():
        problems.append(dataset.missing())

    print(
        f"{dataset.name}, partition {part.name} ({part.hash}): {len(part.labeled)} labeled, {len(part.unlabeled)} unlabeled, "
        f"{len(dataset.val)} val images"
    )
    sizes = ", ".join(f"{w}x{h} ({n} images)" for (h, w), n in look.sizes.most_common(3))
    print(f"image sizes: {sizes}" + (f" and {len(look.sizes) - 3} more" if len(look.sizes) > 3 else ""))
    percent = {group: 100 * pixels / max(1, pixels.sum()) for group, pixels in look.pixels.items()}
    print(f"{'':25} {'labeled images':^20} {'val images':^20}")
    print(f"{'':4} {'class':20} {'% of pixels':>12} {'images':>7} {'% of pixels':>12} {'images':>7}")
    classes = [(i, name) for i, name in enumerate(dataset.classes) if dataset.named or sum(look.images.values())[i]]
    for index, label in [*classes, (IGNORE_INDEX, "(ignored)")]:
        cells = [f"{percent[group][index]:12.2f} {look.images[group][index]:7d}" for group in ("labeled", "val")]
        print(f"{index:4d} {printable(label):20} {' '.join(cells)}")
    for group, images in look.images.items():
        never = [printable(label) for index, label in classes if not images[index]]
        if never and images.any():  # otherwise no mask could be read
            more = f" and {len(never) - 20} more" if len(never) > 20 else ""
            print(f"warning: no {group} image shows {', '.join(never[:20])}{more}")
    if not part.unlabeled:
        print("warning: no image is unlabeled, and MGD needs some: list them in unlabeled.txt, or train with make sup")
    without = sorted(dataset.masks.keys() - dataset.images.keys()) if dataset.masks else []
    if without:
        files = ", ".join(printable(dataset.masks[name]) for name in without[:10])
        print(f"warning: {len(without)} mask(s) have no image: {files}" + (", ..." if len(without) > 10 else ""))
    if args.picture:
        save_picture(args.picture, dataset, [name for name in part.labeled if name not in look.problems][:8])
        print(f"picture: {args.picture}")
    if args.chart:
        save_chart(args.chart, dataset, percent)
        print(f"chart: {args.chart}")
    alike = collections.defaultdict(list)  # what comes before the fix, without file and numbers
    for problem in problems:
        alike[re.sub(r"\d+", "", problem.partition(": ")[2].partition(";")[0])].append(problem)
    for first, *more in alike.values():
        print(f"problem: {printable(first)}" + (f"\n    and {len(more)} more with the same problem" if more else ""))
    print(f"{len(problems)} problem(s)" if problems else "no problem found")
    return len(problems)


def save_picture(path: pathlib.Path, dataset, names: list[str]):
    """Write a sheet of images, each above its mask and within 240x240 pixels."""
    colours, side = colour_table(dataset.palette), 240
    columns = []
    for name in names:
        image, mask = Image.fromarray(np.array(dataset.image(name))), Image.fromarray(colours[dataset.mask(name)])
        size = [max(1, round(each * side / max(image.size))) for each in image.size]
        columns.append((image.resize(size), mask.resize(size, Image.Resampling.NEAREST)))
    height = max([image.height for image, _ in columns], default=1)
    sheet = Image.new("RGB", (side * max(1, len(columns)), 2 * height), "white")
    for i, (image, mask) in enumerate(columns):
        sheet.paste(image, (side * i, 0))
        sheet.paste(mask, (side * i, height))
    save_png(path, sheet)


def save_chart(path: pathlib.Path, dataset, percent: dict[str, np.ndarray]):
    """Write a bar chart: the percentage of pixels of each class, in the labeled and the val masks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    n = len(dataset.classes)
    figure, axis = plt.subplots(figsize=(6, 1 + 0.28 * n), layout="constrained")
    for offset, (group, values) in zip((-0.2, 0.2), percent.items(), strict=True):
        axis.barh(np.arange(n) + offset, np.maximum(values[:n], 1e-3), 0.38, label=group)
    axis.set_yticks(range(n), class_labels(dataset.classes), fontsize=8, parse_math=False)
    axis.set_xscale("log")
    axis.set_xlabel("% of pixels")
    axis.invert_yaxis()
    axis.legend(frameon=False)
    save_figure(path, figure)


# ---- voc ----


def prepare_voc(data: pathlib.Path, download: bool, overwrite: bool):
    """Write SegmentationClassAug and ImageSets/Segmentation/train_aug.txt: the masks and names of VOC's train, and of the SBD
    images outside VOC's val. Existing masks are kept. Raises UserError.

    SBD is searched in `data` as benchmark_RELEASE/dataset, sbd or dataset. `download` fetches missing files.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError("voc: reads SBD's .mat files with scipy; pip install scipy") from None
    folders = [data / "benchmark_RELEASE" / "dataset", data / "sbd", data / "dataset"]
    if download:
        try:
            if not any((data / folder / "JPEGImages").is_dir() for folder in VOC_FOLDERS):
                torchvision.datasets.VOCSegmentation(data, year="2012", image_set="trainval", download=True)
            if not any((folder / "cls").is_dir() for folder in folders):
                torchvision.datasets.SBDataset(data / "sbd", download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--download: failed ({error}); download VOCtrainval_11-May-2012.tar and benchmark.tgz "
                f"yourself and unpack them in {data}"
            ) from None
    root = voc_root(data)
    sbd = next((folder for folder in folders if (folder / "cls").is_dir()), None)
    if sbd is None:
        raise UserError(
            f"{data}: holds no SBD (no cls/ in {', '.join(f.name for f in folders)}); unpack benchmark.tgz "
            "there, or add --download"
        )
    lists = root / "ImageSets" / "Segmentation"
    own, held_out = read_lines(lists / "train.txt"), set(read_lines(lists / "val.txt"))
    target = root / "SegmentationClassAug"
    check_folder("--data", target)
    sources = {path.stem: path for path in sorted((sbd / "cls").glob("*.mat"))}
    sources |= {name: root / "SegmentationClass" / f"{name}.png" for name in own}
    names = sorted(sources.keys() - held_out)
    listed = lists / "train_aug.txt"
    if listed.exists() and read_lines(listed) != names and not overwrite:
        raise UserError(
            f"{listed}: does not list the images of VOC's train and SBD; add --overwrite to replace it, or keep "
            "the list and the masks"
        )
    flat = [channel for colour in voc_palette(256) for channel in colour]
    for name in tqdm(names, desc=target.name, disable=None):
        source, path = sources[name], target / f"{name}.png"
        if path.exists():
            continue
        if source.suffix == ".mat":
            try:
                mask = loadmat(source)["GTcls"]["Segmentation"][0, 0]
            except Exception as error:  # scipy raises its own and many others on damaged files
                raise UserError(f"{source}: cannot be read as a mask of SBD ({error}); unpack benchmark.tgz again") from None
        else:
            mask = open_mask(source)
        image = Image.fromarray(mask.astype(np.uint8))
        image.putpalette(flat)
        with atomic_write(path) as temporary:
            image.save(temporary, format="PNG")
    with atomic_write(listed) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in names))
    print(f"{target}: {len(names)} masks; names in {listed}")
    missing = Voc(data).missing()
    print(f"note: {missing}" if missing else "10,582 training and 1,449 val images, as in the paper")


# ---- masks ----

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
            f"--ignore '{absent[0]}'"
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
                f"with --suffix '{stem.removeprefix(name)}'"
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
    source, out = args.masks.resolve(), args.out.resolve()
    if source == out or source in out.parents or out in source.parents:
        raise UserError(f"--out {args.out}: is, holds or lies in the folder of --masks, which must not change; give another")
    beside = out.parent / "images"
    if args.images and not args.images.is_dir():
        raise UserError(f"--images {args.images}: no such folder")
    folder = args.images or (beside if beside.is_dir() else None)
    images = {name_of(path.name) for path in folder.iterdir() if path.suffix.lower() in readers.SUFFIXES} if folder else set()
    masks, others = find_masks(args.masks, images, args.suffix)
    classes = read_classes(args, next(iter(masks.values())))
    foreign = [path for path in (args.out / f"{name}.png" for name in masks) if path.exists() and not is_converted(path)]
    if foreign and not args.overwrite:
        raise UserError(
            f"--out: {foreign[0]} exists and was not written by this command; give another folder, or add "
            "--overwrite to replace it"
        )

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

    check_folder("--out", args.out)
    flat = colour_table(classes.palette)
    chunk = PngInfo()
    chunk.add_text("Software", WRITTEN)
    for name, path in tqdm(masks.items(), "write", disable=None):
        image = Image.fromarray(table[read_keys(path, classes)].astype(np.uint8))
        image.putpalette(flat.ravel().tolist())
        with atomic_write(args.out / f"{name}.png") as temporary:
            image.save(temporary, format="PNG", pnginfo=chunk)
    if out.name == "masks" or beside.is_dir():
        lines = {"classes.txt": classes.names} if args.values or classes.coloured else {}  # {}: val's labels count them
        if classes.coloured:
            lines["palette.txt"] = [" ".join(map(str, colour)) for colour in classes.palette]
        for file, content in lines.items():
            if content and not (out.parent / file).exists():
                with atomic_write(out.parent / file) as temporary:
                    temporary.write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
                print(f"{args.out.parent / file}: {len(content)} lines")
    if others:
        print(f"note: {len(others)} file(s) belong to no image and were left out, first {printable(others[0])}")
    changed = f"; {sum(unknown.values())} pixels of unknown values: {args.unknown}" if unknown else ""
    print(f"{args.out}: {len(masks)} masks{changed}")
    if beside.is_dir():
        print(f"next: python prepare.py check --dataset folder --data {shlex.quote(str(args.out.parent))} --part 1")
    return 0


def is_converted(path: pathlib.Path) -> bool:
    try:
        return png_text(path).get("Software") == WRITTEN
    except UserError:
        return False


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


# ---- command line ----


def main():
    parser = ArgumentParser(__doc__, usage="%(prog)s {check,voc,masks} [options]")
    commands = parser.add_subparsers(dest="what", required=True, metavar="{check,voc,masks}", prog="prepare.py")
    path, folder = ({"type": pathlib.Path, "metavar": name} for name in ("FILE", "DIR"))
    checker = commands.add_parser(
        "check", usage="%(prog)s --dataset folder --data DIR [options]", help="look at every file of a data set before training"
    )
    add_flags(checker, METHODS, groups=("data",))
    checker.add_argument("--picture", help="write a PNG of eight labeled images and their masks (default: none)", **path)
    checker.add_argument("--chart", help="write a PNG of each class's percentage of the pixels (default: none)", **path)
    preparer = commands.add_parser("voc", usage="%(prog)s --data DIR [options]", help="build VOC's augmented masks from SBD")
    preparer.add_argument("--data", required=True, help="folder that holds VOCdevkit and SBD", **folder)
    preparer.add_argument("--download", action="store_true", help="download what is missing (default: off)")
    converter = commands.add_parser(
        "masks",
        usage="%(prog)s --masks DIR --out DIR [options]",
        help="turn masks of colours or other values into class indices",
    )
    converter.add_argument("--masks", required=True, help="folder of the masks; it is never changed", **folder)
    converter.add_argument("--out", required=True, help="folder for the new masks, such as data/mine/masks", **folder)
    converter.add_argument(
        "--values",
        nargs="+",
        metavar="VALUE=NAME",
        help="the class of each value (0=0 255=1) or colour (128,0,0=1): an index, a name, or ignore, which stands for 255 "
        "(default: values are indices)",
    )
    converter.add_argument(
        "--palette",
        metavar="FILE",
        help="colours of the classes: palette.txt, labelmap.txt of CVAT, label_colors.txt of CamVid, voc or cityscapes "
        "(default: palette.txt beside OUT, or labelmap.txt beside the masks)",
    )
    converter.add_argument("--ignore", nargs="+", default=[], metavar="CLASS", help="classes that become 255 (default: none)")
    converter.add_argument(
        "--unknown",
        choices=["error", "ignore", "nearest"],
        default="error",
        help="values and colours without a class: end with an error, become 255, or become the nearest class (default: error)",
    )
    converter.add_argument(
        "--images", help="folder of the images, which give the masks their names (default: images/ beside OUT)", **folder
    )
    converter.add_argument(
        "--suffix",
        metavar="ENDING",
        help="masks are called NAME + ENDING, such as _mask (default: found by the names of the images)",
    )
    for command, what in {checker: "pictures", preparer: "train_aug.txt", converter: "masks"}.items():
        command.add_argument(
            "--overwrite", action="store_true", help=f"replace {what} that this project did not write (default: off)"
        )
    args = parser.parse_args()
    if args.what == "check":
        sys.exit(1 if check_data(args) else 0)
    if args.what == "voc":
        prepare_voc(args.data, args.download, args.overwrite)
        return
    if args.values and args.palette:
        raise UserError("--values and --palette: give one of the two")
    sys.exit(1 if convert_masks(args) else 0)


if __name__ == "__main__":
    cli(main)
