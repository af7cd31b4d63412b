"""The terms of Eq. 7 and of the baselines, against their formulas."""

import pytest
import torch
import torch.nn.functional as F

import distill_losses
import models


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
    normalizer = torch.tensor([72.0, 72.0])  # all pixels are valid
    terms = distill_losses.kd_losses(
        labeled, mixed, label, teacher_outputs, normalizer, method=method, ohem=False, temperature=4.0
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
    counts = torch.tensor([72.0, 72.0])  # all pixels of both
    losses = distill_losses.mgd_losses(labeled, unlabeled, label, teacher_outputs, counts, ohem=False, **options)
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
        labeled, unlabeled, label, teacher_outputs, counts / torch.tensor([2, 3]), ohem=False, **options
    )
    for name, factor in {"sup": 2, "pixel_l": 2, "pixel_u": 3, "image": 1, "region": 1}.items():
        torch.testing.assert_close(fewer[name], factor * losses[name])
    hard = distill_losses.mgd_losses(labeled, unlabeled, label, teacher_outputs, counts, ohem=True, **options)
    assert {name for name in hard if losses[name] != hard[name]} == {"sup"}


def test_gradient_norms_are_those_of_the_weighted_terms():
    student = torch.nn.Linear(2, 1)  # a term c · Σ weights has the gradient c everywhere, and none for the bias
    terms = {name: c * student.weight.sum() for name, c in (("sup", 3.0), ("image", -2.0), ("cwd", 0.5))}
    norms = distill_losses.gradient_norms(terms, {"sup": 1.0, "image": 0.1, "cwd": 10.0}, student)
    expected = {"grad_sup": 3.0, "grad_image": 0.2, "grad_cwd": 5.0, "grad_loss": 3 - 0.2 + 5}
    assert norms == pytest.approx({name: norm * 2**0.5 for name, norm in expected.items()})
    assert student.weight.grad is None
