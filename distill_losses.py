"""The losses of distillation: their names and weights, the outputs of the teachers that they need, and the terms."""

from typing import NamedTuple

import torch

import mgd_ops
import models
from common import UserError

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


class TeacherOutputs(NamedTuple):
    """Of one teacher for one micro-batch of m labeled images and m mixed views; what the losses do not need is None."""

    pseudo_labels_l: torch.Tensor | None  # (m, H, W) int64, of the labeled images
    pseudo_labels_u: torch.Tensor | None  # (m, H, W) int64, of the clean views, mixed as the views are
    labeled: models.Output | None  # logits (m, N, h, w) and features (m, C, h, w) of the labeled images, h = H/4
    mixed: models.Output | None  # of the mixed views


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


def uses_views(losses: list[str]) -> bool:
    """Whether any loss is on unlabeled images."""
    return losses != ["sup", "pixel:labeled"]


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
