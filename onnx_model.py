"""Exported models: what is in the file, and how ONNX Runtime runs it.

    input   `image`   (B, H, W, 3) uint8, RGB
    output  `logits`  (B, N, H, W) float32, at the size of the input
       or   `labels`  (B, H, W) uint8, the class of the largest logit

Normalization and the last upsampling are inside. The image scale and the sliding windows stay with the caller. What the file
records about its model is JSON in the metadata entry `mgd`; see `describe` in export.py. Only onnxruntime is needed to run one.
"""

import importlib
import json
import math
import os
import pathlib

import numpy as np
import torch

from common import UserError, printable
from run_folder import absent_part, wrong_part

KEY = "mgd"  # of the metadata entry
MARK = b"\n\x03mgd\x12"  # how protobuf writes the key and begins the value, so that our files are known without onnx
PACKAGES = "onnx onnxscript onnxruntime"


def require(*names: str) -> list:
    """Import packages of the extra `export`. Raises UserError with the pip line where one is missing."""
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise UserError(f"this needs {error.name or error}; run pip install {PACKAGES}") from None


def is_exported(path: pathlib.Path) -> bool:
    """Whether a path names an exported model and not a checkpoint."""
    return path.suffix.lower() == ".onnx"


def start_session(model: bytes | str | os.PathLike, threads: int | None = None):
    """A session of ONNX Runtime on the CPU with `threads` threads (default: as many as PyTorch has)."""
    (onnxruntime,) = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors, which are raised too
    model = model if isinstance(model, bytes) else os.fspath(model)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OnnxModel:
    """An exported model in a session of ONNX Runtime. Raises UserError where the file is not one of export.py."""

    def __init__(self, path: pathlib.Path | str):
        shown = printable(path)
        try:
            content = pathlib.Path(path).read_bytes()
        except FileNotFoundError:
            raise UserError(f"{shown}: no such file; give a .onnx file that export.py wrote") from None
        except OSError as error:
            raise UserError(f"{shown}: cannot be read ({error.strerror}); give a .onnx file that export.py wrote") from None
        if MARK not in content:
            raise UserError(f"{shown}: was not written by export.py, or is damaged; export the checkpoint with export.py")
        damaged = f"{shown}: is damaged; export the checkpoint again"
        require("onnxruntime")
        try:
            self.session = start_session(content)
            metadata = json.loads(self.session.get_modelmeta().custom_metadata_map[KEY])
            (image,), (output,) = self.session.get_inputs(), self.session.get_outputs()
        except Exception as error:  # of many types, depending on the bytes
            if "external" in str(error).lower():
                damaged = f"{shown}: keeps its weights in another file; export the checkpoint again, which writes one file"
            raise UserError(damaged) from None
        if fault := fault_of(metadata, image, output):
            raise UserError(f"{damaged} ({fault})")
        self.metadata: dict = metadata
        self.output: str = output.name
        self.classes = len(metadata["classes"])
        self.size: tuple[int, int] | None = tuple(metadata["size"]) if metadata["size"] else None  # (H, W), where it is fixed
        self.path = shown

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """images (B, H, W, 3) uint8 -> logits (B, N, H, W) float32, or labels (B, H, W) uint8."""
        batch, height, width, _ = images.shape
        if self.size and (height, width) != self.size:
            raise UserError(
                f"{self.path}: takes images of {self.size[0]}x{self.size[1]} (height x width) alone, not of {height}x{width}; "
                "export without --size"
            )
        (out,) = self.session.run(None, {"image": np.ascontiguousarray(images)})
        expected = (batch, height, width) if self.output == "labels" else (batch, self.classes, height, width)
        if out.shape != expected:
            raise UserError(f"{self.path}: is damaged; its output is {out.shape}, not {expected}; export the checkpoint again")
        return out


def fault_of(metadata, image, output) -> str | None:
    """What is wrong with the metadata, the input or the output of a file that bears our mark, or None."""
    keys = {
        "classes",
        "palette",
        "args",
        "row",
        "image_scale",
        "window",
        "size",
        "precision",
        "output",
        "params_m",
        "bytes_per_pixel",
    }
    if not isinstance(metadata, dict) or not keys <= metadata.keys():
        return "its metadata is incomplete"
    if wrong := wrong_part(metadata):
        return f"its metadata holds {wrong}"
    if absent := absent_part(metadata):
        return f"its metadata lacks {absent}"
    classes = metadata["classes"]
    sizes = [metadata["window"], metadata["size"]]
    if not (
        metadata["precision"] in ("fp32", "int8")
        and all(type(metadata[key]) in (int, float) and metadata[key] >= 0 for key in ("params_m", "bytes_per_pixel"))
        and type(metadata["image_scale"]) in (int, float)
        and 0 < metadata["image_scale"] < math.inf
        and all(size is None or is_whole(size, 2, 1, 2**20) for size in sizes)
    ):
        return "its metadata is wrong"
    if (image.name, image.type) != ("image", "tensor(uint8)") or len(image.shape) != 4 or image.shape[3] != 3:
        return "its input is not images (B, H, W, 3) of uint8"
    kind = {"logits": ("tensor(float)", 4), "labels": ("tensor(uint8)", 3)}.get(output.name)
    if kind != (output.type, len(output.shape)) or metadata["output"] != output.name:
        return "its output is neither logits nor labels"
    if output.name == "logits" and output.shape[1] != len(classes):
        return f"it has {output.shape[1]} logits for {len(classes)} classes"
    return None


def is_whole(values, count: int, low: int, high: int) -> bool:
    """Whether `values` is a list of `count` whole numbers from `low` to `high`."""
    return isinstance(values, list) and len(values) == count and all(type(v) is int and low <= v <= high for v in values)
