"""The region op: PyTorch default and native kernels against the float64 reference.

CPU kernels are tested wherever there is a compiler, CUDA kernels wherever there is a GPU, and without one by
test_cuda_on_cpu.py, which runs the tests marked `kernel_law`. How kernels are built and loaded is in test_kernels.py.
"""

import math
import os

import numpy as np
import pytest
import torch
from conftest import DEVICES, EMULATED, LAYOUTS, features, python

import mgd_ops

pytestmark = pytest.mark.usefixtures("native_kernels")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (B, C, H, W) of the student, (B, C', H', W') of the teacher, regions
SHAPES = [
    ((1, 1, 1, 1), (1, 1, 1, 1), 7),
    ((2, 3, 5, 3), (2, 8, 4, 9), 7),  # fewer pixels than regions
    ((2, 5, 9, 13), (2, 4, 7, 7), (3, 2)),
    ((1, 20, 33, 65), (1, 6, 65, 33), 7),  # sizes that do not divide: overlapping bins
    ((2, 16, 128, 128), (2, 16, 128, 128), 7),
    ((1, 4, 200, 200), (1, 8, 100, 50), 11),  # 800 / 4
    ((1, 3, 40, 70), (1, 3, 40, 70), (2, 37)),  # more regions in a row than a warp is wide
    ((1, 3, 40, 70), (1, 3, 40, 70), 37),
    ((0, 4, 8, 8), (0, 4, 8, 8), 3),
]
if EMULATED:  # scalar accesses and vectors, overlapping bins, more regions in a row than a warp is wide, nothing
    SHAPES = [
        ((1, 1, 1, 1), (1, 1, 1, 1), 3),
        ((2, 3, 9, 13), (2, 4, 7, 7), (3, 2)),
        ((1, 8, 20, 48), (1, 8, 20, 48), (2, 37)),
        ((0, 4, 8, 8), (0, 4, 8, 8), 3),
    ]


def loss_and_gradient(function, student, teacher, regions):
    student = student.detach().requires_grad_()
    loss = function(student, teacher, regions)
    loss.backward()
    return loss.detach(), student.grad


def default_region_loss(student, teacher, regions):
    """The op's PyTorch default with its backward, whatever kernels are loaded."""
    rows, cols = mgd_ops.region_counts("", regions)

    class Default(torch.autograd.Function):
        @staticmethod
        def forward(ctx, student):
            loss, ctx.grad_pooled = mgd_ops.region_loss_default(student, teacher, rows, cols)
            ctx.like = (*student.shape[2:], rows, cols, student.dtype, mgd_ops.is_channels_last(student))
            return loss

        @staticmethod
        def backward(ctx, grad):
            return mgd_ops.region_loss_backward_default(grad, ctx.grad_pooled, *ctx.like)

    return Default.apply(student)


@pytest.mark.slow
@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("function", [mgd_ops.region_loss, default_region_loss], ids=["native", "default"])
def test_loss_and_gradient_equal_the_float64_reference(function, shapes, layout, device):
    shape, other, regions = shapes
    for dtype in (torch.float64, torch.float32):
        student, teacher = features(shape, 0, device, dtype, layout), features(other, 1, device, dtype, layout)
        loss, grad = loss_and_gradient(function, student, teacher, regions)
        assert grad.shape == student.shape and grad.dtype == dtype and loss.dtype == dtype
        if shape[0] == 0:
            assert loss == 0 and mgd_ops.region_loss_reference(student, teacher, regions) == 0
            continue
        reference, expected = loss_and_gradient(mgd_ops.region_loss_reference, student.double(), teacher.double(), regions)
        tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 1e-7}
        torch.testing.assert_close(loss.double(), reference, **tolerance)
        scale = expected.abs().max().item()
        torch.testing.assert_close(grad.double(), expected, rtol=tolerance["rtol"], atol=scale * tolerance["rtol"] + 1e-15)
        if shape[1] == 1 and function is mgd_ops.region_loss:  # the direction of one channel cannot change
            assert not grad.any()


@pytest.mark.slow
@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shapes", SHAPES[:-1], ids=str)
def test_correlation_and_gradient_equal_the_float64_reference(shapes, layout, device):
    shape, _, regions = shapes
    feat = features(shape, 0, device, torch.float64, layout).requires_grad_()
    correlation = mgd_ops.pooled_correlation(feat, regions)
    weights = torch.rand(correlation.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(device)
    (grad,) = torch.autograd.grad((correlation * weights).sum(), feat)
    reference = mgd_ops.pooled_correlation_reference(feat, regions)
    (expected,) = torch.autograd.grad((reference * weights).sum(), feat)
    torch.testing.assert_close(correlation, reference, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shapes", SHAPES[1:-1], ids=str)
def test_low_precision_errs_at_most_twice_as_much_as_pytorch(shapes, dtype, layout, device):
    shape, other, regions = shapes
    student, teacher = features(shape, 0, device, dtype, layout), features(other, 1, device, dtype, layout)
    exact_loss, exact = loss_and_gradient(mgd_ops.region_loss_reference, student.double(), teacher.double(), regions)
    torch_loss, theirs = loss_and_gradient(mgd_ops.region_loss_reference, student, teacher, regions)
    loss, ours = loss_and_gradient(mgd_ops.region_loss, student, teacher, regions)
    assert ours.dtype == dtype and loss.dtype == torch.float32
    slack = 1e-6 * exact_loss.abs() + 1e-9
    assert (loss - exact_loss).abs() <= 2 * (torch_loss - exact_loss).abs() + slack
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 0.01 * rounding


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
def test_mixed_dtypes(device):
    student, teacher = features((2, 4, 9, 9), 0, device, torch.bfloat16), features((2, 4, 9, 9), 1, device, torch.float64)
    loss, grad = loss_and_gradient(mgd_ops.region_loss, student, teacher, 3)
    expected, exact = loss_and_gradient(mgd_ops.region_loss_reference, student.double(), teacher, 3)
    assert loss.dtype == torch.float64 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad.double(), exact, rtol=0.01, atol=1e-8)


@pytest.mark.slow
@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_equals_finite_differences(layout, device):
    teacher = features((2, 4, 7, 5), 1, device)
    student = features((2, 3, 5, 6), 0, device, layout=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda feat: mgd_ops.region_loss(feat, teacher, (3, 2)), student)
    assert torch.autograd.gradcheck(lambda feat: mgd_ops.pooled_correlation(feat, (3, 2)), student)


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_regions_without_direction_have_no_correlation_and_take_no_gradient(dtype, layout, device):
    feat = features((1, 8, 4, 4), 0, device, dtype, layout).clone()
    feat[..., :2, :2] = 0
    feat.requires_grad_()
    correlation = mgd_ops.pooled_correlation(feat, 2)
    assert (correlation[0, 0] == 0).all() and (correlation[0, :, 0] == 0).all() and correlation[0, 1, 1] > 0.99
    mgd_ops.region_loss(feat, features((1, 8, 4, 4), 1, device, dtype), 2).backward()
    assert (feat.grad[..., :2, :2] == 0).all() and feat.grad.isfinite().all() and feat.grad[..., 2:, 2:].abs().max() > 0
    nothing = torch.zeros(2, 8, 4, 4, device=device, dtype=dtype, requires_grad=True)
    loss = mgd_ops.region_loss(nothing, nothing.detach(), 2)
    loss.backward()
    assert loss == 0 and (nothing.grad == 0).all()


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_keeps_the_memory_format(device):
    for layout in ("contiguous", "channels_last"):
        student = features((2, 8, 12, 12), 0, device, layout=layout)
        _, grad = loss_and_gradient(mgd_ops.region_loss, student, features((2, 8, 12, 12), 1, device), 3)
        assert grad.stride() == student.stride()


@pytest.mark.slow
@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
def test_results_repeat_bit_by_bit(device):
    student, teacher = (features((3, 40, 60, 60), seed, device, torch.float32) for seed in (0, 1))
    first = loss_and_gradient(mgd_ops.region_loss, student, teacher, 7)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, threads):
            torch.set_num_threads(count)
            again = loss_and_gradient(mgd_ops.region_loss, student, teacher, 7)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_torch_compile_has_no_graph_break(device):
    student, teacher = features((2, 8, 20, 20), 0, device, torch.float32), features((2, 8, 20, 20), 1, device, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(student):
        return 3 * mgd_ops.region_loss(torch.relu(student), teacher, 7)

    student.requires_grad_()
    compiled(student).backward()
    grad, student.grad = student.grad, None
    (3 * mgd_ops.region_loss(torch.relu(student), teacher, 7)).backward()
    torch.testing.assert_close(grad, student.grad)


def test_wrong_input_is_refused():
    feat = features((1, 3, 4, 4), 0)
    with pytest.raises(ValueError, match="detach"):
        mgd_ops.region_loss(feat, feat.clone().requires_grad_())
    with pytest.raises(ValueError, match="batches of 2 and 1"):
        mgd_ops.region_loss(features((2, 3, 4, 4), 0), feat)
    for wrong in (0, (2, -1), True, (2, True), 2.0, (2, 3, 4), (2,), "7", None, torch.tensor([2, 2]), np.float64(2)):
        with pytest.raises(ValueError, match="regions must be an integer per side"):
            mgd_ops.region_loss(feat, feat, wrong)
        with pytest.raises(ValueError, match="regions must be an integer per side"):
            mgd_ops.pooled_correlation(feat, wrong)
    wrong_features = (feat[0], feat.long(), feat[:, :0], feat[..., :0], feat.to(torch.float8_e4m3fn), feat.to(torch.complex64))
    for wrong in wrong_features:
        for call in (
            mgd_ops.pooled_correlation,
            lambda x: mgd_ops.region_loss(feat, x),
            lambda x: mgd_ops.region_loss(x, feat),
        ):
            with pytest.raises(ValueError, match=r"\(B, C, H, W\) of float64, float32, float16 or bfloat16"):
                call(wrong)
    with pytest.raises(ValueError, match="the teacher on meta"):
        mgd_ops.region_loss(feat, feat.to("meta"))
    expected = mgd_ops.pooled_correlation(feat, (2, 3))
    for right in ([2, 3], torch.Size((2, 3)), (np.int64(2), np.int32(3))):
        assert torch.equal(mgd_ops.pooled_correlation(feat, right), expected)
    assert torch.equal(mgd_ops.pooled_correlation(feat, np.int64(2)), mgd_ops.pooled_correlation(feat, 2))


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["native", "default"])
def test_raw_ops_refuse_what_does_not_fit(path, device):
    """torch.ops.mgd can be called without the checks of `mgd_ops`, and nothing there may read out of bounds."""
    ops = {
        name: getattr(torch.ops.mgd, name) if path == "native" else getattr(mgd_ops, f"{name}_default")
        for name in ("region_loss", "region_loss_backward", "pooled_correlation", "pooled_correlation_backward")
    }
    feat, vectors = torch.randn(2, 3, 6, 6, device=device), torch.randn(2, 4, 3, device=device)
    grad, one = torch.randn(2, 4, 4, device=device), torch.ones((), device=device)
    like = (6, 6, 2, 2, torch.float32, False)
    odd = [feat[0], feat.long(), feat.bool(), feat[:, :0], feat[..., :0], feat.to(torch.complex64)]
    unlike = [(0, 6, 2, 2), (6, 0, 2, 2), (6, 6, 4, 2), (6, 6, -2, -2)]
    calls = [
        *(("pooled_correlation", each, 2, 2) for each in odd),
        *(("region_loss", each, feat, 2, 2) for each in (*odd, feat[:1], feat[:0])),
        *(("region_loss", feat, each, 2, 2) for each in (*odd, feat[:1], feat[:0])),
        *(("pooled_correlation", feat, *regions) for regions in ((0, 2), (2, -1))),
        *(("region_loss", feat, feat, *regions) for regions in ((0, 2), (2, -1))),
    ]
    for name, first, firsts in (
        ("region_loss_backward", one, (one[None], grad)),
        ("pooled_correlation_backward", grad, (grad[:1], grad[:, :3], grad[..., :3], grad[0], grad.int())),
    ):
        calls += [(name, each, vectors, *like) for each in firsts]
        calls += [(name, first, each, *like) for each in (vectors[0], vectors[:, :3], vectors.long(), vectors[..., :0])]
        calls += [(name, first, vectors, *sizes, torch.float32, False) for sizes in unlike]
        calls += [(name, first, vectors, *like[:4], torch.int32, False)]
    for name, *arguments in calls:
        with pytest.raises((ValueError, RuntimeError), match="mgd:"):
            ops[name](*arguments)
            print("not refused:", name, [getattr(each, "shape", each) for each in arguments])
    if device == "cuda":
        with pytest.raises((ValueError, RuntimeError), match="mgd:"):
            ops["region_loss"](feat, feat.cpu(), 2, 2)


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["native", "default"])
def test_raw_backwards_take_any_strides_and_floats(path, dtype, device):
    regions = lambda *size: torch.randn(*size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)  # noqa: E731
    vectors, grad, one = regions(2, 4, 3), regions(2, 4, 4), torch.tensor(0.5, device=device, dtype=torch.float64)
    like = (6, 7, 2, 2, dtype, False)
    for name, first, second in (("region_loss_backward", one, vectors), ("pooled_correlation_backward", grad, vectors)):
        backward = getattr(torch.ops.mgd, name) if path == "native" else getattr(mgd_ops, f"{name}_default")
        expected = getattr(mgd_ops, f"{name}_default")(first, second, *like[:4], torch.float64, False)
        for type_first, type_second in (
            (torch.float64, torch.float64),
            (torch.float32, torch.float64),
            (torch.float64, torch.float32),
        ):
            for each in (
                second,
                second.transpose(1, 2).contiguous().transpose(1, 2),
                second.flip(0)[[1, 0]].repeat(1, 1, 2)[..., :3],
            ):
                scattered = first.repeat_interleave(2, 2)[..., ::2] if first.ndim else first
                got = backward(scattered.to(type_first), each.to(type_second), *like)
                assert got.dtype == dtype and got.shape == (2, 3, 6, 7)
                tolerance = 1e-5 if dtype != torch.bfloat16 else 2e-2
                torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def views(base):
    """Views (2, 8, 15, 24) whose memory a vector of 16 bytes cannot be read from: each breaks one stride, or the address."""
    flat = lambda *size: base[: math.prod(size)].view(size)  # noqa: E731
    return {
        "address": flat(2, 8, 15, 28)[..., 1:25],
        "rows": flat(2, 8, 15, 25)[..., :-1],
        "planes": flat(2, 8, 15 * 24 + 1)[..., :-1].unflatten(2, (15, 24)),
        "images": flat(2, 8 * 15 * 24 + 1)[:, :-1].unflatten(1, (8, 15, 24)),
        "rows of pixels": flat(2, 15, 24 * 8 + 1)[..., :-1].unflatten(2, (24, 8)).permute(0, 3, 1, 2),
        "images of pixels": flat(2, 15 * 24 * 8 + 1)[:, :-1].unflatten(1, (15, 24, 8)).permute(0, 3, 1, 2),
        "pixels": flat(2, 15, 24, 9)[..., :-1].permute(0, 3, 1, 2),
        "address of pixels": flat(2, 15, 24, 12)[..., 1:9].permute(0, 3, 1, 2),
        "transposed": flat(2, 8, 24, 15).transpose(2, 3),
        "one channel": flat(2, 1, 15, 24).expand(-1, 8, -1, -1),
        "one row": flat(2, 8, 1, 24).expand(-1, -1, 15, -1),
        "one column": flat(2, 8, 15, 1).expand(-1, -1, -1, 24),
        "one image": flat(1, 8, 15, 24).expand(2, -1, -1, -1),
    }


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_any_strides(dtype, device):
    base = (torch.rand(2 * 15 * 24 * 12, generator=torch.Generator().manual_seed(0)) - 0.3).to(device, dtype)
    for name, feat in views(base).items():
        assert feat.shape == (2, 8, 15, 24)
        expected = mgd_ops.pooled_correlation_reference(feat.double(), (2, 3)).float()
        torch.testing.assert_close(mgd_ops.pooled_correlation(feat, (2, 3)), expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("path", ["native", "default", "reference"])
def test_the_norm_below_which_a_region_has_no_direction(path, dtype, device):
    """MIN_NORM from both sides: the diagonal of the correlation is 1 above and 0 below."""
    norms = torch.tensor([0.5, 0.99, 1.01, 2.0, 1e3, 1e5], dtype=torch.float64) * mgd_ops.MIN_NORM
    feat = (torch.tensor([0.6, -0.8], dtype=torch.float64)[:, None] * norms)[None, :, None].to(device, dtype)  # (1, 2, 1, 6)
    call = {
        "native": mgd_ops.pooled_correlation,
        "default": lambda feat, regions: mgd_ops.pooled_correlation_default(feat, *regions)[0],
        "reference": mgd_ops.pooled_correlation_reference,
    }[path]
    diagonal = call(feat, (1, 6))[0].diagonal().double().cpu()
    torch.testing.assert_close(diagonal, (norms >= mgd_ops.MIN_NORM).double(), rtol=1e-5, atol=0)


@pytest.mark.kernel_law
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, 1e25])
def test_reference_default_and_kernels_agree_on_what_is_not_finite(value, layout, device):
    """NaN gives NaN; what overflows when it is squared has no direction, in all of them."""
    for place in ((0, 0, 0, 0), (1, 3, 8, 5)):
        feat = features((2, 4, 9, 9), 0, device, torch.float32, layout).clone()
        feat[place] = value
        good = features((2, 4, 9, 9), 1, device, torch.float32, layout)
        for student, teacher in ((feat, good), (good, feat)):
            losses = [f(student, teacher, 3) for f in (mgd_ops.region_loss_reference, default_region_loss, mgd_ops.region_loss)]
            torch.testing.assert_close(losses[1], losses[0], equal_nan=True)
            torch.testing.assert_close(losses[2], losses[0], equal_nan=True)
            assert losses[0].isfinite() == math.isfinite(value)


def test_gradients_are_of_float32_under_autocast():
    """Also those that the PyTorch defaults find in a backward that runs under autocast."""
    student, teacher = (features((2, 8, 9, 9), seed, dtype=torch.float32) for seed in (0, 1))
    for function in (
        mgd_ops.region_loss,
        default_region_loss,
        lambda student, teacher, regions: mgd_ops.pooled_correlation(student, regions).square().sum(),
    ):
        grads = []
        for autocast in (False, True):
            feat = student.clone().requires_grad_()
            loss = function(feat, teacher, 3)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss.backward()
            grads.append(feat.grad)
        assert torch.equal(*grads)
    grad, vectors = torch.randn(2, 9, 9), torch.randn(2, 9, 8)
    arguments = (grad, vectors, 9, 9, 3, 3, torch.float32, False)
    expected = mgd_ops.pooled_correlation_backward_default(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mgd_ops.pooled_correlation_backward_default(*arguments), expected)


def test_second_derivatives_raise():
    student, teacher = features((2, 3, 6, 6), 0).requires_grad_(), features((2, 3, 6, 6), 1)
    for function in (mgd_ops.region_loss, lambda student, _, regions: mgd_ops.pooled_correlation(student, regions)[0, 0, 1]):
        (grad,) = torch.autograd.grad(function(student, teacher, 2), student, create_graph=True)
        (expected,) = torch.autograd.grad(function(student, teacher, 2), student)
        assert torch.equal(grad, expected)
        # also where another term has a second derivative
        for loss in (grad.square().sum(), grad.square().sum() + function(student, teacher, 2)):
            with pytest.raises(NotImplementedError, match="no second derivative"):
                loss.backward(retain_graph=True)


def test_what_the_backward_needs_is_no_differentiable_output():
    feat = features((2, 3, 6, 6), 0).requires_grad_()
    for outputs in (torch.ops.mgd.pooled_correlation(feat, 2, 2), torch.ops.mgd.region_loss(feat, feat.detach(), 2, 2)):
        assert [each.requires_grad for each in outputs] == [True, False]


def test_meta_tensors_and_an_empty_batch():
    student, teacher = (features((2, 3, 6, 6), seed, "meta") for seed in (0, 1))
    assert mgd_ops.region_loss(student, teacher, 2).shape == () and mgd_ops.pooled_correlation(student, 2).shape == (2, 4, 4)
    for dtype in DTYPES:
        empty = torch.zeros(0, 3, 6, 6, dtype=dtype, requires_grad=True)
        loss = mgd_ops.region_loss(empty, empty.detach(), 2)
        loss.backward()
        assert loss == 0 and empty.grad.shape == empty.shape


@pytest.mark.slow
def test_export_with_dynamic_sizes():
    class Losses(torch.nn.Module):
        def forward(self, student, teacher):
            return mgd_ops.region_loss(student, teacher, (3, 2)), mgd_ops.pooled_correlation(student, 3)

    batch, height, width = torch.export.Dim("batch", min=2), torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    sizes = ({0: batch, 2: height, 3: width}, {0: batch})
    example = features((2, 3, 9, 10), 0), features((2, 4, 5, 5), 1)
    exported = torch.export.export(Losses(), example, dynamic_shapes=sizes).module()
    for batch, size in ((2, (9, 10)), (3, (4, 17)), (5, (30, 3))):
        arguments = features((batch, 3, *size), 2), features((batch, 4, 5, 5), 3)
        for got, expected in zip(exported(*arguments), Losses()(*arguments), strict=True):
            torch.testing.assert_close(got, expected)


OPCHECK = """
import torch, kernels, mgd_ops
from torch.library import opcheck
import sys
device = sys.argv[1]
print(kernels.load_kernels())
for dtype, form in ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)):
    feat = torch.randn(2, 4, 9, 11, device=device).to(dtype).contiguous(memory_format=form).requires_grad_()
    teacher = torch.randn(2, 3, 8, 8, device=device).to(dtype)
    like = (9, 11, 3, 2, dtype, form == torch.channels_last)
    vectors = torch.randn(2, 6, 4, device=device)
    opcheck(torch.ops.mgd.region_loss.default, (feat, teacher, 3, 2))
    opcheck(torch.ops.mgd.pooled_correlation.default, (feat, 3, 2))
    opcheck(torch.ops.mgd.region_loss_backward.default, (torch.tensor(2.0, device=device), vectors, *like))
    opcheck(torch.ops.mgd.pooled_correlation_backward.default, (torch.randn(2, 6, 6, device=device), vectors, *like))
print("checked")
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["torch", "native"])
def test_opcheck_before_and_after_the_native_load(path, device):
    done = python(OPCHECK, device, MGD_OPS=path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [path, "checked"]


# ---- GPU only ----

cuda = pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU, or no nvcc")


@cuda
def test_kernels_run_on_the_current_stream():
    """Kernels run on the current stream: there alone, what they read has been written when they read it."""
    student, teacher = (features((2, 32, 64, 64), seed, "cuda", torch.float32) for seed in (0, 1))
    expected = loss_and_gradient(mgd_ops.region_loss, student, teacher, 7)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.full_like(each, torch.nan) for each in (student, teacher)]
        torch.cuda._sleep(100_000_000)  # cycles: the inputs come long after the default stream could have read them
        for each, source in zip(late, (student, teacher), strict=True):
            each.copy_(source)
        got = [each.clone() for each in loss_and_gradient(mgd_ops.region_loss, *late, 7)]
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@cuda
def test_cuda_graph_capture_without_synchronisation():
    student, teacher = (features((2, 32, 64, 64), seed, "cuda", torch.float32) for seed in (0, 1))
    student.requires_grad_()
    for _ in range(2):
        mgd_ops.region_loss(student, teacher, 7).backward()
    student.grad = None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = mgd_ops.region_loss(student, teacher, 7)
        loss.backward()
    with torch.no_grad():
        student.copy_(features((2, 32, 64, 64), 5, "cuda", torch.float32))
    graph.replay()
    torch.cuda.synchronize()
    expected_loss, expected = loss_and_gradient(mgd_ops.region_loss, student, teacher, 7)
    assert torch.equal(loss.detach(), expected_loss) and torch.equal(student.grad, expected)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_elements_than_32_bits_count(layout, device):
    """The last image of a map of over 2^31 elements alone differs from zero."""
    shape = (33, 64, 1024, 1024)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 2.5 * 2 * 33 * 64 * 1024**2:
        pytest.skip("less than 11 GB of memory free")
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    student = torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=form).zero_()
    student[-1] = torch.rand(64, 1, 1, device=device).bfloat16()
    student[-1, :, :512] *= -1
    correlation = mgd_ops.pooled_correlation(student, 2)
    expected = torch.tensor([[1.0, 1, -1, -1], [1, 1, -1, -1], [-1, -1, 1, 1], [-1, -1, 1, 1]], device=device)
    torch.testing.assert_close(correlation[-1], expected, rtol=1e-3, atol=1e-3)
    assert (correlation[:-1] == 0).all()
    grad_pooled = torch.zeros(33, 4, 64, device=device)
    grad_pooled[-1] = 2**18
    grad = torch.ops.mgd.region_loss_backward(
        torch.tensor(1.0, device=device), grad_pooled, 1024, 1024, 2, 2, torch.bfloat16, layout == "channels_last"
    )
    assert (grad[-1] == 1).all() and not grad[0].any() and not grad[-2].any()
