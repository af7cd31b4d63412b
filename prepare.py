"""Prepare a data set: turn masks of any form, or outlines, into class indices,
divide the images, look at them before training, or build VOC's augmented masks.

    python prepare.py masks --masks old --out data/mine/masks --values 0=0 255=1
    python prepare.py masks --masks old --out data/mine/masks --palette map.txt
    python prepare.py masks --masks labelme --out data/mine/masks
    python prepare.py masks --masks coco.json --out data/mine/masks
    python prepare.py split --data data/mine --val 0.2
    python prepare.py check --dataset folder --data data/mine --picture look.png
    python prepare.py voc --data data/voc --download

masks    writes masks of class indices from masks of colours (palette.txt,
         CVAT's labelmap.txt, CamVid's label_colors.txt) or of other values, or
         from the outlines in LabelMe's JSON files or in a JSON file of COCO.
         The input is never changed.
split    writes train.txt and val.txt for images/ and masks/.
check    opens every image and mask of the data set, and prints what is wrong.
         The exit code is 1 if anything is.
voc      builds SegmentationClassAug from VOC 2012 and SBD.
"""

import argparse
import collections
import pathlib
import re
import sys

import numpy as np
import torchvision
from PIL import Image
from tqdm import tqdm

import checks
import datasets
from common import IGNORE_INDEX, ArgumentParser, UserError, cli, printable
from convert import convert_masks
from datasets import VOC_FOLDERS, Voc, voc_root
from pictures import class_labels, save_figure
from polygons import convert_outlines, json_files
from readers import colour_table, open_mask, read_lines, voc_palette
from recipes import METHODS, add_flags
from result_files import refuse_outputs, save_png
from run_folder import atomic_write, check_folder
from splits import split_data

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


# ---- command line ----


def main():
    parser = ArgumentParser(__doc__, usage="%(prog)s {masks,split,check,voc} [options]")
    commands = parser.add_subparsers(dest="what", required=True, metavar="{masks,split,check,voc}", prog="prepare.py")
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
        help="turn masks of colours or other values, or outlines, into class indices",
    )
    converter.add_argument(
        "--masks",
        required=True,
        help="folder of the masks or of LabelMe's JSON files, or a JSON file of COCO; it is never changed",
        **folder,
    )
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
        help="values, colours and labels without a class: end with an error, become 255, or (values and colours) become the "
        "nearest class (default: error)",
    )
    converter.add_argument(
        "--images", help="folder of the images, which give the masks their names (default: images/ beside OUT)", **folder
    )
    converter.add_argument(
        "--suffix",
        metavar="ENDING",
        help="masks are called NAME + ENDING, such as _mask (default: found by the names of the images)",
    )
    converter.add_argument(
        "--classes",
        help="outlines: one class per line, in the order of the indices (default: classes.txt beside OUT, or else the "
        "background and the categories of COCO by number, or the labels of LabelMe by the alphabet)",
        **path,
    )
    converter.add_argument(
        "--background",
        metavar="CLASS",
        help="outlines: the class of the pixels outside all of them, or ignore, which stands for 255 (default: background)",
    )
    converter.add_argument(
        "--empty",
        choices=["background", "skip"],
        help="outlines: images that have none become background, or get no mask (default: background)",
    )
    splitter = commands.add_parser("split", usage="%(prog)s --data DIR [options]", help="write train.txt and val.txt")
    splitter.add_argument("--data", required=True, help="folder that holds images/ and masks/", **folder)
    splitter.add_argument(
        "--val",
        type=float,
        default=0.2,
        metavar="FRACTION",
        help="fraction of the images with masks that go into val.txt; the others, and those without masks, go into train.txt "
        "(default: 0.2)",
    )
    splitter.add_argument(
        "--by",
        choices=["name", "prefix"],
        default="name",
        help="divide single images, or keep those of one prefix, such as the frames of a video, in one list; the prefix is the "
        "name without the number at its end; images without masks whose prefix is in val.txt are left out (default: name)",
    )
    splitter.add_argument(
        "--prefix",
        metavar="REGEX",
        help="the prefix is what this regular expression, or its first group, matches at the beginning of the name; implies "
        "--by prefix (default: none)",
    )
    splitter.add_argument("--seed", type=int, default=0, help="of the random choice (default: 0)")
    for command, what in {checker: "pictures", preparer: "train_aug.txt", converter: "masks"}.items():
        command.add_argument(
            "--overwrite", action="store_true", help=f"replace {what} that this project did not write (default: off)"
        )
    splitter.add_argument("--overwrite", action="store_true", help="replace train.txt and val.txt (default: off)")
    args = parser.parse_args()
    if args.what == "check":
        sys.exit(1 if check_data(args) else 0)
    if args.what == "voc":
        prepare_voc(args.data, args.download, args.overwrite)
        return
    if args.what == "split":
        split_data(args)
        return
    if args.values and args.palette:
        raise UserError("--values and --palette: give one of the two")
    colours = (args.values or args.palette) and not args.masks.is_file()  # then a JSON file in the folder is something else
    files = [] if colours else json_files(args.masks)
    only = {"--classes": args.classes, "--background": args.background, "--empty": args.empty}  # for outlines
    if files:
        only = {"--values": args.values, "--palette": args.palette, "--suffix": args.suffix}
        only["--unknown nearest"] = args.unknown == "nearest"
    if wrong := [flag for flag, value in only.items() if value]:
        has = "JSON files of outlines" if files else "no JSON file of outlines"
        raise UserError(f"{wrong[0]}: --masks {args.masks} holds {has}; leave this flag out")
    sys.exit(1 if (convert_outlines(args, files) if files else convert_masks(args)) else 0)


if __name__ == "__main__":
    cli(main)
