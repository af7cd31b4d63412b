"""The region op: PyTorch default and native kernels against the float64 reference, and how kernels are built and loaded.

CPU kernels are tested wherever there is a compiler, CUDA kernels wherever there is a GPU, and without one by
test_cuda_on_cpu.py. Where there is nvcc but no GPU, the CUDA source is compiled, linked and loaded.
"""

import contextlib
import os
import pathlib
import sys

import filelock
import pytest
import torch
from conftest import DEVICES, EMULATED, LAYOUTS, NO_GPU, NVCC, features, python

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
    # the emulation takes minutes for the correlations of 37²
    *([] if EMULATED else [((1, 3, 40, 70), (1, 3, 40, 70), 37)]),
    ((0, 4, 8, 8), (0, 4, 8, 8), 3),
]


def loss_and_gradient(function, student, teacher, regions):
    student = student.detach().requires_grad_()
    loss = function(student, teacher, regions)
    loss.backward()
    return loss.detach(), student.grad


def default_region_loss(student, teacher, regions):
    """The op's PyTorch default with its backward, whatever kernels are loaded."""
    rows, cols = mgd_ops.check_features("", regions, student)

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
        if shape[0] == 0:  # the reference's mean of nothing is nan; the loss of an empty batch is 0
            assert loss == 0
            continue
        reference, expected = loss_and_gradient(mgd_ops.region_loss_reference, student.double(), teacher.double(), regions)
        tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 1e-7}
        torch.testing.assert_close(loss.double(), reference, **tolerance)
        scale = expected.abs().max().item()
        torch.testing.assert_close(grad.double(), expected, rtol=tolerance["rtol"], atol=scale * tolerance["rtol"] + 1e-15)
        if shape[1] == 1 and function is mgd_ops.region_loss:  # the direction of one channel cannot change
            assert not grad.any()


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


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_dtypes(device):
    student, teacher = features((2, 4, 9, 9), 0, device, torch.bfloat16), features((2, 4, 9, 9), 1, device, torch.float64)
    loss, grad = loss_and_gradient(mgd_ops.region_loss, student, teacher, 3)
    expected, exact = loss_and_gradient(mgd_ops.region_loss_reference, student.double(), teacher, 3)
    assert loss.dtype == torch.float64 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad.double(), exact, rtol=0.01, atol=1e-8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_equals_finite_differences(layout, device):
    teacher = features((2, 4, 7, 5), 1, device)
    student = features((2, 3, 5, 6), 0, device, layout=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda feat: mgd_ops.region_loss(feat, teacher, (3, 2)), student)
    assert torch.autograd.gradcheck(lambda feat: mgd_ops.pooled_correlation(feat, (3, 2)), student)


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


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_keeps_the_memory_format(device):
    for layout in ("contiguous", "channels_last"):
        student = features((2, 8, 12, 12), 0, device, layout=layout)
        _, grad = loss_and_gradient(mgd_ops.region_loss, student, features((2, 8, 12, 12), 1, device), 3)
        assert grad.stride() == student.stride()


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
    with pytest.raises(ValueError, match="regions must be at least 1"):
        mgd_ops.region_loss(feat, feat, 0)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\) of floats"):
        mgd_ops.region_loss(feat[0], feat)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\) of floats"):
        mgd_ops.pooled_correlation(feat.long())
    with pytest.raises(ValueError, match="the teacher on meta"):
        mgd_ops.region_loss(feat, feat.to("meta"))


OPCHECK = """
import torch, mgd_ops
from torch.library import opcheck
import sys
device = sys.argv[1]
print(mgd_ops.load_kernels())
for dtype in (torch.float32, torch.bfloat16):
    for form in (torch.contiguous_format, torch.channels_last):
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["torch", "native"])
def test_opcheck_before_and_after_the_native_load(path, device):
    done = python(OPCHECK, device, MGD_OPS=path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [path, "checked"]


# ---- building and loading, as a user meets it ----

LOAD = "import mgd_ops; print(mgd_ops.load_kernels(), mgd_ops.load_kernels())"


def path_without(name, folder):
    """A PATH on which everything can be found but `name`: links in `folder` to all the rest."""
    folder.mkdir()
    for place in map(pathlib.Path, os.environ["PATH"].split(os.pathsep)):
        for file in place.iterdir() if place.is_dir() else ():
            if file.name != name and not (folder / file.name).is_symlink():
                (folder / file.name).symlink_to(file)
    return str(folder)


def falls_back(expected, **environment):
    """MGD_OPS=auto says one line and goes on with PyTorch, MGD_OPS=native ends with that line."""
    environment = {**NO_GPU, **environment}
    done = python(LOAD, MGD_OPS="auto", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch", "torch"]
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("mgd_ops: cpu kernels not loaded") and expected in lines[0], done.stderr
    done = python(LOAD, MGD_OPS="native", **environment)
    assert done.returncode != 0 and "MGD_OPS=native: cpu kernels not loaded" in done.stderr and expected in done.stderr


def test_importing_builds_nothing(tmp_path):
    done = python("import mgd_ops; print(mgd_ops.backend())", TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert done.stdout.split() == ["torch"] and not (tmp_path / "cache").exists()


def test_torch_path_does_not_try(tmp_path):
    done = python(LOAD, MGD_OPS="torch", TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert done.stdout.split() == ["torch", "torch"] and not done.stderr and not (tmp_path / "cache").exists()


def test_no_compiler(tmp_path):
    falls_back("no C++ compiler", CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path))


def test_a_compiler_that_fails(tmp_path):
    compiler = tmp_path / "broken-c++"
    versions = "*--version*|*-dumpfullversion*) echo 12.0.0;;"
    compiler.write_text(f"#!/bin/sh\ncase \"$*\" in {versions} *) echo 'x.cpp:1: error: no luck'; exit 1;; esac\n")
    compiler.chmod(0o755)
    falls_back("no luck", CXX=str(compiler), TORCH_EXTENSIONS_DIR=str(tmp_path))


def test_no_ninja(tmp_path):
    code = "import mgd_ops, contextlib; mgd_ops.ninja_on_path = contextlib.nullcontext; print(mgd_ops.load_kernels())"
    done = python(code, PATH=path_without("ninja", tmp_path / "bin"), TORCH_EXTENSIONS_DIR=str(tmp_path), **NO_GPU)
    assert done.stdout.split() == ["torch"] and "no ninja; install it" in done.stderr and len(done.stderr.splitlines()) == 1


def test_ninja_of_an_environment_that_is_not_activated(tmp_path):
    if not pathlib.Path(sys.executable).with_name("ninja").exists():
        pytest.skip("ninja is not installed beside this Python")
    environment = {"PATH": path_without("ninja", tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(tmp_path), **NO_GPU}
    done = python(LOAD, MGD_OPS="native", **environment)
    assert done.stdout.split() == ["native", "native"], done.stderr


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    falls_back("TORCH_EXTENSIONS_DIR", TORCH_EXTENSIONS_DIR=str(tmp_path / "file" / "cache"))


def test_a_lock_that_does_not_come_free_is_named_and_left_alone(tmp_path):
    cache = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "MGD_OPS": "auto", **NO_GPU}
    ask = "import mgd_ops; mgd_ops.wait_for_lock = lambda lock, stays: (print(lock, stays), exit()); mgd_ops.build('cpu')"
    path, stays = python(ask, **cache).stdout.split()
    lock = pathlib.Path(path)
    lock.touch()
    # newer torch locks the file, for older ones the file itself is the lock
    with filelock.FileLock(lock) if stays == "True" else contextlib.nullcontext():
        done = python("import mgd_ops; mgd_ops.LOCK_TIMEOUT = 1; print(mgd_ops.load_kernels())", **cache)
    assert done.stdout.split() == ["torch"] and lock.exists()
    assert f"{lock} has been held for" in done.stderr and len(done.stderr.splitlines()) == 1


def test_another_torch_gets_a_cache_of_its_own(tmp_path):
    code = "import mgd_ops, torch; {}print(mgd_ops.build('cpu').name)"
    changes = ("", "torch.__version__ = '9.9'; ")
    names = [python(code.format(change), TORCH_EXTENSIONS_DIR=str(tmp_path)).stdout for change in changes]
    assert names[0] != names[1] and all(name.startswith("mgd_cpu_") for name in names)


def test_unknown_path():
    done = python(LOAD, MGD_OPS="fast")
    assert done.returncode == 1 and "MGD_OPS=fast: unknown; choose auto, native or torch" in done.stderr


@pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME or /usr/local/cuda")
def test_cuda_source_compiles_links_and_loads():
    arch = {} if torch.cuda.is_available() else {"TORCH_CUDA_ARCH_LIST": "9.0"}
    done = python("import mgd_ops; print(mgd_ops.build('cuda'))", CUDA_HOME=NVCC, **arch)
    assert done.returncode == 0 and list(pathlib.Path(done.stdout.strip()).glob("mgd_cuda_*.so")), done.stderr


@pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME or /usr/local/cuda")
def test_an_unknown_architecture_is_one_line():
    done = python("import mgd_ops; mgd_ops.main()", CUDA_HOME=NVCC, TORCH_CUDA_ARCH_LIST="99.9")
    cuda = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0 and cuda.startswith("cuda: not built: Unknown CUDA arch (99.9)"), done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_while_nvcc_is_there():
    done = python("import mgd_ops; mgd_ops.main()", **({"CUDA_HOME": NVCC} if NVCC else {}), TORCH_CUDA_ARCH_LIST="")
    cpu, cuda = done.stdout.strip().splitlines()
    assert cpu.startswith("cpu: /") and cuda.startswith("cuda: not built: no ")


# ---- GPU only ----

cuda = pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU, or no nvcc")


@cuda
def test_side_stream():
    student, teacher = (features((2, 32, 64, 64), seed, "cuda", torch.float32) for seed in (0, 1))
    expected = loss_and_gradient(mgd_ops.region_loss, student, teacher, 7)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = loss_and_gradient(mgd_ops.region_loss, student, teacher, 7)
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
