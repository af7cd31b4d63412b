r"""Predict images with a checkpoint or an exported model: masks of class indices,
overlays, and a sheet to look at. No masks are needed.

    python predict.py --ckpt A/last.pt --images photos --out predictions
    python predict.py --ckpt A/last.pt --images photo.jpg --out predictions \
        --window 512 --tta-scales 0.75 1 1.25 --flip

OUT/masks/NAME.png     class indices, with the palette of the classes
OUT/overlays/NAME.png  the image, half covered by the colours of the classes
OUT/sheet.png          the first 60 overlays

--images is a folder or one image. Every file of the folder is predicted or
named, whatever its suffix; hidden files and subfolders are left out. A file
that cannot be read or predicted is named with the reason, the others are still
predicted, and the exit code is 1. With sliding windows (--window SIDE), one
scale and no --flip, large images need little memory.
"""

import os
import pathlib
import sys
import traceback
from collections import Counter

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

import readers
from common import ArgumentParser, UserError, cli, free_memory, pick_device, printable
from inference import Protocol, add_protocol_arguments, bytes_per_pixel, check_protocol_arguments, open_model, predict
from pictures import add_legend, drawable, save_figure
from result_files import refuse_foreign, refuse_links_out, save_png
from run_folder import check_folder

# A file claims to be an image by one of these suffixes or first bytes, or by a suffix of Pillow's own list, except those that
# Pillow knows but does not open as images.
NO_IMAGES = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".bufr", ".grib"}
STUBS = {"MPEG", "HDF5", "BUFR", "GRIB"}  # formats that Pillow only recognises
SUFFIXES = {".heic", ".heif", ".hif", ".avif", ".jxl", ".jxr", ".webp", ".svg", ".exr", ".hdr", ".raw", ".dng"}
SUFFIXES |= {".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".srw", ".orf", ".rw2", ".raf", ".pef", ".iiq"}
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ")
BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")  # after `ftyp`
TILES = 60  # of the sheet


def is_image(path: pathlib.Path) -> bool:
    """Whether a file is an image or claims to be one: Pillow opens it or knows its suffix, or it starts as image files do. The
    pixels are not decoded. Of an animation, the first frame is the image."""
    try:
        with Image.open(path) as file:
            return file.format not in STUBS
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            start = file.read(16)
    except Exception:  # a plugin recognised it, or it cannot be opened at all: reading it will report why
        return True
    suffix = path.suffix.lower()
    by_suffix = suffix in SUFFIXES or (suffix in Image.registered_extensions() and suffix not in NO_IMAGES)
    riff = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return by_suffix or start.startswith(MAGIC) or riff or (start[4:8] == b"ftyp" and start[8:12] in BRANDS)


def find_images(images: pathlib.Path) -> list[pathlib.Path]:
    """The images of a folder, sorted. Its other files and its subfolders are named on stderr, except hidden ones. Raises
    UserError where there is no image."""
    if images.is_file():
        return [images]
    try:
        entries = sorted(path for path in images.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        raise UserError(f"--images {printable(images)}: no such folder or image") from None
    except OSError as error:
        raise UserError(f"--images {printable(images)}: cannot be read as a folder ({error.strerror})") from None
    folders = [path for path in entries if path.is_dir()]
    # the reader reports a link to nothing; a pipe or a device is never opened
    paths = [path for path in entries if (path.is_file() and is_image(path)) or (path.is_symlink() and not path.exists())]
    others = [path for path in entries if path not in {*folders, *paths}]
    for what, rest in (("no images, left out", others), ("subfolders, not looked into", folders)):
        if rest:
            more = f" and {len(rest) - 20} more" if len(rest) > 20 else ""
            print(f"note: {images}: {what}: {', '.join(printable(path.name) for path in rest[:20])}{more}", file=sys.stderr)
    if not paths:
        raise UserError(f"--images {printable(images)}: holds no image")
    return paths


def output_names(paths: list[pathlib.Path]) -> list[str]:
    """NAME.png for each image, all different: NAME has no suffix unless another image has the same name without it."""
    stems = Counter(path.stem.casefold() for path in paths)  # some disks ignore case
    full = {path.name.casefold() for path in paths}
    return [
        f"{path.stem if stems[path.stem.casefold()] == 1 and path.stem.casefold() not in full else path.name}.png"
        for path in paths
    ]


def check_memory(path: pathlib.Path, size: tuple[int, int], classes: int, whole: float, device, protocol: Protocol):
    """Raises UserError where the prediction of an image of `size` (H, W) does not fit into the free memory. `whole` is the
    network's memory per pixel. With sliding windows, one scale and no mirroring, little grows with the image."""
    pixels = size[0] * size[1]
    probabilities = 4 * classes * pixels if protocol.flip or len(protocol.scales) > 1 else 0
    network = whole * pixels * (protocol.image_scale * max(protocol.scales)) ** 2 if protocol.window is None else 0
    free = free_memory(device)
    if network + probabilities > free:
        fix = "give --window 512" if network > probabilities else "leave out --tta-scales and --flip"
        raise UserError(
            f"{printable(path)}: needs {(network + probabilities) / 1e9:.1f} GB for {size[1]}x{size[0]} pixels "
            f"at once, but {device} has {free / 1e9:.1f} GB free; {fix}"
        )


def reason_of(error: Exception, path: pathlib.Path, protocol: Protocol) -> str:
    """One line with the reason why a file failed."""
    kind, text = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, UserError):  # names the file, or the model
        return text.split("; replace it")[0] if str(path) in text else f"{path}: {text}"
    # a CPU has no exception of its own for a lack of memory; the last is ONNX Runtime's
    signs = ("not enough memory: you tried to allocate", "DefaultCPUAllocator", "Failed to allocate memory")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in text for sign in signs):
        fix = "--window 512" if protocol.window is None else "a smaller --window, and no --tta-scales or --flip"
        return f"{path}: out of memory ({kind}); give {fix}"
    return f"{path}: {kind}: {text}" if text else f"{path}: {kind}"


def overlay(image: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """image (H, W, 3) uint8, half covered by the colours of labels (H, W). A black class, such as VOC's background, does not
    change it."""
    out = np.empty_like(image)
    for row, pixels, colours in zip(out, image, (palette[line] for line in labels), strict=True):  # rows, to save memory
        row[:] = np.where(colours.any(1, keepdims=True), (pixels.astype(np.uint16) + colours) // 2, pixels)
    return out


def tile_of(image: Image.Image, side: int = 320) -> Image.Image:
    """The image, resized for the sheet to at most `side` pixels per side."""
    scale = side / max(image.size)
    return image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)


def draw_sheet(path: pathlib.Path, tiles: list[tuple[str, Image.Image]], checkpoint: dict, shown: list[int]):
    """Write a PNG of the overlays with the names of their files, and a legend of the classes `shown`."""
    columns = min(6, len(tiles))
    rows = -(-len(tiles) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(2.2 * columns, 2 * rows), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    able = drawable([name for name, _ in tiles])
    for i, (axis, (name, tile)) in enumerate(zip(axes.flat, tiles, strict=False)):
        thin = max(tile.size) > 8 * min(tile.size)  # such as one row of pixels, which would be a hairline
        axis.imshow(tile, aspect="auto" if thin else "equal")
        axis.set_title(name if able[i] else f"image {i + 1}", fontsize=6, parse_math=False)
    add_legend(figure, checkpoint["classes"], checkpoint["palette"], shown)
    save_figure(path, figure)


def predict_files(model, checkpoint: dict, paths: list[pathlib.Path], out: pathlib.Path, device, precision, protocol) -> int:
    """Predict images into OUT/masks, OUT/overlays and OUT/sheet.png. Report files that fail on stderr; return their number."""
    palette, classes = readers.colour_table(checkpoint["palette"]), len(checkpoint["classes"])
    whole = bytes_per_pixel(model, precision) if protocol.window is None else 0.0
    tiles, failed, shown = [], 0, np.zeros(256, bool)
    for path, name in zip(tqdm(paths, "predict", disable=None), output_names(paths), strict=True):
        try:
            image = np.asarray(readers.open_image(path))
            check_memory(path, image.shape[:2], classes, whole, device, protocol)
            labels = predict(model, image, device, precision, protocol).cpu().numpy()
        except Exception as error:  # the other files can still be predicted
            if os.environ.get("MGD_DEBUG") == "1":
                traceback.print_exc()
            print(f"skipped {printable(reason_of(error, path, protocol))}", file=sys.stderr)
            failed += 1
            continue
        shown[np.unique(labels)] = True
        mask = Image.fromarray(labels)
        mask.putpalette(palette.ravel().tolist())
        save_png(out / "masks" / name, mask)
        picture = Image.fromarray(overlay(image, labels, palette))
        save_png(out / "overlays" / name, picture)
        if len(tiles) < TILES:
            tiles.append((printable(path.name), tile_of(picture)))
        del image, labels, mask, picture  # before the next is read
    if tiles:
        draw_sheet(out / "sheet.png", tiles, checkpoint, np.flatnonzero(shown[:classes]).tolist())
    done = f"{len(paths) - failed} masks and overlays" + (", sheet.png" if tiles else "")
    print(f"{printable(out)}: {done}" + (f"; {failed} file(s) skipped" if failed else ""))
    return failed


def check_outputs(paths: list[pathlib.Path], images: pathlib.Path, out: pathlib.Path, overwrite: bool):
    """Raises UserError, before any work, if OUT and its folders cannot be written to or a file would be lost."""
    folders = [out, out / "masks", out / "overlays"]
    if images.is_dir() and os.path.realpath(images) in map(os.path.realpath, folders):
        raise UserError(f"--out {printable(out)}: would write among the images of --images; give another")
    targets = [folder / name for folder in folders[1:] for name in output_names(paths)] + [out / "sheet.png"]
    if lost := {os.path.realpath(path) for path in paths} & {os.path.realpath(target) for target in targets}:
        raise UserError(f"--out {printable(out)}: would replace the image {printable(min(lost))}; give another")
    refuse_links_out(out, targets, f"--out {printable(out)}")
    refuse_foreign(targets, overwrite, f"--out {printable(out)}")
    for folder in folders:
        check_folder("--out", folder)


def parse_args(argv=None):
    parser = ArgumentParser(__doc__, usage="%(prog)s --ckpt FILE --images DIR --out DIR [options]")
    parser.add_argument(
        "--ckpt",
        type=pathlib.Path,
        metavar="FILE",
        required=True,
        help="checkpoint of train_teacher.py or distill.py, or .onnx file of export.py",
    )
    parser.add_argument("--images", type=pathlib.Path, metavar="DIR", required=True, help="folder of images, or one image")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", required=True, help="folder of the predictions")
    parser.add_argument("--overwrite", action="store_true", help="replace files that this project did not write (default: off)")
    add_protocol_arguments(parser)
    args = parser.parse_args(argv)
    check_protocol_arguments(args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("predict.py runs in one process; leave torchrun out")
    return args


def main(argv=None):
    args = parse_args(argv)
    paths = find_images(args.images)
    device = pick_device(args.device)
    checkpoint, model, precision, protocol = open_model(args.ckpt, args, device)
    check_outputs(paths, args.images, args.out, args.overwrite)
    sys.exit(1 if predict_files(model, checkpoint, paths, args.out, device, precision, protocol) else 0)


if __name__ == "__main__":
    cli(main)
