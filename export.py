"""Export a checkpoint to ONNX, in float32 or int8, and compare the export with
the checkpoint before it is written.

    python export.py --ckpt runs/shapes/1-8/mgd-r18/last.pt --out model.onnx
    python export.py --ckpt A/last.pt --out model.onnx --precision int8
    python export.py --ckpt A/last.pt --out model.onnx --precision int8 \\
        --images photos --output labels --size 512x512

OUT takes `image` (B, H, W, 3) uint8 RGB, and gives `logits` (B, N, H, W)
float32 or `labels` (B, H, W) uint8, at the size of the input. Normalization and
the last upsampling are inside; the image scale and the sliding windows of the
training are not, but the metadata names them, and evaluate.py and predict.py
follow it.

The export runs in ONNX Runtime and is compared with PyTorch in float32, on the
CPU: by mIoU on the validation images where the data set is there, or by the
labels of --images. OUT is written where float32 has 99.99% of the labels equal,
and where int8 loses at most 0.5 mIoU, or, without masks, has 97% of the labels
equal. int8 is calibrated on training images, or on --images.
"""

import ast
import contextlib
import io
import json
import logging
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import checks
import datasets
import models
import readers
from common import MEAN, STD, ArgumentParser, UserError, cli, printable
from evaluate import confusion_matrix, iou, label_of
from inference import Protocol, bytes_per_pixel, params_m, predict, protocol_of, views
from onnx_model import KEY, OnnxModel, require
from predict import find_images
from recipes import FLAGS, crop_size
from result_files import git_commit, refuse_outputs, settings_of, write_result
from run_folder import atomic_write, load_network

OPSET = 18  # the exporter's own, and the oldest that it writes without converting
EQUAL = {"fp32": 99.99, "int8": 97.0}  # percent of labels that must be equal; of int8 where there are no masks
LOSS = 0.5  # mIoU that int8 may lose
CALIBRATE = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}  # our name -> ONNX Runtime's
CPU = torch.device("cpu")

# ---- ONNX ----


class Exported(nn.Module):
    """The graph of an exported model: image (B, H, W, 3) uint8 -> logits (B, N, H, W) float32.

    `network` maps normalized images (B, 3, H, W) to logits at any size: a tensor, `models.Output`, or torchvision's dictionary.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
        self.register_buffer("factor", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, image):
        width = image.shape[2]
        # Whole rows are normalized at once: before int8 convolutions, which want the colours last, ONNX Runtime is ten times
        # slower where a factor is broadcast over each pixel's three numbers.
        rows = image.flatten(2) * self.factor.repeat(width) + self.shift.repeat(width)  # (B, H, 3 W)
        pixels = rows.unflatten(2, (width, 3)).permute(0, 3, 1, 2)
        out = self.network(pixels.contiguous())  # strides of channels_last would put an as_strided into the graph
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
    require("onnx", "onnxscript", "onnxruntime")
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


def add_labels(source: pathlib.Path, path: pathlib.Path, metadata: dict | None = None):
    """Write `source`, a model of logits, to `path` as one of labels (B, H, W) uint8."""
    onnx, helper = require("onnx", "onnx.helper")
    model = onnx.load(source)
    (logits,) = model.graph.output
    shape = [dim.dim_param or dim.dim_value for dim in logits.type.tensor_type.shape.dim]
    model.graph.node.extend(
        [
            helper.make_node("ArgMax", ["logits"], ["largest"], name="labels_argmax", axis=1, keepdims=0),
            helper.make_node("Cast", ["largest"], ["labels"], name="labels_cast", to=onnx.TensorProto.UINT8),
        ]
    )
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("labels", onnx.TensorProto.UINT8, [shape[0], *shape[2:]]))
    save(model, path, metadata)


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


# ---- what the file records ----


def describe(checkpoint: dict, network: nn.Module, args) -> dict:
    """The metadata of an export, as plain JSON. `args` and `row` are the training's settings and its row in result files,
    without the folders of this machine; `window` is the size where that is fixed, since the model takes no other."""
    settings = {key: value for key, value in checkpoint["args"].items() if key in FLAGS and FLAGS[key].column is not None}
    protocol, size = protocol_of(checkpoint["args"]), list(args.size) if args.size else None
    return {
        "classes": checkpoint["classes"],
        "palette": [[int(level) for level in colour] for colour in checkpoint["palette"]],
        "dataset": checkpoint["row"].get("dataset"),
        "image_scale": protocol.image_scale,
        "window": size or (list(protocol.window) if protocol.window else None),
        "size": size,
        "precision": args.precision,
        "output": args.output,
        "opset": args.opset,
        "commit": git_commit(),
        "partition_hash": checkpoint["row"].get("partition_hash"),
        "params_m": params_m(network),
        # ONNX Runtime took 220 for MobileNetV2, which is the estimate, and 71 in int8
        "bytes_per_pixel": bytes_per_pixel(network, "fp32") / (3 if args.precision == "int8" else 1),
        "quantization": None,
        "args": without_folders(settings),
        "row": without_folders(checkpoint["row"]),
    }


def without_folders(settings: dict) -> dict:
    """Settings with the file's name for every absolute path: exports are handed on, and folders say who made them."""

    def plain(value):
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return pathlib.Path(value).name if isinstance(value, str) and pathlib.Path(value).is_absolute() else value

    return {key: plain(value) for key, value in settings.items()}


# ---- images ----


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spread over their order."""
    return [items[i * len(items) // count] for i in range(count)] if count < len(items) else [*items]


def open_images(args, checkpoint: dict):
    """The data set, or None where it is not at hand and --images replaces it, and the files of --images. Raises UserError."""
    paths = find_images(args.images) if args.images else []
    trained = checkpoint["args"]
    try:
        dataset = datasets.open_dataset(trained["dataset"], args.data or trained["data"])
        checks.refuse_faults(dataset, {"val": dataset.val})
    except UserError as error:
        if args.data or not paths:
            raise UserError(f"{error} (or give --images DIR, any images like those of the training)") from None
        print(f"note: there is no mIoU, since the data set cannot be used ({error}); --data DIR names its folder")
        return None, paths
    if dataset.classes != checkpoint["classes"]:
        raise UserError(
            f"{args.ckpt}: was trained on the classes {', '.join(checkpoint['classes'])}, but the data set has "
            f"{', '.join(dataset.classes)}; give the data set of the training with --data"
        )
    return dataset, paths


def calibration_images(args, dataset, paths: list[pathlib.Path]) -> list[np.ndarray]:
    """The images that int8 is calibrated on, evenly spread over those of --images or over the training images, which may be
    unlabeled: each (H, W, 3) uint8."""
    if paths:
        return [np.asarray(readers.open_image(path)) for path in spread(paths, args.calibration_images)]
    names = sorted({*dataset.train, *dataset.unlabeled} - {*dataset.val})
    return [dataset.image(name) for name in spread(names, args.calibration_images)]


# ---- the comparison ----


def compare(network: nn.Module, exported: OnnxModel, images: Iterable, classes: int, protocol: Protocol) -> dict:
    """How an export differs from its network in float32 by the same protocol. `images` yields image (H, W, 3) uint8 and mask
    (H, W) uint8 or None.

    -> `images`, `equal_labels` in percent, and, where there are masks, `miou_torch` and `miou`.
    """
    equal = pixels = count = 0
    confusions = torch.zeros(2, classes, classes, dtype=torch.int64)
    for image, mask in images:
        labels = [predict(model, image, CPU, "fp32", protocol) for model in (network, exported)]
        equal += int((labels[0] == labels[1]).sum())
        pixels += labels[0].numel()
        count += 1
        if mask is not None:
            mask = torch.from_numpy(np.array(mask))
            confusions += torch.stack([confusion_matrix(label, mask, classes) for label in labels])
    mious = [iou(confusion)[0] for confusion in confusions] if confusions.any() else [None, None]
    return {"images": count, "equal_labels": 100 * equal / pixels, "miou_torch": mious[0], "miou": mious[1]}


@torch.inference_mode()
def largest_difference(network: nn.Module, exported: OnnxModel, images: Iterable[np.ndarray]) -> tuple[float, float]:
    """The largest difference of a logit between the network and its export, and the largest logit, over images (1, H, W, 3)."""
    reference, difference, largest = Exported(network).eval(), 0.0, 0.0
    for image in images:
        logits = reference(torch.from_numpy(image))
        difference = max(difference, float((logits - torch.from_numpy(exported(image))).abs().max()))
        largest = max(largest, float(logits.abs().max()))
    return difference, largest


def fault_in(found: dict, args) -> str | None:
    """Why an export may not be written, and what to try; None where it is within the tolerance."""
    if args.precision == "int8" and found["miou"] is not None:
        loss = found["miou_torch"] - found["miou"]
        if loss <= LOSS:
            return None
        reason = f"int8 loses {loss:.2f} mIoU, and more than {LOSS} is too much"
    elif found["equal_labels"] >= EQUAL[args.precision]:
        return None
    else:
        reason = f"{found['equal_labels']:.3f}% of the labels are equal, and fewer than {EQUAL[args.precision]}% are too few"
    tries = {
        "--calibrate percentile": args.calibrate != "percentile",
        "--exclude classifier": not args.exclude,
        f"--calibration-images {4 * args.calibration_images}": True,
    }
    tries = [text for text, open_ in tries.items() if open_ and args.precision == "int8"]
    return f"{reason}; " + (f"try {' or '.join(tries)}, or add --force" if tries else "add --force to write it all the same")


# ---- the command ----


def parse_args(argv=None):
    parser = ArgumentParser(__doc__, usage="%(prog)s --ckpt FILE --out FILE [options]")
    path = {"type": pathlib.Path, "metavar": "FILE"}
    parser.add_argument("--ckpt", required=True, help="checkpoint of train_teacher.py or distill.py", **path)
    parser.add_argument("--out", required=True, help="the .onnx file to write", **path)
    parser.add_argument("--precision", choices=["fp32", "int8"], default="fp32", help="(default: fp32)")
    parser.add_argument("--output", choices=["logits", "labels"], default="logits", help="(default: logits)")
    parser.add_argument("--opset", type=int, default=OPSET, metavar="N", help=f"version of ONNX's operators (default: {OPSET})")
    parser.add_argument(
        "--size",
        type=crop_size,
        help="one image of this fixed size, SIDE or HEIGHTxWIDTH (default: any number of any size)",
    )
    folder = {"type": pathlib.Path, "metavar": "DIR"}
    parser.add_argument("--data", help="folder of the data set (default: as in training)", **folder)
    parser.add_argument(
        "--images",
        help="images for the calibration, and for the comparison where there is no data set (default: none)",
        **folder,
    )
    parser.add_argument("--json", help="result file of the comparison (default: OUT with .json)", **path)
    parser.add_argument("--force", action="store_true", help="write an export outside the tolerance too (default: off)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that this project did not write (default: off)")
    group = parser.add_argument_group("int8")
    group.add_argument(
        "--calibration-images", type=int, default=64, metavar="N", help="images for the ranges of activations (default: 64)"
    )
    group.add_argument("--calibrate", choices=[*CALIBRATE], default="minmax", help="how ranges are chosen (default: minmax)")
    group.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="modules that stay in float32, such as classifier, aspp or backbone.low.0 (default: none)",
    )
    group.add_argument("--reduce-range", action="store_true", help="7-bit weights, for x86 without VNNI (default: off)")
    args = parser.parse_args(argv)
    if args.json is None:
        args.json = args.out.with_suffix(".json")
    for flag, file, suffix in (("--out", args.out, ".onnx"), ("--json", args.json, ".json")):
        if file.is_dir() or file.suffix.lower() != suffix:
            raise UserError(f"{flag} {printable(file)}: give a file's name that ends in {suffix}")
    if args.precision == "fp32":
        for name in ("calibration_images", "calibrate", "exclude", "reduce_range"):
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f"--{name.replace('_', '-')}: is for --precision int8; add that, or leave it out")
    if args.opset < OPSET:
        raise UserError(f"--opset {args.opset}: must be at least {OPSET}")
    if args.calibration_images < 1:
        raise UserError(f"--calibration-images {args.calibration_images}: must be at least 1")
    refuse_outputs([("--out", args.out), ("--json", args.json)], [args.ckpt], args.overwrite)
    return args


def main(argv=None):
    args = parse_args(argv)
    began = time.perf_counter()
    onnx, *_ = require("onnx", "onnxscript", "onnxruntime")
    checkpoint = load_network(args.ckpt)
    network = models.model_from_checkpoint(checkpoint, args.ckpt)
    dataset, paths = open_images(args, checkpoint)
    metadata = describe(checkpoint, network, args)
    protocol = protocol_of(metadata)
    if dataset:
        compared = [dataset.image(name) for name in spread(dataset.val, 8)]
    else:
        compared = [np.asarray(readers.open_image(path)) for path in spread(paths, 8)]

    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "fp32.onnx")
        export_onnx(network, file, args.opset, args.size, {**metadata, "precision": "fp32", "output": "logits"})
        if args.precision == "int8":
            images = calibration_images(args, dataset, paths)
            metadata["quantization"] = {
                "images": len(images),
                "source": "--images" if paths else "training images",
                "method": args.calibrate,
                "excluded": args.exclude,
                "float_nodes": float_nodes(onnx.load(file), args.exclude),  # with those that always stay in float32
                "reduce_range": args.reduce_range,
            }
            print(f"calibrating on {len(images)} {'images of --images' if paths else 'training images'}, {args.calibrate}")
            seen = [view for image in images for view in views(image, protocol)]
            source, file = file, file.with_name("int8.onnx")
            logits = {**metadata, "output": "logits"}
            quantize(source, file, seen, args.calibrate, args.exclude, args.reduce_range, logits)
        exported = OnnxModel(file)
        if dataset:
            pairs = ((dataset.image(name), dataset.mask(name)) for name in tqdm(dataset.val, "compare", disable=None))
        else:
            pairs = ((np.asarray(readers.open_image(path)), None) for path in tqdm(paths, "compare", disable=None))
        found = compare(network, exported, pairs, len(metadata["classes"]), protocol)
        seen = [view for image in compared for view in views(image, protocol)]
        found["difference"], found["largest_logit"] = largest_difference(network, exported, seen)
        if args.output == "labels":
            source, file = file, file.with_name("labels.onnx")
            add_labels(source, file, metadata)
            labels = OnnxModel(file)
            if not all(np.array_equal(labels(view), exported(view).argmax(1)) for view in seen):
                raise UserError(f"--output labels: {printable(args.out)} would not give the class of the largest logit")
        report(args, found, file.stat().st_size, bool(dataset))
        fault = fault_in(found, args)
        if fault and not args.force:
            print(f"export.py: {printable(args.out)} was not written: {fault}", file=sys.stderr)
            sys.exit(1)
        with atomic_write(args.out) as temporary:
            temporary.write_bytes(file.read_bytes())
    row = {
        **settings_of(metadata["args"]),
        **metadata["row"],
        **found,
        "export": args.precision,
        **{key: metadata[key] for key in ("output", "opset", "size", "window", "params_m", "quantization")},
        "bytes": args.out.stat().st_size,
        "compared_on": "val" if dataset else "--images",
        "within_tolerance": fault is None,
    }
    write_result(args.json, "export", [row], time.perf_counter() - began, row["mgd_ops"])
    print(f"{printable(args.out)}: {label_of(row)}, {row['bytes'] / 1e6:.1f} MB; results: {printable(args.json)}")


def report(args, found: dict, size: int, masks: bool):
    """Print what the comparison found."""
    print(
        f"compared with PyTorch in float32 on {found['images']} {'val images' if masks else 'images'}: "
        f"{found['equal_labels']:.3f}% of the labels equal, largest difference of a logit {found['difference']:.2g} "
        f"(largest logit {found['largest_logit']:.3g})"
        + (f", mIoU {found['miou']:.2f} instead of {found['miou_torch']:.2f}" if found["miou"] is not None else "")
    )


if __name__ == "__main__":
    cli(main)
