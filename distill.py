"""Distil two frozen teachers into a light student, with the losses of the paper's Eq. 7.

    python distill.py --out runs/shapes/1-8/mgd-r18 --student r18 \
        --deep runs/shapes/1-8/teacher-deep/last.pt --wide runs/shapes/1-8/teacher-wide/last.pt

On labeled images: cross entropy with the ground truth (Eq. 1) and with both teachers' labels (Eq. 2). On CutMix views of
unlabeled images: cross entropy with both teachers' labels (Eq. 2), the image-level loss against the deep teacher (Eq. 4)
and the region-level loss against the wide one (Eq. 6).
"""

import pathlib
import time

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
    autocast,
    fill_from_recipe,
    load_checkpoint,
    load_for_resume,
    parameter_groups,
    pick_device,
    pick_precision,
    plain_args,
    poly_lr,
    run,
    save_checkpoint,
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


@torch.no_grad()
def teach(teacher, images, views, box, separate: bool):
    """What a teacher says of labeled images (B, 3, H, W) and of the unlabeled views.

    With CutMix, views (2B, 3, H, W) are mixed along `box` (B, 1, H, W); without, views (B, 3, H, W) and box None. Returns the
    labels of the images and of the views as mixed, (B, H, W) each, and the output on the mixed views themselves. The views'
    labels come from the clean views, and are mixed as the views are. `separate` runs each batch by itself, which batch norm
    in training mode needs; otherwise one forward serves all.
    """
    mixed = views if box is None else datasets.cutmix(views, box)
    parts = [images, mixed] if box is None else [images, mixed, *views.chunk(2)]
    if separate:
        outputs = [teacher(part) for part in parts]
    else:
        logits, features = teacher(torch.cat(parts))
        outputs = [models.Output(*pair) for pair in zip(logits.split(len(images)), features.split(len(images)), strict=True)]
    clean = outputs[1].logits if box is None else datasets.cutmix(torch.cat([o.logits for o in outputs[2:]]), box)
    return outputs[0].logits.argmax(1), clean.argmax(1), outputs[1]


def mgd_losses(labeled, unlabeled, label, teacher_labels, pseudo_labels, deep_logits, wide_features, args) -> dict:
    """The terms of Eq. 7, and their weighted sum as `loss`.

    labeled, unlabeled: the student's `Output` on labeled images and on the (mixed) views; label (B, H, W) and the teachers'
    labels for the labeled images, pseudo_labels for the views, 255 = ignore; deep_logits (B, N, H, W) of T_D and
    wide_features (B, C, h, w) of T_W on the views.
    """
    supervised_loss = mgd_ops.ohem_cross_entropy if args.ohem else mgd_ops.pixel_cross_entropy
    terms = {
        "sup": supervised_loss(labeled.logits, label),  # Eq. 1
        "pixel_l": mgd_ops.pixel_loss(labeled.logits, teacher_labels),  # Eq. 2
        "pixel_u": mgd_ops.pixel_loss(unlabeled.logits, pseudo_labels),  # Eq. 2
        "image": mgd_ops.image_loss(unlabeled.logits, deep_logits, args.image_reduction),  # Eq. 4
        "region": mgd_ops.region_loss(unlabeled.features, wide_features, args.regions),  # Eq. 6
    }
    weights = {"image": args.lambda_image, "region": args.lambda_region}
    return {**terms, "loss": sum(weights.get(name, 1.0) * term for name, term in terms.items())}  # Eq. 7


def main():
    args = parse_args()
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    mgd_ops.load_kernels()
    dataset, partition = datasets.open_training_data(args, unlabeled=True)
    resumed = load_for_resume(args, partition)

    teachers, teacher_rows = [], []
    for role, path in (("T_D", args.deep), ("T_W", args.wide)):
        teacher, checkpoint = load_teacher(path, dataset, args, device)
        miou = evaluate.validate(teacher, dataset, device, args)
        print(
            f"{role} {checkpoint['row']['method']} {checkpoint['row']['backbone']}: {miou:.2f} mIoU on val ({path})", flush=True
        )
        if checkpoint["partition"]["hash"] != partition.hash:
            print(f"note: {path} was trained on partition {checkpoint['partition']['name']} "
                  f"({checkpoint['partition']['hash']}), the student's is {partition.name} ({partition.hash})")  # fmt: skip
        if args.teacher_bn == "train":
            set_batch_norm_training(teacher)
        teachers.append(teacher)
        teacher_rows.append(checkpoint["row"])

    torch.manual_seed(datasets.seed_of(args.seed, 20))
    student = models.build_model(args.backbone, len(dataset.classes), args.weights, args.stem, args.head_width,
                                 args.separable_head).to(device).train()  # fmt: skip
    optimizer = torch.optim.SGD(parameter_groups(student, args.weight_decay), lr=args.lr, momentum=0.9, fused=True)
    start, seconds = 0, 0.0
    if resumed:
        start, seconds = resumed["step"], resumed["row"]["seconds"]
        student.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizers"][0])
        torch.set_rng_state(resumed["rng"])

    views = 2 if args.cutmix else 1
    labeled = datasets.train_batches(dataset, partition.labeled, args, args.batch, start, labeled=True)
    unlabeled = datasets.train_batches(dataset, partition.unlabeled, args, views * args.batch, start, labeled=False)

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

    print(f"{args.out}: {args.method} {args.backbone}, {len(partition.labeled)} labeled and {len(partition.unlabeled)} "
          f"unlabeled images, {args.steps} steps on {device} in {args.precision}, ops {mgd_ops.backend()}")  # fmt: skip
    progress = Progress(args, start)
    began = time.perf_counter()
    for step in range(start, args.steps):
        lr = poly_lr(step, args.steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)

        images, label = progress.waiting(labeled)
        images, label = datasets.normalize(images, device), label.to(device, non_blocking=True)
        bare, padding = progress.waiting(unlabeled)
        bare, padding = datasets.normalize(bare, device), padding.to(device, non_blocking=True)

        box = None
        if args.cutmix:
            box = datasets.cutmix_mask(args.batch, args.crop, datasets.seed_of(args.seed, 2, step)).to(device)
        with autocast(device, args.precision):
            taught = [teach(teacher, images, bare, box, separate=args.teacher_bn == "train") for teacher in teachers]
            labeled_output = student(images)
            unlabeled_output = student(datasets.cutmix(bare, box) if args.cutmix else bare)
        # pixels without a label, or outside the image, take no part in Eq. 2 either
        outside = (datasets.cutmix(padding, box) if args.cutmix else padding) == datasets.IGNORE
        teacher_labels = [on_images.masked_fill(label == datasets.IGNORE, datasets.IGNORE) for on_images, _, _ in taught]
        pseudo_labels = [on_views.masked_fill(outside, datasets.IGNORE) for _, on_views, _ in taught]
        losses = mgd_losses(labeled_output, unlabeled_output, label, teacher_labels, pseudo_labels,
                            taught[0][2].logits, taught[1][2].features, args)  # fmt: skip
        losses["loss"].backward()
        optimizer.step()
        progress.step(step, len(images) + len(bare), lr, {name: term.detach() for name, term in losses.items()})

        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            save(step + 1, args.out / "resume.pt")
        if args.val_every and (step + 1) % args.val_every == 0 and step + 1 < args.steps:
            miou = evaluate.validate(student, dataset, device, args)
            progress.write(step=step + 1, miou=miou)
            print(f"{args.out.name} step {step + 1}: {miou:.2f} mIoU", flush=True)

    save(args.steps, args.out / "resume.pt")  # so that nothing is lost should the validation fail
    row["miou"] = evaluate.validate(student, dataset, device, args)
    save(args.steps, args.out / "last.pt")
    (args.out / "resume.pt").unlink(missing_ok=True)
    progress.write(step=args.steps, miou=row["miou"])
    progress.close()
    print(f"{args.out}/last.pt: {row['miou']:.2f} mIoU after {args.steps} steps, {row['seconds']:.0f} s")


if __name__ == "__main__":
    run(main)
