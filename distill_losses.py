"""The losses of distillation: their names and weights, the outputs of the teachers that they need, and the terms."""

from typing import NamedTuple

import torch

import mgd_ops
import models
from batches import Batch
from common import IGNORE_INDEX, UserError, mean_over_ranks, ramp_up
from recipes import MGD_METHODS

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
LEVELS = ("image", "region")  # the terms with λ1 and λ2, which follow --lambda-schedule and --lambda-relative
RAMP = 0.4  # the fraction of the steps after which --lambda-schedule ramp ends


def chosen_losses(args) -> list[str]:
    """The losses of the arguments, with `pixel` for both of its halves. Raises UserError for combinations without a meaning."""
    teachers = [role for role, path in (("T_D", args.deep), ("T_W", args.wide)) if path]
    if args.pseudo_labels and args.method not in MGD_METHODS:
        raise UserError(
            f"--pseudo-labels {args.pseudo_labels}: holds labels, but --method {args.method} needs logits; leave one of them "
            "out, or give --method mgd"
        )
    if not teachers and not args.pseudo_labels:
        raise UserError(
            "a teacher is needed: give --deep FILE, --wide FILE or both (train_teacher.py makes them), or --pseudo-labels DIR"
        )
    if args.method not in MGD_METHODS:
        if args.losses:
            raise UserError(f"--losses: is for --method mgd and mgd+; {args.method} has losses of its own")
        return ["sup", args.method]
    names = args.losses or ["sup", "pixel", *([f"image:{teachers[0]}", f"region:{teachers[-1]}"] if teachers else [])]
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
    if args.pseudo_labels and not any(name.startswith("pixel") for name in names):
        raise UserError(f"{given}: uses nothing of --pseudo-labels; add pixel, or leave that flag out")
    if halves <= {*names}:
        names = ["pixel", *(name for name in names if name not in halves)]
    return sorted(names, key=LOSSES.index)


class TeacherOutputs(NamedTuple):
    """Of one teacher for one micro-batch of m labeled images and m mixed views; what the losses do not need is None."""

    pseudo_labels_l: torch.Tensor | None  # (m, H, W) int64, of the labeled images
    pseudo_labels_u: torch.Tensor | None  # (m, H, W) int64, of the clean views, mixed as the views are
    labeled: models.Output | None  # logits (m, N, h, w) and features (m, C, h, w) of the labeled images, h = H/4
    mixed: models.Output | None  # of the mixed views
    clean: torch.Tensor | None = None  # logits (2m, N, h, w) of the clean views; (m, N, h, w) without CutMix


def needed_outputs(method: str, losses: list[str], role: str, soft_labels: float | None = None) -> set[str]:
    """Which fields of the `TeacherOutputs` of teacher `role` the losses need."""
    if method not in MGD_METHODS:
        return {"labeled", "mixed"}
    of_labeled, of_views = {"pseudo_labels_l"}, {"pseudo_labels_u"}
    if soft_labels:  # whose pixels are ignored where the pseudo labels are
        of_labeled, of_views = {*of_labeled, "labeled"}, {*of_views, "clean"}
    fields = {
        "pixel": of_labeled | of_views,
        "pixel:labeled": of_labeled,
        "pixel:unlabeled": of_views,
        f"image:{role}": {"mixed"},
        f"region:{role}": {"mixed"},
    }
    return set().union(*(fields.get(loss, ()) for loss in losses))


def uses_views(losses: list[str]) -> bool:
    """Whether any loss is on unlabeled images."""
    return losses != ["sup", "pixel:labeled"]


def halves_of_pixel(losses: list[str]) -> tuple[bool, bool]:
    """Whether the pixel level (Eq. 2) is on the labeled images, and on the unlabeled ones."""
    labeled, unlabeled = ({"pixel", half} & {*losses} for half in ("pixel:labeled", "pixel:unlabeled"))
    return bool(labeled), bool(unlabeled)


def mgd_losses(
    labeled,
    mixed,
    batch: Batch,
    teachers: dict[str, TeacherOutputs],
    normalizer,
    *,
    losses,
    ohem,
    regions=7,
    image_reduction="sum",
    soft_labels=None,
) -> dict:
    """The terms of Eq. 7 that are in `losses`, without their weights.

    labeled, mixed: the student's `Output` for the labeled images and the mixed views (None where no loss is on them) of
    `batch`, whose pseudo labels of files are one more teacher of the pixel level; the outputs of T_D, T_W, both or none;
    `normalizer`, one number for each of `batch.ignore_masks()` (see `batches.valid_pixels`); `soft_labels` is the temperature
    of the probabilities of T_D and T_W that replace their labels.
    """
    labels, outputs = batch.labels, teachers.values()
    on_labeled, on_views = halves_of_pixel(losses)
    maps = [] if ohem else [(labels, normalizer[0])]
    if on_labeled:
        maps += [(t.pseudo_labels_l, normalizer[0]) for t in outputs if not soft_labels]
        maps += [] if batch.pseudo_labels_l is None else [(batch.pseudo_labels_l, normalizer[2])]
    entropies = mgd_ops.pixel_cross_entropies(labeled.logits, [each for each, _ in maps], [count for _, count in maps])
    terms = {"sup": mgd_ops.ohem_cross_entropy(labeled.logits, labels) if ohem else entropies.pop(0)}  # Eq. 1
    if on_labeled:  # Eq. 2
        soft = [(t.labeled.logits, t.pseudo_labels_l) for t in outputs if soft_labels]
        entropies += soft_cross_entropies(labeled.logits, soft, soft_labels, normalizer[0])
        terms["pixel_l"] = sum(entropies)
    if on_views:  # Eq. 2
        maps = [(t.pseudo_labels_u, normalizer[1]) for t in outputs if not soft_labels]
        maps += [] if batch.pseudo_labels_u is None else [(batch.pseudo_labels_u, normalizer[3])]
        entropies = mgd_ops.pixel_cross_entropies(mixed.logits, [each for each, _ in maps], [count for _, count in maps])
        soft = [(t.clean, t.pseudo_labels_u) for t in outputs if soft_labels]
        entropies += soft_cross_entropies(mixed.logits, soft, soft_labels, normalizer[1], batch.mix)
        terms["pixel_u"] = sum(entropies)
    for role, teacher in teachers.items():
        if f"image:{role}" in losses:  # Eq. 4
            term = mgd_ops.image_loss(mixed.logits, teacher.mixed.logits, labels.shape[-2:], image_reduction)
            terms["image"] = terms.get("image", 0.0) + term
        if f"region:{role}" in losses:  # Eq. 6
            term = mgd_ops.region_loss(mixed.features, teacher.mixed.features, regions)
            terms["region"] = terms.get("region", 0.0) + term
    return terms


def soft_labels_of(logits, pseudo_labels, temperature: float, mix=lambda maps: maps):
    """A teacher's class probabilities at full size, 0 where its pseudo labels are ignored.

    logits (m, N, h, w), or those of which `mix` makes as many at full size; pseudo_labels (m, H, W) int64 -> (m, N, H, W). As
    the temperature goes to 0, the probabilities go to those pseudo labels.
    """
    logits = mix(mgd_ops.upsample(logits, pseudo_labels.shape[-2:]))
    logits = (logits - logits.amax(1, keepdim=True)) / temperature  # none overflows
    return logits.softmax(1).masked_fill(pseudo_labels[:, None] == IGNORE_INDEX, 0.0)


def soft_cross_entropies(logits, teachers: list[tuple], temperature, normalizer, mix=lambda maps: maps) -> list:
    """The cross entropy with the soft labels of all teachers, in a list; an empty one without a teacher. Its gradient is that
    of the divergences KL(soft labels ‖ softmax(logits)). The sum over the pixels is divided by `normalizer`, as in Eq. 2.

    logits (m, N, h, w) floating of the student; of each teacher the first two arguments of `soft_labels_of`.
    """
    if not teachers:
        return []
    target = sum(soft_labels_of(theirs, labels, temperature, mix) for theirs, labels in teachers)  # one map for all
    log_probabilities = mgd_ops.upsample(logits, target.shape[-2:]).log_softmax(1)
    return [-(target * log_probabilities).sum() / normalizer.clamp(min=1e-6)]


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


def kd_losses(labeled, mixed, batch, teachers: dict[str, TeacherOutputs], normalizer, *, method, ohem, temperature) -> dict:
    """The terms of --method kd or cwd, without their weights; arguments as of `mgd_losses`.

    The divergence is taken between coarse logits, and added up over the teachers, and over labeled images and mixed views.
    """
    divergence = kd_loss if method == "kd" else cwd_loss
    supervised_loss = mgd_ops.ohem_cross_entropy if ohem else mgd_ops.pixel_cross_entropy
    pairs = [(labeled, t.labeled) for t in teachers.values()] + [(mixed, t.mixed) for t in teachers.values()]
    return {
        "sup": supervised_loss(labeled.logits, batch.labels, normalizer[0]),
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
        norms[f"grad_{name}"] = float(weights.get(name, 1.0) * torch.nn.utils.get_total_norm(gradients))
    return norms


def lambda_factor(schedule: str | None, step: int, steps: int) -> float:
    """--lambda-schedule: the factor on λ1 and λ2 in step 0 <= step < steps. `ramp` rises to 1 as in Laine & Aila 2017, and
    `decay` falls linearly from 1."""
    if schedule == "ramp":
        return ramp_up(step, steps, 0.0, RAMP)
    return 1 - step / steps if schedule == "decay" else 1.0


class RelativeWeights(torch.nn.Module):
    """--lambda-relative: weights of the levels at which their gradients are a fraction of the pixel level's.

    All are gradients with respect to the student's features of the mixed views, which is where the levels meet, as Esser et al.
    2021 weigh two losses at the last layer that both reach. A step's weights come from the steps before it, so that all of its
    micro-batches and ranks have the same; the first step has none. The norms are a moving average over ten steps, and a buffer:
    resume points hold it, and `FiniteSteps` takes back what a skipped step changed.
    """

    AVERAGE, LARGEST = 0.9, 1e4  # the decay of the norms; the largest weight, as in Esser et al.'s code

    def __init__(self, levels: list[str], fraction: float):
        super().__init__()
        self.terms, self.fraction = ["pixel_u", *levels], fraction
        self.register_buffer("norms", torch.zeros(len(self.terms)))
        self.squares = []  # one per micro-batch of this step, (terms,)

    def weights(self) -> dict[str, torch.Tensor]:
        """The weight of each level, a scalar each."""
        weights = (self.fraction * self.norms[0] / self.norms[1:].clamp(min=1e-12)).clamp(max=self.LARGEST)
        return dict(zip(self.terms[1:], weights, strict=True))

    def measure(self, terms: dict[str, torch.Tensor], features: torch.Tensor):
        """Of a micro-batch with `terms` and the student's features (m, C, h, w) of its mixed views; the graph is kept."""
        gradients = [torch.autograd.grad(terms[name], features, retain_graph=True)[0] for name in self.terms]
        self.squares.append(torch.stack([gradient.float().square().sum() for gradient in gradients]))

    def update(self):
        """At the end of a step, once all of its micro-batches are measured."""
        norms = mean_over_ranks(torch.stack(self.squares).sum(0)).sqrt()
        self.norms.copy_(torch.where(self.norms > 0, self.norms.lerp(norms, 1 - self.AVERAGE), norms))
        self.squares = []
