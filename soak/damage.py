"""Files that are damaged, that lie or that would do harm, as hypothesis draws them: small originals and changes of them."""

import contextlib
import copy
import io
import json
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import warnings
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

import backbones
import models

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
    layer = backbones.conv_norm_relu
    backbones.canonical_name(name)
    low = torch.nn.Sequential(layer(3, 4, 3, stride=2), layer(4, 4, 3, stride=2))
    return backbones.Backbone(low, torch.nn.Sequential(layer(4, 8, 3, stride=2), layer(8, 8, 3, stride=2)), 4, 8)


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


def json_file(draw, content) -> bytes:
    """A JSON file of changed values, or a damaged one."""
    form = draw(st.sampled_from(["values", "values", "values", "values", "bytes", "deep"]))
    if form == "deep":
        return b'{"rows": ' + b"[" * 100_000
    text = json.dumps(changed(draw, content) if form == "values" else content, ensure_ascii=draw(st.booleans()))
    return damaged(draw, text.encode("utf-8", "replace")) if form == "bytes" else text.encode("utf-8", "replace")


def row_of(seed: int) -> dict:
    """A result's row: of MGD, or of Sup where `seed` is not 0."""
    row = {"dataset": "mine", "partition": "1/8", "partition_hash": "0" * 12, "labeled": 9, "role": "student"}
    row |= {"backbone": "resnet18", "method": "sup" if seed else "mgd", "steps": 4, "head_width": 8, "crop": [8, 8]}
    row |= {"teachers": [] if seed else ["T_D", "T_W"], "teacher_labels": None, "regions": 7, "seed": seed}
    row |= {"losses": ["sup"] if seed else ["sup", "pixel", "image:T_D", "region:T_W"], "window": None, "weights": "none"}
    row |= {"teacher_backbones": [] if seed else ["resnet34", "resnet18"], "separable_head": False}
    return row | {"gmacs_backbone": 1.5, "gmacs_model": 2.5, "miou": 50.0, "iou": {"road": 50.0}, "scales": [1.0]}


ROWS = [row_of(0), row_of(1)]
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
