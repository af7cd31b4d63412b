"""Evaluate checkpoints: mIoU and IoU of each class, as a table, as JSON, and as a picture.

    python evaluate.py --ckpt runs/shapes/1-8/mgd-r18/last.pt
    python evaluate.py --ckpt A/last.pt --compare B/last.pt C/last.pt --json out.json --panels out.png

The same `evaluate` validates during training, so the figures cannot differ. Whole images, one scale, no flip; predictions
are compared at the size of the mask.
"""

import math
import pathlib
import time
from collections.abc import Iterable
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

import datasets
import mgd_ops
import models
from common import ArgumentParser, UserError, autocast, load_checkpoint, pick_device, pick_precision, run, write_result

matplotlib.use("Agg")
from matplotlib import pyplot as plt


class Protocol(NamedTuple):
    """How the network sees an image. Every training validates with the protocol of its arguments, and a checkpoint is
    evaluated with that of its training, but for what the command line changes."""

    image_scale: float = 1.0  # factor on the size of all images
    window: tuple[int, int] | None = None  # (height, width) of sliding windows; None: the whole image at once
    scales: tuple[float, ...] = (1.0,)  # the mean over these sizes
    flip: bool = False  # and over the mirrored image


WHOLE = Protocol()


def protocol_of(args: dict) -> Protocol:
    """The protocol of a training's arguments."""
    return Protocol(args["image_scale"], tuple(args["window"]) if args["window"] else None)


def starts(size: int, window: int) -> list[int]:
    """Where windows begin: two thirds of a window apart, the last one moved back to the border."""
    stride = math.ceil(window * 2 / 3)
    return [min(i * stride, size - window) for i in range(1 + max(0, -(-(size - window) // stride)))]


def window_logits(model, x: torch.Tensor, window: tuple[int, int] | None) -> torch.Tensor:
    """Normalised images x (B, 3, H, W) -> logits (B, N, H, W), float32: the sum over sliding windows where `window` is given.

    An image smaller than a window is padded with zeros, the mean colour, at its right and lower border.
    """
    if window is None:
        return model(x).logits
    height, width = x.shape[-2:]
    h, w = window
    x = F.pad(x, (0, max(0, w - width), 0, max(0, h - height)))
    total = None
    for top in starts(x.shape[-2], h):
        for left in starts(x.shape[-1], w):
            logits = model(x[..., top : top + h, left : left + w]).logits
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *x.shape[-2:])
            total[..., top : top + h, left : left + w] += logits
    return total[..., :height, :width]


@torch.inference_mode()
def predict(model, image: np.ndarray, device, precision: str, protocol: Protocol = WHOLE) -> torch.Tensor:
    """image (H, W, 3) uint8 -> (H, W) int64 class indices on `device`.

    Logits are brought to the image's size; several scales or mirrored images are averaged as probabilities.
    """
    size = image.shape[:2]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    total, views = 0, len(protocol.scales) * (1 + protocol.flip)
    for scale in protocol.scales:
        scaled = [max(1, round(side * protocol.image_scale * scale)) for side in size]
        resized = pixels if scaled == list(size) else datasets.v2.functional.resize(pixels, scaled, antialias=True)
        x = datasets.normalize(resized, device)
        for mirrored in (False, True)[: 1 + protocol.flip]:
            with autocast(device, precision):
                logits = window_logits(model, x.flip(-1) if mirrored else x, protocol.window)
            logits = logits.flip(-1) if mirrored else logits
            if logits.shape[-2:] != size:
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=True)
            total = logits if views == 1 else total + logits.softmax(1)
    return total[0].argmax(0)


def confusion_matrix(prediction: torch.Tensor, mask: torch.Tensor, classes: int) -> torch.Tensor:
    """(N, N) int64: entry ij counts the pixels of class i that were predicted as j; pixels of 255 are left out."""
    valid = mask != datasets.IGNORE
    index = classes * mask[valid].long() + prediction[valid].long()
    return torch.bincount(index, minlength=classes**2).view(classes, classes)


def iou(confusion: torch.Tensor) -> tuple[float, list[float | None]]:
    """mIoU and the IoU of each class, in percent. A class absent from masks and predictions is None and not in the mean."""
    hit = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - hit
    values = [100 * float(h / u) if u > 0 else None for h, u in zip(hit, union, strict=True)]
    present = [v for v in values if v is not None]
    return (sum(present) / len(present) if present else float("nan")), values


def evaluate(model, dataset, names: Iterable[str], device, precision: str, protocol: Protocol = WHOLE) -> torch.Tensor:
    """The confusion matrix (N, N), int64 on the CPU, of `model` over the images `names`. The mode of `model` is restored."""
    was_training = model.training
    model.eval()
    n = len(dataset.classes)
    confusion = torch.zeros(n, n, dtype=torch.int64, device=device)
    for name in names:
        mask = torch.from_numpy(np.array(dataset.mask(name))).to(device)
        prediction = predict(model, dataset.image(name), device, precision, protocol)
        if prediction.shape != mask.shape:
            raise UserError(f"{name}: its mask is {tuple(mask.shape)}, its image {tuple(prediction.shape)} (height, width); "
                            "image and mask must be of one size")  # fmt: skip
        confusion += confusion_matrix(prediction, mask, n)
    model.train(was_training)
    return confusion.cpu()


def validate(model, dataset, device, args) -> float:
    """mIoU in percent on the data set's val images, as `evaluate.py` computes it."""
    return iou(evaluate(model, dataset, dataset.val, device, args.precision, protocol_of(vars(args))))[0]


def result_row(args, dataset, partition, **fields) -> dict:
    """A training's entry in result files, without its outcome. GMACs are those at 512x512."""
    cost = models.measure(args.backbone, args.stem, args.head_width, args.separable_head, len(dataset.classes))
    return {
        "dataset": dataset.name, "partition": partition.name, "partition_hash": partition.hash,
        "labeled": len(partition.labeled), "method": args.method, "backbone": args.backbone, "head_width": args.head_width,
        "weights": args.weights, "crop": list(args.crop), "seed": args.seed, "steps": args.steps, "seconds": 0.0,
        "gmacs_backbone": cost["gmacs_512"], "gmacs_model": cost["model_gmacs_512"],
        "mgd_ops": mgd_ops.backend(), **fields,
    }  # fmt: skip


def label_of(row: dict) -> str:
    """How tables and pictures call a run: `Sup resnet18`, `MGD resnet18`, `CPS resnet34 (T_D)`."""
    role = {"teacher_deep": " (T_D)", "teacher_wide": " (T_W)"}.get(row["role"], "")
    return f"{row['method'].upper() if row['method'] != 'sup' else 'Sup'} {row['backbone']}{role}"


def draw_panels(path: pathlib.Path, dataset, names: list[str], columns: list[tuple[str, list[np.ndarray]]]):
    """A PNG with one row an image: the image, its ground truth, and each model's prediction, with a legend (Fig. 4)."""
    palette = np.full((256, 3), 255, np.uint8)
    palette[: len(dataset.palette)] = dataset.palette
    heads = ["image", "ground truth", *(head for head, _ in columns)]
    aspect = np.divide(*dataset.image(names[0]).shape[:2])
    figure, axes = plt.subplots(len(names), len(heads), squeeze=False, layout="constrained",
                                figsize=(2 * len(heads), 2 * aspect * len(names) + 0.9))  # fmt: skip
    for r, name in enumerate(names):
        cells = [dataset.image(name), palette[dataset.mask(name)], *(palette[masks[r]] for _, masks in columns)]
        for axis, cell, head in zip(axes[r], cells, heads, strict=True):
            axis.imshow(cell, interpolation="nearest")
            axis.set_axis_off()
            if r == 0:
                axis.set_title(head, fontsize=8)
    patches = [plt.Rectangle((0, 0), 1, 1, color=np.array(c) / 255) for c in dataset.palette]
    figure.legend(patches, dataset.classes, loc="outside lower center", ncols=min(8, len(patches)), fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def print_table(rows: list[dict], classes: list[str]):
    """One line a model, then the IoU of each class with one column a model."""
    print(f"\n{'':3} {'model':24} {'part':>5} {'labeled':>7} {'steps':>6} {'seed':>4} {'GMACs':>6} {'mIoU':>6}")
    for i, row in enumerate(rows):
        print(f"{chr(97 + i % 26):3} {label_of(row):24} {row['partition']:>5} {row['labeled']:7d} {row['steps']:6d} "
              f"{row['seed']:4d} {row['gmacs_model']:6.1f} {row['miou']:6.2f}")  # fmt: skip
    print(f"\n{'IoU':24}" + "".join(f"{chr(97 + i % 26):>7}" for i in range(len(rows))))
    for name in classes:
        cells = ["  absent" if row["iou"][name] is None else f"{row['iou'][name]:7.2f}" for row in rows]
        print(f"{name:24}" + "".join(cells))


def print_seeds(rows: list[dict]):
    """Mean and standard deviation over the seeds, for what was trained with more than one."""
    groups = {}
    for row in rows:
        groups.setdefault((label_of(row), row["partition"], row["steps"]), []).append(row["miou"])
    if max(map(len, groups.values())) > 1:
        print("\nover seeds")
    for (label, part, steps), values in groups.items():
        if len(values) > 1:
            spread = f"{np.mean(values):6.2f} ± {np.std(values, ddof=1):.2f}"
            print(f"    {label:24} {part:>5} {steps:6d} steps  {spread}  ({len(values)} seeds)")


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--ckpt", type=pathlib.Path, required=True, help="checkpoint of train_teacher.py or distill.py")
    parser.add_argument("--compare", type=pathlib.Path, nargs="+", default=[], help="more checkpoints, beside the first")
    parser.add_argument("--data", type=pathlib.Path, help="folder of the data set, where it is not the one of training")
    parser.add_argument("--json", type=pathlib.Path, help="write a result file")
    parser.add_argument("--panels", type=pathlib.Path, help="write a picture: image, ground truth, each model")
    parser.add_argument("--panel-rows", type=int, default=6, help="images in the picture, evenly spread over val")
    parser.add_argument("--device", help="cuda, cpu, ...; by default cuda where there is one")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="by default that of the training")
    args = parser.parse_args()
    if args.panel_rows < 1:
        raise UserError(f"--panel-rows {args.panel_rows}: must be at least 1")
    for flag, path in (("--json", args.json), ("--panels", args.panels)):
        if path and (path.is_dir() or path.suffix.lower() not in (".json", ".png")):
            raise UserError(f"{flag} {path}: give a file's name that ends in .json or .png")
    began = time.perf_counter()
    device = pick_device(args.device)
    paths = [args.ckpt, *args.compare]
    checkpoints = [load_checkpoint(path) for path in paths]
    trained = checkpoints[0]["args"]
    dataset = datasets.open_dataset(trained["dataset"], args.data or trained["data"])
    dataset.check(dataset.val, masks=True)

    rows, panels = [], []
    shown = dataset.val[:: max(1, len(dataset.val) // args.panel_rows)][: args.panel_rows]
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        if checkpoint["classes"] != dataset.classes:
            raise UserError(f"{path}: was trained on the classes {', '.join(checkpoint['classes'])}, but the data set has "
                            f"{', '.join(dataset.classes)}; give the data set of the training with --data")  # fmt: skip
        precision = pick_precision(args.precision or checkpoint["args"]["precision"], device)
        protocol = protocol_of(checkpoint["args"])
        model = models.model_from_checkpoint(checkpoint).to(device)
        miou, values = iou(evaluate(model, dataset, dataset.val, device, precision, protocol))
        rows.append({**checkpoint["row"], "miou": miou, "iou": dict(zip(dataset.classes, values, strict=True))})
        if args.panels and rows[-1]["seed"] == rows[0]["seed"]:  # one seed is enough to look at
            masks = [predict(model, dataset.image(name), device, precision, protocol).cpu().numpy() for name in shown]
            panels.append((f"{label_of(rows[-1])}\n{rows[-1]['steps']} steps: {miou:.1f} mIoU", masks))
    print_table(rows, dataset.classes)
    print_seeds(rows)
    if args.json:
        distilled = {row["mgd_ops"] for row in rows if row["method"] == "mgd"} or {mgd_ops.backend()}
        write_result(args.json, "evaluation", rows, time.perf_counter() - began, "+".join(sorted(distilled)))
        print(f"\nresults: {args.json}")
    if args.panels:
        draw_panels(args.panels, dataset, shown, panels)
        print(f"panels: {args.panels}")


if __name__ == "__main__":
    run(main)
