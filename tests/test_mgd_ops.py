"""The losses against the paper's formulas, written out in float64. More on the region op in test_region_op.py."""

import itertools
import math

import pytest
import torch

import mgd_ops


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cross_entropy_by_hand(logits, label):
    """Eq. 1, pixel by pixel."""
    total, count = 0.0, 0
    batch, _, height, width = logits.shape
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                if label[b, y, x] != 255:
                    column = [math.exp(v) for v in logits[b, :, y, x].tolist()]
                    total -= math.log(column[label[b, y, x]] / sum(column))
                    count += 1
    return total / max(count, 1)


def correlation_by_hand(feat, height, width):
    """Eq. 5 for one image: pool with adaptive bins, then cosines."""
    _, h, w = feat.shape
    vectors = []
    for i in range(height):
        for j in range(width):
            rows = slice(i * h // height, -(-(i + 1) * h // height))
            columns = slice(j * w // width, -(-(j + 1) * w // width))
            vectors.append(feat[:, rows, columns].mean((1, 2)))
    m = torch.zeros(len(vectors), len(vectors), dtype=feat.dtype)
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            if a.norm() >= 1e-6 and b.norm() >= 1e-6:
                m[i, j] = a @ b / (a.norm() * b.norm())
    return m


def test_cross_entropy_is_eq_1():
    logits = random(2, 4, 3, 5)
    label = torch.randint(4, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    label[0, 0] = 255
    assert mgd_ops.pixel_cross_entropy(logits, label).item() == pytest.approx(cross_entropy_by_hand(logits, label), rel=1e-12)


def test_cross_entropy_without_a_valid_pixel_is_zero_with_zero_gradient():
    logits = random(2, 4, 3, 5).requires_grad_()
    loss = mgd_ops.pixel_cross_entropy(logits, torch.full((2, 3, 5), 255))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_pixel_loss_is_eq_2():
    logits = random(2, 4, 3, 5)
    labels = [torch.randint(4, (2, 3, 5), generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    expected = sum(cross_entropy_by_hand(logits, label) for label in labels)
    assert sum(mgd_ops.pixel_cross_entropies(logits, labels)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("size", [(6, 5), (17, 8), (24, 20)])
def test_image_loss_is_eq_4(reduction, size):
    student, teacher = random(3, 4, 6, 5).requires_grad_(), random(3, 4, 6, 5, seed=1)
    large = [torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=True) for x in (student, teacher)]
    per_image = [
        sum(abs(large[0][b, n].mean() - large[1][b, n].mean()) for n in range(4)) / (4 if reduction == "mean" else 1)
        for b in range(3)
    ]
    expected = sum(per_image) / 3
    loss = mgd_ops.image_loss(student, teacher, size, reduction)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, student)[0] for each in (loss, expected)))


def test_micro_batches_average_to_its_cross_entropy():
    logits, label = random(6, 4, 3, 5), torch.randint(4, (6, 3, 5), generator=torch.Generator().manual_seed(1))
    label[:, 0] = 255
    label[0] = 255  # micro-batches of unequal numbers of valid pixels, one of none
    count = (label != 255).sum() / 3
    losses = [mgd_ops.pixel_cross_entropy(logits[i : i + 2], label[i : i + 2], count) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(losses) / 3, mgd_ops.pixel_cross_entropy(logits, label))
    empty = torch.full((2, 3, 5), 255)
    assert mgd_ops.pixel_cross_entropy(logits[:2], empty, torch.tensor(0.0)) == 0


@pytest.mark.parametrize("size,regions", [((14, 14), 7), ((9, 13), 7), ((5, 3), 7), ((1, 1), 2), ((12, 8), (3, 2))])
def test_region_loss_is_eq_6(size, regions):
    rows, columns = (regions, regions) if isinstance(regions, int) else regions
    student, teacher = random(2, 6, *size), random(2, 4, 10, 11, seed=1)
    ours = torch.stack([correlation_by_hand(f, rows, columns) for f in student])
    theirs = torch.stack([correlation_by_hand(f, rows, columns) for f in teacher])
    torch.testing.assert_close(mgd_ops.pooled_correlation(student, regions), ours)
    expected = ((ours - theirs) ** 2).sum((1, 2)) / (rows * columns) ** 2  # Eq. 6 an image
    torch.testing.assert_close(mgd_ops.region_loss(student, teacher, regions), expected.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_accumulated_in_float32(dtype):
    student, teacher = random(1, 8, 20, 20, dtype=dtype), random(1, 8, 20, 20, seed=1, dtype=dtype)
    exact = mgd_ops.region_loss(student.double(), teacher.double())
    with torch.autocast("cpu", torch.bfloat16):
        loss = mgd_ops.region_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)


def test_losses_in_plain_pytorch_are_of_float32_under_autocast():
    """Gradients too, of a backward that runs under autocast."""
    teacher, label = (
        random(2, 4, 6, 5, seed=1).float(),
        torch.randint(4, (2, 17, 8), generator=torch.Generator().manual_seed(1)),
    )
    for loss in (
        lambda logits: mgd_ops.image_loss(logits, teacher, (17, 8)),
        lambda logits: mgd_ops.ohem_cross_entropy(logits, label),
    ):
        found = []
        for autocast in (False, True):
            logits = random(2, 4, 6, 5).float().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = loss(logits)
                value.backward()
            found.append((value.detach(), logits.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_empty_batch_has_no_loss():
    logits = torch.zeros(0, 4, 6, 5, requires_grad=True)
    label = torch.zeros(0, 17, 8, dtype=torch.int64)
    for loss in (
        mgd_ops.ohem_cross_entropy(logits, label),
        mgd_ops.image_loss(logits, logits.detach(), (17, 8)),
        mgd_ops.image_loss(logits, logits.detach(), (17, 8), "mean"),
        mgd_ops.pixel_cross_entropy(logits, label),
        mgd_ops.region_loss(logits, logits.detach()),
        mgd_ops.region_loss_reference(logits, logits.detach()),
    ):
        loss.backward()
        assert loss == 0


def test_nan_in_plain_pytorch_reaches_the_loss():
    logits, label = random(1, 4, 5, 5), torch.zeros(1, 5, 5, dtype=torch.int64)
    logits[0, 2, 3, 3] = torch.nan
    assert mgd_ops.image_loss(logits, random(1, 4, 5, 5, seed=1), (9, 9)).isnan()
    assert mgd_ops.ohem_cross_entropy(logits, label).isnan()
    label[0, 3, 3] = 255
    assert mgd_ops.ohem_cross_entropy(logits, label).isfinite()


def test_meta_tensors_have_the_losses_shapes():
    logits, label = random(2, 4, 6, 5).to("meta"), torch.zeros(2, 17, 8, dtype=torch.int64, device="meta")
    assert mgd_ops.ohem_cross_entropy(logits, label).shape == mgd_ops.image_loss(logits, logits, (17, 8)).shape == ()
    assert mgd_ops.global_logits(logits, (17, 8)).shape == (2, 4)


@pytest.mark.slow
def test_export_with_dynamic_sizes():
    class Losses(torch.nn.Module):
        def forward(self, logits, teacher, label):
            return mgd_ops.ohem_cross_entropy(logits, label), mgd_ops.image_loss(logits, teacher, label.shape[1:])

    dims = {name: torch.export.Dim(name, min=2) for name in "bhwHW"}
    coarse = {0: dims["b"], 2: dims["h"], 3: dims["w"]}
    sizes = (coarse, coarse, {0: dims["b"], 1: dims["H"], 2: dims["W"]})

    def arguments(batch, height, width, *size):
        label = torch.randint(4, (batch, *size), generator=torch.Generator().manual_seed(1))
        return random(batch, 4, height, width), random(batch, 4, height, width, seed=1), label

    exported = torch.export.export(Losses(), arguments(2, 6, 5, 17, 18), dynamic_shapes=sizes).module()
    for case in ((2, 6, 5, 17, 18), (3, 4, 9, 30, 8), (5, 7, 7, 5, 5)):
        for got, expected in zip(exported(*arguments(*case)), Losses()(*arguments(*case)), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("keep,ignored", [(0.08, 0.1), (0.5, 0.1), (1.0, 0.1), (0.5, 0.9), (0.5, 1.0)])
def test_ohem_equals_sorting_by_hand(keep, ignored):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, 8, 9, generator=generator, dtype=torch.float64)
    label = torch.randint(5, (2, 8, 9), generator=generator)
    label[torch.rand(label.shape, generator=generator) < ignored] = 255
    losses = []
    for b, y, x in itertools.product(range(2), range(8), range(9)):
        if label[b, y, x] != 255:
            losses.append(-float(logits[b, :, y, x].log_softmax(0)[label[b, y, x]]))
    losses.sort(reverse=True)
    hard = [loss for i, loss in enumerate(losses) if i < int(keep * label.numel()) or math.exp(-loss) < 0.7]
    expected = sum(hard) / max(1, len(hard))
    assert float(mgd_ops.ohem_cross_entropy(logits, label, keep=keep)) == pytest.approx(expected)
