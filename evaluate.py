"""Evaluate checkpoints: mIoU and the IoU of each class, as a table, as JSON, and
as pictures.

    python evaluate.py --ckpt runs/shapes/1-8/mgd-r18/last.pt
    python evaluate.py --ckpt A/last.pt B/last.pt --json ab.json --panels ab.png
    torchrun --nproc-per-node 4 evaluate.py --ckpt A/last.pt

The same `evaluate` validates during training, so the numbers cannot differ.
Images are seen as in the training's validation (whole, or in the sliding
windows of its --window), at one scale and not mirrored unless told otherwise.
Predictions are compared at the size of the mask. Under torchrun the images are
shared out.
"""

import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

import checks
import datasets
import kernels
import mgd_ops
import models
from batches import normalize
from common import (
    IGNORE_INDEX,
    ArgumentParser,
    UserError,
    autocast,
    cli,
    init_distributed,
    pick_precision,
    print0,
    printable,
    rank_and_size,
    sync_buffers,
)
from recipes import WINDOW_HELP, window_size
from result_files import GROUP_BY, git_commit, refuse_outputs, setting_values, settings_of, write_result
from run_folder import load_checkpoint

STRIP_BYTES = 2**27  # of finished logits per strip; fewer bytes are one strip, more take more memory


class Protocol(NamedTuple):
    """How the network sees an image. A training validates with the protocol of its arguments. A checkpoint is evaluated with
    the same protocol, except for what the command line changes."""

    image_scale: float = 1.0  # factor on the size of all images
    window: tuple[int, int] | None = None  # (height, width) of sliding windows; None: the whole image at once
    scales: tuple[float, ...] = (1.0,)  # the mean over these sizes
    flip: bool = False  # and over the mirrored image


WHOLE = Protocol()


def protocol_of(args: dict) -> Protocol:
    """The protocol of a training's arguments."""
    return Protocol(args["image_scale"], tuple(args["window"]) if args.get("window") else None)


def starts(size: int, window: int) -> list[int]:
    """Where windows begin: two thirds of a window apart, the last one moved back to the border."""
    stride = math.ceil(window * 2 / 3)
    return [min(i * stride, size - window) for i in range(1 + max(0, -(-(size - window) // stride)))]


def window_strips(forward, rows, size: tuple[int, int], window: tuple[int, int] | None) -> Iterator[torch.Tensor]:
    """Logits (1, N, h, W), float32, of strips of an image of `size` (H, W), which together are its H rows from top to bottom:
    the mean over the sliding windows that see a pixel where `window` is given (the same classes as their sum has).

    rows(top, bottom) -> the normalized rows (1, 3, bottom - top, W), and forward(rows of a window) -> their logits. Only rows
    that later windows see, and at most STRIP_BYTES of finished ones, are kept. Without a window there is one strip.
    An image smaller than a window is padded with zeros, the mean colour, at the right and lower border.
    """
    if window is None:
        yield forward(rows(0, size[0]))
        return
    (height, width), (h, w) = size, window
    tops, lefts = starts(max(height, h), h), starts(max(width, w), w)
    total, first = None, 0  # the sum of the logits from row `first` on
    for top, end in zip(tops, [*tops[1:], height], strict=True):  # later windows begin at row `end`
        x = F.pad(rows(top, min(top + h, height)), (0, max(0, w - width), 0, max(0, h - height)))
        for left in lefts:
            logits = forward(x[..., left : left + w])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], 0, x.shape[-1])
            if total.shape[2] < top + h - first:
                total = F.pad(total, (0, 0, 0, top + h - first - total.shape[2]))
            total[..., top - first :, left : left + w] += logits
        if end == height or 4 * total[:, :, : end - first].numel() > STRIP_BYTES:
            count = seen_by(tops, h)[first:end, None] * seen_by(lefts, w)  # of the windows that see a pixel
            yield (total[:, :, : end - first] / count.to(total))[..., :width]
            total, first = total[:, :, end - first :].clone(), end


def seen_by(begins: list[int], side: int) -> torch.Tensor:
    """How many windows, which are `side` long and begin at `begins`, see each row (or column)."""
    count = torch.zeros(begins[-1] + side)
    for start in begins:
        count[start : start + side] += 1
    return count


def upsampled_strips(strips: Iterator[torch.Tensor], size: tuple[int, int], target: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Strips of logits of an image of `size`, as from `window_strips` -> strips (1, N, h, W) of the whole, upsampled to
    `target` (H, W).

    One strip of the whole image goes through `mgd_ops.upsample`. Otherwise the rows are interpolated with the same weights. The
    result is bit-equal for four classes or more on CPUs with fused multiply-add; elsewhere the last bit can differ.
    """
    if size == target:
        yield from strips
        return
    (height, _), (rows, width) = size, target
    kept, first, done = None, 0, 0  # coarse rows from row `first` on; output rows that are made
    for strip in strips:
        if strip.shape[2] == height:
            yield mgd_ops.upsample(strip, target)
            return
        strip = mgd_ops.upsample(strip, (strip.shape[2], width))
        kept = strip if kept is None else torch.cat([kept, strip], 2)
        # output row y lies at y (height - 1) / (rows - 1), rounded as PyTorch does, between the coarse rows above and below
        position = torch.arange(rows, dtype=torch.float32) * (torch.tensor(height - 1.0) / max(1, rows - 1))
        above = position.long().clamp(max=height - 1)
        below = (above + 1).clamp(max=height - 1)
        fraction = (position - above).clamp(0, 1)
        ready = int((below < first + kept.shape[2]).sum())
        block = max(1, STRIP_BYTES // 16 // (4 * strip.shape[1] * width))  # several tensors of this size are alive
        for top in range(done, ready, block):
            part = slice(top, min(top + block, ready))
            weight = fraction[part, None].to(kept.device)
            upper, lower = (kept[:, :, (index[part] - first).to(kept.device)] for index in (above, below))
            yield torch.addcmul(lower * weight, upper, 1 - weight)
        done, end = ready, first + kept.shape[2]
        keep = min(int(above[min(done, rows - 1)]), end)  # the next output row can lie below all that is there
        kept, first = kept[:, :, keep - first :].clone(), keep


@torch.inference_mode()
def predict(model, image: np.ndarray, device, precision: str, protocol: Protocol = WHOLE) -> torch.Tensor:
    """image (H, W, 3) uint8 -> (H, W) uint8 class indices on `device`.

    Logits are upsampled to the image's size; probabilities are averaged over several scales or mirrored images. With sliding
    windows, one scale and no mirroring, the image is predicted in strips, so the memory beside it grows only with its width.
    Otherwise logits or probabilities of the whole image are held.
    """
    size = image.shape[:2]
    labels = torch.empty(size, dtype=torch.uint8, device=device)
    total, views = None, len(protocol.scales) * (1 + protocol.flip)

    def forward(x):
        with autocast(device, precision):
            logits = model(x).logits
        return mgd_ops.upsample(logits, x.shape[2:])

    for scale in protocol.scales:
        scaled = tuple(max(1, round(side * protocol.image_scale * scale)) for side in size)
        resized = image if scaled == size else resize(image, scaled)
        for mirrored in (False, True)[: 1 + protocol.flip]:

            def rows(top, bottom, resized=resized, mirrored=mirrored):
                pixels = torch.from_numpy(np.array(resized[top:bottom])).permute(2, 0, 1)[None]
                x = normalize(pixels, device)
                return x.flip(-1) if mirrored else x

            strips = window_strips(forward, rows, scaled, protocol.window)
            done = 0
            for strip in upsampled_strips((s.flip(-1) for s in strips) if mirrored else strips, scaled, size):
                part = slice(done, done + strip.shape[2])
                done = part.stop
                if views == 1:
                    labels[part] = strip[0].argmax(0)
                    continue
                if total is None:
                    total = strip.new_zeros(1, strip.shape[1], *size)
                total[:, :, part] += strip.softmax(1)
    return labels if total is None else total[0].argmax(0).to(torch.uint8)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 -> (*size, 3) uint8, bilinear with antialiasing."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return v2.functional.resize(pixels, list(size), antialias=True)[0].permute(1, 2, 0).numpy()


def confusion_matrix(prediction: torch.Tensor, mask: torch.Tensor, classes: int) -> torch.Tensor:
    """(N, N) int64: entry ij counts the pixels of class i that were predicted as j; pixels labeled 255 are left out."""
    valid = mask != IGNORE_INDEX
    index = classes * mask[valid].long() + prediction[valid].long()
    return torch.bincount(index, minlength=classes**2).view(classes, classes)


def iou(confusion: torch.Tensor) -> tuple[float, list[float | None]]:
    """mIoU and the IoU of each class, in percent. A class absent from masks and predictions is None and not in the mean.
    Raises UserError where no pixel was compared."""
    if not confusion.any():
        raise UserError(
            "all pixels of the masks are 255, which is ignored, so there is nothing to evaluate; run python prepare.py check"
        )
    hit = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - hit
    values = [100 * float(h / u) if u > 0 else None for h, u in zip(hit, union, strict=True)]
    present = [v for v in values if v is not None]
    return sum(present) / len(present), values


def evaluate(model, dataset, names: Sequence[str], device, precision: str, protocol: Protocol = WHOLE) -> torch.Tensor:
    """The confusion matrix (N, N), int64 on the CPU, of `model` over the images `names`. The mode of `model` is restored.

    Under torch.distributed each rank evaluates a part of the names, and all get the sum.
    """
    was_training = model.training
    model.eval()
    n = len(dataset.classes)
    confusion = torch.zeros(n, n, dtype=torch.int64, device=device)
    rank, ranks = rank_and_size()
    for name in names[rank::ranks]:
        mask = torch.from_numpy(np.array(dataset.mask(name))).to(device)
        prediction = predict(model, dataset.image(name), device, precision, protocol)
        if prediction.shape != mask.shape:
            raise UserError(
                f"{name}: its mask is {tuple(mask.shape)}, its image {tuple(prediction.shape)} (height, width); "
                "image and mask must have the same size"
            )
        confusion += confusion_matrix(prediction, mask, n)
    if ranks > 1:
        torch.distributed.all_reduce(confusion)
    model.train(was_training)
    return confusion.cpu()


def validate(model, dataset, device, args) -> float:
    """mIoU in percent on the data set's val images, as `evaluate.py` computes it."""
    return iou(evaluate(model, dataset, dataset.val, device, args.precision, protocol_of(vars(args))))[0]


def finish_run(args, model, dataset, device, row: dict, save, progress):
    """End a training: save, validate, write OUT/last.pt with its mIoU, and remove OUT/resume.pt. `save(step, path)` writes a
    checkpoint of `model` with its `row`."""
    sync_buffers(model)
    save(args.steps, args.out / "resume.pt")  # so that nothing is lost if the validation fails
    row["miou"] = validate(model, dataset, device, args)
    save(args.steps, args.out / "last.pt")
    if rank_and_size()[0] == 0:
        (args.out / "resume.pt").unlink(missing_ok=True)
    progress.write(step=args.steps, miou=row["miou"])
    progress.close()
    print0(f"{args.out}/last.pt: {row['miou']:.2f} mIoU after {args.steps} steps, {row['seconds']:.0f} s")


def result_row(args, dataset, partition, device, **fields) -> dict:
    """A training's row in result files, still without its mIoU. GMACs are at 512x512."""
    cost = models.measure(args.backbone, args.stem, args.head_width, args.separable_head, len(dataset.classes))
    return {
        "dataset": dataset.name,
        "partition": partition.name,
        "partition_hash": partition.hash,
        "labeled": len(partition.labeled),
        "method": args.method,
        "backbone": args.backbone,
        "head_width": args.head_width,
        "weights": args.weights,
        "crop": list(args.crop),
        "seed": args.seed,
        "steps": args.steps,
        "seconds": 0.0,
        "gmacs_backbone": cost["gmacs_512"],
        "gmacs_model": cost["model_gmacs_512"],
        "mgd_ops": kernels.backend(device.type),
        "code": git_commit(),
        **fields,
    }


def label_of(row: dict) -> str:
    """The name of a run in tables and pictures: `Sup resnet18`, `MGD resnet18`, `CPS resnet34 (T_D)`."""
    role = {"teacher_deep": " (T_D)", "teacher_wide": " (T_W)"}.get(row["role"], "")
    return f"{row['method'].upper() if row['method'] != 'sup' else 'Sup'} {row['backbone']}{role}"


def print_table(rows: list[dict], names: list[str], classes: list[str]):
    """One line per model with the name of its run's folder, then the IoU of each class with one column per model."""
    print(f"\n{'':3} {'model':24} {'part':>5} {'labeled':>7} {'steps':>6} {'seed':>4} {'GMACs':>6} {'mIoU':>6}  run")
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        print(
            f"{chr(97 + i % 26):3} {label_of(row):24} {row['partition']:>5} {row['labeled']:7d} {row['steps']:6d} "
            f"{row['seed']:4d} {row['gmacs_model']:6.1f} {row['miou']:6.2f}  {printable(name)}"
        )
    print(f"\n{'IoU':24}" + "".join(f"{chr(97 + i % 26):>7}" for i in range(len(rows))))
    for name in classes:
        cells = [f"{'-' if row['iou'][name] is None else format(row['iou'][name], '.2f'):>7}" for row in rows]
        print(f"{printable(name):24}" + "".join(cells))
    if absent := [printable(name) for name in classes if all(row["iou"][name] is None for row in rows)]:
        print(f"absent from masks and predictions, not in the mean: {', '.join(absent)}")


def print_seeds(rows: list[dict]):
    """Mean and standard deviation over the seeds, for each model that was trained with more than one."""
    groups = {}
    for row in rows:
        groups.setdefault(str(setting_values(row, GROUP_BY)), {})[row["seed"], str(row.get("teacher_seeds"))] = row
    groups = [list(group.values()) for group in groups.values() if len(group) > 1]
    if groups:
        print("\nover seeds")
    for group in groups:
        row, mious = group[0], [row["miou"] for row in group]
        print(
            f"    {label_of(row):24} {row['partition']:>5} {row['steps']:6d} steps  {np.mean(mious):6.2f} ± "
            f"{np.std(mious, ddof=1):.2f}  ({len(group)} seeds)"
        )


def parse_args(argv=None):
    parser = ArgumentParser(__doc__, usage="%(prog)s --ckpt FILE [FILE ...] [options]")
    path = {"type": pathlib.Path, "metavar": "FILE"}
    parser.add_argument("--ckpt", nargs="+", required=True, help="checkpoints of train_teacher.py or distill.py", **path)
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        metavar="DIR",
        help="folder of the data set (default: as in training)",
    )
    parser.add_argument("--json", help="write a result file (default: none)", **path)
    parser.add_argument("--panels", help="write a PNG: image, ground truth, each model (default: none)", **path)
    parser.add_argument(
        "--panel-rows",
        type=int,
        default=6,
        metavar="IMAGES",
        help="images in the panels, evenly spread over val (default: 6)",
    )
    parser.add_argument("--confusion", help="write a PNG of the first checkpoint's confusion matrix (default: none)", **path)
    parser.add_argument("--overwrite", action="store_true", help="replace files that this project did not write (default: off)")
    add_protocol_arguments(parser)
    args = parser.parse_args(argv)
    if not 1 <= args.panel_rows <= 100:
        raise UserError(f"--panel-rows {args.panel_rows}: must be from 1 to 100")
    check_protocol_arguments(args)
    outputs = (("--json", args.json, ".json"), ("--panels", args.panels, ".png"), ("--confusion", args.confusion, ".png"))
    for flag, path, suffix in outputs:
        if path and (path.is_dir() or path.suffix.lower() != suffix):
            raise UserError(f"{flag} {path}: give a file's name that ends in {suffix}")
    refuse_outputs([(flag, path) for flag, path, _ in outputs], args.ckpt, args.overwrite)
    return args


def open_model(path: pathlib.Path, args, device) -> tuple[dict, models.DeepLabV3Plus, str, Protocol]:
    """A checkpoint, its network, its precision on `device` and its protocol, as changed by --window, --tta-scales, --flip and
    --precision of the command line."""
    checkpoint = load_checkpoint(path)
    protocol = protocol_of(checkpoint["args"])._replace(scales=tuple(args.scales), flip=args.flip)
    if args.window is not None:
        protocol = protocol._replace(window=args.window or None)
    precision = pick_precision(args.precision or checkpoint["args"]["precision"], device)
    return checkpoint, models.model_from_checkpoint(checkpoint).to(device), precision, protocol


def add_protocol_arguments(parser):
    """How a checkpoint sees images, in evaluation and prediction."""
    parser.add_argument("--window", type=window_size, metavar="SIZE", help=f"{WINDOW_HELP} (default: as in training)")
    parser.add_argument(
        "--tta-scales",
        dest="scales",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="FACTOR",
        help="average over these image sizes (default: 1)",
    )
    parser.add_argument("--flip", action="store_true", help="average over mirrored images too (default: off)")
    parser.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="of autocast (default: as in training)")


def check_protocol_arguments(args):
    if not min(args.scales) > 0:
        raise UserError(f"--tta-scales {min(args.scales)}: must be above 0")


def main(argv=None):
    args = parse_args(argv)
    began = time.perf_counter()
    device = init_distributed(args.device)
    main_rank = rank_and_size()[0] == 0

    if args.panels or args.confusion:
        import pictures  # and matplotlib, which trainings do not need

    trained = load_checkpoint(args.ckpt[0])["args"]
    dataset = datasets.open_dataset(trained["dataset"], args.data or trained["data"])
    checks.refuse_faults(dataset, {"val": dataset.val})
    rows, panels = [], []
    shown = dataset.val[:: max(1, len(dataset.val) // args.panel_rows)][: args.panel_rows]
    for path in args.ckpt:
        checkpoint, model, precision, protocol = open_model(path, args, device)
        if checkpoint["classes"] != dataset.classes:
            raise UserError(
                f"{path}: was trained on the classes {', '.join(checkpoint['classes'])}, but the data set has "
                f"{', '.join(dataset.classes)}; give the data set of the training with --data"
            )
        confusion = evaluate(model, dataset, dataset.val, device, precision, protocol)
        miou, ious = iou(confusion)
        rows.append(
            {
                **settings_of(checkpoint["args"]),
                **checkpoint["row"],
                "miou": miou,
                "iou": dict(zip(dataset.classes, ious, strict=True)),
                "params_m": sum(p.numel() for p in model.parameters()) / 1e6,
                "window": protocol.window,
                "scales": protocol.scales,
                "flip": protocol.flip,
            }
        )
        if not main_rank:
            continue
        if args.panels and rows[-1]["seed"] == rows[0]["seed"]:  # one seed is enough to look at
            masks = [predict(model, dataset.image(name), device, precision, protocol).cpu().numpy() for name in shown]
            panels.append((f"{label_of(rows[-1])}\n{rows[-1]['steps']} steps: {miou:.1f} mIoU", masks))
        if args.confusion and len(rows) == 1:
            pictures.draw_confusion(args.confusion, confusion, dataset.classes, f"{label_of(rows[0])}: {miou:.1f} mIoU")
    if not main_rank:
        return
    print_table(rows, [path.resolve().parent.name for path in args.ckpt], dataset.classes)
    print_seeds(rows)
    if args.json:
        ops = "+".join(sorted({row["mgd_ops"] for row in rows}))  # of the trainings
        write_result(args.json, "evaluation", rows, time.perf_counter() - began, ops)
        print(f"\nresults: {args.json}")
    if args.panels:
        pictures.draw_panels(args.panels, dataset, shown, panels)
        print(f"panels: {args.panels}")
    if args.confusion:
        print(f"confusion matrix: {args.confusion}")


if __name__ == "__main__":
    cli(main)
