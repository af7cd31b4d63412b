"""Evaluate checkpoints and exported models: mIoU and the IoU of each class, as a
table, as JSON, and as pictures.

    python evaluate.py --ckpt runs/shapes/1-8/mgd-r18/last.pt
    python evaluate.py --ckpt A/last.pt B/last.pt --json ab.json --panels ab.png
    python evaluate.py --ckpt A/last.pt model.onnx
    python evaluate.py --ckpt A/last.pt --list data/mine/test.txt
    torchrun --nproc-per-node 4 evaluate.py --ckpt A/last.pt

The same `evaluate` validates during training, so the numbers cannot differ.
Images are seen as in the training's validation (whole, or in the sliding
windows of its --window), at one scale and not mirrored unless told otherwise.
Predictions are compared at the size of the mask. Under torchrun the images are
shared out. --list evaluates the images that a file names, such as a test set,
in place of the val images; each needs a mask.
"""

import pathlib
import time
from collections.abc import Sequence

import numpy as np
import torch

import checks
import datasets
import kernels
import models
from common import (
    IGNORE_INDEX,
    ArgumentParser,
    UserError,
    cli,
    init_distributed,
    print0,
    printable,
    rank_and_size,
    sync_buffers,
)
from inference import (
    WHOLE,
    Protocol,
    add_protocol_arguments,
    check_protocol_arguments,
    load_trained,
    open_model,
    params_m,
    predict,
    protocol_of,
)
from logit_adjustment import adjust_logits
from onnx_model import is_exported
from result_files import GROUP_BY, git_commit, refuse_outputs, setting_values, settings_of, write_result
from run_folder import PREVIOUS, RESUME


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
    was_training = isinstance(model, torch.nn.Module) and model.training
    if was_training:
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
    if was_training:
        model.train()
    return confusion.cpu()


def validate(model, dataset, device, args) -> float:
    """mIoU in percent on the data set's val images, as `evaluate.py` computes it."""
    return iou(evaluate(model, dataset, dataset.val, device, args.precision, protocol_of(vars(args))))[0]


def validate_step(args, step: int, model, dataset, device, progress, signals):
    """Validate before step `step` begins, so that a run that was stopped in the middle of it repeats it."""
    sync_buffers(model)
    with signals.may_interrupt():
        miou = validate(model, dataset, device, args)
    progress.validated(step, miou)


def finish_run(args, model, dataset, partition, device, row: dict, save, progress, signals):
    """End a training: save, adjust the logits, validate, write OUT/last.pt with its mIoU, and remove the resume points.
    `save(step, path)` writes a checkpoint of `model` with its `row`."""
    sync_buffers(model)
    save(args.steps, args.out / RESUME)  # so that nothing is lost if what follows fails
    with signals.may_interrupt():
        if args.logit_adjustment:
            adjust_logits(model, dataset, partition.labeled, args.logit_adjustment)
        row["miou"] = validate(model, dataset, device, args)
    save(args.steps, args.out / "last.pt")
    progress.write(step=args.steps, miou=row["miou"])
    progress.close()
    if rank_and_size()[0] == 0:
        for name in (PREVIOUS, RESUME):  # the newest one last: without one, the run counts as finished
            (args.out / name).unlink(missing_ok=True)
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
    export = f" ONNX {row['export']}" if row.get("export") else ""
    return f"{row['method'].upper() if row['method'] != 'sup' else 'Sup'} {row['backbone']}{role}{export}"


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
    parser.add_argument(
        "--ckpt",
        nargs="+",
        required=True,
        help="checkpoints of train_teacher.py or distill.py, or .onnx files of export.py",
        **path,
    )
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        metavar="DIR",
        help="folder of the data set (default: as in training)",
    )
    parser.add_argument("--list", help="names the images to evaluate, one per line (default: those of val)", **path)
    parser.add_argument("--json", help="write a result file (default: none)", **path)
    parser.add_argument("--panels", help="write a PNG: image, ground truth, each model (default: none)", **path)
    parser.add_argument(
        "--panel-rows",
        type=int,
        default=6,
        metavar="IMAGES",
        help="images in the panels, evenly spread over those evaluated (default: 6)",
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
    refuse_outputs([(flag, path) for flag, path, _ in outputs], [*args.ckpt, *filter(None, [args.list])], args.overwrite)
    return args


def main(argv=None):
    args = parse_args(argv)
    began = time.perf_counter()
    device = init_distributed(args.device)
    main_rank = rank_and_size()[0] == 0

    if args.panels or args.confusion:
        import pictures  # and matplotlib, which trainings do not need

    trained = load_trained(args.ckpt[0])["args"]
    dataset = datasets.open_dataset(trained["dataset"], args.data or trained.get("data"))
    names, listed = dataset.val, None
    if args.list:
        names = datasets.read_masked_names(args.list, dataset, {*dataset.images, *dataset.train, *dataset.val})
        hash = datasets.digest("\n".join(sorted(names)))
        listed = f"{args.list.stem} ({hash})"
    checks.refuse_faults(dataset, {"listed" if args.list else "val": names})
    rows, panels = [], []
    shown = names[:: max(1, len(names) // args.panel_rows)][: args.panel_rows]
    for path in args.ckpt:
        checkpoint, model, precision, protocol = open_model(path, args, device)
        if checkpoint["classes"] != dataset.classes:
            raise UserError(
                f"{path}: was trained on the classes {', '.join(checkpoint['classes'])}, but the data set has "
                f"{', '.join(dataset.classes)}; give the data set of the training with --data"
            )
        if main_rank and checkpoint["row"].get("dataset", dataset.name) != dataset.name:
            print(f"note: {path} was trained on {printable(checkpoint['row']['dataset'])}, not on {printable(dataset.name)}")
        confusion = evaluate(model, dataset, names, device, precision, protocol)
        miou, ious = iou(confusion)
        rows.append(
            {
                **settings_of(checkpoint["args"]),
                **checkpoint["row"],
                "dataset": dataset.name,
                "miou": miou,
                "iou": dict(zip(dataset.classes, ious, strict=True)),
                "params_m": params_m(model),
                "export": precision if is_exported(path) else None,
                "window": protocol.window,
                "scales": protocol.scales,
                "flip": protocol.flip,
                "list": listed,
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
    if args.list:
        print(f"{printable(args.list)}: {len(names)} images, in place of the {len(dataset.val)} val images")
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
