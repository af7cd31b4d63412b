"""Read images, masks, lists, palettes and files of tensors of many forms, or raise a UserError of one line with the reason.

Files come from others and may lie or be made to harm: docs/reliability.md states the rules.
"""

import contextlib
import errno
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import shlex
import stat
import struct
import unicodedata
import warnings
import zipfile
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from common import IGNORE_INDEX, UserError

SUFFIXES = (".jpg", ".jpeg", ".png")
VOC_BORDER = (224, 224, 192)  # VOC's colour of 255
MOST_UNNAMED = 32  # labels without classes.txt; more are probably levels of grey
MAX_PIXELS = 2**28  # of one image, 16384x16384; a small file can claim to be much larger and fill the memory
MAX_TEXT = 2**27  # bytes of one list or JSON file
MAX_VALUES = 10**7  # in one file of tensors; a checkpoint names all images of its partition
MAX_DEPTH = 32  # of its lists and dictionaries, one in the other
MAX_VIEW = 2**28  # bytes of a tensor that repeats fewer stored ones, as one number for all
RUNS_PROGRAMS = ("EPS", "WMF")  # formats that Pillow has another program draw
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which warns from 89 million pixels on

# ---- any file ----


def refuse_special(path):
    """Raises UserError for a pipe or a device, which a reader could wait for without end."""
    with contextlib.suppress(OSError, ValueError):  # what is absent, the reader reports
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{path}: is a pipe or a device, which may never end; give a file")


def read_text(path: pathlib.Path) -> str:
    """A file in UTF-8, with or without a byte order mark, which some editors write. Raises OSError, UnicodeDecodeError, or
    UserError for a pipe and for more than MAX_TEXT bytes."""
    refuse_special(path)
    if os.path.getsize(path) > MAX_TEXT:
        raise UserError(f"{path}: has {os.path.getsize(path):,} bytes, more than the {MAX_TEXT:,} of a text file; split it")
    return path.read_text(encoding="utf-8-sig")


def read_json(path: pathlib.Path, fix: str):
    """The content of a JSON file. Raises UserError, which ends with `fix`."""
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:  # the last: too many brackets
        raise UserError(f"{path}: cannot be read as JSON ({getattr(error, 'strerror', error)}); {fix}") from None


# ---- names and lists ----


def name_of(text: str) -> str:
    """The image's name in a file name or path: without folders, suffix and the endings of Cityscapes, in Unicode's NFC, since
    zip files from macOS have accents as separate characters (NFD)."""
    text = unicodedata.normalize("NFC", text).replace("\\", "/").rsplit("/", 1)[-1]
    text = re.sub(r"\.(jpe?g|png)$", "", text, flags=re.IGNORECASE)
    return re.sub(r"_leftImg8bit$|_gtFine(_label(Train)?Ids)?$", "", text)


def by_name(paths: Iterable[pathlib.Path]) -> dict[str, pathlib.Path]:
    """{name: path}, sorted; hidden files, such as the ._NAME.png of macOS, are left out. Raises UserError where two files have
    one name."""
    files = {}
    for path in sorted(path for path in paths if not path.name.startswith(".")):
        other = files.setdefault(name_of(path.name), path)
        if other is not path:
            alike = unicodedata.normalize("NFC", path.name) == unicodedata.normalize("NFC", other.name)
            forms = ", with accents in another Unicode form" if alike else ""
            raise UserError(f"{path}: has the name of {other.name}, beside it{forms}; rename or remove one of them")
    return files


def read_lines(path: pathlib.Path, what: str = "name") -> list[str]:
    """The lines of a text file that are not empty, stripped, in Unicode's NFC; each is a `what`. Raises UserError."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; write one {what} per line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save it as such") from None
    return [line.strip() for line in unicodedata.normalize("NFC", text).splitlines() if line.strip()]


def read_names(path: pathlib.Path, known: Iterable[str]) -> list[str]:
    """The images that a list names, each once, in its order.

    A line is a name, a path of the image (without regard to folders and suffix), or such a path and the path of the mask,
    separated by a space or tab. Raises UserError if the list is empty or a name is not among `known`.
    """
    names, known = {}, set(known)
    for number, line in enumerate(read_lines(path), 1):
        pair = re.match(r"(.+?\.(?:jpe?g|png))\s+\S", line, re.IGNORECASE)
        candidates = [line, line.split("\t")[0], pair[1] if pair else line, line.split()[0]]
        name = next((n for n in [line, *map(name_of, candidates)] if n in known), None)
        if name is None:
            raise UserError(
                f"{path}, entry {number}: '{line}' is no image of this data set (no file "
                f"'{name_of(line)}.jpg' or .png); add the image or remove the line"
            )
        names[name] = None
    if not names:
        raise UserError(f"{path}: names no image; write one image name per line")
    return list(names)


def read_palette(path: pathlib.Path, classes: int) -> list[tuple[int, int, int]]:
    palette = []
    for line in read_lines(path):
        colour = re.fullmatch(r"(\d+)[\s,]+(\d+)[\s,]+(\d+)", line)
        if not colour or max(map(int, colour.groups())) > 255:
            raise UserError(f"{path}: '{line}' is not a colour; write one 'R G B' per line, each from 0 to 255")
        palette.append(tuple(map(int, colour.groups())))
    if len(palette) != classes:
        raise UserError(f"{path}: holds {len(palette)} colours for {classes} classes; write one line per class")
    return palette


def why_refused(file: Image.Image) -> str | None:
    """Why an opened image must not be decoded, by its header, and the fix; None where it may be."""
    if file.format in RUNS_PROGRAMS:
        return f"is {file.format}, which another program would have to draw; save it as PNG"
    if file.width * file.height > MAX_PIXELS:
        size = f"{file.width}x{file.height}"
        return f"has {size} pixels, more than the {MAX_PIXELS:,} that are read at once; split it or make it smaller"
    return None


@contextlib.contextmanager
def opened(path, problem: str, fix: str = "replace it or remove it from the lists"):
    """`Image.open`. While the file is read, any exception, out of memory included, becomes a UserError of one line with the
    file's name and the exception's type. All are caught, since Pillow and its plugins raise almost anything on damaged files.
    An image of more than MAX_PIXELS is refused by its header, and so is a format that another program would draw."""
    refuse_special(path)
    try:
        with Image.open(path) as file:
            if reason := why_refused(file):
                raise UserError(f"{path}: {reason}")
            yield file
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such {problem.split()[-1]}") from None
    except Exception as error:
        text = "of no format that Pillow opens" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        reason = f"{type(error).__name__}: {text}".removesuffix(": ")
        raise UserError(f"{path}: {problem} ({reason}); {fix}") from error


# EXIF's orientation -> how the image is turned upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = [TURNS[orientation] for orientation in (5, 6, 7, 8)]
# What Pillow raises on an EXIF entry that it cannot parse.
BROKEN_EXIF = (ArithmeticError, AssertionError, LookupError, OSError, struct.error, SyntaxError, TypeError, ValueError)


def turn_of(file: Image.Image) -> Image.Transpose | None:
    """How an image is turned upright, by its orientation alone (tag 0x0112 of its EXIF or XMP entry); None where it is upright,
    has no such entry, or a broken one. `ImageOps.exif_transpose` also writes the entry back, which not every entry survives."""
    try:
        return TURNS.get(file.getexif().get(0x0112))
    except BROKEN_EXIF:
        return None


def upright(file: Image.Image) -> Image.Image:
    """The decoded image, turned upright."""
    file.load()  # first, since a PNG may have its EXIF entry after the pixels, and a TIFF turns itself
    turn = turn_of(file)
    return file if turn is None else file.transpose(turn)


def upright_size(path) -> tuple[int, int]:
    """(width, height) of an image as it is shown, from its header alone. Raises UserError."""
    with opened(path, "not a readable image") as file:
        # but for the first test Pillow would decode a PNG to look for EXIF after it
        stated = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"} & file.info.keys()
        return file.size[::-1] if stated and turn_of(file) in SWAPS_SIDES else file.size


def open_image(path) -> Image.Image:
    """An RGB image of 8 bits, turned upright by its EXIF entry. Raises UserError.

    Transparency is dropped. Of 16-bit colours the upper 8 bits stay. Grey values of more than 8 bits and floats are brought to
    0 to 255 by the value that is white: see `white_of`.
    """
    with opened(path, "cannot be read as an image") as file:
        deep = ";16" in str(file.tile)  # Pillow keeps the upper half of 16-bit colours
        image = upright(file)
        if image.mode == "F" or image.mode.startswith("I"):
            return grey(path, file, np.asarray(image)).convert("RGB")
        if deep and max(high for _, high in np.reshape(image.getextrema(), (-1, 2))[: 1 if image.mode == "LA" else 3]) < 16:
            raise UserError(
                f"{path}: holds 16-bit colours, all of them below 4096 of 65535, so it is nearly black or 12-bit "
                "data; save it with 8 bits per channel"
            )
        image.info.pop("transparency", None)  # of a palette, which Pillow would warn of
        return image if image.mode == "RGB" else image.convert("RGB")


def grey(path, file: Image.Image, values: np.ndarray) -> Image.Image:
    """Grey values (H, W), whole numbers or floats, of an opened file -> an image of 8 bits, black at 0. Raises UserError."""
    tags = getattr(file, "tag_v2", {})  # of a TIFF
    if values.dtype == np.int32 and tags.get(339) in (None, 1, (1,)):
        values = values.view(np.uint32)  # Pillow knows only signed 32-bit values
    low, high = values.min().item(), values.max().item()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{path}: holds values that are not finite (nan or inf); save it with grey values from 0 to 255")
    if low < 0:
        raise UserError(f"{path}: holds grey values from {low:g} to {high:g}, but 0 is black; save it with 0 to 255")
    white = white_of(path, file, tags, high, values.dtype.kind == "f")
    out = np.empty(values.shape, np.uint8)
    for row, line in zip(out, values, strict=True):  # by rows, to save memory
        # 65535 -> 255: whole numbers lose their lower bits
        row[:] = np.rint(line * (255 / white)) if values.dtype.kind == "f" else line.astype(np.uint64) * 256 // (white + 1)
    return Image.fromarray(255 - out if tags.get(262) == 0 else out)  # PhotometricInterpretation 0: 0 is white


def white_of(path, file: Image.Image, tags, high: float, floats: bool) -> float:
    """The grey value that is white in a file whose largest value is `high`. Raises UserError where that cannot be told.

    The file's own value comes first: the largest value of a format whose samples Pillow scales to 16 bits (PGM, JPEG 2000), or
    a TIFF's MaxSampleValue, SMaxSampleValue or BitsPerSample. Otherwise it is the smallest usual value that is not exceeded:
    255, 4095 (12 bits), 65535 or 2^32 - 1; for floats 1, 255 or 65535. So the values of a 12-bit camera look the same in a
    container of 16 bits. If all values lie below a sixteenth of it, it cannot be told.
    """
    if not floats and file.format in ("PPM", "JPEG2000"):
        return 65535
    bits = np.max(tags.get(258, 0))
    stated = [np.max(tags[tag]).item() for tag in (281, 341) if tag in tags]
    stated += [2 ** int(bits) - 1] if not floats and bits not in (0, 16, 32) else []
    for white in stated:
        if white > 0 and high <= white:
            return white
    usual = (1.0, 255.0, 65535.0) if floats else (255, 4095, 65535, 2**32 - 1)
    white = next((white for white in usual if high <= white), math.inf)
    if white == math.inf or (white > usual[0] and high < white / 16):
        raise UserError(
            f"{path}: holds grey values up to {high:g}, and it is unknown which value is white; save it with values "
            "from 0 to 255"
        )
    return white


def open_mask(path) -> np.ndarray:
    """(H, W) integers, as stored in a grey or palette PNG of 1 to 16 bits. Raises UserError."""
    with opened(path, "cannot be read as a PNG mask", "replace it") as file:
        if file.mode in ("L", "P", "1") or file.mode.startswith("I"):
            return mask_values(file)
        raise UserError(
            f"{path}: has the mode {file.mode}, but a mask holds one class index per pixel (grey or palette PNG); "
            f"{masks_command(pathlib.Path(path).parent, flags_for_file(path))}"
        )


def mask_values(file: Image.Image) -> np.ndarray:
    """(H, W) uint8 or int32: the stored values of an opened grey or palette image, upright."""
    raw = file.tile[0].args if file.tile else None
    values = np.array(upright(file)).astype(np.int32 if file.mode.startswith("I") else np.uint8)
    return values // {"L;2": 85, "L;4": 17}.get(raw if isinstance(raw, str) else "", 1)  # Pillow stretches them to 0..255


def read_colours(path: pathlib.Path) -> bytes | None:
    """The palette of a mask file, three bytes per index, from its header alone. None if it has none or only the grey ramp
    that Pillow writes by default. Raises UserError."""
    with opened(path, "cannot be read as a PNG mask", "replace it") as file:
        if file.mode != "P":
            return None
        rawmode, colours = file.palette.getdata()
        colours = bytes(colours) if rawmode == "RGB" else bytes(file.getpalette())
    ramp = bytes(np.repeat(np.arange(256, dtype=np.uint8), 3))
    return None if ramp.startswith(colours) else colours


# ---- tensors ----

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32)
DTYPES = (*DTYPES, torch.int64, torch.bool)
PICKLES = [bytes((0x80, protocol)) for protocol in range(2, 6)]  # how a pickle begins


def open_tensors(path, name: str):
    """The content of a file of torch.save, on the CPU: plain values, lists, tuples, dictionaries, and dense tensors. Raises
    UserError, which begins with `name`, for anything else, and FileNotFoundError.

    Nothing in the file is run: torch.load takes known types alone. A file is refused before it is unpacked if its parts claim
    to hold more bytes than the file has, and afterwards if a tensor has more numbers than are stored.
    """
    refuse_special(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                claimed = sum(part.file_size for part in archive.infolist())
                if claimed > os.path.getsize(path):  # torch.save packs nothing
                    raise UserError(f"{name}: its parts claim {claimed:,} bytes, more than the file has; it is damaged")
                if archive.testzip():  # torch.load does not compare the checksums
                    raise UserError(f"{name}: cannot be read, since its checksums are wrong; it is damaged")
        with warnings.catch_warnings():  # torch's, about foreign pickles; the error below reports them in one line
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:  # of many types, depending on the file's bytes
        raise UserError(f"{name}: {why_unreadable(path, error)}") from None
    if reason := not_plain(content):
        raise UserError(f"{name}: holds {reason}; save tensors and plain values alone")
    return content


def why_unreadable(path, error: Exception) -> str:
    """Why torch.load refused a file, and the fix."""
    if isinstance(error, IsADirectoryError):
        return "is a folder; give the file in it"
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # as of a file that was cut off
        return f"cannot be opened ({os.strerror(error.errno).lower()}); give access to it, or another file"
    with open(path, "rb") as file:
        begins = file.read(2)  # of a zip file of torch.save, or of a pickle
    refused = isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error)
    if refused and (begins == b"PK" or begins in PICKLES):
        return "is a pickle of Python objects, which could run code when it is opened; save network.state_dict() alone"
    return f"cannot be read as a file of torch.save ({type(error).__name__}); it is damaged or of another format"


def not_plain(content) -> str | None:
    """The first thing in nested content that `open_tensors` refuses, or None. It is walked as it would be printed, so that few
    lists that hold one another many times are too many values."""
    stack, count = [(content, 0)], 0
    while stack:
        value, depth = stack.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            return f"more than {MAX_VALUES:,} values" if count > MAX_VALUES else f"lists in lists, {depth} deep"
        if isinstance(value, torch.Tensor):
            dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not dense or type(value) not in (torch.Tensor, torch.nn.Parameter) or value.dtype not in DTYPES:
                return "a tensor that is sparse, quantized, complex or without data"
            if value.numel() * value.element_size() > max(MAX_VIEW, value.untyped_storage().nbytes()):
                return f"a tensor of {value.numel():,} numbers, of which fewer are stored"
        elif isinstance(value, dict):
            stack += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, (list, tuple)):
            stack += [(item, depth + 1) for item in value]
        elif not isinstance(value, (str, int, float, type(None))):
            return f"a {type(value).__name__}"
    return None


# ---- which command fixes wrong masks ----

PALETTE = "--palette palette.txt"  # in flags: the file beside the folder of the masks


def masks_command(folder: pathlib.Path, flags: str) -> str:
    """How to convert the masks in `folder`, as the end of a message: what to do first, and a command to paste."""
    free = (folder.with_name(f"{folder.name}-original{f'-{i}' if i > 1 else ''}") for i in itertools.count(1))
    old, new = (shlex.quote(str(path)) for path in (next(path for path in free if not path.exists()), folder))
    palette = folder.parent / "palette.txt"
    write = PALETTE in flags and not palette.exists()
    first = f"write the colour of each class, one 'R G B' per line, into {palette}, then " if write else ""
    first += "replace each CLASS below by a class, or by ignore, then " if "=CLASS" in flags else ""
    flags = flags.replace(PALETTE, f"--palette {shlex.quote(str(palette))}")
    return f"{first}rename {new} to {old} and run: python prepare.py masks --masks {old} --out {new} {flags}".rstrip()


def flags_for(values: np.ndarray, pixels: np.ndarray, classes: int, named: bool = False) -> str:
    """The flags of `prepare.py masks` for masks with the sorted grey `values`, each in the given number of `pixels`, in a data
    set with `classes` classes; `named`: in classes.txt. Where these do not tell the class of a value, the flags say CLASS."""
    common = values[pixels >= 0.03 * pixels.sum()].tolist()
    frequent = {*common[:1], *common[-1:], *values[pixels >= 0.1 * pixels.sum()].tolist()}  # edges are less
    values = values.tolist()
    labels = [value for value in values if value != IGNORE_INDEX]
    wrong = [value for value in labels if value >= classes]
    if len(common) > 1 and len({*wrong} - {*common}) > 3:  # soft edges, or a JPEG
        levels, more = [value for value in common if value in frequent or (named and classes > 2)], ["--unknown nearest"]
    elif len(wrong) > MOST_UNNAMED and not (named and classes > 2):
        levels, more = [0, IGNORE_INDEX], ["--unknown nearest"]
    elif values == [0, IGNORE_INDEX] or (len(labels) > 1 and min(wrong, default=0) > 2 * classes and labels[1] >= classes):
        levels, more = values, []  # levels of grey
    elif not wrong:
        return ""
    elif named and wrong != [classes]:
        return "--unknown ignore"
    else:  # with names, the labels start at 1
        ignored = [f"{value}=ignore" for value in values if value - named not in range(classes)]
        return " ".join(["--values", *(f"{i + named}={i}" for i in range(classes)), *ignored])
    guess = not named or (classes == 2 and levels == [0, IGNORE_INDEX])
    names = [i if guess and (i < 2 or level != IGNORE_INDEX) else "CLASS" for i, level in enumerate(levels)]
    return " ".join(["--values", *(f"{level}={name}" for level, name in zip(levels, names, strict=True)), *more])


def flags_for_file(path) -> str:
    """The flags of `prepare.py masks` for a file that is not a grey or palette PNG, by its colours."""
    root = pathlib.Path(path).parent.parent
    names = read_lines(root / "classes.txt") if (root / "classes.txt").exists() else []
    with opened(path, "cannot be read as an image", "replace it") as file:
        pixels = np.asarray(file.convert("RGB")).reshape(-1, 3)
        lossy = " --unknown nearest" if file.format == "JPEG" else ""
    if (pixels == pixels[:, :1]).all():
        values, counts = np.unique(pixels[:, 0], return_counts=True)
        few = values[values != IGNORE_INDEX].max(initial=0) <= MOST_UNNAMED
        flags = flags_for(values, counts, len(names) or (MOST_UNNAMED + 1 if few else 2), bool(names))
        if lossy and "--values" not in flags:
            flags = "--values 0=CLASS 255=CLASS"
        return flags.removesuffix(lossy) + lossy
    colours = {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()}
    known = [("voc", voc_palette(21)), ("cityscapes", CITYSCAPES_PALETTE)]
    known = [n for n, p in known if colours <= {*p, VOC_BORDER, (0, 0, 0)} and len(names) in (0, len(p))]
    if (root / "palette.txt").exists() or (len(colours) > 8 and not known):
        return PALETTE + lossy
    if known:
        return f"--palette {known[0]}"
    two = not names and len(colours) == 2
    classes = ["ignore" if colour == VOC_BORDER else i if two else "CLASS" for i, colour in enumerate(sorted(colours))]
    pairs = [f"{','.join(map(str, colour))}={name}" for colour, name in zip(sorted(colours), classes, strict=True)]
    return " ".join(["--values", *pairs]) + lossy


CITYSCAPES_PALETTE = [
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
]


def voc_palette(n: int) -> list[tuple[int, int, int]]:
    """PASCAL VOC's colours: the bits of the class index, spread over the three channels from the highest bit down."""

    def channel(index, which):
        return sum((index >> (3 * bit + which) & 1) << (7 - bit) for bit in range(8))

    return [(channel(index, 0), channel(index, 1), channel(index, 2)) for index in range(n)]


def colour_table(palette: list[tuple[int, int, int]]) -> np.ndarray:
    """(256, 3) uint8: the colour of every mask value, white beyond the classes."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = palette
    return table
