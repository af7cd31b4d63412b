r"""Distil frozen teachers, one or two, into a light student.

    python distill.py --out runs/shapes/1-8/mgd-r18 --student r18 \
        --deep runs/shapes/1-8/teacher-deep/last.pt \
        --wide runs/shapes/1-8/teacher-wide/last.pt
    python distill.py --out runs/shapes/1-8/cwd-r18 --method cwd \
        --deep runs/shapes/1-8/teacher-deep/last.pt

--method mgd    the losses of the paper's Eq. 7. On labeled images: cross
                entropy with the ground truth (Eq. 1) and with the teachers'
                pseudo labels (Eq. 2). On CutMix views of unlabeled images:
                cross entropy with the teachers' pseudo labels (Eq. 2), the
                image-level loss against the deep teacher T_D (Eq. 4) and the
                region-level loss against the wide teacher T_W (Eq. 6).
                --losses chooses among them.
--method kd     cross entropy with the ground truth, and, on labeled images and
                views, the divergence from the teachers' softened class
                probabilities (Hinton, Vinyals & Dean 2015)
--method cwd    the same with the channel-wise divergence over space (Shu et
                al. 2021)
"""

import collections
import functools
import pathlib
import sys
import time
from typing import NamedTuple

import torch

import datasets
import evaluate
import events
import kernels
import mgd_ops
import models
import recipes
from batches import Batch, images_of_step, micro_batches, seed_of, step_batches, train_batches, valid_pixels
from common import (
    IGNORE_INDEX,
    ArgumentParser,
    UserError,
    autocast,
    cli,
    compiled,
    distribute,
    due,
    init_distributed,
    maybe_no_sync,
    parameter_groups,
    pick_precision,
    poly_lr,
    print0,
    print_plan,
    set_lr,
)
from finite_steps import FiniteSteps
from run_folder import Progress, load_for_resume, load_network, plain_args, restore, save_checkpoint, save_or_stop, states
from stop_signals import StopSignals

LOSSES = ("sup", "pixel", "pixel:labeled", "pixel:unlabeled", "image:T_D", "image:T_W", "region:T_D", "region:T_W")
# Each term of a method's loss, and the flag that weights it (Eq. 7); None: 1.
WEIGHTS = {
    "sup": None,
    "pixel_l": None,
    "pixel_u": None,
    "image": "lambda_image",
    "region": "lambda_region",
    "kd": "kd_weight",
    "cwd": "kd_weight",
}


def parse_args(argv=None):
    parser = ArgumentParser(__doc__, usage="%(prog)s --out DIR --deep CKPT --wide CKPT [options]")
    parser.add_argument("--method", choices=recipes.STUDENT_METHODS, default="mgd", help="see above (default: mgd)")
    parser.add_argument(
        "--student",
        "--backbone",
        dest="backbone",
        default="resnet18",
        metavar="NAME",
        help=f"{', '.join(models.ALIASES)} (default: r18)",
    )
    parser.add_argument("--deep", type=pathlib.Path, metavar="CKPT", help="checkpoint of the deep teacher T_D (default: none)")
    parser.add_argument(
        "--wide",
        type=pathlib.Path,
        metavar="CKPT",
        help="checkpoint of the second teacher T_W; any backbone (default: none)",
    )
    parser.add_argument(
        "--losses",
        nargs="+",
        metavar="LOSS",
        help=f"mgd: some of {', '.join(LOSSES)} (default: sup, pixel, the image term of T_D and the region term of T_W, or of "
        "the one teacher that is given)",
    )
    recipes.add_flags(parser, recipes.STUDENT_METHODS)
    args = parser.parse_args(argv)
    args.backbone = models.canonical_name(args.backbone, "--student")
    args.losses = chosen_losses(args)
    used = {flag for term, flag in WEIGHTS.items() if any(loss.startswith(term) for loss in args.losses)}
    for flag in sorted({*filter(None, WEIGHTS.values())} - used):
        if getattr(args, flag) != parser.get_default(flag):
            given = f"--{flag.replace('_', '-')} {getattr(args, flag)}"
            print(f"note: {given} has no effect: the losses are {' '.join(args.losses)}", file=sys.stderr)
    recipes.fill_from_recipe(args, "student")
    return args


def chosen_losses(args) -> list[str]:
    """The losses of the arguments, with `pixel` for both of its halves. Raises UserError for combinations without a meaning."""
    teachers = [role for role, path in (("T_D", args.deep), ("T_W", args.wide)) if path]
    if not teachers:
        raise UserError("a teacher is needed: give --deep FILE, --wide FILE or both (train_teacher.py makes them)")
    if args.method != "mgd":
        if args.losses:
            raise UserError(f"--losses: is for --method mgd; {args.method} has losses of its own")
        return ["sup", args.method]
    names = args.losses or ["sup", "pixel", f"image:{teachers[0]}", f"region:{teachers[-1]}"]
    given = f"--losses {' '.join(names)}"
    for name in names:
        if name not in LOSSES:
            raise UserError(f"--losses: unknown loss '{name}'; choose from {', '.join(LOSSES)}")
        if name.partition(":")[2] in {"T_D", "T_W"} - {*teachers}:
            raise UserError(f"{given}: '{name}' needs that teacher; give {'--deep' if 'T_D' in name else '--wide'} FILE")
    halves = {"pixel:labeled", "pixel:unlabeled"}
    if len({*names}) < len(names) or ("pixel" in names and halves & {*names}):
        raise UserError(f"{given}: names a loss twice ('pixel' is both of its halves)")
    if "sup" not in names:
        raise UserError(f"{given}: the ground truth of the labeled images is always used; add sup")
    if names == ["sup"]:
        raise UserError(f"{given}: uses no teacher; that is train_teacher.py --method sup")
    for role in teachers:
        if not any(name.startswith("pixel") or name.endswith(role) for name in names):
            raise UserError(f"{given}: uses nothing of {role}; leave {'--deep' if role == 'T_D' else '--wide'} out")
    if halves <= {*names}:
        names = ["pixel", *(name for name in names if name not in halves)]
    return sorted(names, key=LOSSES.index)


def load_teacher(path, dataset, args, device):
    """A frozen teacher in evaluation mode, and its checkpoint. Raises UserError where it does not fit the data set."""
    checkpoint = load_network(path)
    classes, scale = checkpoint["classes"], checkpoint["args"]["image_scale"]
    if classes != dataset.classes:
        difference = f"{len(classes)} classes, but the data set has {len(dataset.classes)}"
        if len(classes) == len(dataset.classes):
            difference = f"other classes ({', '.join(classes)})"
        raise UserError(f"{path}: this teacher has {difference}; train the teachers on this data set")
    if scale != args.image_scale:
        raise UserError(
            f"{path}: this teacher was trained with --image-scale {scale}, not {args.image_scale}; teachers and student must "
            "see images of the same size"
        )
    return models.model_from_checkpoint(checkpoint, path).to(device).requires_grad_(False), checkpoint


def set_batch_norm_training(teacher):
    """Normalize with the statistics of each batch, and leave the stored ones as they are (`--teacher-bn train`)."""
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
            module.track_running_stats = False


class TeacherOutputs(NamedTuple):
    """Of one teacher for one micro-batch of m labeled images and m mixed views; what the losses do not need is None."""

    pseudo_labels_l: torch.Tensor | None  # (m, H, W) int64, of the labeled images
    pseudo_labels_u: torch.Tensor | None  # (m, H, W) int64, of the clean views, mixed as the views are
    labeled: models.Output | None  # logits (m, N, h, w) and features (m, C, h, w) of the labeled images, h = H/4
    mixed: models.Output | None  # of the mixed views


BATCH_PIXELS = 2**17  # one teacher forward takes at most this many pixels, but at least one input of a micro-batch


def needed_outputs(method: str, losses: list[str], role: str) -> set[str]:
    """Which fields of the `TeacherOutputs` of teacher `role` the losses need."""
    if method != "mgd":
        return {"labeled", "mixed"}
    fields = {
        "pixel": {"pseudo_labels_l", "pseudo_labels_u"},
        "pixel:labeled": {"pseudo_labels_l"},
        "pixel:unlabeled": {"pseudo_labels_u"},
        f"image:{role}": {"mixed"},
        f"region:{role}": {"mixed"},
    }
    return set().union(*(fields.get(loss, ()) for loss in losses))


def needed_forwards(needed: set[str], cutmix: bool, mixed_terms: str) -> tuple[bool, bool, bool]:
    """Whether a teacher has to see the labeled images, the clean views and the mixed views for the outputs `needed`."""
    mixed = "mixed" in needed and cutmix and mixed_terms == "mixed"
    clean = "pseudo_labels_u" in needed or ("mixed" in needed and not mixed)
    return bool(needed & {"pseudo_labels_l", "labeled"}), clean, mixed


def uses_views(losses: list[str]) -> bool:
    """Whether any loss is on unlabeled images."""
    return losses != ["sup", "pixel:labeled"]


def teacher_outputs(teacher, batch: Batch, needed: set[str], *, teacher_bn="eval", mixed_terms="mixed") -> TeacherOutputs:
    """Run a teacher for the outputs `needed`. Where a labeled image or a mixed view is ignored, its pseudo labels are 255: no
    pixel without ground truth, or outside its image, takes part in Eq. 2.

    Small crops run in one forward. Large crops run one input at a time: a step then needs a fifth less memory, and is a fifth
    slower on two CPU cores. With batch norm in training mode the released code's separate batches matter. With
    `mixed_terms="clean"` the mixed views are not run: their outputs are those of the clean views, mixed.
    """
    m, size = len(batch.images), batch.images.shape[-2:]
    run_labeled, run_clean, run_mixed = needed_forwards(needed, batch.cutmix_mask is not None, mixed_terms)
    inputs = [batch.images] if run_labeled else []
    inputs += batch.views.split(m) if run_clean else []
    inputs += [batch.mixed] if run_mixed else []
    at_once = 1 if teacher_bn == "train" else max(1, BATCH_PIXELS // (m * size.numel()))
    outputs = []
    with torch.inference_mode():
        for i in range(0, len(inputs), at_once):
            logits, features = teacher(torch.cat(inputs[i : i + at_once]))
            outputs += map(models.Output, logits.split(m), features.split(m))
    labeled = outputs.pop(0) if run_labeled else None
    mixed = outputs.pop() if run_mixed else None
    if mixed is None and "mixed" in needed:
        mixed = models.Output(*(batch.mix(torch.cat(maps)) for maps in zip(*outputs, strict=True)))
    pseudo_labels_l = pseudo_labels_u = None
    if "pseudo_labels_l" in needed:
        labels = mgd_ops.upsampled_argmax(labeled.logits, size)
        pseudo_labels_l = labels.masked_fill(batch.labels == IGNORE_INDEX, IGNORE_INDEX)
    if "pseudo_labels_u" in needed:  # maps of labels can be mixed as well as maps of logits: each pixel is of one view
        labels = mgd_ops.upsampled_argmax(torch.cat([output.logits for output in outputs]), size)
        pseudo_labels_u = batch.mix(labels).masked_fill(batch.mixed_ignore, IGNORE_INDEX)
    return TeacherOutputs(pseudo_labels_l, pseudo_labels_u, labeled if "labeled" in needed else None, mixed)


def mgd_losses(
    labeled, mixed, labels, teachers: dict[str, TeacherOutputs], normalizer, *, losses, ohem, regions=7, image_reduction="sum"
) -> dict:
    """The terms of Eq. 7 that are in `losses`, without their weights.

    labeled, mixed: the student's `Output` for the labeled images and the mixed views (None where no loss is on them); labels
    (m, H, W); the outputs of T_D, T_W or both; `normalizer` for the labeled images and, where a loss is on them, the mixed
    views (see `batches.valid_pixels`).
    """
    maps = [] if ohem else [labels]
    maps += [teacher.pseudo_labels_l for teacher in teachers.values()] if {"pixel", "pixel:labeled"} & {*losses} else []
    entropies = mgd_ops.pixel_cross_entropies(labeled.logits, maps, [normalizer[0]] * len(maps))
    terms = {"sup": mgd_ops.ohem_cross_entropy(labeled.logits, labels) if ohem else entropies.pop(0)}  # Eq. 1
    if entropies:
        terms["pixel_l"] = sum(entropies)  # Eq. 2
    if {"pixel", "pixel:unlabeled"} & {*losses}:
        maps = [teacher.pseudo_labels_u for teacher in teachers.values()]
        terms["pixel_u"] = sum(mgd_ops.pixel_cross_entropies(mixed.logits, maps, [normalizer[1]] * len(maps)))  # Eq. 2
    for role, teacher in teachers.items():
        if f"image:{role}" in losses:  # Eq. 4
            term = mgd_ops.image_loss(mixed.logits, teacher.mixed.logits, labels.shape[-2:], image_reduction)
            terms["image"] = terms.get("image", 0.0) + term
        if f"region:{role}" in losses:  # Eq. 6
            term = mgd_ops.region_loss(mixed.features, teacher.mixed.features, regions)
            terms["region"] = terms.get("region", 0.0) + term
    return terms


def kd_loss(student, teacher, temperature: float):
    """Knowledge distillation (Hinton, Vinyals & Dean 2015), pixel by pixel: T² · KL(softmax(teacher/T) ‖ softmax(student/T))
    over the classes, mean over pixels and batch; the T² keeps the gradient's size as T changes.

    student, teacher: logits (B, N, h, w), float32 or float64 -> scalar.
    """
    log_p, log_q = ((logits / temperature).log_softmax(1) for logits in (teacher, student))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean()


def cwd_loss(student, teacher, temperature: float):
    """Channel-wise distillation (Shu et al. 2021): T² · KL(φ(teacher) ‖ φ(student)), φ the softmax over the
    pixels of a channel at temperature T; mean over the channels and the batch.

    student, teacher: logits (B, N, h, w), float32 or float64 -> scalar.
    """
    log_p, log_q = ((logits.flatten(2) / temperature).log_softmax(2) for logits in (teacher, student))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(2).mean()


def kd_losses(labeled, mixed, labels, teachers: dict[str, TeacherOutputs], normalizer, *, method, ohem, temperature) -> dict:
    """The terms of --method kd or cwd, without their weights; arguments as of `mgd_losses`.

    The divergence is taken between coarse logits, and added up over the teachers, and over labeled images and mixed views.
    """
    divergence = kd_loss if method == "kd" else cwd_loss
    supervised_loss = mgd_ops.ohem_cross_entropy if ohem else mgd_ops.pixel_cross_entropy
    pairs = [(labeled, t.labeled) for t in teachers.values()] + [(mixed, t.mixed) for t in teachers.values()]
    return {
        "sup": supervised_loss(labeled.logits, labels, normalizer[0]),
        method: sum(divergence(ours.logits, theirs.logits, temperature) for ours, theirs in pairs),
    }


def weighted_sum(terms: dict, weights: dict[str, float]):
    """Eq. 7. A term without a row in `WEIGHTS` is an error, and never weighted silently."""
    return sum(weights[name] * term for name, term in terms.items())


def gradient_norms(terms: dict, weights: dict[str, float], student) -> dict[str, float]:
    """The norm, over all weights of the student, of the gradient of each weighted term and of their sum, `loss`, as
    `grad_NAME`; the graph is kept."""
    norms = {}
    for name, term in {**terms, "loss": weighted_sum(terms, weights)}.items():
        gradients = torch.autograd.grad(term, list(student.parameters()), retain_graph=True, allow_unused=True)
        gradients = [gradient for gradient in gradients if gradient is not None]
        norms[f"grad_{name}"] = weights.get(name, 1.0) * float(torch.nn.utils.get_total_norm(gradients))
    return norms


def labels_of_teachers(rows, partition) -> str:
    """Which labels the teachers saw: `partition` for the student's own, `all`, or the name of their partition."""
    if all(row["partition_hash"] == partition.hash for row in rows):
        return "partition"
    names = " ".join(sorted({row["partition"] for row in rows}))
    return "all" if names == "1" else names


def main(argv=None):
    args = parse_args(argv)
    events.check_tensorboard(args)
    device = init_distributed(args.device)
    torch.backends.cudnn.benchmark = True  # crops are of one size
    args.precision = pick_precision(args.precision, device)
    kernels.load_kernels()
    on_views = uses_views(args.losses)
    dataset, partition = datasets.open_training_data(args, unlabeled=on_views)
    resumed = load_for_resume(args, dataset, partition)

    teachers, teacher_rows = {}, {}
    for role, path in (("T_D", args.deep), ("T_W", args.wide)):
        if path is None:
            continue
        teacher, checkpoint = load_teacher(path, dataset, args, device)
        row = checkpoint["row"]
        miou = evaluate.validate(teacher, dataset, device, args)
        print0(f"{role} {row['method']} {row['backbone']}: {miou:.2f} mIoU on val ({path})")
        if checkpoint["partition"]["hash"] != partition.hash:
            print0(
                f"note: {path} was trained on partition {checkpoint['partition']['name']} "
                f"({checkpoint['partition']['hash']}), the student's is {partition.name} ({partition.hash})"
            )
        if args.teacher_bn == "train":
            set_batch_norm_training(teacher)
        else:
            teacher = models.fold_batch_norm(teacher, args.precision)
        teachers[role], teacher_rows[role] = compiled(teacher, args, device), row
    if resumed and resumed.get("teachers") != list(teacher_rows.values()):
        raise UserError(
            f"{args.out / 'resume.pt'}: was trained with different teachers than --deep and --wide; give another --out, or "
            "delete it to start again"
        )
    needed = {role: needed_outputs(args.method, args.losses, role) for role in teachers}
    weights = {term: 1.0 if flag is None else getattr(args, flag) for term, flag in WEIGHTS.items()}  # of Eq. 7
    if args.method == "mgd":
        losses_of = functools.partial(
            mgd_losses,
            losses=args.losses,
            ohem=args.ohem,
            regions=args.regions,
            image_reduction=args.image_reduction,
        )
    else:
        losses_of = functools.partial(kd_losses, method=args.method, ohem=args.ohem, temperature=args.temperature)

    torch.manual_seed(seed_of(args.seed, 20))
    student = models.model_from_args(vars(args), len(dataset.classes), args.weights).to(device).train()
    optimizer = torch.optim.SGD(parameter_groups(student, args.weight_decay), lr=args.lr, momentum=0.9, fused=True)
    activations = models.activation_bytes(student, micro_batches(args)[1], args.crop, args.precision, whole=args.ohem)
    # 12 bytes: float32 weights, gradients and momentum
    memory = 12 * sum(p.numel() for p in student.parameters()) + (1 + on_views) * activations
    more = f", {' + '.join(args.losses)}, ops {kernels.backend(device.type)}"
    print_plan(args, device, partition, on_views, memory, more)
    start, seconds = restore(resumed, {"model": student}, [optimizer])
    ddp_model = compiled(
        distribute(student), args, device, retain_graph=args.grad_norms
    )  # what the steps run; `student` is validated and saved

    labeled = train_batches(dataset, partition.labeled, args, 1, start, labeled=True)
    views = on_views * (2 if args.cutmix else 1)
    unlabeled = train_batches(dataset, partition.unlabeled, args, views, start, labeled=False) if on_views else None

    row = evaluate.result_row(
        args,
        dataset,
        partition,
        device,
        role="student",
        losses=args.losses,
        teachers=[*teacher_rows],
        teacher_roles=[row["role"] for row in teacher_rows.values()],
        teacher_backbones=[row["backbone"] for row in teacher_rows.values()],
        teacher_methods=[row["method"] for row in teacher_rows.values()],
        teacher_steps=[row["steps"] for row in teacher_rows.values()],
        teacher_seeds=[row["seed"] for row in teacher_rows.values()],
        teacher_labels=labels_of_teachers(teacher_rows.values(), partition),
        regions=args.regions if any(loss.startswith("region") for loss in args.losses) else None,
    )
    checkpoint = {
        "args": plain_args(args),
        "classes": dataset.classes,
        "palette": dataset.palette,
        "partition": partition._asdict(),
        "row": row,
        "teachers": list(teacher_rows.values()),
    }

    def save(step, path):
        row["seconds"] = round(seconds + time.perf_counter() - began, 1)
        save_checkpoint(path, {**checkpoint, **states(path, {"model": student}, [optimizer]), "step": step})

    finite_steps = FiniteSteps([student], [optimizer])
    board = events.Events(args, dataset, device, start)
    progress = Progress(args, start, functools.partial(images_of_step, args, partition), board)
    next_labeled = functools.partial(progress.next_batch, labeled)
    next_unlabeled = functools.partial(progress.next_batch, unlabeled) if on_views else None
    began = time.perf_counter()
    signals = StopSignals()
    for step in range(start, args.steps):
        if step and due(step - 1, args.val_every, args.steps):
            board.panels(step, student)
            evaluate.validate_step(args, step, student, dataset, device, progress, signals)
        lr = poly_lr(step, args.steps, args.lr)
        set_lr([optimizer], lr)
        finite_steps.begin()

        # All teachers come first, since cross entropies are divided by the valid pixels of the whole batch.
        batches = step_batches(args, step, device, next_labeled, next_unlabeled)
        with autocast(device, args.precision):
            outputs = [
                {
                    role: teacher_outputs(
                        teacher, batch, needed[role], teacher_bn=args.teacher_bn, mixed_terms=args.mixed_terms
                    )
                    for role, teacher in teachers.items()
                }
                for batch in batches
            ]
        normalizer = valid_pixels(
            [[batch.labels == IGNORE_INDEX, *([batch.mixed_ignore] if on_views else [])] for batch in batches]
        )

        losses = collections.Counter()
        for k, (batch, teacher) in enumerate(zip(batches, outputs, strict=True)):
            with maybe_no_sync(ddp_model, last=k + 1 == len(batches)):
                with autocast(device, args.precision):
                    of_labeled = ddp_model(batch.images)
                    of_mixed = ddp_model(batch.mixed) if on_views else None
                terms = losses_of(of_labeled, of_mixed, batch.labels, teacher, normalizer)
                if args.grad_norms and k == 0 and (step + 1) % args.log_every == 0:  # of the first micro-batch
                    progress.write(step=step + 1, **gradient_norms(terms, weights, student))
                loss = weighted_sum(terms, weights)  # Eq. 7
                (loss / len(batches)).backward()
            for name, term in {**terms, "loss": loss}.items():
                losses[name] += term.detach() / len(batches)
        losses = finite_steps.check(losses)
        optimizer.step()

        progress.step(step, args.batch * (1 + views), lr, losses, finite_steps.skipped)
        save_or_stop(args, step, save, progress, signals)
    evaluate.finish_run(args, student, dataset, device, row, save, progress, signals)
    board.panels(args.steps, student)
    board.close()


if __name__ == "__main__":
    cli(main)
