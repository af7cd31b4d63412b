r"""Distil frozen teachers, one or two, into a light student.

    python distill.py --out runs/shapes/1-8/mgd-r18 --student r18 \
        --deep runs/shapes/1-8/teacher-deep/last.pt --wide runs/shapes/1-8/teacher-wide/last.pt
    python distill.py --out ... --deep ... --wide ... --losses sup pixel image:T_D                # an ablation (Table 5a)
    python distill.py --out ... --deep ... --wide ... --method cwd                                # a baseline

--method mgd    the losses of the paper's Eq. 7. On labeled images: cross entropy with the ground truth (Eq. 1) and with the
                teachers' labels (Eq. 2). On CutMix views of unlabeled images: cross entropy with the teachers' labels
                (Eq. 2), the image-level loss against the deep teacher T_D (Eq. 4) and the region-level loss against the
                wide one T_W (Eq. 6). `--losses` chooses among them.
--method kd     cross entropy with the ground truth, and on labeled images and views the divergence of the teachers' softened
                class probabilities (Hinton, Vinyals & Dean 2015)
--method cwd    the same with channel-wise divergence over space (Shu et al. 2021)
"""

import collections
import pathlib
import time
from typing import NamedTuple

import torch

import datasets
import evaluate
import kernels
import mgd_ops
import models
from common import (
    IGNORE_INDEX,
    ArgumentParser,
    Progress,
    UserError,
    add_model_arguments,
    add_training_arguments,
    agree,
    autocast,
    compiled,
    distribute,
    fill_from_recipe,
    finish,
    gradients_stay,
    load_checkpoint,
    load_for_resume,
    parameter_groups,
    pick_precision,
    plain_args,
    poly_lr,
    run,
    save_checkpoint,
    say,
    say_plan,
    shares_of,
    start_ranks,
    valid_pixels,
)


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument("--method", choices=["mgd", "kd", "cwd"], default="mgd")
    parser.add_argument("--student", "--backbone", dest="backbone", default="resnet18", help="r18, mbv2, ...")
    parser.add_argument("--deep", type=pathlib.Path, help="checkpoint of the deep teacher T_D")
    parser.add_argument("--wide", type=pathlib.Path, help="checkpoint of the wide teacher T_W (of any kind: it is the second)")
    datasets.add_arguments(parser)
    datasets.add_view_arguments(parser)
    add_model_arguments(parser)
    add_training_arguments(parser)
    group = parser.add_argument_group("mgd")
    group.add_argument("--losses", nargs="+", metavar="LOSS", help=f"of {', '.join(LOSSES)}; by default sup, pixel, the image "
                       "term of T_D and the region term of T_W, or of the one teacher there is")  # fmt: skip
    group.add_argument("--lambda-image", type=float, help="λ1 of Eq. 7")
    group.add_argument("--lambda-region", type=float, help="λ2 of Eq. 7")
    group.add_argument("--image-reduction", choices=["sum", "mean"], default="sum", help="over the classes; mean is Eq. 4")
    group.add_argument("--regions", type=int, default=7, help="regions a side, H_v = W_v of Eq. 6")
    group = parser.add_argument_group("kd and cwd")
    group.add_argument("--temperature", type=float, default=4.0, help="of the softened probabilities")
    group.add_argument("--kd-weight", type=float, default=1.0, help="of the divergence")
    group = parser.add_argument_group("teachers")
    group.add_argument("--teacher-bn", choices=["eval", "train"], default="eval", help="train: with the batch's statistics")
    group.add_argument("--mixed-terms", choices=["mixed", "clean"], default="mixed",
                       help="where the teachers' outputs for mixed views come from: from mixed views, or from the clean views' "
                       "outputs, mixed, which saves a quarter of their work")  # fmt: skip
    parser.add_argument("--grad-norms", action="store_true",
                        help="with each line of the log, the norm of each weighted term's gradient")  # fmt: skip
    args = parser.parse_args(argv)
    args.backbone = models.canonical_name(args.backbone, "--student")
    fill_from_recipe(args, datasets.RECIPES[args.dataset], "student")
    args.losses = chosen_losses(args)
    return args


LOSSES = ("sup", "pixel", "pixel:labeled", "pixel:unlabeled", "image:T_D", "image:T_W", "region:T_D", "region:T_W")


def chosen_losses(args) -> list[str]:
    """The losses of the arguments, with `pixel` for both of its halves. Raises UserError for what makes no sense."""
    teachers = [role for role, path in (("T_D", args.deep), ("T_W", args.wide)) if path]
    if not teachers:
        raise UserError("a teacher is needed: give --deep FILE, --wide FILE or both (train_teacher.py makes them)")
    if args.method != "mgd":
        if args.losses:
            raise UserError(f"--losses: chooses among those of --method mgd; {args.method} has its own")
        return ["sup", args.method]
    names = args.losses or ["sup", "pixel", f"image:{teachers[0]}", f"region:{teachers[-1]}"]
    given = f"--losses {' '.join(names)}"
    for name in names:
        if name not in LOSSES:
            raise UserError(f"--losses: unknown loss '{name}'; choose of {', '.join(LOSSES)}")
        if name.partition(":")[2] in {"T_D", "T_W"} - {*teachers}:
            raise UserError(f"{given}: '{name}' needs that teacher; give {'--deep' if 'T_D' in name else '--wide'} FILE")
    halves = {"pixel:labeled", "pixel:unlabeled"}
    if len({*names}) < len(names) or ("pixel" in names and halves & {*names}):
        raise UserError(f"{given}: names a loss twice ('pixel' is both of its halves)")
    if "sup" not in names:
        raise UserError(f"{given}: the ground truth of the labeled images is always learnt; add sup")
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
    checkpoint = load_checkpoint(path)
    if len(checkpoint["classes"]) != len(dataset.classes):
        raise UserError(f"{path}: a teacher of {len(checkpoint['classes'])} classes, but the data set has "
                        f"{len(dataset.classes)}; train the teachers on this data set")  # fmt: skip
    if checkpoint["classes"] != dataset.classes:
        raise UserError(f"{path}: a teacher of other classes ({', '.join(checkpoint['classes'])}); train the teachers on "
                        "this data set")  # fmt: skip
    if checkpoint["args"]["image_scale"] != args.image_scale:
        raise UserError(f"{path}: a teacher of --image-scale {checkpoint['args']['image_scale']}, not {args.image_scale}; "
                        "teachers and student must see images of one size")  # fmt: skip
    return models.model_from_checkpoint(checkpoint).to(device).requires_grad_(False), checkpoint


def set_batch_norm_training(teacher):
    """Normalise with the batch's statistics and leave the stored ones untouched (`--teacher-bn train`)."""
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
            module.track_running_stats = False


class Taught(NamedTuple):
    """What a teacher says of a share of a step, m labeled images and m mixed views; what is not wanted is None."""

    labels: torch.Tensor | None  # (m, H, W) int64, of the labeled images
    pseudo_labels: torch.Tensor | None  # (m, H, W) int64, of the clean views, mixed as the views are
    labeled: models.Output | None  # logits (m, N, h, w) and features (m, C, h, w) of the labeled images, h = H/4
    mixed: models.Output | None  # of the mixed views


BATCH_PIXELS = 2**17  # a teacher's forward takes as many parts of a step as fit into so many pixels, at least one


def wanted(args, role: str) -> set[str]:
    """Which fields of the `Taught` of teacher `role` the losses look at."""
    if args.method != "mgd":
        return {"labeled", "mixed"}
    of_loss = {"pixel": {"labels", "pseudo_labels"}, "pixel:labeled": {"labels"}, "pixel:unlabeled": {"pseudo_labels"},
               f"image:{role}": {"mixed"}, f"region:{role}": {"mixed"}}  # fmt: skip
    return set().union(*(of_loss.get(loss, ()) for loss in args.losses))


def inputs_of(fields: set[str], cutmix: bool, mixed_terms: str) -> tuple[bool, bool, bool]:
    """Whether a teacher has to see the labeled images, the clean views and the mixed views for those fields of `Taught`."""
    mixed = "mixed" in fields and cutmix and mixed_terms == "mixed"
    return bool(fields & {"labels", "labeled"}), "pseudo_labels" in fields or ("mixed" in fields and not mixed), mixed


def uses_views(args) -> bool:
    """Whether any loss is on unlabeled images."""
    return args.losses != ["sup", "pixel:labeled"]


def teach(teacher, images, label, views, padding, box, args, fields: set[str]) -> Taught:
    """Run a teacher (a `models.Coarse`, perhaps folded) for those `fields` of Taught on labeled images (m, 3, H, W) and
    unlabeled views (2m, 3, H, W), which CutMix mixes along `box` (m, 1, H, W); or on views (m, 3, H, W) with box None.
    Where `label` and the mixed views' `padding`, both (m, H, W), are 255, its labels are too: no pixel without ground truth, or
    outside the image, takes part in Eq. 2.

    Small crops go through in one forward. Large ones go m at a time, which takes a fifth off the memory of a step, and on two
    CPU cores off its speed. With batch norm in training mode the released procedure's separate batches matter.
    With --mixed-terms clean the mixed views are not run: their logits and features are those of the clean views, mixed.
    """
    size = images.shape[-2:]
    run_labeled, run_clean, run_mixed = inputs_of(fields, box is not None, args.mixed_terms)
    parts = [images] if run_labeled else []
    parts += views.split(len(images)) if run_clean else []
    parts += [datasets.cutmix(views, box)] if run_mixed else []
    at_once = 1 if args.teacher_bn == "train" else max(1, BATCH_PIXELS // (len(images) * size.numel()))
    outputs = []
    with torch.inference_mode():
        for i in range(0, len(parts), at_once):
            logits, features = teacher(torch.cat(parts[i : i + at_once]))
            outputs += map(models.Output, logits.split(len(images)), features.split(len(images)))
    labeled = outputs.pop(0) if run_labeled else None
    mixed = outputs.pop() if run_mixed else None
    if mixed is None and "mixed" in fields:
        mixed = models.Output(*(datasets.cutmix(torch.cat(maps), box) for maps in zip(*outputs, strict=True)))
    labels = pseudo_labels = None
    if "labels" in fields:
        labels = mgd_ops.upsampled_argmax(labeled.logits, size).masked_fill(label == IGNORE_INDEX, IGNORE_INDEX)
    if "pseudo_labels" in fields:  # maps of labels can be mixed as well as maps of logits: each pixel is of one view
        clean = mgd_ops.upsampled_argmax(torch.cat([output.logits for output in outputs]), size)
        pseudo_labels = datasets.cutmix(clean, box).masked_fill(padding == IGNORE_INDEX, IGNORE_INDEX)
    return Taught(labels, pseudo_labels, labeled if "labeled" in fields else None, mixed)


def mgd_losses(labeled, mixed, label, taught: dict[str, Taught], args, counts) -> dict:
    """The terms of Eq. 7 that are in args.losses, and their weighted sum as `loss`.

    labeled, mixed: the student's coarse `Output` on labeled images and on the mixed views (None where no loss is on them);
    label (m, H, W); `taught` by T_D, T_W or both, with labels of 255 where they are to be ignored; `counts` of the labeled
    and, where a loss is on them, of the views' pixels (see `common.valid_pixels`).
    """
    size, losses = label.shape[-2:], args.losses

    def cross_entropies(logits, labels, count):
        return mgd_ops.pixel_cross_entropies(logits, labels, [count] * len(labels))

    labels = [] if args.ohem else [label]
    labels += [t.labels for t in taught.values()] if {"pixel", "pixel:labeled"} & {*losses} else []
    entropies = cross_entropies(labeled.logits, labels, counts[0])
    terms = {"sup": mgd_ops.ohem_cross_entropy(labeled.logits, label) if args.ohem else entropies.pop(0)}  # Eq. 1
    if entropies:
        terms["pixel_l"] = sum(entropies)  # Eq. 2
    if {"pixel", "pixel:unlabeled"} & {*losses}:
        pseudo_labels = [t.pseudo_labels for t in taught.values()]
        terms["pixel_u"] = sum(cross_entropies(mixed.logits, pseudo_labels, counts[1]))  # Eq. 2
    for role, teacher in taught.items():
        if f"image:{role}" in losses:  # Eq. 4
            image = mgd_ops.image_loss(mixed.logits, teacher.mixed.logits, size, args.image_reduction)
            terms["image"] = terms.get("image", 0.0) + image
        if f"region:{role}" in losses:  # Eq. 6
            region = mgd_ops.region_loss(mixed.features, teacher.mixed.features, args.regions)
            terms["region"] = terms.get("region", 0.0) + region
    return {**terms, "loss": sum(weight_of(name, args) * term for name, term in terms.items())}  # Eq. 7


def weight_of(term: str, args) -> float:
    """Of a term in the loss."""
    argument = {"image": "lambda_image", "region": "lambda_region", "kd": "kd_weight", "cwd": "kd_weight"}.get(term)
    return getattr(args, argument) if argument else 1.0


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


def kd_losses(labeled, mixed, label, taught: dict[str, Taught], args, counts) -> dict:
    """The terms of --method kd or cwd, and their weighted sum as `loss`; arguments as of `mgd_losses`.

    The divergence is taken between the classifiers' coarse logits, and added up over the teachers, and over labeled images
    and mixed views.
    """
    divergence = kd_loss if args.method == "kd" else cwd_loss
    supervised_loss = mgd_ops.ohem_cross_entropy if args.ohem else mgd_ops.pixel_cross_entropy
    sup = supervised_loss(labeled.logits, label, counts[0])
    pairs = [(labeled, t.labeled) for t in taught.values()] + [(mixed, t.mixed) for t in taught.values()]
    kd = sum(divergence(ours.logits, theirs.logits, args.temperature) for ours, theirs in pairs)
    return {"sup": sup, args.method: kd, "loss": sup + weight_of(args.method, args) * kd}


def gradient_norms(terms: dict, student, args) -> dict[str, float]:
    """The norm, over all weights of the student, of the gradient of each weighted term of `mgd_losses` or `kd_losses` and of
    their sum, as `grad_NAME`; the graph is kept."""
    norms = {}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, list(student.parameters()), retain_graph=True, allow_unused=True)
        norm = torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        norms[f"grad_{name}"] = weight_of(name, args) * float(norm)
    return norms


def labels_of_teachers(rows, partition) -> str:
    """Of a result's row: `partition` where the teachers saw the student's, `all`, or the name of their partition."""
    if all(row["partition_hash"] == partition.hash for row in rows):
        return "partition"
    names = sorted({row["partition"] for row in rows})
    return "all" if names == ["1"] else " ".join(names)


def main():
    args = parse_args()
    device = start_ranks(args.device)
    torch.backends.cudnn.benchmark = True  # crops are of one size
    args.precision = pick_precision(args.precision, device)
    kernels.load_kernels()
    on_views = uses_views(args)
    dataset, partition = datasets.open_training_data(args, unlabeled=on_views)
    resumed = load_for_resume(args, partition)

    teachers, teacher_rows = {}, {}
    for role, path in (("T_D", args.deep), ("T_W", args.wide)):
        if path is None:
            continue
        teacher, checkpoint = load_teacher(path, dataset, args, device)
        row = checkpoint["row"]
        miou = evaluate.validate(teacher, dataset, device, args)
        say(f"{role} {row['method']} {row['backbone']}: {miou:.2f} mIoU on val ({path})")
        if checkpoint["partition"]["hash"] != partition.hash:
            say(f"note: {path} was trained on partition {checkpoint['partition']['name']} "
                f"({checkpoint['partition']['hash']}), the student's is {partition.name} ({partition.hash})")  # fmt: skip
        teacher = models.Coarse(teacher)
        if args.teacher_bn == "train":
            set_batch_norm_training(teacher)
        else:
            teacher = models.fold_batch_norm(teacher, args.precision)
        teachers[role], teacher_rows[role] = compiled(teacher, args, device), row
    if resumed and resumed.get("teachers") != list(teacher_rows.values()):
        raise UserError(f"{args.out / 'resume.pt'}: learnt from other teachers than those of --deep and --wide now; give "
                        "another --out, or remove it to start again")  # fmt: skip
    fields = {role: wanted(args, role) for role in teachers}
    all_losses = mgd_losses if args.method == "mgd" else kd_losses

    torch.manual_seed(datasets.seed_of(args.seed, 20))
    student = models.build_model(args.backbone, len(dataset.classes), args.weights, args.stem, args.head_width,
                                 args.separable_head).to(device).train()  # fmt: skip
    optimizer = torch.optim.SGD(parameter_groups(student, args.weight_decay), lr=args.lr, momentum=0.9, fused=True)
    activations = models.activation_bytes(student, shares_of(args)[1], args.crop, args.precision, whole=args.ohem)
    weights = 4 * sum(p.numel() for p in student.parameters())
    images = f"{len(partition.labeled)} labeled and {len(partition.unlabeled) if on_views else 'no'} unlabeled images"
    say_plan(args, device, f"{images}, {' + '.join(args.losses)}, ops {kernels.backend(device.type)}",
             needed=3 * weights + (1 + on_views) * activations)  # gradients, momentum; the student's forwards  # fmt: skip
    start, seconds = 0, 0.0
    if resumed:
        start, seconds = resumed["step"], resumed["row"]["seconds"]
        student.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizers"][0])
        torch.set_rng_state(resumed["rng"])
    running = compiled(distribute(student), args, device)  # what the steps run; `student` is what is validated and saved

    labeled = datasets.train_batches(dataset, partition.labeled, args, 1, start, labeled=True)
    views = on_views * (2 if args.cutmix else 1)
    unlabeled = datasets.train_batches(dataset, partition.unlabeled, args, views, start, labeled=False) if on_views else None

    row = evaluate.result_row(
        args, dataset, partition, device, role="student", losses=args.losses,
        teachers=[*teacher_rows],
        teacher_roles=[row["role"] for row in teacher_rows.values()],
        teacher_backbones=[row["backbone"] for row in teacher_rows.values()],
        teacher_methods=[row["method"] for row in teacher_rows.values()],
        teacher_steps=[row["steps"] for row in teacher_rows.values()],
        teacher_seeds=[row["seed"] for row in teacher_rows.values()],
        teacher_labels=labels_of_teachers(teacher_rows.values(), partition),
        regions=args.regions if any(loss.startswith("region") for loss in args.losses) else None,
    )  # fmt: skip
    checkpoint = {"args": plain_args(args), "classes": dataset.classes, "palette": dataset.palette,
                  "partition": partition._asdict(), "row": row, "teachers": list(teacher_rows.values())}  # fmt: skip

    def save(step, path):
        row["seconds"] = round(seconds + time.perf_counter() - began, 1)
        optimizers = [optimizer.state_dict()] if path.name == "resume.pt" else []
        save_checkpoint(path, {**checkpoint, "model": student.state_dict(), "optimizers": optimizers, "step": step})

    progress = Progress(args, start)
    began = time.perf_counter()
    for step in range(start, args.steps):
        lr = poly_lr(step, args.steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)

        shares = []  # of the batch; the teachers see all of them first, so that their valid pixels can be counted
        for box in datasets.cutmix_boxes(args, step, device):
            images, label = progress.waiting(labeled)
            images, label = datasets.normalize(images, device), label.to(device, non_blocking=True).long()
            bare = mixed = padding = None
            if on_views:
                bare, padding = progress.waiting(unlabeled)
                bare, padding = datasets.normalize(bare, device), padding.to(device, non_blocking=True).long()
                mixed, padding = datasets.cutmix(bare, box), datasets.cutmix(padding, box)
            taught = {}
            for role, teacher in teachers.items():
                with autocast(device, args.precision):
                    taught[role] = teach(teacher, images, label, bare, padding, box, args, fields[role])
            shares.append((images, mixed, label, taught, padding))
        counts = valid_pixels([[label, padding] if on_views else [label] for _, _, label, _, padding in shares])

        losses = collections.Counter()
        for i, (images, mixed, label, taught, _) in enumerate(shares):
            with gradients_stay(running, last=i + 1 == len(shares)):
                with autocast(device, args.precision):
                    of_labeled = running(images, upsample=False)
                    of_mixed = running(mixed, upsample=False) if on_views else None
                terms = all_losses(of_labeled, of_mixed, label, taught, args, counts)
                if args.grad_norms and i == 0 and (step + 1) % args.log_every == 0:  # of the batch's first share
                    progress.write(step=step + 1, **gradient_norms(terms, student, args))
                (terms["loss"] / len(shares)).backward()
            for name, term in terms.items():
                losses[name] += term.detach() / len(shares)
        optimizer.step()
        progress.step(step, args.batch * (1 + views), lr, losses)

        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            save(step + 1, args.out / "resume.pt")
        if args.val_every and (step + 1) % args.val_every == 0 and step + 1 < args.steps:
            agree(student)
            progress.validated(step + 1, evaluate.validate(student, dataset, device, args))

    agree(student)
    save(args.steps, args.out / "resume.pt")  # so that nothing is lost should the validation fail
    row["miou"] = evaluate.validate(student, dataset, device, args)
    save(args.steps, args.out / "last.pt")
    finish(args)
    progress.write(step=args.steps, miou=row["miou"])
    progress.close()
    say(f"{args.out}/last.pt: {row['miou']:.2f} mIoU after {args.steps} steps, {row['seconds']:.0f} s")


if __name__ == "__main__":
    run(main)
