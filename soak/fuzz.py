"""Read thousands of damaged, lying and hostile files of every kind that this
project reads.

    python -m soak.fuzz --inputs 5000
    python -m soak.fuzz --inputs 200 --only checkpoint --first 3    # from its part 3 on

Each input is drawn by hypothesis: a small file that is made here, damaged byte
by byte or part by part, or plain values of which some are replaced. The readers
and scripts must take it, or refuse it with a UserError of one printable line.
Whatever else ends a call is counted and named: another exception, a call of
more than 60 seconds, a crash of a library, a process that is started, a file
that is written outside the run's folder, 1.5 GB of memory.

The inputs come in parts of 50. A part is a function of the seed (21), its kind
and its number, so --only KIND --first PART makes the same inputs again. Inputs
that fail are copied to OUT. All run in one process; where it dies, the next
part starts another.
"""

import argparse
import base64
import contextlib
import copy
import faulthandler
import functools
import importlib.util
import io
import json
import os
import pathlib
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from PIL import Image

import checks
import convert
import datasets
import evaluate
import inference
import models
import predict
import prepare
import readers
import result_files
import run_folder
from common import ArgumentParser, UserError, cli
from paper import report

SEED = 21
INPUTS = 5000
COUNTS = ("tried", "survived", "differing", "lost")
PART = 50  # inputs of one run of hypothesis
SECONDS = 60  # of one input; more is a hang
MEMORY = 1.5e9  # bytes that one input may add; an image of 2^28 pixels takes half of it
CPU = torch.device("cpu")

# ---- what is damaged, and how ----

NUMBERS = (0, 1, -1, 2, 7, 8, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 10**30)
HOSTILE = (
    *("../../outside/made", "/etc/passwd", "..", ".", "", "-rf", "--out=/", "a/b", "a\\b", "a\0b", "a\nb", "a\r\nb", "\x1b[2J"),
    *(
        "$(touch made)",
        r"$\frac{$",
        "`touch made`",
        "; touch made",
        "' ; touch made '",
        "| touch made",
        "{0} %s $x_1^2$",
        "<script>",
        "|",
    ),
    *("\u202eabc", "e\u0301", "x" * 5000, "0" * 5000, "nan", "class 1", "None", "\u2028", "\ufeff"),
)
TEXTS = st.sampled_from(HOSTILE) | st.text(max_size=12)
PLAIN = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.floats() | TEXTS
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5
)


def damaged(draw, data: bytes) -> bytes:
    """Up to four changes of bytes; 16 and 32 bits are set to numbers that lie."""
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        change = draw(st.sampled_from(["set", "number", "number", "insert", "remove", "repeat", "cut"]))
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 64))
        if change == "set":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif change == "number":
            size, order = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from(["big", "little"]))
            number = draw(st.sampled_from(NUMBERS)) % 256**size
            data[at : at + size] = number.to_bytes(size, order)
        elif change == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif change == "remove":
            del data[at : at + length]
        elif change == "repeat":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 300))
        else:
            del data[at:]
    return bytes(data)


def damaged_parts(draw, data: bytes) -> bytes:
    """As `damaged`, but inside the parts of a PNG or a zip file, whose checksums are right again: else few would be read."""
    if draw(st.integers(0, 2)) == 0:
        return damaged(draw, data)
    if data.startswith(b"\x89PNG"):
        chunks, at = [], 8
        while at < len(data):
            (length,) = struct.unpack(">I", data[at : at + 4])
            chunks.append([data[at + 4 : at + 8], data[at + 8 : at + 8 + length]])
            at += 12 + length
        change_parts(draw, chunks)
        if draw(st.integers(0, 3)) == 0:
            kind, content = draw(st.sampled_from(PNG_CHUNKS))
            chunks.insert(draw(st.integers(0, len(chunks))), [kind, content])
        return data[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [[name, archive.read(name)] for name in archive.namelist()]
        change_parts(draw, members)
        if draw(st.integers(0, 5)) == 0:
            members[draw(st.integers(0, len(members) - 1))][1] = bytes(30_000_000)
        out = io.BytesIO()
        packed = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
        with warnings.catch_warnings(), zipfile.ZipFile(out, "w", packed) as archive:
            warnings.simplefilter("ignore")  # of two members of one name
            for name, content in members:
                archive.writestr(name, content)
        return out.getvalue()
    return damaged(draw, data)


def change_parts(draw, parts: list[list]):
    """Damage, repeat, move or remove a part, in place."""
    at = draw(st.integers(0, len(parts) - 1))
    change = draw(st.sampled_from(["damage", "damage", "damage", "repeat", "move", "remove"]))
    if change == "damage":
        parts[at][1] = damaged(draw, parts[at][1])
    elif change == "repeat":
        parts.insert(draw(st.integers(0, len(parts))), list(parts[at]))
    elif len(parts) > 1:
        part = parts.pop(at)
        if change == "move":
            parts.insert(draw(st.integers(0, len(parts))), part)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


BOMB = zlib.compress(bytes(100_000_000))  # 97 kB
PNG_CHUNKS = [
    (b"zTXt", b"Software\0\0" + BOMB),
    (b"iTXt", b"Software\0\1\0\0\0" + BOMB),
    (b"iCCP", b"icc\0\0" + BOMB),
    (b"IDAT", BOMB),
    (b"IHDR", struct.pack(">IIBBBBB", 16000, 16000, 8, 2, 0, 0, 0)),
    (b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 6, 0, 0, 0)),
    (b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + bytes(range(256)) * 4),
    (b"PLTE", bytes(range(256)) * 3),
    (b"tRNS", bytes(300)),
    (b"acTL", struct.pack(">II", 2**31, 0)),
    (b"fcTL", bytes(26)),
    (b"tEXt", b"Software\0mgd"),
]


def changed(draw, value, kinds=VALUES):
    """A copy of nested plain values in which one to three entries are replaced, removed, or moved to another key."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        inner, key = draw(st.sampled_from(list(entries_of(value)) or [([None], 0)]))
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "move"]))
        if change == "replace":
            inner[key] = draw(kinds)
        elif change == "remove":
            del inner[key]
        elif isinstance(inner, dict):
            inner[draw(TEXTS)] = inner.pop(key)
        else:
            inner.append(inner[key])
    return value


def entries_of(value) -> Iterator[tuple]:
    """(container, key) of every entry of nested plain values."""
    for key in range(len(value)) if isinstance(value, list) else list(value):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from entries_of(value[key])


def text_file(draw, lines: list[str]) -> bytes:
    """Lines of text of which some are changed, in an encoding; or damaged bytes."""
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(lines)))
        change = draw(st.sampled_from(["insert", "replace", "join", "remove"]))
        if change == "insert":
            lines.insert(at, draw(TEXTS))
        elif change == "replace":
            lines[at : at + 1] = [draw(TEXTS)]
        elif change == "join":
            lines[at : at + 1] = [lines[at % len(lines)] + draw(TEXTS)] if lines else []
        else:
            del lines[at : at + 1]
    text = draw(st.sampled_from(["\n", "\r\n", "\r"])).join(lines)
    data = text.encode(draw(st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"])), "replace")
    return damaged(draw, data) if draw(st.integers(0, 3)) == 0 else data


# ---- the files that are damaged ----


def image_files() -> list[bytes]:
    """An image of 9x7 pixels in the formats and modes that people have."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = [(mode, "PNG", {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")]
    forms += [("RGB", "PNG", {"exif": exif}), ("RGB", "JPEG", {"exif": exif}), ("RGB", "WEBP", {"exif": exif})]
    forms += [(mode, "JPEG", {}) for mode in ("RGB", "L", "CMYK")] + [("RGB", "JPEG", {"progressive": True})]
    forms += [("RGB", "TIFF", {"compression": c}) for c in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")]
    forms += [(mode, "TIFF", {}) for mode in ("L", "F", "I", "1", "CMYK", "P")]
    forms += [("RGB", "WEBP", {"lossless": True}), ("RGB", "BMP", {}), ("P", "BMP", {}), ("RGB", "GIF", {}), ("RGB", "PPM", {})]
    forms += [("RGB", "JPEG2000", {}), ("RGB", "TGA", {"compression": "tga_rle"}), ("RGB", "ICO", {}), ("RGB", "PCX", {})]
    forms += [("RGB", "SGI", {}), ("RGB", "DDS", {}), ("L", "EPS", {}), ("L", "XBM", {}), ("RGB", "AVIF", {})]
    files = []
    for mode, form, more in forms:
        out = io.BytesIO()
        with contextlib.suppress(OSError, KeyError, ValueError):  # a library that this Pillow lacks
            image.convert("1" if form == "XBM" else mode).save(out, format=form, **more)
            files.append(out.getvalue())
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 2**16, (7, 9)).astype(np.uint16)).save(out, format="PNG")
    return [*files, out.getvalue()]


def mask_files() -> list[bytes]:
    """A mask of 9x7 pixels and three classes as grey and palette PNG, and in colours."""
    mask = np.random.default_rng(0).integers(0, 3, (7, 9), np.uint8)
    mask[0] = 255
    grey, coloured = Image.fromarray(mask), Image.fromarray(mask)
    coloured.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    forms = [(grey, "PNG"), (coloured, "PNG"), (coloured.convert("RGB"), "PNG"), (coloured.convert("RGBA"), "PNG")]
    forms += [(grey.point(lambda value: value and 1, "1"), "PNG"), (grey.convert("I;16"), "PNG"), (grey, "TIFF"), (grey, "GIF")]
    forms += [(grey, "JPEG"), (grey, "BMP")]
    files = []
    for image, form in forms:
        out = io.BytesIO()
        image.save(out, format=form, **({"bits": 2} if image is coloured else {}))
        files.append(out.getvalue())
    return files


def tiny_backbone(name, weights="none", stem="standard"):
    """Four convolutions in place of any backbone, so that a checkpoint is small."""
    layer = models.conv_norm_relu
    models.canonical_name(name)
    low = torch.nn.Sequential(layer(3, 4, 3, stride=2), layer(4, 4, 3, stride=2))
    return models.Backbone(low, torch.nn.Sequential(layer(4, 8, 3, stride=2), layer(8, 8, 3, stride=2)), 4, 8)


def checkpoint_of(data: pathlib.Path) -> dict:
    """A checkpoint of a network that was not trained, on a folder of three classes."""
    args = {"dataset": "folder", "data": str(data), "part": "1", "backbone": "resnet18", "stem": "standard", "head_width": 2}
    args |= {
        "separable_head": True,
        "precision": "fp32",
        "image_scale": 1.0,
        "window": None,
        "crop": [8, 8],
        "seed": 0,
        "lr": 0.1,
    }
    args |= {"steps": 4, "scales": [1.0], "weights": "none", "method": "sup", "role": "student", "ohem": False}
    row = {"dataset": "mine", "partition": "1", "partition_hash": "0" * 12, "labeled": 2, "method": "sup", "role": "student"}
    row |= {"backbone": "resnet18", "head_width": 2, "weights": "none", "crop": [8, 8], "seed": 0, "steps": 4, "seconds": 1.0}
    row |= {"gmacs_backbone": 1.0, "gmacs_model": 1.0, "mgd_ops": "torch", "code": None, "losses": ["sup"], "teachers": []}
    row |= {"teacher_labels": None, "regions": None, "miou": 50.0}
    torch.manual_seed(0)
    model = models.model_from_args(args, 3)
    return {
        "model": model.state_dict(),
        "args": args,
        "classes": ["road", "tree", "car"],
        "palette": [[0, 0, 0], [128, 0, 0], [0, 128, 0]],
        "row": row,
        "partition": {"name": "1", "hash": "0" * 12},
        "teachers": {},
        "step": 4,
        "optimizers": [],
        "rng": torch.get_rng_state(),
        "versions": {"torch": "2", "torchvision": "0"},
    }


class RunsCode:
    """A pickle of this runs a function when it is opened by `pickle.load`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE_PICKLES = [
    RunsCode(os.system, "touch made"),
    RunsCode(eval, "open('made', 'w')"),
    RunsCode(open, "made", "w"),
    RunsCode(subprocess.check_output, ["touch", "made"]),
    RunsCode(shutil.rmtree, "data"),
    RunsCode(getattr, "text", "format"),
    RunsCode(torch.load, "made"),
    RunsCode(np.zeros, 10**10),
]


@st.composite
def tensors(draw):
    """Tensors that no checkpoint of this project holds."""
    tensor = torch.zeros(draw(st.sampled_from([(), (0,), (1,), (3,), (2, 8, 1, 1), (4, 3, 3, 3)])))
    forms = ["plain", "wide", "int8", "complex64", "bool", "bfloat16", "nan", "sparse", "parameter", "meta", "quantized"]
    match draw(st.sampled_from(forms)):
        case "wide":  # more numbers than its file holds
            return torch.zeros(1).expand(2**40)
        case "nan":
            return tensor + torch.nan
        case "sparse":
            return torch.eye(3).to_sparse()
        case "parameter":
            return torch.nn.Parameter(tensor)
        case "meta":
            return tensor.to("meta")
        case "quantized":
            return torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)
        case "plain":
            return tensor
        case kind:
            return tensor.to(getattr(torch, kind))


def tensor_file(draw, content, values) -> bytes:
    """A file of torch.save with changed values, a damaged file, or a pickle that would run code."""
    form = draw(st.sampled_from(["values", "values", "values", "bytes", "bytes", "old", "code"]))
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form == "code":
            harm = draw(st.sampled_from(HOSTILE_PICKLES))
            content = {**content, draw(st.sampled_from([*content])): harm} if draw(st.booleans()) else [harm]
            if draw(st.booleans()):
                return pickle.dumps(content, protocol=draw(st.integers(0, 5)))
            torch.save(content, out)
            return out.getvalue()
        if form == "values":
            content = changed(draw, content, values)
        try:
            torch.save(content, out, _use_new_zipfile_serialization=form != "old")
        except Exception:  # some values cannot be saved
            return out.getvalue()
    return damaged_parts(draw, out.getvalue()) if form != "values" else out.getvalue()


# ---- the calls ----


class Fault(Exception):
    """What a call did that it must not do."""


class Differs(Fault):
    """Two readers do not agree on one file."""


def attempt(call: Callable, *arguments):
    """What a call returns, or None where it raises a UserError; that must be one line."""
    try:
        return call(*arguments)
    except UserError as error:
        text = str(error)
        if not text.isprintable():
            raise Fault(f"the message is not one printable line: {text!r}") from None
        return None


def script(module, *arguments):
    """Run a script as its command line would."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli(module.main)
    except SystemExit as exit:
        code = exit.code or 0
    finally:
        sys.argv = before
    if code not in (0, 1, 2) or "Traceback" in err.getvalue():
        raise Fault(f"{module.__name__} ended with {code}: {err.getvalue()[-500:]}")
    if code == 2 and len([line for line in err.getvalue().splitlines() if ": error: " in line]) != 1:
        raise Fault(f"{module.__name__} refused without one line: {err.getvalue()[-500:]}")
    return out.getvalue()


class Place:
    """The folders of one process: ROOT/data is read, ROOT/run may be written, and all else may not."""

    def __init__(self, root: pathlib.Path):
        self.root, self.data, self.run = root, root / "data", root / "run"
        self.template = root / "template"
        folder = self.template / "mine"
        (folder / "images").mkdir(parents=True)
        (folder / "masks").mkdir()
        images, masks = image_files(), mask_files()
        for name in ("a", "b", "c", "d"):
            (folder / "images" / f"{name}.png").write_bytes(images[0])
        for name in ("a", "b", "c"):
            (folder / "masks" / f"{name}.png").write_bytes(masks[0])
        (folder / "train.txt").write_text("a\nb\nd\n")
        (folder / "val.txt").write_text("c\n")
        (folder / "classes.txt").write_text("road\ntree\ncar\n")
        torch.save(checkpoint_of(self.data / "mine"), self.template / "last.pt")
        self.images, self.masks = images, masks

    def fresh(self):
        """Make ROOT/data as it was, and ROOT/run empty."""
        for folder in (self.data, self.run):
            if folder.is_symlink():
                folder.unlink()
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.template, self.data)
        self.run.mkdir()
        os.chdir(self.run)


def one_in(draw, n: int) -> bool:
    return draw(st.integers(1, n)) == 1


def image(draw, place):
    path = place.data / f"photo{draw(st.sampled_from(['.png', '.jpg', '.tif', '.webp', '.bmp', '.gif', '']))}"
    path.write_bytes(damaged_parts(draw, draw(st.sampled_from(place.images))))
    whole = one_in(draw, 15)

    def call():
        size, image = attempt(readers.upright_size, path), attempt(readers.open_image, path)
        if image is not None and image.size != size:
            raise Differs(f"upright_size gives {size}, open_image {image.size}")
        if image is not None and image.mode != "RGB":
            raise Fault(f"open_image gives the mode {image.mode}")
        predict.is_image(path)
        attempt(convert.has_colours, path)
        if whole and (size is None or size[0] * size[1] < 1e6):
            script(predict, "--ckpt", place.data / "last.pt", "--images", path, "--out", place.run / "out")

    return call


def folder_reads(root: pathlib.Path, script_too: bool):
    """Open a data set of the folder form, and look at all of it."""
    dataset = attempt(datasets.Folder, root)
    if dataset is not None:
        part = attempt(datasets.partition, dataset, "1/2")
        if part is not None:
            groups = {"labeled": part.labeled, "unlabeled": part.unlabeled, "val": dataset.val}
            look = attempt(checks.look_at, dataset, groups, True)
            attempt(checks.refuse_faults, dataset, groups)
            for name in {*part.labeled, *dataset.val} - look.problems.keys():
                mask = dataset.mask(name)
                if mask.dtype != np.uint8 or mask.shape != dataset.image(name).shape[:2]:
                    raise Fault(f"a mask is {mask.dtype} {mask.shape}")
                if mask[mask != 255].max(initial=0) >= len(dataset.classes):
                    raise Fault(f"a mask holds {mask.max()} of {len(dataset.classes)} classes")
    if script_too:
        script(prepare, "check", "--dataset", "folder", "--data", root, "--part", "1")


def mask(draw, place):
    root = place.data / "mine"
    content = damaged_parts(draw, draw(st.sampled_from(place.masks)))
    name = draw(st.sampled_from(["a", "c"]))
    (root / "masks" / f"{name}.png").write_bytes(content)
    if draw(st.booleans()):
        (root / "classes.txt").unlink()
    converts, checks_too = one_in(draw, 8), one_in(draw, 8)
    more = draw(st.sampled_from([[], ["--unknown", "nearest"], ["--palette", "voc", "--unknown", "ignore"]]))

    def call():
        attempt(readers.open_mask, root / "masks" / f"{name}.png")
        attempt(readers.flags_for_file, root / "masks" / f"{name}.png")
        attempt(result_files.is_ours, root / "masks" / f"{name}.png")
        folder_reads(root, checks_too)
        if converts:
            script(prepare, "masks", "--masks", root / "masks", "--out", place.run / "masks", *more)

    return call


def name_list(draw, place):
    root = place.data / "mine"
    file = draw(st.sampled_from(["train.txt", "val.txt", "unlabeled.txt", "more.txt"]))
    (root / file).write_bytes(text_file(draw, draw(st.lists(st.sampled_from(["a", "images/b.png", "c", "d.jpg masks/d.png"])))))
    check = one_in(draw, 15)

    def call():
        folder_reads(root, check)
        if (root / "more.txt").exists() and (dataset := attempt(datasets.Folder, root)):
            part = attempt(datasets.listed_partition, dataset, root / "more.txt", None)
            if part and not {*part.labeled, *part.unlabeled} <= dataset.images.keys():
                raise Fault("a list names what is no image")

    return call


def class_list(draw, place):
    root = place.data / "mine"
    (root / "classes.txt").write_bytes(text_file(draw, [*draw(st.lists(TEXTS, max_size=5)), "road", "tree", "car"]))
    check, whole = one_in(draw, 15), one_in(draw, 15)

    def call():
        folder_reads(root, check)
        if whole:
            script(evaluate, "--ckpt", place.data / "last.pt", "--panels", place.run / "panels.png", "--data", root)

    return call


def palette(draw, place):
    root = place.data / "mine"
    lines = draw(st.sampled_from([["0 0 0", "1,2,3", "4 5 6"], ["# c", "road:1,2,3::", "tree:128,0,0::", "car:0,128,0:a:b"]]))
    (root / "palette.txt").write_bytes(text_file(draw, list(lines)))
    converts = one_in(draw, 10)
    (root / "masks" / "a.png").write_bytes(place.masks[draw(st.integers(0, 3))])

    def call():
        folder_reads(root, False)
        attempt(convert.read_colour_file, str(root / "palette.txt"))
        if converts:
            more = ["--palette", root / "palette.txt", "--unknown", "ignore"]
            script(prepare, "masks", "--masks", root / "masks", "--out", place.run / "masks", *more)

    return call


ARGUMENTS = argparse.Namespace(scales=[1.0], flip=False, window=None, precision=None)


def checkpoint(draw, place):
    path = place.data / "last.pt"
    content = checkpoint_of(place.data / "mine")
    path.write_bytes(tensor_file(draw, content, VALUES | tensors()))
    photo = np.zeros((9, 7, 3), np.uint8)
    whole = one_in(draw, 15)

    def call():
        found = attempt(run_folder.load_checkpoint, path)
        opened = attempt(inference.open_model, path, ARGUMENTS, CPU)
        if opened is not None:
            loaded, model, precision, protocol = opened
            attempt(inference.predict, model, photo, CPU, precision, protocol)
            result_files.setting_values(loaded["row"], result_files.GROUP_BY)
            result_files.settings_of(loaded["args"])
        attempt(result_files.is_ours, path)
        if whole:
            script(evaluate, "--ckpt", path, "--json", place.run / "a.json", "--data", place.data / "mine")
            script(predict, "--ckpt", path, "--images", place.data / "mine" / "images", "--out", place.run / "out")
            if (place.run / "a.json").exists():
                script(report, place.run / "a.json", "--out", place.run / "tables")
        return found

    return call


def weights(draw, place):
    path = place.data / "weights.pth"
    state = {key: value for key, value in checkpoint_of(place.data)["model"].items() if key.startswith("backbone.low")}
    content = draw(st.sampled_from([state, {"state_dict": state}, {"model": {"module." + k: v for k, v in state.items()}}]))
    path.write_bytes(tensor_file(draw, content, VALUES | tensors()))

    def call():
        found = attempt(models.read_state_dict, str(path))
        if found is not None:
            attempt(models.load_weights, NETWORK, "mobilenetv2", str(path), "standard")
            bare = torch.nn.Module()
            for key, value in state.items():
                bare.register_buffer(key.replace(".", "_"), value.clone())
            needed = {key.replace(".", "_"): value for key, value in state.items()}
            renamed = {key.replace(".", "_"): value for key, value in found.items()}
            if models.misfit(renamed, needed) is None:
                bare.load_state_dict(renamed)

    return call


def exported(draw, place):
    """A model in ONNX, as export.py describes it; the image is its own logits."""
    from onnx import TensorProto, helper

    trained = checkpoint_of(place.data / "mine")
    metadata = {key: trained[key] for key in ("args", "row", "classes", "palette")}
    metadata |= {"image_scale": 1.0, "window": None, "size": None, "precision": "fp32", "output": "logits", "params_m": 0.1}
    metadata |= {"bytes_per_pixel": 9.0}
    if draw(st.booleans()):
        metadata = changed(draw, metadata)
    nodes = [helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT)]
    order = (0, 1, 3, 2) if one_in(draw, 4) else (0, 3, 1, 2)  # the former is no shape of logits
    nodes.append(helper.make_node("Transpose", ["float"], ["logits"], perm=order))
    inputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", "H", "W", 3])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 3, "H", "W"])]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    helper.set_model_props(model, {"mgd": json.dumps(metadata)})
    path = place.data / "last.onnx"
    path.write_bytes(damaged(draw, model.SerializeToString()))
    whole = one_in(draw, 15)

    def call():
        opened = attempt(inference.open_model, path, ARGUMENTS, CPU)
        if opened is not None:
            attempt(inference.predict, opened[1], np.zeros((9, 7, 3), np.uint8), CPU, *opened[2:])
        attempt(result_files.is_ours, path)
        if whole:
            script(evaluate, "--ckpt", path, "--json", place.run / "a.json", "--data", place.data / "mine")
            script(predict, "--ckpt", path, "--images", place.data / "mine" / "images", "--out", place.run / "out")

    return call


NETWORK = torch.nn.Module()  # that nothing but an empty state would fit
ROWS = [
    {
        "dataset": "mine",
        "partition": "1/8",
        "partition_hash": "0" * 12,
        "labeled": 9,
        "role": "student",
        "backbone": "resnet18",
    },
    {
        "dataset": "mine",
        "partition": "1/8",
        "partition_hash": "0" * 12,
        "labeled": 9,
        "role": "student",
        "backbone": "resnet18",
    },
]
for seed, settings_of_row in enumerate(ROWS):
    settings_of_row |= {"method": "sup" if seed else "mgd", "steps": 4, "head_width": 8, "crop": [8, 8], "weights": "none"}
    settings_of_row |= {"teachers": [] if seed else ["T_D", "T_W"], "teacher_labels": None, "regions": 7, "seed": seed}
    settings_of_row |= {"losses": ["sup"] if seed else ["sup", "pixel", "image:T_D", "region:T_W"], "window": None}
    settings_of_row |= {"teacher_backbones": [] if seed else ["resnet34", "resnet18"], "separable_head": False}
    settings_of_row |= {"gmacs_backbone": 1.5, "gmacs_model": 2.5, "miou": 50.0, "iou": {"road": 50.0}, "scales": [1.0]}


def result(draw, place):
    content = {"what": "evaluation", "command": "evaluate.py", "created": "2026-01-01T00:00:00+00:00", "rows": ROWS}
    path = place.data / "a.json"
    path.write_bytes(json_file(draw, content))
    whole = one_in(draw, 12)

    def call():
        rows = attempt(report.read_rows, [path])
        attempt(result_files.is_ours, path)
        if rows is not None:
            groups = attempt(quiet, report.average, rows)
            for dataset in dict.fromkeys(group["dataset"] for group in groups):
                of_dataset = [group for group in groups if group["dataset"] == dataset]
                attempt(quiet, report.write_tables, of_dataset, dataset, "mine", place.run / "tables")
        if whole:
            script(report, path, "--out", place.run / "more")

    return call


def json_file(draw, content) -> bytes:
    """A JSON file of changed values, or a damaged one."""
    form = draw(st.sampled_from(["values", "values", "values", "values", "bytes", "deep"]))
    if form == "deep":
        return b'{"rows": ' + b"[" * 100_000
    text = json.dumps(changed(draw, content) if form == "values" else content, ensure_ascii=draw(st.booleans()))
    return damaged(draw, text.encode("utf-8", "replace")) if form == "bytes" else text.encode("utf-8", "replace")


def quiet(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def log(draw, place):
    path = place.run / "log.jsonl"
    entry = {"step": 1, "lr": 0.1, "images_per_s": 1.0, "data_wait": 0.5, "loss": 1.0, "sup": 1.0}
    entries = [entry, {**entry, "step": 2}, {"step": 2, "miou": 5.0}]
    if draw(st.booleans()):
        entries = changed(draw, entries)
    lines = [json.dumps(e) for e in entries]
    path.write_bytes(text_file(draw, lines))
    drawn = one_in(draw, 6)

    def call():
        attempt(run_folder.is_log, path)
        for line in path.read_bytes().splitlines():
            run_folder.logged_step(line)
        if drawn:
            script(report, "--curves", path, "--out", place.run / "curves.png")

    return call


def output(draw, place):
    """Names and links by which an output could leave its folder."""
    photos, out = place.data / "photos", place.run / "out"
    photos.mkdir()
    for name in draw(st.lists(TEXTS, min_size=1, max_size=3)):
        with contextlib.suppress(OSError, ValueError):  # no name of a file
            (photos / f"{name[:50]}.png").write_bytes(place.images[0])
    outside = place.root / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    shutil.copyfile(place.data / "mine" / "masks" / "a.png", outside / "a.png")
    result_files.save_png(outside / "ours.png", Image.new("L", (2, 2)))
    (photos / "a.png").write_bytes(place.images[0])
    link = draw(st.sampled_from(["", "", "masks", "overlays", "masks/a.png", "overlays/a.png", "sheet.png", "../classes.txt"]))
    if link:
        (out / link).parent.mkdir(parents=True, exist_ok=True)
        target = outside if link in ("masks", "overlays") else outside / draw(st.sampled_from(["a.png", "ours.png", "absent"]))
        (out / link).symlink_to(target)
    how = "predict" if link in ("masks", "overlays") else draw(st.sampled_from(["predict", "masks"]))  # OUT may be a link
    more = draw(st.sampled_from([[], ["--overwrite"]]))

    def call():
        if how == "predict":
            script(predict, "--ckpt", place.data / "last.pt", "--images", photos, "--out", out, *more)
        else:
            values = ["--values", "0=0", "1=1", "2=2", "--unknown", "ignore"]
            masks = place.data / "mine" / "masks"
            script(prepare, "masks", "--masks", masks, "--out", out / "masks", *values, *more)

    return call


LABELME = {
    "version": "5.5.0",
    "imagePath": "a.png",
    "imageWidth": 9,
    "imageHeight": 7,
    "shapes": [
        {"label": "road", "points": [[1, 1], [5.5, 1], [4, 6]], "shape_type": "polygon"},
        {"label": "tree", "points": [[1, 1], [2, 3]], "shape_type": "circle"},
        {"label": "car", "points": [[1, 1], [5, 4]], "shape_type": "rectangle"},
    ],
}
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 7}, {"id": 2, "file_name": "x/b.png"}],
    "categories": [{"id": 1, "name": "road"}, {"id": 7, "name": "tree"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 5, 1, 4, 6]], "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 7, "segmentation": {"counts": [3, 10, 50], "size": [7, 9]}, "iscrowd": 1},
        {"id": 3, "image_id": 2, "category_id": 7, "segmentation": {"counts": "3:b1", "size": [7, 9]}, "iscrowd": 1},
    ],
}


def outline(draw, place):
    """Outlines of LabelMe and COCO."""
    source = place.data / "outlines"
    source.mkdir()
    content = draw(st.sampled_from([LABELME, COCO]))
    if content is LABELME and draw(st.booleans()):
        pixels = base64.b64encode(damaged_parts(draw, draw(st.sampled_from(place.masks)))).decode()
        shape = {"label": "car", "points": [[1, 1], [5, 4]], "shape_type": "mask", "mask": pixels}
        content = {**content, "shapes": [*content["shapes"], shape]}
    (source / "a.json").write_bytes(json_file(draw, content))
    more = draw(st.sampled_from([[], ["--images", place.data / "mine" / "images"], ["--unknown", "ignore", "--empty", "skip"]]))

    def call():
        script(prepare, "masks", "--masks", source, "--out", place.run / "masks", *more)

    return call


def link(draw, place):
    """A link, a pipe or a folder in place of a file."""
    root = place.data / "mine"
    files = ["images/a.png", "images/d.png", "masks/a.png", "masks/c.png", "train.txt", "val.txt", "classes.txt", "palette.txt"]
    path = draw(st.sampled_from([*(root / file for file in files), place.data / "last.pt", root / "images", root / "masks"]))
    moved = place.data / "moved"
    if path.exists():
        path.rename(moved)
    match draw(st.sampled_from(["link", "nowhere", "loop", "zero", "pipe", "folder", "other"])):
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case what:
            targets = {"link": moved, "nowhere": "nowhere", "loop": path, "zero": "/dev/zero", "other": place.data / "last.pt"}
            path.symlink_to(targets[what])
    check = one_in(draw, 5)

    def call():
        folder_reads(root, check)
        attempt(run_folder.load_checkpoint, place.data / "last.pt")
        attempt(models.read_state_dict, str(path))
        attempt(report.read_rows, [path])
        attempt(readers.open_image, path)
        if check:
            script(predict, "--ckpt", place.data / "last.pt", "--images", root / "images", "--out", place.run / "out")

    return call


KINDS = {
    "image": image,
    "mask": mask,
    "list": name_list,
    "classes": class_list,
    "palette": palette,
    "checkpoint": checkpoint,
    "weights": weights,
    "exported": exported,
    "result": result,
    "log": log,
    "outline": outline,
    "link": link,
    "output": output,
}

if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
    del KINDS["exported"]

# ---- who watches ----

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MOVES = {"os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile"}  # the second path is written
CHANGES = {"os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.rename", "shutil.rmtree"}
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn", "os.startfile"}


class Watch:
    """Python's audit events of writes outside a folder and of processes, while it is on."""

    def __init__(self, allowed: pathlib.Path):
        self.allowed, self.on, self.seen = (os.path.realpath(allowed), "/dev/null"), False, []
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and isinstance(flags, int) and flags & WRITES:
                self.write(event, path)
        elif event in STARTS and not (event == "subprocess.Popen" and arguments[0] == "git"):  # the commit of a result
            self.seen.append(f"{event} {arguments[:2]}")
        if event in MOVES:
            self.write(event, arguments[1])
        if event in CHANGES:
            self.write(event, arguments[0])

    def fault_of(self, call: Callable) -> str | None:
        """What a call does that it must not do, or None."""
        self.seen, self.on = [], True
        try:
            call()
            fault = None
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "site-packages" not in frame.filename]
            at = ", from ".join(dict.fromkeys(f"{frame.filename}:{frame.lineno}" for frame in (frames[-1], ours[-1])))
            fault = f"{type(error).__name__}: {error} at {at}"
        finally:
            self.on = False
        return f"outside: {self.seen}" if self.seen else fault

    def write(self, event, path):
        path = os.fsdecode(path)
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))  # a link itself is moved
        if event in ("open", "os.mkdir"):
            real = os.path.realpath(path)
        if not any(f"{real}/".startswith(f"{folder}/") for folder in self.allowed):
            self.seen.append(f"{event} {path}")


def work(tasks: list, root: pathlib.Path, out: pathlib.Path):
    """Do the tasks (kind, part, inputs): one line of OUT/parts.jsonl each."""
    warnings.simplefilter("ignore")
    models.build_backbone = tiny_backbone
    models.expected_shapes = lambda name, stem: {}
    models.dilated_network = lambda name, stem: NETWORK
    torch.set_num_threads(1)
    place = Place(root)
    watch = Watch(place.run)
    for kind, part, inputs in tasks:
        began = time.perf_counter()
        counts = read_part(kind, part, inputs, place, watch, out)
        with open(out / "parts.jsonl", "a") as file:
            file.write(json.dumps({"kind": kind, **counts, "seconds": time.perf_counter() - began}) + "\n")


def read_part(kind: str, part: int, inputs: int, place: Place, watch: Watch, out: pathlib.Path) -> dict:
    """Read the inputs of a part. Faults are lines of OUT/faults.jsonl, and OUT/now says which input is being read."""
    counts = dict.fromkeys(COUNTS, 0)

    def one(data):
        place.fresh()
        call = KINDS[kind](data.draw, place)  # ends this call where hypothesis has drawn too much
        counts["tried"] += 1
        (out / "now").write_text(json.dumps([kind, part, counts]))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        fault = watch.fault_of(call)
        faulthandler.cancel_dump_traceback_later()
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if fault is None and grown > MEMORY:
            fault = f"takes {grown / 1e9:.1f} GB"
        if fault is None:
            counts["survived"] += 1
            return
        counts["differing"] += fault.startswith("Differs")
        counts["lost"] += fault.startswith("outside")
        put_fault(out, kind, part, counts["tried"], fault)
        shutil.copytree(
            place.data, out / f"{kind}-{part}-{counts['tried']}", symlinks=True, ignore=no_pipes, dirs_exist_ok=True
        )

    options = {"database": None, "deadline": None, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}
    numbered = SEED * 10**6 + list(KINDS).index(kind) * 10**4 + part
    seeded(numbered)(settings(max_examples=inputs, **options)(given(st.data())(one)))()
    return counts


def no_pipes(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if pathlib.Path(folder, name).is_fifo()]


def put_fault(out: pathlib.Path, kind: str, part: int, number: int, fault: str):
    with open(out / "faults.jsonl", "a") as file:
        file.write(json.dumps({"kind": kind, "part": part, "input": number, "fault": fault}) + "\n")


# ---- the processes ----


def fuzz(inputs: dict[str, int], first: int, out: pathlib.Path) -> dict[str, dict]:
    """{kind: counts and seconds} of the number of inputs of each kind. Faults are left in OUT/faults.jsonl."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tasks = [(kind, first + i, min(PART, count - i * PART)) for kind, count in inputs.items() for i in range(-(-count // PART))]
    rows = {kind: {**dict.fromkeys(COUNTS, 0), "seconds": 0.0} for kind in inputs}
    while tasks:
        with tempfile.TemporaryDirectory(prefix="mgd-fuzz-") as root:
            environment = {**os.environ, "MPLCONFIGDIR": f"{root}/matplotlib", "PYTHONDONTWRITEBYTECODE": "1"}
            environment["PYTHONPATH"] = str(pathlib.Path(readers.__file__).parent)
            task = json.dumps([tasks, f"{root}/place", str(out)])
            done = subprocess.run(
                [sys.executable, "-m", "soak.fuzz", "--work", task], env=environment, capture_output=True, errors="replace"
            )
        parts = (out / "parts.jsonl").read_text().splitlines() if (out / "parts.jsonl").exists() else []
        (out / "parts.jsonl").unlink(missing_ok=True)
        for part in map(json.loads, parts):
            for key in (*COUNTS, "seconds"):
                rows[part["kind"]][key] += part[key]
        tasks = tasks[len(parts) :]
        if tasks:  # the process died while it read an input
            if not (out / "now").exists():
                raise UserError(f"the process that reads the inputs ended with {done.returncode}: {done.stderr[-1000:]}")
            kind, part, counts = json.loads((out / "now").read_text())
            put_fault(out, kind, part, counts["tried"], f"crash or hang, exit code {done.returncode}: {done.stderr[-2000:]}")
            for key in COUNTS:
                rows[kind][key] += counts[key]
            left = tasks[0][2] - counts["tried"]
            tasks = [*([(kind, part + 1000, left)] if left > 0 else []), *tasks[1:]]
    return rows


def shares(inputs: int, kinds) -> dict[str, int]:
    return {kind: inputs // len(kinds) + (i < inputs % len(kinds)) for i, kind in enumerate(kinds)}


def count(inputs: dict[str, int], out: pathlib.Path) -> dict[str, int]:
    """The counts over all kinds; each fault is printed."""
    rows = fuzz(inputs, 0, out)
    print_faults(out)
    return {key: sum(row[key] for row in rows.values()) for key in COUNTS}


def print_faults(out: pathlib.Path):
    for line in (out / "faults.jsonl").read_text().splitlines() if (out / "faults.jsonl").exists() else []:
        print(line[:1000])


def cases(folder: pathlib.Path) -> dict[str, Callable]:
    """For `python -m soak`: one case per kind, 5,000 inputs in all."""
    return {
        f"fuzzed files: {kind}": functools.partial(count, {kind: number}, folder / "fuzz" / kind)
        for kind, number in shares(INPUTS, list(KINDS)).items()
    }


def quick(folder: pathlib.Path) -> dict[str, Callable]:
    """Five inputs of each kind."""
    return {"fuzzed files": functools.partial(count, shares(5 * len(KINDS), list(KINDS)), folder / "fuzz" / "quick")}


def main(argv=None):
    parser = ArgumentParser(__doc__, usage="python -m soak.fuzz [options]")
    parser.add_argument("--inputs", type=int, default=INPUTS, metavar="N", help=f"how many, over all kinds (default: {INPUTS})")
    parser.add_argument("--only", nargs="+", choices=list(KINDS), metavar="KIND", help="some of the kinds (default: all)")
    parser.add_argument("--first", type=int, default=0, metavar="PART", help="number of each kind's first part (default: 0)")
    path = {"type": pathlib.Path, "metavar": "DIR", "default": pathlib.Path("runs/soak/fuzz/all")}
    parser.add_argument("--out", help="inputs that fail; emptied first (default: runs/soak/fuzz/all)", **path)
    parser.add_argument("--work", help=argparse.SUPPRESS)  # the process that reads the inputs
    args = parser.parse_args(argv)
    if args.work:
        tasks, root, out = json.loads(args.work)
        return work(tasks, pathlib.Path(root), pathlib.Path(out))
    rows = fuzz(shares(args.inputs, args.only or list(KINDS)), args.first, args.out.resolve())
    for kind, row in rows.items():
        print(f"{kind:12} " + ", ".join(f"{row[key]} {key}" for key in COUNTS) + f", {row['seconds']:.0f} s")
    print_faults(args.out)
    if (args.out / "faults.jsonl").exists():
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
