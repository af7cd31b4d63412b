"""Train one network on labeled and unlabeled images: the teachers, and the baselines when given a light backbone.

    python train_teacher.py --out runs/shapes/1-8/teacher-deep --role teacher_deep
    python train_teacher.py --out runs/mine/1-8/teacher-wide --role teacher_wide --dataset folder --data data/mine
    python train_teacher.py --out runs/shapes/1-8/sup-r18 --method sup --backbone r18

--method sup    cross entropy on the labeled images
--method cps    cross pseudo supervision (Chen et al. 2021): two networks of one kind, from different seeds, each learn from
                the other's pseudo labels on CutMix views of unlabeled images. The first of them is kept.
--method mt     Mean Teacher (Tarvainen & Valpola 2017, with the CutMix of French et al. 2020): the network's class
                probabilities, on labeled images and on CutMix views, follow those of the exponential moving average of its
                weights. The average is what is validated and kept.
"""

import collections
import time

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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
    load_for_resume,
    parameter_groups,
    pick_precision,
    plain_args,
    poly_lr,
    ramp_up,
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
    parser.add_argument("--method", choices=["sup", "mt", "cps"], default="cps")
    parser.add_argument("--role", choices=["teacher_deep", "teacher_wide", "student"], default="student",
                        help="what the network is for; a teacher's backbone has a default")  # fmt: skip
    parser.add_argument("--backbone", help=", ".join([*models.BACKBONES, *models.ALIASES]))
    datasets.add_arguments(parser)
    datasets.add_view_arguments(parser)
    add_model_arguments(parser)
    add_training_arguments(parser)
    group = parser.add_argument_group("unlabeled images")
    group.add_argument("--cps-weight", type=float, help="cps: weight of the loss on pseudo labels")
    group.add_argument("--threshold", type=float, help="cps: leave out pseudo labels below this probability")
    group.add_argument("--mt-weight", type=float, default=100.0, help="mt: weight of the consistency loss")
    group.add_argument("--ema-decay", type=float, default=0.99, help="mt: of the moving average of the weights, a step")
    group.add_argument("--sup-only", type=float, help="share of the steps, at first, without unlabeled images")
    group.add_argument("--ramp-up", type=float, help="share of the steps at which their weight is full")
    args = parser.parse_args(argv)
    recipe = datasets.RECIPES[args.dataset]
    args.backbone = models.canonical_name(args.backbone or ("resnet18" if args.role == "student" else recipe[args.role]))
    fill_from_recipe(args, recipe, "student" if args.role == "student" else "teacher")
    if not 0 <= args.ema_decay < 1:
        raise UserError(f"--ema-decay {args.ema_decay}: must be at least 0 and below 1")
    return args


def consistency_loss(logits, target, valid, count):
    """Mean Teacher's consistency: the mean squared difference of class probabilities (Tarvainen & Valpola 2017).

    logits (B, N, H, W) of the network, target (B, N, H, W) probabilities of the averaged one, valid (B, H, W) bool; the sum
    over valid pixels is divided by `count` and by N -> scalar.
    """
    squared = (logits.softmax(1) - target).square().mean(1)  # (B, H, W)
    return (squared * valid).sum() / count.clamp(min=1e-6)


def moving_average(net, decay: float) -> AveragedModel:
    """The exponential moving average of `net`'s weights and batch-norm statistics, in evaluation mode. Its
    `update_parameters(net)` takes the weights as they are after the first step, and later decay · average + (1 - decay) · net.
    """
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True).requires_grad_(False).eval()


def main():
    args = parse_args()
    device = start_ranks(args.device)
    torch.backends.cudnn.benchmark = True  # crops are of one size
    args.precision = pick_precision(args.precision, device)
    kernels.load_kernels()
    dataset, partition = datasets.open_training_data(args, unlabeled=args.method != "sup")
    resumed = load_for_resume(args, partition)

    nets, optimizers = [], []
    for i in range(2 if args.method == "cps" else 1):
        # without weights the two start from different ones, and so do two teachers of one kind
        torch.manual_seed(datasets.seed_of(args.seed, (30 if args.role == "teacher_wide" else 10) + i))
        net = models.build_model(args.backbone, len(dataset.classes), args.weights, args.stem, args.head_width,
                                 args.separable_head).to(device).train()  # fmt: skip
        nets.append(net)
        groups = parameter_groups(net, args.weight_decay)
        optimizers.append(torch.optim.SGD(groups, lr=args.lr, momentum=0.9, fused=True))
    average = moving_average(nets[0], args.ema_decay) if args.method == "mt" else None
    kept = average.module if average else nets[0]  # what is validated
    saved = {"model": kept} if args.method == "sup" else {"model": kept, "peer": nets[0] if average else nets[1]}
    whole = args.ohem or args.method == "mt"  # which losses need logits at full size
    activations = models.activation_bytes(nets[0], shares_of(args)[1], args.crop, args.precision, whole)
    forwards = 1 if args.method == "sup" else 2  # of which a backward goes through
    weights = 4 * sum(p.numel() for net in {*nets, *saved.values()} for p in net.parameters())
    bare_images = "no" if args.method == "sup" else len(partition.unlabeled)
    say_plan(args, device, f"{len(partition.labeled)} labeled and {bare_images} unlabeled images",
             needed=3 * weights + forwards * activations)  # weights, gradients, momentum  # fmt: skip
    start, seconds = 0, 0.0
    if resumed:
        start, seconds = resumed["step"], resumed["row"]["seconds"]
        for key, net in saved.items():
            net.load_state_dict(resumed[key])
        for optimizer, state in zip(optimizers, resumed["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        if average:
            average.n_averaged.fill_(start)
        torch.set_rng_state(resumed["rng"])
    running = [compiled(distribute(net), args, device) for net in nets]  # what the steps run
    averaged = compiled(average.module, args, device) if average else None

    supervised_loss = mgd_ops.ohem_cross_entropy if args.ohem else mgd_ops.pixel_cross_entropy
    labeled = datasets.train_batches(dataset, partition.labeled, args, 1, start, labeled=True)
    views = 2 if args.cutmix else 1
    full_weight = {"sup": 0.0, "cps": args.cps_weight, "mt": args.mt_weight}[args.method]
    unlabeled = None  # its loader starts with the first step that has a weight for it

    row = evaluate.result_row(
        args, dataset, partition, device, role=args.role, losses=["sup"] if args.method == "sup" else ["sup", args.method],
        teachers=[], teacher_labels=None, regions=None,
    )  # fmt: skip
    checkpoint = {"args": plain_args(args), "classes": dataset.classes, "palette": dataset.palette,
                  "partition": partition._asdict(), "row": row}  # fmt: skip

    def save(step, path):
        row["seconds"] = round(seconds + time.perf_counter() - began, 1)
        states = {key: net.state_dict() for key, net in saved.items()}
        optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
        save_checkpoint(path, {**checkpoint, **states, "optimizers": optimizer_states, "step": step})

    progress = Progress(args, start)
    began = time.perf_counter()
    for step in range(start, args.steps):
        lr = poly_lr(step, args.steps, args.lr)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
        weight = full_weight * ramp_up(step, args.steps, args.sup_only, args.ramp_up)
        if weight > 0 and unlabeled is None:
            unlabeled = datasets.train_batches(dataset, partition.unlabeled, args, views, step, labeled=False)

        shares = []  # of the batch: images, label, mixed views, their padding, what they are to be learnt from, CutMix mask
        maps = []  # of each share: the label maps whose valid pixels are counted
        for box in datasets.cutmix_boxes(args, step, device):
            images, label = progress.waiting(labeled)
            images, label = datasets.normalize(images, device), label.to(device, non_blocking=True).long()
            mixed = padding = targets = None
            if weight > 0:
                bare, padding = progress.waiting(unlabeled)
                bare, padding = datasets.normalize(bare, device), padding.to(device, non_blocking=True).long()
                with torch.no_grad(), autocast(device, args.precision):
                    if average:  # the averaged network's coarse logits, of the images and of the views
                        targets = [averaged(x, upsample=False).logits for x in (images, bare)]
                    else:  # each network's labels, with batch norm in training mode, as in CPS
                        coarse = [net(bare, upsample=False).logits for net in running]
                        labels = [mgd_ops.upsampled_argmax(logits, args.crop, args.threshold) for logits in coarse]
                        outside = padding == IGNORE_INDEX
                        targets = [datasets.cutmix(each.masked_fill(outside, IGNORE_INDEX), box) for each in labels]
                mixed, padding = datasets.cutmix(bare, box), datasets.cutmix(padding, box)
            shares.append((images, label, mixed, padding, targets, box))
            if weight == 0:
                maps.append([label])
            else:
                maps.append([label, padding] if average else [label, *targets])
        counts = valid_pixels(maps)

        losses = collections.Counter()
        for s, (images, label, mixed, padding, targets, box) in enumerate(shares):
            for i, net in enumerate(running):
                with gradients_stay(net, last=s + 1 == len(shares)):
                    with autocast(device, args.precision):
                        logits = net(images, upsample=False).logits  # (m, N, H/4, W/4)
                    loss = sup = supervised_loss(logits, label, counts[0])
                    losses["sup"] += sup.detach() / (len(shares) * len(nets))
                    if weight > 0:
                        with autocast(device, args.precision):
                            mixed_logits = net(mixed, upsample=False).logits
                        if average:
                            both = mgd_ops.upsample(torch.cat([logits, mixed_logits]), args.crop)
                            of_images, of_views = (mgd_ops.upsample(coarse, args.crop).softmax(1) for coarse in targets)
                            target = torch.cat([of_images, datasets.cutmix(of_views, box)])
                            valid = torch.cat([label, padding]) != IGNORE_INDEX
                            term = consistency_loss(both, target, valid, counts.sum())
                        else:
                            term = mgd_ops.pixel_cross_entropy(mixed_logits, targets[1 - i], counts[2 - i])
                        losses[args.method] += term.detach() / (len(shares) * len(nets))
                        loss = sup + weight * term
                    (loss / len(shares)).backward()
        for optimizer in optimizers:
            optimizer.step()
        if average:
            average.update_parameters(nets[0])
            if device.type == "cpu":  # where batch norm is not synchronised
                agree(kept)
        progress.step(step, args.batch * (1 + views if weight > 0 else 1), lr, losses)

        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            save(step + 1, args.out / "resume.pt")
        if args.val_every and (step + 1) % args.val_every == 0 and step + 1 < args.steps:
            agree(kept)
            progress.validated(step + 1, evaluate.validate(kept, dataset, device, args))

    agree(kept)
    save(args.steps, args.out / "resume.pt")  # so that nothing is lost should the validation fail
    row["miou"] = evaluate.validate(kept, dataset, device, args)
    saved.pop("peer", None)
    optimizers.clear()
    save(args.steps, args.out / "last.pt")
    finish(args)
    progress.write(step=args.steps, miou=row["miou"])
    progress.close()
    say(f"{args.out}/last.pt: {row['miou']:.2f} mIoU after {args.steps} steps, {row['seconds']:.0f} s")


if __name__ == "__main__":
    run(main)
