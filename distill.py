r"""Distil frozen teachers, one or two, into a light student.

    python distill.py --out runs/shapes/1-8/mgd-r18 --student r18 \
        --deep runs/shapes/1-8/teacher-deep/last.pt \
        --wide runs/shapes/1-8/teacher-wide/last.pt
    python distill.py --out runs/shapes/1-8/cwd-r18 --method cwd \
        --deep runs/shapes/1-8/teacher-deep/last.pt
    python distill.py --out runs/mine/1/files-r18 --dataset folder \
        --data data/mine --part 1 --pseudo-labels predictions/masks

--method mgd    the losses of the paper's Eq. 7. On labeled images: cross
                entropy with the ground truth (Eq. 1) and with the teachers'
                pseudo labels (Eq. 2). On CutMix views of unlabeled images:
                cross entropy with the teachers' pseudo labels (Eq. 2), the
                image-level loss against the deep teacher T_D (Eq. 4) and the
                region-level loss against the wide teacher T_W (Eq. 6).
                --losses chooses among them.
--method mgd+   the same with --logit-adjustment 0.3; the flag works with the
                other methods too
--method kd     cross entropy with the ground truth, and, on labeled images and
                views, the divergence from the teachers' softened class
                probabilities (Hinton, Vinyals & Dean 2015)
--method cwd    the same with the channel-wise divergence over space (Shu et
                al. 2021)

--pseudo-labels DIR is a teacher of the pixel level (Eq. 2) that any model can
be: an image's DIR/NAME.png holds a class index per pixel, and 255 where there
is none. It is used alone, or beside the teachers of --deep and --wide.
"""

import collections
import functools
import pathlib
import sys
import time

import torch
from torch.optim.swa_utils import AveragedModel

import backbones
import datasets
import depthwise
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
from distill_losses import (
    LEVELS,
    LOSSES,
    WEIGHTS,
    RelativeWeights,
    TeacherOutputs,
    chosen_losses,
    gradient_norms,
    halves_of_pixel,
    kd_losses,
    lambda_factor,
    mgd_losses,
    needed_outputs,
    uses_views,
    weighted_sum,
)
from finite_steps import FiniteSteps
from run_folder import Progress, load_for_resume, load_network, plain_args, restore, save_checkpoint, save_or_stop, states
from step_time import Pass, print_duration
from stop_signals import StopSignals


def parse_args(argv=None):
    parser = ArgumentParser(__doc__, usage="%(prog)s --out DIR --deep CKPT --wide CKPT [options]")
    parser.add_argument("--method", choices=recipes.STUDENT_METHODS, default="mgd", help="see above (default: mgd)")
    parser.add_argument(
        "--student",
        "--backbone",
        dest="backbone",
        metavar="NAME",
        help=f"{', '.join(backbones.ALIASES)} (default: r18; el0 with --recipe light)",
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
    args.backbone = backbones.canonical_name(args.backbone or recipes.recipe_of(args)["backbone"], "--student")
    args.losses = chosen_losses(args)
    given = [flag for flag in vars(args) if getattr(args, flag) != parser.get_default(flag)]
    recipes.fill_from_recipe(args, "student")
    levels = [level for level in LEVELS if any(loss.startswith(level) for loss in args.losses)]
    if args.lambda_relative and levels:
        if not {"pixel", "pixel:unlabeled"} & {*args.losses}:
            raise UserError(
                "--lambda-relative: is relative to the pixel level on views; add pixel to --losses, or leave it out"
            )
        if args.compile:
            raise UserError("--lambda-relative: does not work with --compile; leave one of them out")
    for flag, why in without_effect(args).items():
        if flag in given:
            print(f"note: {as_typed(flag, getattr(args, flag))} has no effect{why}", file=sys.stderr)
    if not steps_with_teachers(args):
        raise UserError(f"--refine {args.refine}: leaves none of the {args.steps} steps to the teachers; lower it")
    for flag in OFF_BY_DEFAULT:
        if getattr(args, flag) in (0, False, "constant"):  # off, as where the flag is left out
            setattr(args, flag, None)
    return args


def as_typed(flag: str, value) -> str:
    """A flag and its value as on a command line."""
    name = flag.replace("_", "-")
    return f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name} {value}"


def steps_with_teachers(args) -> int:
    """How many steps the teachers take part in, the first ones; the others are those of --refine."""
    return args.steps - round((args.refine or 0.0) * args.steps)


OFF_BY_DEFAULT = (
    "logit_adjustment",
    "ema_decay",
    "conf_thresh",
    "soft_labels",
    "refine",
    "strong_views",
    "lambda_relative",
    "lambda_schedule",
)
OF_NETWORKS = ("conf_thresh", "soft_labels", "teacher_bn", "mixed_terms")  # what files are not asked for


def without_effect(args) -> dict[str, str]:
    """The flags that change nothing in a run with these arguments, and why."""

    def unused(*begins):
        return not any(loss.startswith(begins) for loss in args.losses)

    of_losses = {flag for term, flag in WEIGHTS.items() if flag and unused(term)}
    of_losses -= {flag for term, flag in WEIGHTS.items() if not unused(term)}
    of_losses |= {"conf_thresh", "soft_labels"} if unused("pixel") else set()
    of_losses |= set() if uses_views(args.losses) else {"strong_views"}
    of_losses |= {"lambda_schedule", "lambda_relative"} if unused(*LEVELS) else set()
    beside = {"lambda_image": " beside --lambda-relative", "lambda_region": " beside --lambda-relative"}
    found = beside if args.lambda_relative else {}
    if not (args.deep or args.wide):
        found |= dict.fromkeys(OF_NETWORKS, ": --pseudo-labels is the only teacher")
    return found | {flag: f": the losses are {' '.join(args.losses)}" for flag in sorted(of_losses)}


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


BATCH_PIXELS = 2**17  # one teacher forward takes at most this many pixels, but at least one input of a micro-batch


def needed_forwards(needed: set[str], cutmix: bool, mixed_terms: str) -> tuple[bool, bool, bool]:
    """Whether a teacher has to see the labeled images, the clean views and the mixed views for the outputs `needed`."""
    mixed = "mixed" in needed and cutmix and mixed_terms == "mixed"
    clean = bool(needed & {"pseudo_labels_u", "clean"}) or ("mixed" in needed and not mixed)
    return bool(needed & {"pseudo_labels_l", "labeled"}), clean, mixed


def teacher_outputs(
    teacher, batch: Batch, needed: set[str], *, teacher_bn="eval", mixed_terms="mixed", threshold=0.0
) -> TeacherOutputs:
    """Run a teacher for the outputs `needed`. Where a labeled image or a mixed view is ignored, its pseudo labels are 255: no
    pixel without ground truth, or outside its image, takes part in Eq. 2. Neither does one of a probability below `threshold`.

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
    clean = torch.cat([output.logits for output in outputs]) if needed & {"pseudo_labels_u", "clean"} else None
    pseudo_labels_l = pseudo_labels_u = None
    if "pseudo_labels_l" in needed:
        labels = mgd_ops.upsampled_argmax(labeled.logits, size, threshold)
        pseudo_labels_l = labels.masked_fill(batch.labels == IGNORE_INDEX, IGNORE_INDEX)
    if "pseudo_labels_u" in needed:  # maps of labels can be mixed as well as maps of logits: each pixel is of one view
        labels = mgd_ops.upsampled_argmax(clean, size, threshold)
        pseudo_labels_u = batch.mix(labels).masked_fill(batch.mixed_ignore, IGNORE_INDEX)
    labeled, clean = labeled if "labeled" in needed else None, clean if "clean" in needed else None
    return TeacherOutputs(pseudo_labels_l, pseudo_labels_u, labeled, mixed, clean)


def labels_of_teachers(rows, partition, files: bool) -> str:
    """Which labels the teachers saw: `partition` for the student's own, `all`, the name of their partition, or `unknown` where
    `files` are a teacher."""
    if files:
        return "unknown"
    if all(row["partition_hash"] == partition.hash for row in rows):
        return "partition"
    names = " ".join(sorted({row["partition"] for row in rows}))
    return "all" if names == "1" else names


def passes_of_step(args, student, teachers: dict, needed: dict[str, set[str]]) -> list[Pass]:
    """What the steps do with the networks."""
    parts, size = micro_batches(args)
    images, views = len(parts) * size, 2 if args.cutmix else 1
    end = steps_with_teachers(args)
    passes = [Pass(student, images), *([Pass(student, images, end=end)] if uses_views(args.losses) else [])]
    for role, teacher in teachers.items():
        labeled, clean, mixed = needed_forwards(needed[role], args.cutmix, args.mixed_terms)
        passes.append(Pass(teacher, images * (labeled + views * clean + mixed), backward=False, end=end))
    return passes


def main(argv=None):
    args = parse_args(argv)
    events.check_tensorboard(args)
    device = init_distributed(args.device)
    torch.backends.cudnn.benchmark = True  # crops are of one size
    args.precision = pick_precision(args.precision, device)
    kernels.load_kernels()
    on_views = uses_views(args.losses)
    dataset, partition = datasets.open_training_data(args, unlabeled=on_views)
    pseudo_labels = of_files = None
    if args.pseudo_labels:
        pseudo_labels = datasets.open_pseudo_labels(args.pseudo_labels, dataset, partition, *halves_of_pixel(args.losses))
        of_files = pseudo_labels.hash
    resumed = load_for_resume(args, dataset, partition)

    teachers, teacher_rows, taus = {}, {}, []
    for role, path in (("T_D", args.deep), ("T_W", args.wide)):
        if path is None:
            continue
        teacher, checkpoint = load_teacher(path, dataset, args, device)
        row = checkpoint["row"]
        taus.append(checkpoint["args"].get("logit_adjustment") or 0.0)
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
    if resumed and resumed["row"].get("pseudo_labels") != of_files:
        raise UserError(
            f"{args.out / 'resume.pt'}: was trained with pseudo labels {resumed['row'].get('pseudo_labels')}, not {of_files} "
            f"(the files in {args.pseudo_labels} have changed): give the same or another --out, or delete it to start again"
        )
    needed = {role: needed_outputs(args.method, args.losses, role, args.soft_labels) for role in teachers}
    fixed = {term: 1.0 if flag is None else getattr(args, flag) for term, flag in WEIGHTS.items()}  # of Eq. 7
    if args.method in recipes.MGD_METHODS:
        losses_of = functools.partial(
            mgd_losses,
            losses=args.losses,
            ohem=args.ohem,
            regions=args.regions,
            image_reduction=args.image_reduction,
            soft_labels=args.soft_labels,
        )
    else:
        losses_of = functools.partial(kd_losses, method=args.method, ohem=args.ohem, temperature=args.temperature)
    ground_truth_alone = functools.partial(mgd_losses, losses=["sup"], ohem=args.ohem)  # of --refine
    taught_steps = steps_with_teachers(args)
    levels = [level for level in LEVELS if any(loss.startswith(level) for loss in args.losses)]
    relative = RelativeWeights(levels, args.lambda_relative).to(device) if args.lambda_relative and levels else None

    torch.manual_seed(seed_of(args.seed, 20))
    student = models.model_from_args(vars(args), len(dataset.classes), args.weights).to(device).train()
    depthwise.speed_up(student, device)
    optimizer = torch.optim.SGD(parameter_groups(student, args.weight_decay), lr=args.lr, momentum=0.9, fused=True)
    soft = bool(args.soft_labels and teachers) and any(loss.startswith("pixel") for loss in args.losses)
    size = micro_batches(args)[1]
    activations = models.activation_bytes(student, size, args.crop, args.precision, whole=args.ohem or soft)
    if soft:  # the soft labels, float32 at full size
        activations += 4 * size * len(dataset.classes) * args.crop[0] * args.crop[1]
    finite_steps = FiniteSteps([student, *([relative] if relative else [])], [optimizer])
    average = None
    if args.ema_decay:  # of weights and batch norm's statistics
        average = AveragedModel(student, multi_avg_fn=finite_steps.moving_average(args.ema_decay, True), use_buffers=True)
        average.requires_grad_(False).eval()
    kept = average.module if average else student  # what is validated and kept
    saved = {"model": kept, "second": student} if average else {"model": student}
    saved |= {"relative": relative} if relative else {}
    # 12 bytes: float32 weights, gradients and momentum; 4 of an average
    memory = (16 if average else 12) * sum(p.numel() for p in student.parameters()) + (1 + on_views) * activations
    more = f", {' + '.join(args.losses)}, ops {kernels.backend(device.type)}"
    more += f", the ground truth alone after step {taught_steps}" if taught_steps < args.steps else ""
    print_plan(args, device, partition, on_views, memory, more)
    start, seconds = restore(resumed, saved, [optimizer])
    if average:
        average.n_averaged.fill_(start)
    print_duration(args, device, start, passes_of_step(args, student, teachers, needed))
    ddp_model = compiled(distribute(student), args, device, retain_graph=args.grad_norms)  # what the steps run

    labeled = train_batches(dataset, partition.labeled, args, 1, start, labeled=True, pseudo_labels=pseudo_labels)
    views = on_views * (2 if args.cutmix else 1)
    unlabeled = None
    if on_views and start < taught_steps:
        more = {"strong": bool(args.strong_views), "pseudo_labels": pseudo_labels}
        unlabeled = train_batches(dataset, partition.unlabeled, args, views, start, labeled=False, **more)

    row = evaluate.result_row(
        args,
        dataset,
        partition,
        device,
        role="student",
        losses=args.losses,
        teachers=[*teacher_rows, *(["pseudo labels"] if pseudo_labels else [])],
        teacher_roles=[row["role"] for row in teacher_rows.values()],
        teacher_backbones=[row["backbone"] for row in teacher_rows.values()],
        teacher_methods=[row["method"] for row in teacher_rows.values()],
        teacher_steps=[row["steps"] for row in teacher_rows.values()],
        teacher_seeds=[row["seed"] for row in teacher_rows.values()],
        teacher_logit_adjustments=taus if any(taus) else None,
        teacher_labels=labels_of_teachers(teacher_rows.values(), partition, files=pseudo_labels is not None),
        pseudo_labels=of_files,
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
        save_checkpoint(path, {**checkpoint, **states(path, saved, [optimizer]), "step": step})

    board = events.Events(args, dataset, device, start)
    progress = Progress(args, start, functools.partial(images_of_step, args, partition), board)
    next_labeled = functools.partial(progress.next_batch, labeled)
    next_unlabeled = functools.partial(progress.next_batch, unlabeled) if on_views else None
    began = time.perf_counter()
    signals = StopSignals()
    for step in range(start, args.steps):
        if step and due(step - 1, args.val_every, args.steps):
            board.panels(step, kept)
            evaluate.validate_step(args, step, kept, dataset, device, progress, signals)
        lr = poly_lr(step, args.steps, args.lr)
        set_lr([optimizer], lr)
        finite_steps.begin()

        taught, weights, lambdas = step < taught_steps, fixed, {}
        if taught:
            factor = lambda_factor(args.lambda_schedule, step, taught_steps)
            full = relative.weights() if relative else {level: fixed[level] for level in levels}
            lambdas = {level: factor * weight for level, weight in full.items()}
            weights = {**fixed, **lambdas}

        # All teachers come first, since cross entropies are divided by the valid pixels of the whole batch.
        batches = step_batches(args, step, device, next_labeled, next_unlabeled if taught else None)
        with autocast(device, args.precision):
            outputs = [
                {
                    role: teacher_outputs(
                        teacher,
                        batch,
                        needed[role],
                        teacher_bn=args.teacher_bn,
                        mixed_terms=args.mixed_terms,
                        threshold=args.conf_thresh or 0.0,
                    )
                    for role, teacher in (teachers if taught else {}).items()
                }
                for batch in batches
            ]
        normalizer = valid_pixels([batch.ignore_masks() for batch in batches])

        losses = collections.Counter()
        for k, (batch, teacher) in enumerate(zip(batches, outputs, strict=True)):
            with maybe_no_sync(ddp_model, last=k + 1 == len(batches)):
                with autocast(device, args.precision):
                    of_labeled = ddp_model(batch.images)
                    of_mixed = ddp_model(batch.student_mixed) if on_views and taught else None
                terms = (losses_of if taught else ground_truth_alone)(of_labeled, of_mixed, batch, teacher, normalizer)
                if relative and taught:
                    relative.measure(terms, of_mixed.features)
                if args.grad_norms and k == 0 and (step + 1) % args.log_every == 0:  # of the first micro-batch
                    progress.write(step=step + 1, **gradient_norms(terms, weights, student))
                loss = weighted_sum(terms, weights)  # Eq. 7
                (loss / len(batches)).backward()
            for name, term in {**terms, "loss": loss}.items():
                losses[name] += term.detach() / len(batches)
        for level, weight in lambdas.items() if args.lambda_schedule or relative else ():
            losses[f"lambda_{level}"] = torch.as_tensor(weight, device=device)
        if relative and taught:
            relative.update()
        losses = finite_steps.check(losses)
        optimizer.step()
        if average:
            average.update_parameters(student)

        progress.step(step, args.batch * (1 + views * taught), lr, losses, finite_steps.skipped)
        save_or_stop(args, step, save, progress, signals)
    evaluate.finish_run(args, kept, dataset, partition, device, row, save, progress, signals)
    board.panels(args.steps, kept)
    board.close()


if __name__ == "__main__":
    cli(main)
