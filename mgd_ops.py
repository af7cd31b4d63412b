"""The losses of multi-granularity distillation: pixel (Eqs. 1, 2), image (Eq. 4) and region level (Eqs. 5, 6).

    python mgd_ops.py     # build the native kernels ahead, and say what was built (make ext)

The region level and the pixel level are custom ops. Schema, PyTorch default, fake and gradient stand here, once; `csrc/` adds
kernels for the CPU and for CUDA, which `load_kernels` builds and loads. So the fallback and the kernels share all but the
arithmetic. MGD_OPS=auto (the default) falls back to PyTorch with one line that says why, MGD_OPS=native raises instead,
MGD_OPS=torch does not try. Everything is computed in float32 at least, whatever the dtype of the inputs and under autocast.
"""

import contextlib
import hashlib
import logging
import math
import os
import pathlib
import platform
import shutil
import sys
import time

import filelock  # of torch's own requirements
import torch
import torch.nn.functional as F

from common import IGNORE_INDEX, UserError, run

MIN_NORM = 1e-6  # a pooled region below this norm has no direction: its correlations are 0 and it takes no gradient

# ---- pixel level: the references ----


def upsample(logits: torch.Tensor, size) -> torch.Tensor:
    """Logits (B, N, h, w) -> (B, N, *size), bilinear with aligned corners as in the released code, float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logits.shape[2:] == torch.Size(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=True)


def pixel_cross_entropies_reference(logits: torch.Tensor, labels: list[torch.Tensor], counts=None) -> list[torch.Tensor]:
    """`pixel_cross_entropies` in plain PyTorch, differentiable by autograd; it holds the full-size logits several times."""
    with torch.autocast(logits.device.type, enabled=False):
        log_probabilities = upsample(logits, labels[0].shape[1:]).log_softmax(1)
        sums = [F.nll_loss(log_probabilities, label, ignore_index=IGNORE_INDEX, reduction="sum") for label in labels]
    return divide(sums, labels, counts)


def upsampled_argmax_reference(logits: torch.Tensor, size: tuple[int, int], threshold: float = 0.0) -> torch.Tensor:
    """`upsampled_argmax` in plain PyTorch."""
    with torch.autocast(logits.device.type, enabled=False):
        logits = upsample(logits, size)
        label = logits.argmax(1)
        if threshold > 0:
            label[logits.softmax(1).amax(1) < threshold] = IGNORE_INDEX
        return label


# ---- pixel level: the public functions ----


def pixel_cross_entropies(logits: torch.Tensor, labels: list[torch.Tensor], counts=None) -> list[torch.Tensor]:
    """Cross entropies of the same logits against several label maps, each the mean over its pixels that are not 255 (Eq. 1);
    0 where all are.

    logits (B, N, h, w) in float64, float32, float16 or bfloat16, as if they were first brought to the labels' size by bilinear
    interpolation with aligned corners; labels (B, H, W) int64 each -> scalars, float32 or float64. `counts`, a scalar tensor
    each, are divided by instead of the number of valid pixels: where this is one of several shares of a batch, their mean
    number, so that the mean over the shares is the loss of the batch.

    The large logits are never held whole. The gradient reaches the logits once (no second derivative). Raises ValueError where
    shapes, dtypes or devices do not fit; a label that is neither 255 nor a class raises too, or fails an assertion on a GPU.
    """
    if not labels:
        return []
    check_logits("pixel_cross_entropies", logits, labels[0].shape[1:])
    for label in labels:
        if label.dtype != torch.int64 or label.shape != (logits.shape[0], *labels[0].shape[1:]):
            raise ValueError(f"pixel_cross_entropies: labels are (B, H, W) of int64 for logits (B, N, h, w), not "
                             f"{tuple(label.shape)} of {label.dtype} for {tuple(logits.shape)}")  # fmt: skip
        if label.device != logits.device:
            raise ValueError(f"pixel_cross_entropies: the logits are on {logits.device}, a label on {label.device}")
    with torch.autocast(logits.device.type, enabled=False):
        sums = torch.ops.mgd.upsampled_cross_entropy(logits, list(labels))
    return divide(sums.unbind(), labels, counts)


def divide(sums, labels, counts):
    """The sums of cross entropies over the numbers of valid pixels of their labels, or over `counts`."""
    if counts is None:  # not sum(), which on a CPU makes 8 bytes of each pixel first
        counts = [(label != IGNORE_INDEX).count_nonzero() for label in labels]
    return [total / count.clamp(min=1e-6) for total, count in zip(sums, counts, strict=True)]


def pixel_cross_entropy(logits: torch.Tensor, label: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
    """`pixel_cross_entropies` against one label map (Eq. 1)."""
    return pixel_cross_entropies(logits, [label], None if count is None else [count])[0]


def upsampled_argmax(logits: torch.Tensor, size: tuple[int, int], threshold: float = 0.0) -> torch.Tensor:
    """Pseudo labels: the class of the largest logit at each pixel of `size`, the first of equals; 255 where its softmax
    probability is below `threshold`.

    logits (B, N, h, w) in float64, float32, float16 or bfloat16, as if they were first brought to `size` by bilinear
    interpolation with aligned corners, -> (B, *size) int64, without gradient. The large logits are never held whole. Raises
    ValueError for anything but a map of floats.
    """
    check_logits("upsampled_argmax", logits, size)
    with torch.autocast(logits.device.type, enabled=False):
        return torch.ops.mgd.upsampled_argmax(logits.detach(), *size, threshold)


def check_logits(op: str, logits: torch.Tensor, size):
    if logits.ndim != 4 or logits.shape[1:].numel() == 0 or not logits.is_floating_point():
        raise ValueError(f"{op}: logits are (B, N, h, w) of floats, not {tuple(logits.shape)} of {logits.dtype}")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{op}: logits cannot be brought to the size {tuple(size)}; it takes a height and a width")


def ohem_cross_entropy(logits: torch.Tensor, label: torch.Tensor, count=None, threshold=0.7, keep=0.08) -> torch.Tensor:
    """Cross entropy, mean over the hard pixels: those whose true class has a probability below `threshold`, and at least
    the share `keep` of all pixels, hardest first, as far as they have labels (Shrivastava et al. 2016; CPS on Cityscapes
    keeps 50,000 of 800x800). `count` is there for `pixel_cross_entropy`'s sake: each share has its own hard pixels.

    logits (B, N, h, w) floating, brought to the label's size as there, but held whole, since it is single pixels' losses that
    are sorted; label (B, H, W) int64, 255 = ignore -> scalar, float32 or float64.
    """
    logits = upsample(logits, label.shape[1:])
    losses = F.cross_entropy(logits, label, ignore_index=IGNORE_INDEX, reduction="none").flatten()
    valid = label.flatten() != IGNORE_INDEX
    hardest = losses.detach().masked_fill(~valid, 0.0).topk(max(1, int(keep * label.numel()))).values
    hard = valid & (losses >= hardest[-1].clamp(max=-math.log(threshold)))
    return (losses * hard).sum() / hard.sum().clamp(min=1)


# ---- image level: plain PyTorch ----


def global_logits(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The average of logits over the image (Eq. 3): coarse logits (B, N, h, w) floating, as if they were first brought to
    `size` by bilinear interpolation with aligned corners, -> (B, N), float32 or float64.

    Interpolation and average are linear, so each coarse pixel has a weight, and the large logits need not be made.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weights = [interpolation(*lengths, logits).mean(1) for lengths in zip(logits.shape[2:], size, strict=True)]
    return torch.einsum("bnhw,h,w->bn", logits, *weights)


def interpolation(length: int, target: int, like: torch.Tensor) -> torch.Tensor:
    """(length, target): row i holds the weights that coarse pixel i has in the pixels it is interpolated to."""
    eye = torch.eye(length, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(eye, target, mode="linear", align_corners=True)[0]


def image_loss(student: torch.Tensor, teacher: torch.Tensor, size: tuple[int, int], reduction: str = "sum") -> torch.Tensor:
    """Image-level semantic-sensitive loss (Eqs. 3 and 4): L1 distance of the globally averaged logits, of which `size` is the
    resolution they are averaged at.

    student and teacher (B, N, h, w) floating, of equal batch and classes -> scalar, float32 or float64, the batch's mean.
    reduction: `sum` over the classes, or `mean`, which is Eq. 4 to the letter and N times weaker.
    """
    with torch.autocast(student.device.type, enabled=False):
        difference = (global_logits(student, size) - global_logits(teacher, size)).abs()  # (B, N)
    return (difference.sum(1) if reduction == "sum" else difference.mean(1)).mean()


# ---- region level: the references ----


def pooled_correlation_reference(feat: torch.Tensor, regions: int | tuple[int, int] = 7) -> torch.Tensor:
    """`pooled_correlation` in plain PyTorch, differentiable by autograd."""
    with torch.autocast(feat.device.type, enabled=False):
        feat = feat if feat.dtype == torch.float64 else feat.float()
        vectors = F.adaptive_avg_pool2d(feat, regions).flatten(2)  # (B, C, R)
        squared = vectors.square().sum(1, keepdim=True)
        alive = squared >= MIN_NORM**2
        # both branches of the where stay finite, so that no 0 · inf reaches the gradient
        unit = torch.where(alive, vectors * torch.where(alive, squared, 1.0).rsqrt(), 0.0)
        return unit.transpose(1, 2) @ unit


def region_loss_reference(student: torch.Tensor, teacher: torch.Tensor, regions: int | tuple[int, int] = 7) -> torch.Tensor:
    """`region_loss` in plain PyTorch, differentiable by autograd."""
    ours, theirs = (pooled_correlation_reference(f, regions) for f in (student, teacher))
    return (ours - theirs).square().mean()


# ---- region level: the public functions ----


def pooled_correlation(feat: torch.Tensor, regions: int | tuple[int, int] = 7) -> torch.Tensor:
    """Self-correlation of pooled regions (Eq. 5): feat (B, C, H, W) -> (B, R, R), R = regions².

    Each region is an adaptive average over its bin, as in `F.adaptive_avg_pool2d`; entry ij is the cosine of the vectors of
    regions i and j, and 0 where either has a norm below 1e-6. float32, or float64 for float64 features; differentiable.
    `regions` is a number a side, or (rows, columns). Raises ValueError for anything but a map of floats.
    """
    rows, cols = check_features("pooled_correlation", regions, feat)
    with torch.autocast(feat.device.type, enabled=False):
        return torch.ops.mgd.pooled_correlation(feat, rows, cols)[0]


def region_loss(student: torch.Tensor, teacher: torch.Tensor, regions: int | tuple[int, int] = 7) -> torch.Tensor:
    """Region-level content-aware loss (Eq. 6): the mean over i, j and the batch of (m_ij^S - m_ij^T)², m as in Eq. 5.

    student (B, C, H, W) and teacher (B, C', H', W') in float64, float32, float16 or bfloat16 -> scalar, float32 or float64.
    Channels, sizes and dtypes may differ. The gradient reaches the student alone, once (no second derivative). An empty batch
    gives 0. Raises ValueError where the teacher asks for a gradient, or batches or devices differ.
    """
    rows, cols = check_features("region_loss", regions, student, teacher)
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError("region_loss: the teacher is frozen; detach its features")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"region_loss: batches of {student.shape[0]} and {teacher.shape[0]} differ")
    if student.device != teacher.device:
        raise ValueError(f"region_loss: the student is on {student.device}, the teacher on {teacher.device}")
    with torch.autocast(student.device.type, enabled=False):
        return torch.ops.mgd.region_loss(student, teacher, rows, cols)[0]


def check_features(op: str, regions: int | tuple[int, int], *features: torch.Tensor) -> tuple[int, int]:
    rows, cols = (regions, regions) if isinstance(regions, int) else regions
    if rows < 1 or cols < 1:
        raise ValueError(f"{op}: regions must be at least 1 a side, not {regions}")
    for feat in features:
        if feat.ndim != 4 or feat.shape[1:].numel() == 0 or not feat.is_floating_point():
            raise ValueError(f"{op}: features are (B, C, H, W) of floats, not {tuple(feat.shape)} of {feat.dtype}")
    return rows, cols


# ---- the ops: schema, PyTorch default, fake, gradient ----

library = torch.library.Library("mgd", "DEF")
# The forward also returns what the gradient needs: pooled vectors, or the loss's gradient with respect to them, (B, R, C).
library.define("region_loss(Tensor student, Tensor teacher, int rows, int cols) -> (Tensor, Tensor)")
library.define("pooled_correlation(Tensor feat, int rows, int cols) -> (Tensor, Tensor)")
library.define("upsampled_cross_entropy(Tensor logits, Tensor[] labels) -> Tensor")
library.define("upsampled_cross_entropy_backward(Tensor grad, Tensor logits, Tensor[] labels) -> Tensor")
library.define("upsampled_argmax(Tensor logits, SymInt height, SymInt width, float threshold) -> Tensor")
scatter = "SymInt height, SymInt width, int rows, int cols, ScalarType dtype, bool channels_last) -> Tensor"
library.define(f"region_loss_backward(Tensor grad_loss, Tensor grad_pooled, {scatter}")
library.define(f"pooled_correlation_backward(Tensor grad, Tensor pooled, {scatter}")


def bins(size: int, count: int, like: torch.Tensor) -> torch.Tensor:
    """(count, size): row i holds the weights of the pixels in the i-th average of adaptive pooling."""
    i = torch.arange(count, device=like.device)[:, None]
    x = torch.arange(size, device=like.device)
    inside = (x >= i * size // count) & (x < -((i + 1) * size // -count))
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)


def pool(feat, rows, cols):
    """(B, C, H, W) -> (B, R, C)."""
    feat = feat if feat.dtype == torch.float64 else feat.float()
    return F.adaptive_avg_pool2d(feat, (rows, cols)).flatten(2).transpose(1, 2).contiguous()


def unpool(grad_pooled, height, width, rows, cols, dtype, channels_last):
    """The gradient of `pool`: (B, R, C) -> (B, C, H, W)."""
    vertical, horizontal = bins(height, rows, grad_pooled), bins(width, cols, grad_pooled)
    grad = torch.einsum("brsc,rh,sw->bchw", grad_pooled.unflatten(1, (rows, cols)), vertical, horizontal)
    return grad.to(dtype, memory_format=memory_format(channels_last))


def normalize(pooled):
    """(B, R, C) -> unit vectors (B, R, C) and norms (B, R, 1), 0 and infinity for a region without direction."""
    squared = pooled.square().sum(2, keepdim=True)
    norm = torch.where(squared >= MIN_NORM**2, squared.sqrt(), math.inf)
    return pooled / norm, norm


def correlation_gradient(grad, unit, norm):
    """From the gradient (B, R, R) of unit · unitᵀ to that of the vectors before they were normalised (B, R, C)."""
    grad = (grad + grad.transpose(1, 2)) @ unit
    return (grad - (grad * unit).sum(2, keepdim=True) * unit) / norm


def memory_format(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


def is_channels_last(feat) -> bool:
    return feat.stride(1) == 1 and feat.stride(3) != 1


def region_loss_default(student, teacher, rows, cols):
    (unit, norm), (unit_t, _) = (normalize(pool(feat, rows, cols)) for feat in (student, teacher))
    difference = unit @ unit.transpose(1, 2) - unit_t @ unit_t.transpose(1, 2)  # (B, R, R)
    count = max(difference.numel(), 1)
    grad_pooled = correlation_gradient(2 * difference / count, unit.to(difference.dtype), norm.to(difference.dtype))
    return difference.square().sum() / count, grad_pooled


def region_loss_backward_default(grad_loss, grad_pooled, height, width, rows, cols, dtype, channels_last):
    return unpool(grad_loss * grad_pooled, height, width, rows, cols, dtype, channels_last)


def pooled_correlation_default(feat, rows, cols):
    pooled = pool(feat, rows, cols)
    unit, _ = normalize(pooled)
    return unit @ unit.transpose(1, 2), pooled


def pooled_correlation_backward_default(grad, pooled, height, width, rows, cols, dtype, channels_last):
    return unpool(correlation_gradient(grad, *normalize(pooled)), height, width, rows, cols, dtype, channels_last)


# One image at a time, so that the large logits of one image alone exist at once.


def upsampled_cross_entropy_default(logits, labels):
    sums = [logits.new_zeros(len(labels), dtype=accumulation_dtype(logits))]
    for image, *maps in zip(logits, *labels, strict=True):
        log_probabilities = upsample(image[None], maps[0].shape).log_softmax(1)  # (1, N, H, W)
        losses = [F.nll_loss(log_probabilities, m[None], ignore_index=IGNORE_INDEX, reduction="sum") for m in maps]
        sums.append(torch.stack(losses))
    return torch.stack(sums).sum(0)


def upsampled_cross_entropy_backward_default(grad, logits, labels):
    grad = grad.to(accumulation_dtype(logits))
    vertical, horizontal = (interpolation(logits.shape[i + 1], labels[0].shape[i], grad) for i in (1, 2))
    out = empty_gradient(logits)
    for b, maps in enumerate(zip(*labels, strict=True)):
        full = upsample(logits[b, None], maps[0].shape).softmax(1)[0]  # (N, H, W)
        weights = [g * (label != IGNORE_INDEX) for g, label in zip(grad, maps, strict=True)]
        full *= sum(weights)
        for weight, label in zip(weights, maps, strict=True):
            full.scatter_add_(0, torch.where(label == IGNORE_INDEX, 0, label)[None], -weight[None])
        out[b] = torch.einsum("nyx,hy,wx->nhw", full, vertical, horizontal)
    return out


def upsampled_argmax_default(logits, height, width, threshold):
    labels = logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)
    for image, label in zip(logits, labels, strict=True):
        label.copy_(upsampled_argmax_reference(image[None], (height, width), threshold)[0])
    return labels


def empty_gradient(logits):
    """Memory for the gradient of logits: dense, and channels_last where they are."""
    return torch.empty(
        logits.shape, dtype=logits.dtype, device=logits.device, memory_format=memory_format(is_channels_last(logits))
    )


def accumulation_dtype(*features):
    return torch.float64 if any(feat.dtype == torch.float64 for feat in features) else torch.float32


def region_loss_fake(student, teacher, rows, cols):
    dtype = accumulation_dtype(student, teacher)
    loss = student.new_empty((), dtype=dtype)
    return loss, student.new_empty((student.shape[0], rows * cols, student.shape[1]), dtype=dtype)


def pooled_correlation_fake(feat, rows, cols):
    batch, channels = feat.shape[:2]
    dtype = accumulation_dtype(feat)
    correlation = feat.new_empty((batch, rows * cols, rows * cols), dtype=dtype)
    return correlation, feat.new_empty((batch, rows * cols, channels), dtype=dtype)


def backward_fake(grad, pooled, height, width, rows, cols, dtype, channels_last):
    size = (pooled.shape[0], pooled.shape[2], height, width)
    return torch.empty(size, dtype=dtype, device=pooled.device, memory_format=memory_format(channels_last))


def upsampled_cross_entropy_fake(logits, labels):
    return logits.new_empty(len(labels), dtype=accumulation_dtype(logits))


def upsampled_cross_entropy_backward_fake(grad, logits, labels):
    return empty_gradient(logits)


def upsampled_argmax_fake(logits, height, width, threshold):
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)


def setup_context(ctx, inputs, output):
    feat, rows, cols = inputs[0], inputs[-2], inputs[-1]
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)
    ctx.like = (feat.shape[2], feat.shape[3], rows, cols, feat.dtype, is_channels_last(feat))


def region_loss_backward(ctx, grad_loss, _):
    grad = None
    if grad_loss is not None and ctx.needs_input_grad[0]:
        grad = torch.ops.mgd.region_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.like)
    return grad, None, None, None


def pooled_correlation_backward(ctx, grad_correlation, _):
    grad = None
    if grad_correlation is not None and ctx.needs_input_grad[0]:
        grad = torch.ops.mgd.pooled_correlation_backward(grad_correlation, *ctx.saved_tensors, *ctx.like)
    return grad, None, None


def setup_upsampled_context(ctx, inputs, output):
    logits, labels = inputs
    ctx.save_for_backward(logits, *labels)
    ctx.set_materialize_grads(False)


def upsampled_cross_entropy_backward(ctx, grad):
    logits, *labels = ctx.saved_tensors
    grad_logits = None
    if grad is not None and ctx.needs_input_grad[0]:
        grad_logits = torch.ops.mgd.upsampled_cross_entropy_backward(grad, logits, labels)
    return grad_logits, [None] * len(labels)


# CompositeExplicitAutograd is the default of every device; a kernel registered for CPU or CUDA goes before it.
for name, default, fake in (
    ("region_loss", region_loss_default, region_loss_fake),
    ("region_loss_backward", region_loss_backward_default, backward_fake),
    ("pooled_correlation", pooled_correlation_default, pooled_correlation_fake),
    ("pooled_correlation_backward", pooled_correlation_backward_default, backward_fake),
    ("upsampled_cross_entropy", upsampled_cross_entropy_default, upsampled_cross_entropy_fake),
    ("upsampled_cross_entropy_backward", upsampled_cross_entropy_backward_default, upsampled_cross_entropy_backward_fake),
    ("upsampled_argmax", upsampled_argmax_default, upsampled_argmax_fake),
):
    library.impl(name, default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mgd::{name}", fake, lib=library)
torch.library.register_autograd("mgd::region_loss", region_loss_backward, setup_context=setup_context, lib=library)
torch.library.register_autograd(
    "mgd::pooled_correlation", pooled_correlation_backward, setup_context=setup_context, lib=library
)
torch.library.register_autograd(
    "mgd::upsampled_cross_entropy", upsampled_cross_entropy_backward, setup_context=setup_upsampled_context, lib=library
)

# ---- native kernels: build and load ----

SOURCES = pathlib.Path(__file__).parent / "csrc"
LOCK_TIMEOUT = 120.0  # seconds; a build takes 20 to 40
state = {}  # device type -> "native", or the reason why its kernels are not loaded


def backend(device: str | None = None) -> str:
    """The path that computes the ops on a type of device, by default this machine's: `native` or `torch`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return "native" if state.get(device) == "native" else "torch"


def load_kernels() -> str:
    """Build the kernels where they are not built yet, load them, and return `backend()`.

    Once a process, before any torch.compile. Under torchrun the first rank of each machine builds while the others wait. A
    failure is remembered: with MGD_OPS=auto it is said in one line on stderr and PyTorch takes over, with MGD_OPS=native it is
    raised as UserError.
    """
    mode = os.environ.get("MGD_OPS", "auto")
    if mode not in ("auto", "native", "torch"):
        raise UserError(f"MGD_OPS={mode}: unknown; choose auto, native or torch")
    if mode == "torch":
        return backend()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if distributed and not first:
        torch.distributed.barrier()  # the first rank has built
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        if device not in state:
            try:
                build(device)
                state[device] = "native"
            except KernelError as error:
                state[device] = str(error)
                if mode == "auto":
                    print(f"mgd_ops: {device} kernels not loaded, PyTorch computes instead: {error}", file=sys.stderr)
        if mode == "native" and state[device] != "native":
            raise UserError(f"MGD_OPS=native: {device} kernels not loaded: {state[device]}")
    if distributed and first:
        torch.distributed.barrier()
    return backend()


class KernelError(Exception):
    """Why the kernels cannot be built or loaded, and the fix, in one line."""


def build(device: str) -> pathlib.Path:
    """Build and load the kernels of `cpu` or `cuda`; return the folder that holds them. Raises KernelError."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it reports where it found CUDA
    from torch.utils import cpp_extension  # takes a second, and only builds need it

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise KernelError(f"no C++ compiler '{compiler}'; install one (such as Debian's g++), or set CXX")
    # Kernels are built for this very processor and torch; the folder's name says so, and another gets its own.
    if device == "cuda":
        if cpp_extension.CUDA_HOME is None or not pathlib.Path(cpp_extension.CUDA_HOME, "bin", "nvcc").exists():
            raise KernelError("no nvcc; install the CUDA toolkit of torch's version, or set CUDA_HOME to its folder")
        names, key = ["region_cuda.cu", "upsample_cuda.cu"], os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        if not key:
            if not torch.cuda.is_available():
                raise KernelError("no GPU to build for; set TORCH_CUDA_ARCH_LIST, such as 9.0, to build for another machine")
            key = str(torch.cuda.get_device_capability())
    else:
        names, key = ["region_cpu.cpp", "upsample_cpu.cpp"], processor()
    digest = hashlib.sha256(f"{torch.__version__} {torch.version.cuda} {key}".encode()).hexdigest()[:12]
    name = f"mgd_{device}_{digest}"
    root = pathlib.Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    folder = root / name
    flags = ["-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # the stable ABI of torch 2.11
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is read-only")
        wait_for_lock(folder / "lock", stays=hasattr(cpp_extension, "FileLock"))
        with ninja_on_path():
            if not cpp_extension.is_ninja_available():
                raise KernelError("no ninja; install it with pip install ninja")
            cpp_extension.load(
                name,
                [str(SOURCES / file) for file in names],
                extra_cflags=[*flags, "-march=native"],
                extra_cuda_cflags=[*flags, "-DUSE_CUDA", "-lineinfo", "--expt-relaxed-constexpr"],
                build_directory=str(folder),
                is_python_module=False,
                with_cuda=device == "cuda",
            )
    except OSError as error:
        raise KernelError(f"{one_line(error)}; set TORCH_EXTENSIONS_DIR to a folder that can be written") from None
    except (RuntimeError, ValueError) as error:  # the latter for a TORCH_CUDA_ARCH_LIST that torch does not know
        raise KernelError(f"{one_line(error)}; mend it, or set MGD_OPS=torch to do without") from None
    return folder


def processor() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.machine() + platform.processor()


@contextlib.contextmanager
def ninja_on_path():
    """The ninja of this Python's environment is found also where that environment is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def wait_for_lock(lock: pathlib.Path, stays: bool):
    """torch's build would wait forever for the lock of another; wait a while, then name it. It is never deleted.

    Newer torch locks a file that stays (`stays`); for older ones the file itself is the lock, also when its owner has died.
    """
    until = time.monotonic() + LOCK_TIMEOUT
    while lock.exists():
        if stays:
            with contextlib.suppress(filelock.Timeout), filelock.FileLock(lock, timeout=0):
                return
        if time.monotonic() > until:
            age = time.time() - lock.stat().st_mtime
            cure = "end the build that holds it" if stays else "if no build is running, delete that file"
            raise KernelError(f"{lock} has been held for {age:.0f} s; {cure}, or set MGD_OPS=torch")
        time.sleep(0.2)


def one_line(error: Exception) -> str:
    """The line of a build's output that tells most: the first error of the compiler, or the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line), lines[-1] if len(lines) > 1 else lines[0])


def main():
    for device in ("cpu", "cuda"):
        began = time.perf_counter()
        try:
            folder = build(device)
        except KernelError as error:
            print(f"{device}: not built: {error}")
            continue
        print(f"{device}: {folder} ({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    run(main)
