"""The terms of Eq. 7 and of the baselines, against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

import batches
import distill
import distill_losses
import models
from finite_steps import FiniteSteps


def test_baselines_follow_their_formulas():
    """KD and CWD against loops over the definitions, in float64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    T = 2.5

    def divergence(p_logits, q_logits):  # of one distribution from another
        p, q = ((logits / T).exp() for logits in (p_logits, q_logits))
        p, q = p / p.sum(), q / q.sum()
        return T**2 * (p * (p / q).log()).sum()

    pixels = [(b, h, w) for b in range(2) for h in range(4) for w in range(5)]
    expected = torch.stack([divergence(teacher[b, :, h, w], student[b, :, h, w]) for b, h, w in pixels]).mean()
    torch.testing.assert_close(distill_losses.kd_loss(student, teacher, T), expected)
    expected = torch.stack([divergence(teacher[b, c], student[b, c]) for b in range(2) for c in range(3)]).mean()
    torch.testing.assert_close(distill_losses.cwd_loss(student, teacher, T), expected)


@pytest.mark.parametrize("method", ["kd", "cwd"])
def test_kd_and_cwd_distil_from_both_teachers_on_labeled_images_and_views(method):
    generator = torch.Generator().manual_seed(0)

    def output(ours=False):
        logits = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
        return models.Output(logits.requires_grad_(ours), None)

    label = torch.randint(3, (2, 6, 6), generator=generator)
    labeled, mixed = output(ours=True), output(ours=True)
    teacher_outputs = {role: distill_losses.TeacherOutputs(None, None, output(), output()) for role in ("T_D", "T_W")}
    normalizer, batch = torch.tensor([72.0, 72.0]), batches.Batch(None, label)  # all pixels are valid
    terms = distill_losses.kd_losses(
        labeled, mixed, batch, teacher_outputs, normalizer, method=method, ohem=False, temperature=4.0
    )
    loss = distill_losses.weighted_sum(terms, {"sup": 1.0, method: 3.0})
    each = distill_losses.kd_loss if method == "kd" else distill_losses.cwd_loss
    expected = sum(
        each(labeled.logits, t.labeled.logits, 4.0) + each(mixed.logits, t.mixed.logits, 4.0) for t in teacher_outputs.values()
    )
    torch.testing.assert_close(terms[method], expected)
    expected = F.cross_entropy(labeled.logits, label) + 3 * expected
    torch.testing.assert_close(loss, expected)
    for logits in (labeled.logits, mixed.logits):
        ours, theirs = (torch.autograd.grad(total, logits, retain_graph=True)[0] for total in (loss, expected))
        torch.testing.assert_close(ours, theirs)


def test_total_loss_is_eq_7():
    """Every term from its formula in float64, with the weights where Eq. 7 has them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def labels():
        return torch.randint(3, (2, 6, 6), generator=generator)

    labeled = models.Output(random(2, 3, 6, 6).requires_grad_(), random(2, 4, 3, 3))
    unlabeled = models.Output(random(2, 3, 6, 6).requires_grad_(), random(2, 4, 3, 3).requires_grad_())
    label, on_labeled, on_views = labels(), [labels(), labels()], [labels(), labels()]
    deep_logits, wide_features = random(2, 3, 6, 6), random(2, 5, 3, 3)
    options = {"losses": ["sup", "pixel", "image:T_D", "region:T_W"], "regions": 3}
    weights = {"sup": 1.0, "pixel_l": 1.0, "pixel_u": 1.0, "image": 0.3, "region": 11.0}

    def cross_entropy(logits, label):
        return -logits.log_softmax(1).gather(1, label[:, None]).mean()

    def correlation(feat):  # one pixel a region
        unit = feat.flatten(2) / feat.flatten(2).norm(dim=1, keepdim=True)
        return unit.transpose(1, 2) @ unit

    expected = cross_entropy(labeled.logits, label)
    expected += sum(cross_entropy(labeled.logits, each) for each in on_labeled)
    expected += sum(cross_entropy(unlabeled.logits, each) for each in on_views)
    expected += 0.3 * (unlabeled.logits.mean((2, 3)) - deep_logits.mean((2, 3))).abs().sum(1).mean()
    expected += 11.0 * (correlation(unlabeled.features) - correlation(wide_features)).square().mean()
    teacher_outputs = {
        "T_D": distill_losses.TeacherOutputs(on_labeled[0], on_views[0], None, models.Output(deep_logits, None)),
        "T_W": distill_losses.TeacherOutputs(on_labeled[1], on_views[1], None, models.Output(None, wide_features)),
    }
    counts, batch = torch.tensor([72.0, 72.0]), batches.Batch(None, label)  # all pixels of both
    losses = distill_losses.mgd_losses(labeled, unlabeled, batch, teacher_outputs, counts, ohem=False, **options)
    losses["loss"] = distill_losses.weighted_sum(losses, weights)
    torch.testing.assert_close(losses["loss"], expected)
    inputs = {"labeled": labeled.logits, "unlabeled": unlabeled.logits, "features": unlabeled.features}
    gradients = torch.autograd.grad(losses["loss"], inputs.values(), retain_graph=True)
    for name, ours, theirs in zip(inputs, gradients, torch.autograd.grad(expected, inputs.values()), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    reached = {"sup": "labeled", "pixel_l": "labeled", "pixel_u": "unlabeled", "image": "unlabeled", "region": "features"}
    for term, name in reached.items():  # so that no sum hides a term that has lost its gradient
        assert torch.autograd.grad(losses[term], inputs[name], retain_graph=True)[0].abs().sum() > 0, term
    fewer = distill_losses.mgd_losses(
        labeled, unlabeled, batch, teacher_outputs, counts / torch.tensor([2, 3]), ohem=False, **options
    )
    for name, factor in {"sup": 2, "pixel_l": 2, "pixel_u": 3, "image": 1, "region": 1}.items():
        torch.testing.assert_close(fewer[name], factor * losses[name])
    hard = distill_losses.mgd_losses(labeled, unlabeled, batch, teacher_outputs, counts, ohem=True, **options)
    assert {name for name in hard if losses[name] != hard[name]} == {"sup"}


def test_files_of_pseudo_labels_are_a_teacher_of_the_pixel_level():
    """Each of its terms is a mean over the pixels that the files label, alone or beside a teacher, hard or soft."""
    generator = torch.Generator().manual_seed(0)
    ours = [models.Output(torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64), None) for _ in range(2)]
    label, mixed_ignore = torch.randint(3, (2, 6, 6), generator=generator), torch.zeros(2, 6, 6, dtype=torch.bool)
    files = [torch.randint(3, (2, 6, 6), generator=generator) for _ in range(2)]
    label[0, :2], mixed_ignore[1, 4:], files[0][0], files[1][:, 3:] = 255, True, 255, 255
    batch = batches.Batch(None, label, mixed_ignore=mixed_ignore)
    with_files = batch._replace(pseudo_labels_l=files[0], pseudo_labels_u=files[1])
    logits = models.Output(torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64), None)
    teacher = distill_losses.TeacherOutputs(label, label, logits, None, logits.logits)

    def terms(batch, teachers, **options):
        counts = batches.valid_pixels([batch.ignore_masks()]).double()
        return distill_losses.mgd_losses(
            *ours, batch, teachers, counts, **{"losses": ["sup", "pixel"], "ohem": False, **options}
        )

    entropies = [F.cross_entropy(of.logits, maps, ignore_index=255) for of, maps in zip(ours, files, strict=True)]
    expected = dict(zip(("pixel_l", "pixel_u"), entropies, strict=True))
    alone = terms(with_files, {})
    for name in ("pixel_l", "pixel_u"):
        torch.testing.assert_close(alone[name], expected[name])
    for options in ({}, {"soft_labels": 1.0}, {"ohem": True}):
        plain, beside = (terms(each, {"T_D": teacher}, **options) for each in (batch, with_files))
        torch.testing.assert_close(beside["sup"], plain["sup"])
        for name in ("pixel_l", "pixel_u"):
            torch.testing.assert_close(beside[name], plain[name] + expected[name])
    half = terms(with_files, {}, losses=["sup", "pixel:unlabeled"])
    assert half.keys() == {"sup", "pixel_u"} and half["pixel_u"] == alone["pixel_u"]
    none = terms(batch._replace(pseudo_labels_l=torch.full_like(label, 255), pseudo_labels_u=files[1]), {})
    assert none["pixel_l"] == 0 and none["pixel_u"] == alone["pixel_u"]


def test_gradient_norms_are_those_of_the_weighted_terms():
    student = torch.nn.Linear(2, 1)  # a term c · Σ weights has the gradient c everywhere, and none for the bias
    terms = {name: c * student.weight.sum() for name, c in (("sup", 3.0), ("image", -2.0), ("cwd", 0.5))}
    norms = distill_losses.gradient_norms(terms, {"sup": 1.0, "image": 0.1, "cwd": 10.0}, student)
    expected = {"grad_sup": 3.0, "grad_image": 0.2, "grad_cwd": 5.0, "grad_loss": 3 - 0.2 + 5}
    assert norms == pytest.approx({name: norm * 2**0.5 for name, norm in expected.items()})
    assert student.weight.grad is None


@pytest.fixture
def step():
    """A micro-batch of two labeled images and two views with ignored pixels, the student's outputs for them, the outputs of two
    teachers with all that soft labels need, and a normalizer; in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    views, box = random(4, 3, 8, 8), random(2, 1, 8, 8) > 0
    label, ignore = torch.randint(3, (2, 8, 8), generator=generator), random(2, 8, 8) > 1
    label[0, :, 2] = 255
    batch = batches.Batch(
        random(2, 3, 8, 8), label, views, torch.cat([ignore, ignore]), batches.cutmix(views, box), ignore, box
    )
    needed = distill_losses.needed_outputs("mgd", ["sup", "pixel"], "T_D", soft_labels=1.0)
    teachers = {}
    for role in ("T_D", "T_W"):
        weight = 5 * random(3, 3, 4, 4)

        def teacher(images, weight=weight):
            return models.Output(F.conv2d(images, weight, stride=4), images)

        teachers[role] = distill.teacher_outputs(teacher, batch, needed)
    labeled, mixed = (models.Output(random(2, 3, 2, 2).requires_grad_(), None) for _ in range(2))
    return labeled, mixed, batch, teachers, torch.tensor([97.0, 83.0], dtype=torch.float64)


def test_soft_labels_of_a_teacher_without_temperature_are_eq_2(step):
    """In value and gradient, on labeled images and on views."""
    labeled, mixed, *_ = step
    found = []
    for temperature in (None, 0.0, 1e-9, 1e-320, 1.0):
        terms = distill_losses.mgd_losses(*step, losses=["sup", "pixel"], ohem=False, soft_labels=temperature)
        gradients = torch.autograd.grad(terms["pixel_l"] + 3 * terms["pixel_u"], [labeled.logits, mixed.logits])
        found.append([terms["sup"], terms["pixel_l"], terms["pixel_u"], *gradients])
    for other in found[1:4]:
        torch.testing.assert_close(other, found[0])
    assert all(not torch.allclose(*pair) for pair in zip(found[4][1:], found[0][1:], strict=True))


def test_soft_labels_are_the_divergence_from_the_teachers_probabilities(step):
    """Pixel by pixel, after upsampling and CutMix, in the gradient; the value lacks the teachers' entropy alone."""
    labeled, mixed, batch, teachers, normalizer = step
    T = 2.0
    terms = distill_losses.mgd_losses(*step, losses=["sup", "pixel"], ohem=False, soft_labels=T)

    def full(logits):
        return F.interpolate(logits, (8, 8), mode="bilinear", align_corners=True)

    divergence, entropy = {"pixel_l": 0.0, "pixel_u": 0.0}, {"pixel_l": 0.0, "pixel_u": 0.0}
    for teacher in teachers.values():
        of_views = full(teacher.clean)
        for b, y, x in ((b, y, x) for b in range(2) for y in range(8) for x in range(8)):
            view = b + 2 * int(batch.cutmix_mask[b, 0, y, x])
            for term, ours, theirs, ignored in (
                ("pixel_l", labeled, full(teacher.labeled.logits)[b, :, y, x], batch.labels[b, y, x] == 255),
                ("pixel_u", mixed, of_views[view, :, y, x], batch.mixed_ignore[b, y, x]),
            ):
                if not ignored:
                    p, q = (theirs / T).softmax(0), full(ours.logits)[b, :, y, x].softmax(0)
                    divergence[term] += (p * (p / q).log()).sum()
                    entropy[term] -= (p * p.log()).sum()
    for term, ours, count in (("pixel_l", labeled, normalizer[0]), ("pixel_u", mixed, normalizer[1])):
        torch.testing.assert_close(terms[term], (divergence[term] + entropy[term]) / count)
        expected = torch.autograd.grad(divergence[term] / count, ours.logits)[0]
        torch.testing.assert_close(torch.autograd.grad(terms[term], ours.logits, retain_graph=True)[0], expected)


def test_schedules_of_the_levels_begin_and_end_as_they_say():
    for steps in (1, 5, 40_000):
        decay = [distill_losses.lambda_factor("decay", step, steps) for step in range(steps)]
        assert decay == pytest.approx([1 - step / steps for step in range(steps)])
        ramp = [distill_losses.lambda_factor("ramp", step, steps) for step in range(steps)]
        assert ramp == sorted(ramp) and ramp[0] == pytest.approx(math.exp(-5))
        assert {*ramp[math.ceil(0.4 * steps) :]} <= {1.0}
        assert {distill_losses.lambda_factor(schedule, 0, steps) for schedule in (None, "constant")} == {1.0}
    assert ramp[8_000] == pytest.approx(math.exp(-5 / 4)) and ramp[15_000] < 1


def test_relative_weights_give_each_level_its_fraction_of_the_pixel_levels_gradient():
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(4, 5, 3, 3, generator=generator) for _ in range(3)]
    features = torch.randn(4, 5, 3, 3, generator=generator, requires_grad=True)

    def terms(features, targets):
        pairs = zip(("pixel_u", "image", "region"), (1.0, 30.0, 1e-3), targets, strict=True)
        return {name: factor * (features - target).square().mean() for name, factor, target in pairs}

    relative = distill_losses.RelativeWeights(["image", "region"], 0.25)
    assert relative.weights() == {"image": 0.0, "region": 0.0}  # nothing is measured yet
    relative.measure(terms(features, targets), features)
    relative.update()
    norms = {
        name: torch.autograd.grad(term, features, retain_graph=True)[0].norm()
        for name, term in terms(features, targets).items()
    }
    first = relative.weights()
    for level in ("image", "region"):
        torch.testing.assert_close(first[level] * norms[level], 0.25 * norms["pixel_u"])
    # two micro-batches of a step are as their batch
    parts = distill_losses.RelativeWeights(["image", "region"], 0.25)
    for half in (slice(0, 2), slice(2, 4)):
        part = features[half].detach().requires_grad_()
        parts.measure(terms(part, [target[half] for target in targets]), part)
    parts.update()
    torch.testing.assert_close(parts.weights(), first)
    # a second step moves the norms by a tenth
    relative.measure(
        {name: 2 * term for name, term in terms(features, targets).items()} | {"image": features.sum() * 0}, features
    )
    relative.update()
    expected = torch.tensor([1.1 * norms["pixel_u"], 0.9 * norms["image"], 1.1 * norms["region"]])
    torch.testing.assert_close(relative.norms, expected)
    assert all(weight <= relative.LARGEST for weight in distill_losses.RelativeWeights(["image"], 1.0).weights().values())


def test_a_skipped_step_leaves_relative_weights_as_they_were():
    net = torch.nn.Conv2d(3, 5, 1)
    relative = distill_losses.RelativeWeights(["image"], 0.25)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    guard = FiniteSteps([net, relative], [optimizer])
    for factor in (1.0, math.nan, 1.0):
        before = relative.norms.clone()
        guard.begin()
        features = net(torch.randn(2, 3, 4, 4))
        terms = {"pixel_u": factor * features.square().mean(), "image": features.abs().mean()}
        relative.measure(terms, features)
        sum(terms.values()).backward()
        relative.update()
        guard.check({"loss": sum(terms.values()).detach()})
        assert torch.equal(before, relative.norms) == math.isnan(factor) and relative.norms.isfinite().all()
        optimizer.zero_grad()
