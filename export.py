"""Export a checkpoint to ONNX, in float32 or int8, for ONNX Runtime and other runtimes."""

import ast
import contextlib
import io
import json
import logging
import pathlib
import tempfile
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import models
from batches import MEAN, STD
from common import UserError
from onnx_model import KEY, require
from run_folder import atomic_write

OPSET = 18  # the exporter's own, and the oldest that it writes without converting


class Exported(nn.Module):
    """The graph of an exported model: image (B, H, W, 3) uint8 -> logits (B, N, H, W) float32.

    `network` maps normalized images (B, 3, H, W) to logits at any size: a tensor, `models.Output`, or torchvision's dictionary.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
        self.register_buffer("factor", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, image):
        pixels = image.permute(0, 3, 1, 2).contiguous()  # strides of channels_last would put an as_strided into the graph
        out = self.network(pixels * self.factor + self.shift)
        logits = out["out"] if isinstance(out, dict) else out if isinstance(out, torch.Tensor) else out.logits
        return F.interpolate(logits, image.shape[1:3], mode="bilinear", align_corners=True)


def export_onnx(
    network: nn.Module,
    path: pathlib.Path,
    opset: int = OPSET,
    size: tuple[int, int] | None = None,
    metadata: dict | None = None,
):
    """Write `network` (see `Exported`) to `path` as ONNX in float32 with batch norm folded, in one file.

    Batch, height and width are free; with `size` (H, W), the batch is 1 and the size fixed. `metadata` becomes JSON in the
    metadata entry `mgd`. Raises UserError where a package is missing or the exporter has no such opset.
    """
    onnx, _ = require("onnx", "onnxscript")
    network = models.fold_batch_norm(network).to(memory_format=torch.contiguous_format)
    height, width = size or (96, 128)
    images = torch.zeros(1 if size else 2, height, width, 3, dtype=torch.uint8)
    free = None if size else ({0: "batch", 1: "height", 2: "width"},)
    with quiet():
        program = torch.onnx.export(
            Exported(network).eval(),
            (images,),
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=free,
            verbose=False,
        )
        model = program.model_proto
    given = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if given != opset:
        raise UserError(f"--opset {opset}: the exporter cannot write it; give a lower one, from {OPSET} on")
    strip(model)
    save(model, path, metadata)


def strip(model):
    """Remove what the exporter notes about this machine: stack traces with the paths of its files. Each node keeps the path of
    its module, such as `network.classifier`, for `quantize`."""
    model.doc_string = ""
    del model.metadata_props[:]
    for node in model.graph.node:
        scopes = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        del node.metadata_props[:]
        node.doc_string = ""
        if scopes:
            node.doc_string = next((s for s in ast.literal_eval(scopes[0]) if s.startswith("network.")), "").removeprefix(
                "network."
            )
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        del value.metadata_props[:]
        value.doc_string = ""
    del model.graph.metadata_props[:]


def save(model, path: pathlib.Path, metadata: dict | None):
    """Write an onnx.ModelProto as one file, whole or not at all."""
    (onnx,) = require("onnx")
    if metadata is not None:
        onnx.helper.set_model_props(model, {KEY: json.dumps(metadata)})
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


@contextlib.contextmanager
def quiet():
    """Keeps the exporter and the quantizer from printing; an exception says what is wrong."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# ---- int8 ----


class Reader:
    """Calibration images for ONNX Runtime's quantizer, one at a time, so that the activations of one are held."""

    def __init__(self, images: Iterable[np.ndarray]):
        self.images, self.left = list(images), 0
        self.iterator = iter(self.images)

    def __len__(self):
        return len(self.images)

    def set_range(self, start_index, end_index):
        self.iterator = iter(self.images[start_index:end_index])

    def get_next(self):
        image = next(self.iterator, None)
        return None if image is None else {"image": image}


CALIBRATE = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}


def quantize(
    source: pathlib.Path,
    path: pathlib.Path,
    images: Iterable[np.ndarray],
    calibrate: str = "minmax",
    exclude: Sequence[str] = (),
    reduce_range: bool = False,
    metadata: dict | None = None,
):
    """Write the int8 form of `source`, which `export_onnx` wrote, to `path`: static quantization by ONNX Runtime, QDQ, with
    int8 weights per channel and uint8 activations. Normalization, and all after the last convolutions, stay in float32.

    images: (1, H, W, 3) uint8 each, for the ranges of the activations. exclude: modules that stay in float32, by the beginning
    of their path, such as `classifier` or `backbone.low.0`. Raises UserError for one that there is not.
    """
    onnx, quantization = require("onnx", "onnxruntime.quantization")
    model = onnx.load(source)
    with tempfile.TemporaryDirectory() as folder, quiet():
        quantization.quantize_static(
            model,
            pathlib.Path(folder, "int8.onnx"),
            Reader(images),
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=float_nodes(model, exclude),
            calibrate_method=quantization.CalibrationMethod[CALIBRATE[calibrate]],
            extra_options={"CalibStridedMinMax": 1},
        )
        model = onnx.load(pathlib.Path(folder, "int8.onnx"))
    for node in model.graph.node:
        node.doc_string = ""
    save(model, path, metadata)


def float_nodes(model, exclude: Sequence[str]) -> list[str]:
    """The names of the nodes that stay in float32: those of excluded modules, and those before the first convolutions or after
    the last. A node is between them if one of its inputs depends on a convolution, and a convolution on its output."""
    nodes = model.graph.node
    before = {node.output[0] for node in nodes if node.op_type == "Conv"}
    for node in nodes:  # in topological order
        if before & {*node.input}:
            before.update(node.output)
    after = set()
    for node in reversed(nodes):
        if node.op_type == "Conv" or after & {*node.output}:
            after.update(node.input)
    names = []
    for prefix in exclude:
        found = [node.name for node in nodes if f"{node.doc_string}.".startswith(f"{prefix}.")]
        if not found:
            tops = sorted({node.doc_string.split(".")[0] for node in nodes if node.doc_string})
            raise UserError(f"--exclude {prefix}: the network has no such module; its parts are {', '.join(tops)}")
        names += found
    between = {node.name for node in nodes if before & {*node.output} and (after & {*node.output} or node.op_type == "Conv")}
    return sorted({node.name for node in nodes} - between | {*names})
