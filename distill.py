"""Distil two frozen teachers into a light student, with the losses of the paper's Eq. 7.

    python distill.py --out runs/shapes/1-8/mgd-r18 --student r18 \
        --deep runs/shapes/1-8/teacher-deep/last.pt --wide runs/shapes/1-8/teacher-wide/last.pt

On labeled images: cross entropy with the ground truth (Eq. 1) and with both teachers' labels (Eq. 2). On CutMix views of
unlabeled images: cross entropy with both teachers' labels (Eq. 2), the image-level loss against the deep teacher (Eq. 4)
and the region-level loss against the wide one (Eq. 6).
"""

import argparse
import pathlib
import time

import torch

import datasets
import evaluate
import mgd_ops
import models
from common import (
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["mgd"], default="mgd")
    parser.add_argument("--student", "--backbone", dest="backbone", default="resnet18", help="r18, mbv2, ...")
    parser.add_argument("--deep", type=pathlib.Path, required=True, help="checkpoint of the deep teacher T_D")
    parser.add_argument("--wide", type=pathlib.Path, required=True, help="checkpoint of the wide teacher T_W")
    datasets.add_arguments(parser)
    add_model_arguments(parser)
    add_training_arguments(parser)
    group = parser.add_argument_group("distillation")
    group.add_argument("--lambda-image", type=float, help="λ1 of Eq. 7")
    group.add_argument("--lambda-region", type=float, help="λ2 of Eq. 7")
    group.add_argument("--image-reduction", choices=["sum", "mean"], default="sum", help="over the classes; mean is Eq. 4")
    group.add_argument("--regions", type=int, default=7, help="regions a side, H_v = W_v of Eq. 6")
    group.add_argument("--teacher-bn", choices=["eval", "train"], default="eval", help="train: the released code's")
    args = parser.parse_args()
    fill_from_recipe(args, datasets.RECIPES[args.dataset])
    args.backbone = models.canonical_name(args.backbone)
    if args.regions < 1:
        raise UserError(f"--regions {args.regions}: must be at least 1")
    return args


def load_teacher(path, dataset, device):
    """A frozen teacher in evaluation mode, and its checkpoint. Raises UserError where its classes are others."""
    checkpoint = load_checkpoint(path)
    if len(checkpoint["classes"]) != len(dataset.classes):
        raise UserError(f"{path}: a teacher of {len(checkpoint['classes'])} classes, but the data set has "
                        f"{len(dataset.classes)}; train the teachers on this data set")  # fmt: skip
    if checkpoint["classes"] != dataset.classes:
        raise UserError(f"{path}: a teacher of other classes ({', '.join(checkpoint['classes'])}); train the teachers on "
                        "this data set")  # fmt: skip
    teacher = models.model_from_checkpoint(checkpoint).to(device).requires_grad_(False)
    return teacher, checkpoint


def set_batch_norm_training(teacher):
    """Normalise with the batch's statistics and leave the stored ones untouched (`--teacher-bn train`)."""
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
            module.track_running_stats = False


def main():
    args = parse_args()
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    dataset, partition = datasets.open_training_data(args, unlabeled=True)
    resumed = load_for_resume(args, partition)

    teachers, teacher_rows = [], []
    for role, path in (("T_D", args.deep), ("T_W", args.wide)):
        teacher, checkpoint = load_teacher(path, dataset, device)
        miou = evaluate.iou(evaluate.evaluate(teacher, dataset, dataset.val, device, args.precision,
                                              checkpoint["args"]["image_scale"]))[0]  # fmt: skip
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
        optimizers = [optimizer.state_dict()] if step < args.steps else []
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

        # Pseudo labels come from the clean views and are mixed as the views are; the image and region terms compare
        # student and teachers on the mixed view itself. One forward a teacher serves all of it.
        if args.cutmix:
            box = datasets.cutmix_mask(args.batch, args.crop, datasets.seed_of(args.seed, 2, step)).to(device)
            mixed, padding = datasets.cutmix(bare, box), datasets.cutmix(padding, box)
            parts = [images, mixed, bare]
        else:
            mixed, parts = bare, [images, bare]
        with torch.no_grad(), autocast(device, args.precision):
            outputs = [teacher(torch.cat(parts)) for teacher in teachers]
        pseudo_labeled, pseudo = [], []
        for logits, _ in outputs:
            on_labeled, on_mixed, on_clean = logits.tensor_split([args.batch, 2 * args.batch])
            clean = datasets.cutmix(on_clean, box) if args.cutmix else on_mixed
            pseudo_labeled.append(torch.where(label == datasets.IGNORE, label, on_labeled.argmax(1)))  # (B, H, W)
            pseudo.append(torch.where(padding == datasets.IGNORE, padding, clean.argmax(1)))  # (B, H, W)
        on_mixed = slice(args.batch, 2 * args.batch)
        deep_logits, wide_features = outputs[0].logits[on_mixed], outputs[1].features[on_mixed]

        with autocast(device, args.precision):
            logits, _ = student(images)  # (B, N, H, W)
            mixed_logits, features = student(mixed)  # (B, N, H, W), (B, C, H/4, W/4)
        sup = mgd_ops.pixel_cross_entropy(logits, label)  # Eq. 1
        pixel_labeled = mgd_ops.pixel_loss(logits, pseudo_labeled)  # Eq. 2
        pixel = mgd_ops.pixel_loss(mixed_logits, pseudo)  # Eq. 2
        image = mgd_ops.image_loss(mixed_logits, deep_logits, args.image_reduction)  # Eq. 4
        region = mgd_ops.region_loss(features, wide_features, args.regions)  # Eq. 6
        loss = sup + pixel_labeled + pixel + args.lambda_image * image + args.lambda_region * region  # Eq. 7
        loss.backward()
        optimizer.step()
        terms = {"sup": sup, "pixel_l": pixel_labeled, "pixel_u": pixel, "image": image, "region": region}
        progress.step(step, len(images) + len(bare), lr, {k: v.detach() for k, v in terms.items()})

        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            save(step + 1, args.out / "resume.pt")
        if args.val_every and (step + 1) % args.val_every == 0 and step + 1 < args.steps:
            miou = evaluate.validate(student, dataset, device, args)
            progress.write(step=step + 1, miou=miou)
            print(f"{args.out.name} step {step + 1}: {miou:.2f} mIoU", flush=True)

    row["miou"] = evaluate.validate(student, dataset, device, args)
    save(args.steps, args.out / "last.pt")
    (args.out / "resume.pt").unlink(missing_ok=True)
    progress.write(step=args.steps, miou=row["miou"])
    progress.close()
    print(f"{args.out}/last.pt: {row['miou']:.2f} mIoU after {args.steps} steps, {row['seconds']:.0f} s")


if __name__ == "__main__":
    run(main)
