"""Distil two frozen teachers into a light student, with the losses of the paper's Eq. 7.

    python distill.py --out runs/shapes/1-8/mgd-r18 --student r18 \
        --deep runs/shapes/1-8/teacher-deep/last.pt --wide runs/shapes/1-8/teacher-wide/last.pt

On labeled images: cross entropy with the ground truth (Eq. 1) and with both teachers' labels (Eq. 2). On CutMix views of
unlabeled images: cross entropy with both teachers' labels (Eq. 2), the image-level loss against the deep teacher (Eq. 4)
and the region-level loss against the wide one (Eq. 6).
"""

import collections
import pathlib
import time
from typing import NamedTuple

import torch

import datasets
import evaluate
import mgd_ops
import models
from common import (
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


def parse_args():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--method", choices=["mgd"], default="mgd")
    parser.add_argument("--student", "--backbone", dest="backbone", default="resnet18", help="r18, mbv2, ...")
    parser.add_argument("--deep", type=pathlib.Path, required=True, help="checkpoint of the deep teacher T_D")
    parser.add_argument("--wide", type=pathlib.Path, required=True, help="checkpoint of the wide teacher T_W")
    datasets.add_arguments(parser)
    datasets.add_view_arguments(parser)
    add_model_arguments(parser)
    add_training_arguments(parser)
    group = parser.add_argument_group("distillation")
    group.add_argument("--lambda-image", type=float, help="λ1 of Eq. 7")
    group.add_argument("--lambda-region", type=float, help="λ2 of Eq. 7")
    group.add_argument("--image-reduction", choices=["sum", "mean"], default="sum", help="over the classes; mean is Eq. 4")
    group.add_argument("--regions", type=int, default=7, help="regions a side, H_v = W_v of Eq. 6")
    group.add_argument("--teacher-bn", choices=["eval", "train"], default="eval", help="train: with the batch's statistics")
    group.add_argument("--mixed-terms", choices=["mixed", "clean"], default="mixed",
                       help="what the teachers' image and region terms see: mixed views, or the clean views' outputs, mixed, "
                       "which saves a quarter of their work")  # fmt: skip
    args = parser.parse_args()
    args.backbone = models.canonical_name(args.backbone, "--student")
    fill_from_recipe(args, datasets.RECIPES[args.dataset], "student")
    if args.regions < 1:
        raise UserError(f"--regions {args.regions}: must be at least 1")
    return args


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
    """What a teacher says of a share of a step: m labeled images, and m views as mixed."""

    labels: torch.Tensor  # (m, H, W) int64, of the labeled images
    pseudo_labels: torch.Tensor  # (m, H, W) int64, of the clean views, mixed as the views are
    logits: torch.Tensor  # (m, N, h, w), of the mixed views, before they are brought to full size
    features: torch.Tensor  # (m, C, h, w), of the mixed views


@torch.inference_mode()
def teach(teacher, images, views, box, args) -> Taught:
    """Run a teacher (a `models.Coarse`, perhaps folded) on labeled images (m, 3, H, W) and unlabeled views (2m, 3, H, W), which
    CutMix mixes along `box` (m, 1, H, W); or on views (m, 3, H, W) with box None.

    One forward serves all, unless batch norm is in training mode, where the released procedure's separate batches matter.
    With --mixed-terms clean the mixed views are not run: their logits and features are those of the clean views, mixed.
    """
    mixed = [] if box is None or args.mixed_terms == "clean" else [datasets.cutmix(views, box)]
    parts = [images, *views.split(len(images)), *mixed]
    if args.teacher_bn == "train":
        outputs = [teacher(part) for part in parts]
    else:
        logits, features = teacher(torch.cat(parts))
        outputs = [models.Output(*pair) for pair in zip(logits.split(len(images)), features.split(len(images)), strict=True)]
    clean = outputs[1 : len(parts) - len(mixed)]
    size = images.shape[-2:]
    labels, *view_labels = (models.full_size(output.logits, size).argmax(1) for output in (outputs[0], *clean))
    # maps of labels can be mixed as well as maps of logits: each pixel is of one view
    pseudo_labels = datasets.cutmix(torch.cat(view_labels), box)
    if mixed:
        return Taught(labels, pseudo_labels, *outputs[-1])
    return Taught(labels, pseudo_labels, *(datasets.cutmix(torch.cat(maps), box) for maps in zip(*clean, strict=True)))


def mgd_losses(labeled, unlabeled, label, teacher_labels, pseudo_labels, deep_logits, wide_features, args, counts=None) -> dict:
    """The terms of Eq. 7, and their weighted sum as `loss`.

    labeled, unlabeled: the student's coarse `Output` on labeled images and on the (mixed) views; label (B, H, W) and the
    teachers' labels for the labeled images, pseudo_labels for the views, 255 = ignore; deep_logits (B, N, h, w) of T_D and
    wide_features (B, C, h, w) of T_W on the views; `counts` of the labeled and of the views' pixels (see
    `mgd_ops.pixel_cross_entropies`).
    """
    size = label.shape[-2:]
    of_labeled, of_views = (None, None) if counts is None else ([counts[0]] * 3, [counts[1]] * 2)
    logits = models.full_size(labeled.logits, size)  # (B, N, H, W)
    sup, *pixel_l = mgd_ops.pixel_cross_entropies(logits, [label, *teacher_labels], of_labeled)
    if args.ohem:
        sup = mgd_ops.ohem_cross_entropy(logits, label)
    logits = models.full_size(unlabeled.logits, size)
    pixel_u = mgd_ops.pixel_cross_entropies(logits, pseudo_labels, of_views)
    terms = {
        "sup": sup,  # Eq. 1
        "pixel_l": sum(pixel_l),  # Eq. 2
        "pixel_u": sum(pixel_u),  # Eq. 2
        "image": mgd_ops.image_loss(unlabeled.logits, deep_logits, size, args.image_reduction),  # Eq. 4
        "region": mgd_ops.region_loss(unlabeled.features, wide_features, args.regions),  # Eq. 6
    }
    weights = {"image": args.lambda_image, "region": args.lambda_region}
    return {**terms, "loss": sum(weights.get(name, 1.0) * term for name, term in terms.items())}  # Eq. 7


def main():
    args = parse_args()
    device = start_ranks(args.device)
    torch.backends.cudnn.benchmark = True  # crops are of one size
    args.precision = pick_precision(args.precision, device)
    mgd_ops.load_kernels()
    dataset, partition = datasets.open_training_data(args, unlabeled=True)
    resumed = load_for_resume(args, partition)

    teachers, teacher_rows = [], []
    for role, path in (("T_D", args.deep), ("T_W", args.wide)):
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
        teachers.append(compiled(teacher, args, device))
        teacher_rows.append(row)

    torch.manual_seed(datasets.seed_of(args.seed, 20))
    student = models.build_model(args.backbone, len(dataset.classes), args.weights, args.stem, args.head_width,
                                 args.separable_head).to(device).train()  # fmt: skip
    optimizer = torch.optim.SGD(parameter_groups(student, args.weight_decay), lr=args.lr, momentum=0.9, fused=True)
    activations = models.activation_bytes(student, shares_of(args)[1], args.crop, args.precision)
    weights = 4 * sum(p.numel() for p in student.parameters())
    say_plan(args, device, f"{len(partition.labeled)} labeled and {len(partition.unlabeled)} unlabeled images, ops "
             f"{mgd_ops.backend()}", needed=3 * weights + 2 * activations)  # gradients, momentum; two forwards  # fmt: skip
    start, seconds = 0, 0.0
    if resumed:
        start, seconds = resumed["step"], resumed["row"]["seconds"]
        student.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizers"][0])
        torch.set_rng_state(resumed["rng"])
    running = compiled(distribute(student), args, device)  # what the steps run; `student` is what is validated and saved

    labeled = datasets.train_batches(dataset, partition.labeled, args, 1, start, labeled=True)
    unlabeled = datasets.train_batches(dataset, partition.unlabeled, args, 2 if args.cutmix else 1, start, labeled=False)

    row = evaluate.result_row(
        args, dataset, partition, role="student", losses=["sup", "pixel", "image:T_D", "region:T_W"],
        teachers=[teacher_row["backbone"] for teacher_row in teacher_rows],
        teacher_labels="all" if all(teacher_row["partition"] == "1" for teacher_row in teacher_rows) else "partition",
        regions=args.regions,
    )  # fmt: skip
    checkpoint = {"args": plain_args(args), "classes": dataset.classes, "palette": dataset.palette,
                  "partition": partition._asdict(), "row": row}  # fmt: skip

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
            images, label = datasets.normalize(images, device), label.to(device, non_blocking=True)
            bare, padding = progress.waiting(unlabeled)
            bare, padding = datasets.normalize(bare, device), padding.to(device, non_blocking=True)
            with autocast(device, args.precision):
                taught = [teach(teacher, images, bare, box, args) for teacher in teachers]
            # pixels without a label, or outside the image, take no part in Eq. 2 either
            outside = datasets.cutmix(padding, box) == datasets.IGNORE
            teacher_labels = [t.labels.masked_fill(label == datasets.IGNORE, datasets.IGNORE) for t in taught]
            pseudo_labels = [t.pseudo_labels.masked_fill(outside, datasets.IGNORE) for t in taught]
            targets = (label, teacher_labels, pseudo_labels, taught[0].logits, taught[1].features)
            shares.append((images, datasets.cutmix(bare, box), targets))
        counts = valid_pixels([[label, pseudo_labels[0]] for _, _, (label, _, pseudo_labels, _, _) in shares])

        losses = collections.Counter()
        for i, (images, mixed, targets) in enumerate(shares):
            with gradients_stay(running, last=i + 1 == len(shares)):
                with autocast(device, args.precision):
                    outputs = running(images, upsample=False), running(mixed, upsample=False)
                terms = mgd_losses(*outputs, *targets, args, counts)
                (terms["loss"] / len(shares)).backward()
            for name, term in terms.items():
                losses[name] += term.detach() / len(shares)
        optimizer.step()
        progress.step(step, args.batch * (3 if args.cutmix else 2), lr, losses)

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
