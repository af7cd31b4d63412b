r"""Train one network on labeled and unlabeled images: the teachers, and the
baselines when given a light backbone.

    python train_teacher.py --out runs/shapes/1-8/teacher-deep \
        --role teacher_deep
    python train_teacher.py --out runs/shapes/1-8/sup-r18 --method sup \
        --backbone r18

--method sup    cross entropy on the labeled images
--method cps    cross pseudo supervision (Chen et al. 2021): two networks of one
                kind, from different seeds. Each learns from the other's pseudo
                labels on CutMix views of unlabeled images. The first is kept.
--method mt     Mean Teacher (Tarvainen & Valpola 2017, with the CutMix of
                French et al. 2020): the network's class probabilities, on
                labeled images and on CutMix views, follow those of the
                exponential moving average of its weights. The average is
                validated and kept.
"""

import collections
import functools
import math
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
from batches import images_of_step, micro_batches, seed_of, step_batches, train_batches, valid_pixels
from common import (
    IGNORE_INDEX,
    ArgumentParser,
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
    print_plan,
    ramp_up,
    set_lr,
    sync_buffers,
)
from finite_steps import FiniteSteps
from run_folder import Progress, load_for_resume, plain_args, restore, save_checkpoint, save_or_stop, states
from step_time import Pass, print_duration
from stop_signals import StopSignals


def parse_args(argv=None):
    parser = ArgumentParser(__doc__, usage="%(prog)s --out DIR [options]")
    parser.add_argument(
        "--method", choices=recipes.TEACHER_METHODS, help="see above (default: cps; teachers of --recipe light: sup)"
    )
    parser.add_argument(
        "--role",
        choices=["teacher_deep", "teacher_wide", "student"],
        default="student",
        help="what the network is for (default: student)",
    )
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        help=f"{', '.join(backbones.ALIASES)} (default: by --role and --recipe; for voc r101, wr34 and r18)",
    )
    recipes.add_flags(parser, recipes.TEACHER_METHODS)
    args = parser.parse_args(argv)
    recipe, is_teacher = recipes.recipe_of(args), args.role != "student"
    args.method = args.method or (recipe.get("teacher_method", "cps") if is_teacher else "cps")
    args.backbone = backbones.canonical_name(args.backbone or recipe[args.role if is_teacher else "backbone"])
    recipes.fill_from_recipe(args, "teacher" if is_teacher else "student")
    args.logit_adjustment = args.logit_adjustment or None  # 0 is off, as where the flag is left out
    return args


class CPS:
    """Each network learns from the other's pseudo labels for the clean views, mixed as the views are."""

    def __init__(self, nets, crop, threshold: float):
        self.nets, self.crop, self.threshold = nets, crop, threshold

    def targets(self, batch):
        """One map of pseudo labels (m, H, W) per network; batch norm is in training mode, as in CPS."""
        coarse = [net(batch.views).logits for net in self.nets]
        labels = [mgd_ops.upsampled_argmax(logits, self.crop, self.threshold) for logits in coarse]
        return [batch.mix(each.masked_fill(batch.views_ignore, IGNORE_INDEX)) for each in labels]

    def ignore_masks(self, batch, targets):
        return [labels == IGNORE_INDEX for labels in (batch.labels, *targets)]

    def loss(self, i, logits, mixed_logits, batch, targets, normalizer):
        """Of network i: the cross entropy with the pseudo labels of the other one."""
        return mgd_ops.pixel_cross_entropy(mixed_logits, targets[1 - i], normalizer[2 - i])


class MeanTeacher:
    """The class probabilities follow those of the averaged network, on labeled images and on mixed views."""

    def __init__(self, averaged, crop):
        self.averaged, self.crop = averaged, crop

    def targets(self, batch):
        """The averaged network's coarse logits of the images and of the clean views."""
        return [self.averaged(x).logits for x in (batch.images, batch.views)]

    def ignore_masks(self, batch, targets):
        return [batch.labels == IGNORE_INDEX, batch.mixed_ignore]

    def loss(self, i, logits, mixed_logits, batch, targets, normalizer):
        both = mgd_ops.upsample(torch.cat([logits, mixed_logits]), self.crop)
        of_images, of_views = (mgd_ops.upsample(coarse, self.crop).softmax(1) for coarse in targets)
        target = torch.cat([of_images, batch.mix(of_views)])
        valid = ~torch.cat(self.ignore_masks(batch, targets))
        return consistency_loss(both, target, valid, normalizer.sum())


def consistency_loss(logits, target, valid, normalizer):
    """Mean Teacher's consistency: the mean squared difference of class probabilities (Tarvainen & Valpola 2017).

    logits (B, N, H, W) of the network, target (B, N, H, W) probabilities of the averaged one, valid (B, H, W) bool; the sum
    over valid pixels is divided by `normalizer` and by N -> scalar.
    """
    squared = (logits.softmax(1) - target).square().mean(1)  # (B, H, W)
    return (squared * valid).sum() / normalizer.clamp(min=1e-6)


def passes_of_step(args, nets, eval_model) -> list[Pass]:
    """What the steps do with the networks."""
    parts, size = micro_batches(args)
    images, views, first = len(parts) * size, 2 if args.cutmix else 1, 0
    passes = [Pass(net, images) for net in nets]
    if args.method != "sup":
        first = math.ceil(args.sup_only * args.steps)
        passes += [Pass(net, images, first=first) for net in nets]
    if args.method == "cps":
        passes += [Pass(net, views * images, backward=False, first=first) for net in nets]
    if args.method == "mt":
        passes.append(Pass(eval_model, (1 + views) * images, backward=False, first=first))
    return passes


def main(argv=None):
    args = parse_args(argv)
    events.check_tensorboard(args)
    device = init_distributed(args.device)
    torch.backends.cudnn.benchmark = True  # crops are of one size
    args.precision = pick_precision(args.precision, device)
    kernels.load_kernels()
    dataset, partition = datasets.open_training_data(args, unlabeled=args.method != "sup")
    resumed = load_for_resume(args, dataset, partition)

    nets = []
    for i in range(2 if args.method == "cps" else 1):
        # without weights the two start from different ones, and so do two teachers of one kind
        torch.manual_seed(seed_of(args.seed, (30 if args.role == "teacher_wide" else 10) + i))
        net = models.model_from_args(vars(args), len(dataset.classes), args.weights).to(device).train()
        nets.append(depthwise.speed_up(net, device))
    optimizers = [
        torch.optim.SGD(parameter_groups(net, args.weight_decay), lr=args.lr, momentum=0.9, fused=True) for net in nets
    ]
    finite_steps = FiniteSteps(nets, optimizers)
    average = None
    if args.method == "mt":  # of weights and batch norm's statistics: at first the weights after the first step
        average = AveragedModel(nets[0], multi_avg_fn=finite_steps.moving_average(args.ema_decay), use_buffers=True)
        average.requires_grad_(False).eval()
    eval_model = average.module if average else nets[0]  # what is validated and kept
    saved = {"model": eval_model} if args.method == "sup" else {"model": eval_model, "second": nets[0] if average else nets[1]}
    whole = args.ohem or args.method == "mt"  # which losses need logits at full size
    activations = models.activation_bytes(nets[0], micro_batches(args)[1], args.crop, args.precision, whole)
    parameters = sum(p.numel() for net in {*nets, *saved.values()} for p in net.parameters())
    # 12 bytes: float32 weights, gradients and momentum; and one forward that backward goes through, or two
    needed = 12 * parameters + (1 if args.method == "sup" else 2) * activations
    print_plan(args, device, partition, args.method != "sup", needed)
    start, seconds = restore(resumed, saved, optimizers)
    print_duration(args, device, start, passes_of_step(args, nets, eval_model))
    if average:
        average.n_averaged.fill_(start)
    ddp_models = [compiled(distribute(net), args, device) for net in nets]  # what the steps run
    supervised_loss = mgd_ops.ohem_cross_entropy if args.ohem else mgd_ops.pixel_cross_entropy
    method = None
    if args.method == "cps":
        method = CPS(ddp_models, args.crop, args.conf_thresh)
    elif average:
        method = MeanTeacher(compiled(average.module, args, device), args.crop)
    full_weight = {"sup": 0.0, "cps": args.cps_weight, "mt": args.mt_weight}[args.method]
    views = 2 if args.cutmix else 1
    labeled = train_batches(dataset, partition.labeled, args, 1, start, labeled=True)
    unlabeled = None  # its loader starts with the first step that has a weight for it

    row = evaluate.result_row(
        args,
        dataset,
        partition,
        device,
        role=args.role,
        losses=["sup"] if args.method == "sup" else ["sup", args.method],
        teachers=[],
        teacher_labels=None,
        regions=None,
    )
    checkpoint = {
        "args": plain_args(args),
        "classes": dataset.classes,
        "palette": dataset.palette,
        "partition": partition._asdict(),
        "row": row,
    }

    def save(step, path):
        row["seconds"] = round(seconds + time.perf_counter() - began, 1)
        save_checkpoint(path, {**checkpoint, **states(path, saved, optimizers), "step": step})

    board = events.Events(args, dataset, device, start)
    progress = Progress(args, start, functools.partial(images_of_step, args, partition), board)
    began = time.perf_counter()
    signals = StopSignals()
    for step in range(start, args.steps):
        if step and due(step - 1, args.val_every, args.steps):
            board.panels(step, eval_model)
            evaluate.validate_step(args, step, eval_model, dataset, device, progress, signals)
        lr = poly_lr(step, args.steps, args.lr)
        set_lr(optimizers, lr)
        finite_steps.begin()
        weight = full_weight * ramp_up(step, args.steps, args.sup_only, args.ramp_up)
        if weight > 0 and unlabeled is None:
            unlabeled = train_batches(dataset, partition.unlabeled, args, views, step, labeled=False)
        next_labeled = functools.partial(progress.next_batch, labeled)
        next_unlabeled = functools.partial(progress.next_batch, unlabeled) if weight > 0 else None

        # Targets come first, since cross entropies are divided by the valid pixels of the whole batch.
        batches = step_batches(args, step, device, next_labeled, next_unlabeled)
        with torch.no_grad(), autocast(device, args.precision):
            targets = [method.targets(batch) if weight > 0 else None for batch in batches]
        normalizer = valid_pixels(
            [
                method.ignore_masks(batch, target) if weight > 0 else [batch.labels == IGNORE_INDEX]
                for batch, target in zip(batches, targets, strict=True)
            ]
        )
        losses = collections.Counter()
        for k, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            for i, net in enumerate(ddp_models):
                with maybe_no_sync(net, last=k + 1 == len(batches)):
                    with autocast(device, args.precision):
                        logits = net(batch.images).logits  # (m, N, H/4, W/4)
                    terms = {"sup": supervised_loss(logits, batch.labels, normalizer[0])}
                    loss = terms["sup"]
                    if weight > 0:
                        with autocast(device, args.precision):
                            mixed_logits = net(batch.mixed).logits
                        terms[args.method] = method.loss(i, logits, mixed_logits, batch, target, normalizer)
                        loss = loss + weight * terms[args.method]
                    (loss / len(batches)).backward()
                for name, term in terms.items():
                    losses[name] += term.detach() / (len(batches) * len(nets))
        losses = finite_steps.check(losses)
        for optimizer in optimizers:
            optimizer.step()
        if average:
            average.update_parameters(nets[0])
            if device.type == "cpu":  # where batch norm is not synchronised
                sync_buffers(eval_model)

        progress.step(step, args.batch * (1 + views if weight > 0 else 1), lr, losses, finite_steps.skipped)
        save_or_stop(args, step, save, progress, signals)
    evaluate.finish_run(args, eval_model, dataset, partition, device, row, save, progress, signals)
    board.panels(args.steps, eval_model)
    board.close()


if __name__ == "__main__":
    cli(main)
