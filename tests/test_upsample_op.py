"""Cross entropy and argmax of upsampled logits: PyTorch default and native kernels against the float64 reference."""

import itertools
import os

import bench_upsample_loss
import pytest
import torch
from conftest import DEVICES, EMULATED, LAYOUTS, features, python

import mgd_ops

pytestmark = pytest.mark.usefixtures("native_kernels")
# F.interpolate does not round all classes alike, and F.nll_loss has its own words
kernels_alone = pytest.mark.skipif(os.environ.get("MGD_OPS") == "torch", reason="the kernels are not loaded")
# (B, N, h, w) of the logits, (H, W) of the labels
CASES = [
    ((1, 1, 1, 1), (1, 1)),
    ((1, 3, 1, 1), (9, 5)),
    ((2, 1, 3, 4), (9, 13)),  # one class
    ((2, 2, 1, 5), (7, 40)),
    ((2, 5, 6, 1), (21, 3)),
    ((2, 3, 8, 6), (8, 6)),  # nothing to interpolate
    ((1, 4, 20, 31), (7, 5)),  # a smaller size
    ((1, 4, 9, 9), (1, 1)),
    ((1, 3, 7, 1), (1, 4)),
    ((1, 255, 5, 6), (17, 21)),
    ((2, 21, 33, 33), (129, 129)),  # 4 n + 1: coarse pixels that lie on full ones
    ((2, 4, 70, 10), (70, 37)),
    ((1, 3, 2, 2), (300, 70)),
    ((0, 3, 4, 4), (9, 9)),
]
if EMULATED:  # smaller and larger, coarse pixels on full ones, several groups of classes and blocks, nothing
    CASES = [CASES[i] for i in (1, 6)] + [((2, 11, 5, 9), (17, 33)), ((1, 4, 7, 10), (7, 37)), ((0, 3, 4, 4), (9, 9))]


def random_logits(shape, seed, device="cpu", dtype=torch.float64, layout="contiguous"):
    return features(shape, seed, device, dtype, layout).mul_(10)


def random_labels(shape, size, device="cpu", ignored=(0.1, 0.6, 0.0)):
    """Label maps in which some pixels have no label."""
    generator = torch.Generator().manual_seed(3)
    labels = []
    for fraction in ignored:
        label = torch.randint(shape[1], (shape[0], *size), generator=generator)
        label[torch.rand(label.shape, generator=generator) < fraction] = 255
        labels.append(label.to(device))
    return labels


def default_cross_entropies(logits, labels, counts=None):
    """The op's PyTorch default with its backward, whatever kernels are loaded."""

    class Default(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            ctx.logits = logits
            return mgd_ops.upsampled_cross_entropy_default(logits, labels)

        @staticmethod
        def backward(ctx, grad):
            return mgd_ops.upsampled_cross_entropy_backward_default(grad, ctx.logits, labels)

    return mgd_ops.divide(Default.apply(logits).unbind(), labels, counts)


def losses_and_gradient(function, logits, labels, counts=None):
    """The losses, and the gradient of a sum that weighs each differently."""
    logits = logits.detach().requires_grad_()
    losses = torch.stack(function(logits, labels, counts))
    (grad,) = torch.autograd.grad(losses @ torch.tensor([1.0, -2.0, 0.5], dtype=losses.dtype, device=losses.device), logits)
    return losses.detach(), grad


def scale_of(grad, labels) -> float:
    """The largest gradient, or that of a pixel, whose parts need not cancel exactly where there is but one class."""
    return grad.abs().max().item() + 1 / labels[0].numel() if grad.numel() else 0.0


IMPLEMENTATIONS = {"native": mgd_ops.pixel_cross_entropies, "default": default_cross_entropies}


@pytest.mark.slow
@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape,size", CASES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_losses_and_gradient_equal_the_float64_reference(implementation, shape, size, layout, device):
    labels = random_labels(shape, size, device)
    for dtype in (torch.float64, torch.float32):
        logits = random_logits(shape, 0, device, dtype, layout)
        losses, grad = losses_and_gradient(IMPLEMENTATIONS[implementation], logits, labels)
        assert losses.dtype == grad.dtype == dtype and grad.shape == logits.shape
        reference, expected = losses_and_gradient(mgd_ops.pixel_cross_entropies_reference, logits.double(), labels)
        # PyTorch finds the places of pixels with 24 bits
        tolerance = 1e-9 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(losses.double(), reference, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=tolerance * scale_of(expected, labels) + 1e-15)


@pytest.mark.slow
@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape,size", CASES[1:-1], ids=str)
def test_low_precision_errs_at_most_twice_as_much_as_pytorch(shape, size, dtype, layout, device):
    labels = random_labels(shape, size, device)
    logits = random_logits(shape, 0, device, dtype, layout)
    exact_losses, exact = losses_and_gradient(mgd_ops.pixel_cross_entropies_reference, logits.double(), labels)
    torch_losses, theirs = losses_and_gradient(mgd_ops.pixel_cross_entropies_reference, logits, labels)
    losses, ours = losses_and_gradient(mgd_ops.pixel_cross_entropies, logits, labels)
    assert ours.dtype == dtype and losses.dtype == torch.float32
    assert ((losses - exact_losses).abs() <= 2 * (torch_losses - exact_losses).abs() + 1e-6 * exact_losses + 1e-9).all()
    rounding = torch.finfo(dtype).eps * scale_of(exact, labels)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 0.01 * rounding


@pytest.mark.slow
@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_equals_finite_differences(implementation, layout, device):
    for shape, size in (((2, 3, 4, 5), (9, 12)), ((1, 2, 5, 4), (3, 2)), ((1, 2, 3, 3), (3, 3))):
        labels = random_labels(shape, size, device)
        logits = random_logits(shape, 0, device, layout=layout).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, labels=labels: tuple(IMPLEMENTATIONS[implementation](x, labels)), logits)


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_losses_are_divided_by_the_given_normalizers(implementation, device):
    logits, labels = random_logits((2, 4, 5, 5), 0, device), random_labels((2, 4), (17, 17), device)
    counts = [torch.tensor(count, device=device) for count in (3.0, 100.0, 0.5)]
    got = losses_and_gradient(IMPLEMENTATIONS[implementation], logits, labels, counts)
    expected = losses_and_gradient(mgd_ops.pixel_cross_entropies_reference, logits, labels, counts)
    torch.testing.assert_close(got, expected)


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_maps_without_a_label_have_no_loss_and_no_gradient(implementation, device):
    logits = random_logits((2, 4, 5, 5), 0, device, torch.float32)
    labels = random_labels((2, 4), (17, 17), device, ignored=(1, 1, 1))
    losses, grad = losses_and_gradient(IMPLEMENTATIONS[implementation], logits, labels)
    assert (losses == 0).all() and (grad == 0).all()
    assert mgd_ops.pixel_cross_entropies(logits, []) == []


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(6, 6), (23, 23)])
def test_large_logits_do_not_overflow(size, device):
    logits, labels = random_logits((2, 4, 6, 6), 0, device, torch.float32).mul_(1e4), random_labels((2, 4), size, device)
    losses, grad = losses_and_gradient(mgd_ops.pixel_cross_entropies, logits, labels)
    reference, expected = losses_and_gradient(mgd_ops.pixel_cross_entropies_reference, logits.double(), labels)
    torch.testing.assert_close(losses.double(), reference, rtol=1e-5, atol=0)
    assert (grad.double() - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [(6, 6), (21, 26), (4, 3)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_class_ruled_out_by_minus_infinity(implementation, size, device):
    """Such logits are as good as in F.cross_entropy, also where they are interpolated, and take a gradient of exactly 0."""
    for dtype in (torch.float64, torch.float32):
        logits, labels = random_logits((2, 4, 6, 6), 0, device, dtype), random_labels((2, 3), size, device)
        logits[:, 3] = -torch.inf
        losses, grad = losses_and_gradient(IMPLEMENTATIONS[implementation], logits, labels)
        assert not grad[:, 3].any()
        without = losses_and_gradient(mgd_ops.pixel_cross_entropies_reference, logits[:, :3].double(), labels)
        torch.testing.assert_close((losses.double(), grad[:, :3].double()), without, rtol=1e-4, atol=1e-6)


VALUES = {"nan": [torch.nan], "inf": [torch.inf], "-inf": [-torch.inf], "all": [torch.nan, torch.inf, -torch.inf]}


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", VALUES)
def test_reference_default_and_kernels_agree_on_what_is_not_finite(values, dtype, device):
    """Losses and labels of logits of which some are NaN or infinite; of NaN, what counts makes the loss NaN."""
    seen = []
    for (shape, size), seed in itertools.product(
        (
            ((2, 3, 4, 5), (4, 5)),
            ((2, 4, 5, 4), (9, 13)),
            ((1, 5, 3, 6), (20, 41)),
            ((2, 2, 6, 5), (4, 3)),
            ((1, 1, 3, 3), (7, 7)),
        ),
        range(2 if EMULATED else 6),
    ):
        generator = torch.Generator().manual_seed(seed)
        logits = random_logits(shape, seed, device, dtype)
        for value in VALUES[values]:
            logits[(torch.rand(shape, generator=generator) < 0.05).to(device)] = value
        labels = random_labels(shape, size, device, ignored=(0.0, 0.9, 0.99))
        losses = [torch.stack(f(logits, labels)) for f in (mgd_ops.pixel_cross_entropies_reference, *IMPLEMENTATIONS.values())]
        for other in losses[1:]:
            torch.testing.assert_close(other, losses[0], rtol=1e-4, atol=1e-4, equal_nan=True)
        full = mgd_ops.upsample_any(logits, size)
        counts = torch.stack([(full.isnan().any(1) & (label != 255)).any() for label in labels])
        assert losses[0][counts].isnan().all()
        for threshold in (0.0, 0.4):
            expected = mgd_ops.upsampled_argmax_reference(logits, size, threshold)
            assert torch.equal(mgd_ops.upsampled_argmax(logits, size, threshold), expected)
            assert torch.equal(mgd_ops.upsampled_argmax_default(logits, *size, threshold), expected)
        seen.append(losses[0])
    seen = torch.cat(seen)
    assert seen.isfinite().any() and not seen.isfinite().all()


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_nan_without_weight_does_not_count(implementation, device):
    """Coarse pixels are where they lie: at scale 4 the full pixels of the other coarse columns take nothing from a NaN."""
    logits, label = random_logits((1, 3, 4, 4), 0, device), torch.full((1, 13, 13), 255, device=device)
    logits[:, :, :, 1] = torch.nan
    label[..., 0] = label[..., 8:] = 1
    (loss,) = IMPLEMENTATIONS[implementation](logits, [label])
    finite = logits.clone()
    finite[:, :, :, 1] = 7
    torch.testing.assert_close(loss, mgd_ops.pixel_cross_entropies_reference(finite, [label])[0])
    label[0, 5, 1] = 2
    assert IMPLEMENTATIONS[implementation](logits, [label])[0].isnan()


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_largest_floats_do_not_overflow_between_each_other(implementation, device):
    logits, labels = random_logits((1, 3, 3, 3), 0, device, torch.float32), random_labels((1, 3), (9, 9), device)
    logits[0, 0, 1], logits[0, 0, 2] = 3e38, -2.5e38  # whose difference is infinite
    losses, grad = losses_and_gradient(IMPLEMENTATIONS[implementation], logits, labels)
    reference, expected = losses_and_gradient(mgd_ops.pixel_cross_entropies_reference, logits, labels)
    torch.testing.assert_close((losses, grad), (reference, expected))
    assert not losses.isnan().any() and grad.isfinite().all()


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_improbable_classes_are_exact(implementation, device):
    """The gradient of a class is its probability, down to the smallest that float32 holds in full."""
    differences = torch.tensor([0.0, -5, -16, -18, -30, -60, -86])
    logits, label = (
        differences.to(device)[None, :, None, None].expand(1, 7, 2, 2).clone(),
        torch.zeros(1, 2, 2, dtype=torch.int64),
    )
    logits.requires_grad_()
    (loss,) = IMPLEMENTATIONS[implementation](logits, [label.to(device)])
    (grad,) = torch.autograd.grad(4 * loss, logits)
    expected = differences.double().softmax(0)[1:]
    torch.testing.assert_close(grad[0, 1:, 0, 1].double().cpu(), expected, rtol=1e-4, atol=0)


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["native", "default"])
def test_labels_and_gradients_of_any_strides(path, device):
    """Label maps that lie anyhow in memory, and gradients of the sums of any strides and floats."""
    forward, backward = (
        getattr(torch.ops.mgd, name) if path == "native" else getattr(mgd_ops, f"{name}_default")
        for name in ("upsampled_cross_entropy", "upsampled_cross_entropy_backward")
    )
    logits, (label, other, _) = random_logits((2, 3, 4, 5), 0, device, torch.float32), random_labels((2, 3), (9, 12), device)
    wide = label.repeat_interleave(2, 2)
    sums = torch.tensor([2.0, -1.0], device=device)
    for map_ in (
        label.transpose(1, 2).contiguous().transpose(1, 2),
        wide[..., ::2],
        label.flip(0).flip(0),
        label[:1].expand(2, -1, -1),
    ):
        maps = [map_, other]
        dense = [each.contiguous() for each in maps]
        expected = losses_and_gradient_of_sums(mgd_ops.pixel_cross_entropies_reference, logits, dense, sums)
        torch.testing.assert_close(forward(logits, maps), expected[0], rtol=1e-5, atol=1e-5)
        for grad in (
            sums,
            sums.double(),
            sums.bfloat16(),
            sums.repeat_interleave(2)[::2],
            sums.double().repeat_interleave(2)[::2],
        ):
            torch.testing.assert_close(backward(grad, logits, maps), expected[1], rtol=1e-4, atol=1e-5)
    same = torch.tensor(2.0, device=device).expand(2)
    torch.testing.assert_close(backward(same, logits, [label, other]), backward(same.contiguous(), logits, [label, other]))


def losses_and_gradient_of_sums(function, logits, labels, weights):
    """The sums of cross entropies, and the gradient of a weighted sum of them."""
    logits = logits.detach().requires_grad_()
    ones = [torch.ones((), device=logits.device) for _ in labels]
    sums = torch.stack(function(logits, labels, ones))
    return sums.detach(), torch.autograd.grad(sums @ weights, logits)[0]


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["native", "default"])
def test_raw_ops_refuse_what_does_not_fit(path, device):
    """torch.ops.mgd can be called without the checks of `mgd_ops`, and nothing there may read out of bounds."""
    forward, backward, argmax = (
        getattr(torch.ops.mgd, name) if path == "native" else getattr(mgd_ops, f"{name}_default")
        for name in ("upsampled_cross_entropy", "upsampled_cross_entropy_backward", "upsampled_argmax")
    )
    logits, label = torch.randn(2, 3, 4, 4, device=device), torch.zeros(2, 9, 9, dtype=torch.int64, device=device)
    sums = torch.ones(1, device=device)
    many = torch.zeros(2, 256, 4, 4, device=device)
    wrong_logits = [logits[0], logits.long(), logits[:, :0], logits[..., :0], logits.to(torch.complex64), many]
    wrong_maps = [
        [],
        [label.int()],
        [label[:1]],
        [label[0]],
        [label[:, :0]],
        [label, label[:, :3, :3]],
        [label, label[..., :0]],
    ]
    calls = [
        *((forward, each, [label]) for each in (*wrong_logits, logits[:1])),
        *((forward, logits, each) for each in wrong_maps),
        *((backward, sums, each, [label]) for each in (*wrong_logits, logits[:1])),
        *((backward, torch.ones(len(each), device=device), logits, each) for each in wrong_maps),
        *((backward, each, logits, [label]) for each in (sums[:0], sums[0], torch.ones(2, device=device), sums.long())),
        *((argmax, each, 9, 9, 0.0) for each in wrong_logits),
        *((argmax, logits, *size, 0.0) for size in ((0, 9), (9, -1))),
    ]
    for op, *arguments in calls:
        with pytest.raises((ValueError, RuntimeError), match="mgd:"):
            op(*arguments)
            print("not refused:", op, [getattr(each, "shape", each) for each in arguments])
    if device == "cuda":
        for op, *arguments in ((forward, logits, [label.cpu()]), (backward, sums.cpu(), logits, [label])):
            with pytest.raises((ValueError, RuntimeError), match="mgd:"):
                op(*arguments)


@pytest.mark.skipif("not EMULATED and 'cuda' not in DEVICES", reason="limits of the CUDA kernels alone")
@pytest.mark.kernel_law
def test_limits_of_the_cuda_kernels_are_named():
    device = DEVICES[-1]
    logits, label = torch.zeros(1, 2, 2, 2, device=device), torch.zeros(1, 3, 3, dtype=torch.int64, device=device)
    assert len(mgd_ops.pixel_cross_entropies(logits, [label] * 16)) == 16
    with pytest.raises(RuntimeError, match="17 label maps are too many for the CUDA kernels, which take 16; set MGD_OPS=torch"):
        mgd_ops.pixel_cross_entropies(logits, [label] * 17)
    with pytest.raises(RuntimeError, match=r"batches of over 65,535 images.*set MGD_OPS=torch"):
        mgd_ops.upsampled_argmax(logits.expand(65536, -1, -1, -1), (3, 3))
    with pytest.raises(
        RuntimeError, match="55x55 regions are too many for the CUDA kernels, which take 3000; set MGD_OPS=torch"
    ):
        mgd_ops.pooled_correlation(logits, 55)


def test_gradients_are_of_float32_under_autocast():
    """Also those that the PyTorch default finds in a backward that runs under autocast."""
    logits, labels = random_logits((2, 4, 5, 6), 0, dtype=torch.float32), random_labels((2, 4), (17, 21))
    for function in IMPLEMENTATIONS.values():
        grads = []
        for autocast in (False, True):
            leaf = logits.clone().requires_grad_()
            loss = sum(function(leaf, labels))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss.backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


def test_second_derivatives_raise():
    logits, labels = random_logits((2, 4, 5, 6), 0).requires_grad_(), random_labels((2, 4), (17, 21))
    loss = sum(mgd_ops.pixel_cross_entropies(logits, labels))
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.equal(grad, torch.autograd.grad(loss, logits, retain_graph=True)[0])
    for total in (grad.square().sum(), grad.square().sum() + loss):  # also where another term has a second derivative
        with pytest.raises(NotImplementedError, match="no second derivative"):
            total.backward(retain_graph=True)


def test_meta_tensors_and_an_empty_batch():
    logits, label = torch.zeros(2, 3, 4, 4, device="meta"), torch.zeros(2, 9, 9, dtype=torch.int64, device="meta")
    assert [loss.shape for loss in mgd_ops.pixel_cross_entropies(logits, [label, label])] == [(), ()]
    assert mgd_ops.upsampled_argmax(logits, (9, 9)).shape == (2, 9, 9)
    empty = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = mgd_ops.pixel_cross_entropy(empty, torch.zeros(0, 9, 9, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and empty.grad.shape == empty.shape


@pytest.mark.slow
def test_export_with_dynamic_sizes():
    class Pixels(torch.nn.Module):
        def forward(self, logits, label):
            size = label.shape[1:]
            return *mgd_ops.pixel_cross_entropies(logits, [label, label.flip(0)]), mgd_ops.upsampled_argmax(logits, size, 0.5)

    dims = {name: torch.export.Dim(name, min=2) for name in "bhwHW"}
    shapes = ({0: dims["b"], 2: dims["h"], 3: dims["w"]}, {0: dims["b"], 1: dims["H"], 2: dims["W"]})
    example = random_logits((2, 3, 4, 5), 0), random_labels((2, 3), (13, 14))[0]
    exported = torch.export.export(Pixels(), example, dynamic_shapes=shapes).module()
    for batch, coarse, size in ((2, (4, 5), (13, 14)), (3, (7, 2), (9, 30)), (5, (9, 9), (4, 5))):
        arguments = random_logits((batch, 3, *coarse), 1), random_labels((batch, 3), size)[1]
        for got, expected in zip(exported(*arguments), Pixels()(*arguments), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_sums_over_many_pixels_stay_exact(device):
    logits = random_logits((1, 2, 64, 64), 0, device, torch.float32)
    labels = random_labels((1, 2), (2048, 2048), device)
    losses, grad = losses_and_gradient(mgd_ops.pixel_cross_entropies, logits, labels)
    reference, expected = losses_and_gradient(mgd_ops.pixel_cross_entropies_reference, logits.double(), labels)
    torch.testing.assert_close(losses.double(), reference, rtol=1e-6, atol=0)
    assert (grad.double() - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_keeps_the_memory_format(device):
    for layout in ("contiguous", "channels_last"):
        logits = random_logits((2, 8, 12, 12), 0, device, layout=layout)
        for function in IMPLEMENTATIONS.values():
            assert losses_and_gradient(function, logits, random_labels((2, 8), (48, 48), device))[1].stride() == logits.stride()


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_large_logits_are_never_held(device):
    for layout in (torch.contiguous_format, torch.channels_last):
        logits = torch.randn(2, 21, 64, 64, device=device).contiguous(memory_format=layout).requires_grad_()
        labels = random_labels((2, 21), (256, 256), device)
        peak = bench_upsample_loss.peak_mb(lambda _: losses_and_gradient(mgd_ops.pixel_cross_entropies, logits, labels), device)  # noqa: B023
        # the gradient is a sixteenth; on a GPU, a number a pixel besides, a twenty-first
        assert peak < (0.10 if device == "cpu" else 0.15) * logits.nbytes * 16 / 1e6
        peak = bench_upsample_loss.peak_mb(lambda _: mgd_ops.upsampled_argmax(logits, (256, 256), 0.5), device)  # noqa: B023
        assert peak < 1.1 * 8 * 2 * 256 * 256 / 1e6


@pytest.mark.slow
@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape,size", CASES, ids=str)
@pytest.mark.parametrize("native", [True, False], ids=["native", "default"])
def test_argmax_equals_the_float64_reference(native, shape, size, layout, device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = random_logits(shape, 0, device, dtype, layout)
        full = mgd_ops.upsample(logits.double(), size)
        probability = full.softmax(1)
        best = full.topk(min(2, shape[1]), 1).values
        clear = best[:, 0] - best[:, -1] > 1e-3 if shape[1] > 1 else torch.ones_like(best[:, 0], dtype=torch.bool)
        for threshold in (0.0, 0.6):
            label = (
                mgd_ops.upsampled_argmax(logits, size, threshold)
                if native
                else mgd_ops.upsampled_argmax_default(logits, *size, threshold)
            )
            assert label.dtype == torch.int64 and label.shape == (shape[0], *size)
            expected = mgd_ops.upsampled_argmax_reference(logits.double(), size, threshold)
            sure = clear & ((probability.amax(1) - threshold).abs() > 1e-4)
            assert torch.equal(label[sure], expected[sure])


@kernels_alone
@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
def test_of_equal_classes_the_first_wins(device):
    logits = random_logits((2, 3, 6, 7), 0, device, torch.float32)
    label = mgd_ops.upsampled_argmax(logits, (25, 30))
    assert torch.equal(mgd_ops.upsampled_argmax(torch.cat([logits, logits, logits], 1), (25, 30)), label)
    assert (mgd_ops.upsampled_argmax(torch.zeros(1, 5, 2, 2, device=device), (9, 9)) == 0).all()


@pytest.mark.slow
@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
def test_results_repeat_bit_by_bit(device):
    shape, size = (3, 21, 40, 41), (160, 163)
    logits, labels = random_logits(shape, 0, device, torch.float32), random_labels(shape, size, device)
    first = (*losses_and_gradient(mgd_ops.pixel_cross_entropies, logits, labels), mgd_ops.upsampled_argmax(logits, size, 0.5))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5, threads):
            torch.set_num_threads(count)
            again = losses_and_gradient(mgd_ops.pixel_cross_entropies, logits, labels)
            again = (*again, mgd_ops.upsampled_argmax(logits, size, 0.5))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_has_no_graph_break(device):
    logits, labels = random_logits((2, 5, 6, 7), 0, device, torch.float32), random_labels((2, 5), (23, 25), device)

    def function(logits):
        sup, other, _ = mgd_ops.pixel_cross_entropies(torch.relu(logits), labels)
        return sup + 2 * other, mgd_ops.upsampled_argmax(logits, (23, 25), 0.4)

    logits.requires_grad_()
    loss, label = torch.compile(function, fullgraph=True, backend="aot_eager")(logits)
    expected, expected_label = function(logits)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(label, expected_label) and not label.requires_grad
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))


def test_wrong_input_is_refused():
    logits, label = random_logits((2, 3, 4, 4), 0), torch.zeros(2, 9, 9, dtype=torch.int64)
    for wrong in (label.int(), label[:1], label[0]):
        with pytest.raises(ValueError, match=r"labels are \(B, H, W\) of int64"):
            mgd_ops.pixel_cross_entropies(logits, [label, wrong])
    with pytest.raises(ValueError, match="a label on meta"):
        mgd_ops.pixel_cross_entropies(logits, [label.to("meta")])
    for wrong in (logits[0], logits.long(), logits[:, :0], logits.to(torch.float8_e5m2)):
        with pytest.raises(ValueError, match=r"logits are \(B, N, h, w\) of float64, float32, float16 or bfloat16"):
            mgd_ops.pixel_cross_entropies(wrong, [label])
        with pytest.raises(ValueError, match=r"logits are \(B, N, h, w\) of float64, float32, float16 or bfloat16"):
            mgd_ops.upsampled_argmax(wrong, (9, 9))
    many = torch.zeros(2, 256, 4, 4)  # 255 would be a class and the label of pixels that do not count
    for call in (lambda: mgd_ops.pixel_cross_entropies(many, [label]), lambda: mgd_ops.upsampled_argmax(many, (9, 9))):
        with pytest.raises(ValueError, match="there are 256 classes"):
            call()
    with pytest.raises(ValueError, match="cannot be brought to the size"):
        mgd_ops.upsampled_argmax(logits, (0, 9))


@kernels_alone
@pytest.mark.parametrize("wrong", [3, 254, 256, -1, -100])
def test_labels_that_are_no_class_are_refused(wrong):
    logits, label = random_logits((2, 3, 4, 4), 0).requires_grad_(), torch.full((2, 9, 40), 255)
    label[1, 8, 39] = wrong
    with pytest.raises(RuntimeError, match=f"a label is {wrong}, and neither 255 nor one of 3 classes"):
        mgd_ops.pixel_cross_entropy(logits, label)
    with pytest.raises(RuntimeError, match=f"a label is {wrong}"):
        torch.ops.mgd.upsampled_cross_entropy_backward(torch.ones(1), logits, [label])
    with pytest.raises((IndexError, RuntimeError)):
        mgd_ops.upsampled_cross_entropy_default(logits, [label])


OPCHECK = """
import torch, kernels, mgd_ops
from torch.library import opcheck
import sys
device = sys.argv[1]
print(kernels.load_kernels())
for dtype, form in ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)):
    logits = torch.randn(2, 4, 5, 6, device=device).to(dtype).contiguous(memory_format=form)
    labels = [torch.randint(4, (2, 13, 15), device=device) for _ in range(2)]
    opcheck(torch.ops.mgd.upsampled_cross_entropy.default, (logits.clone().requires_grad_(), labels))
    opcheck(torch.ops.mgd.upsampled_cross_entropy_backward.default, (torch.randn(2, device=device), logits, labels))
    opcheck(torch.ops.mgd.upsampled_argmax.default, (logits, 13, 15, 0.4))
print("checked")
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["torch", "native"])
def test_opcheck_before_and_after_the_native_load(path, device):
    done = python(OPCHECK, device, MGD_OPS=path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [path, "checked"]


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU, or no nvcc")
def test_cuda_graph_capture_without_synchronisation():
    shape, size = (2, 21, 32, 32), (128, 128)
    logits = random_logits(shape, 0, "cuda", torch.float32).requires_grad_()
    labels = random_labels(shape, size, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        losses_and_gradient(mgd_ops.pixel_cross_entropies, logits, labels)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = mgd_ops.pixel_cross_entropies(logits, labels)
        (grad,) = torch.autograd.grad(losses[0] - 2 * losses[1] + 0.5 * losses[2], logits)
        label = mgd_ops.upsampled_argmax(logits, size, 0.5)
    with torch.no_grad():
        logits.copy_(random_logits(shape, 5, "cuda", torch.float32))
    graph.replay()
    torch.cuda.synchronize()
    expected_losses, expected = losses_and_gradient(mgd_ops.pixel_cross_entropies, logits, labels)
    torch.testing.assert_close(torch.stack(losses).detach(), expected_losses)
    torch.testing.assert_close(grad, expected)
    assert torch.equal(label, mgd_ops.upsampled_argmax(logits, size, 0.5))
