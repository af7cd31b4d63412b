"""The losses of multi-granularity distillation: pixel (Eqs. 1, 2), image (Eq. 4) and region level (Eqs. 5, 6).

The region level and the pixel level are custom ops. Schema, PyTorch default, fake and gradient are defined here, once; `csrc/`
adds kernels for the CPU and for CUDA, which `kernels.py` builds and loads. So the default and the kernels differ only in the
arithmetic. Everything is computed in float32 at least, whatever the dtype of the inputs and under autocast, gradients too.

The ops have a first derivative. A second one raises NotImplementedError. Forward-mode automatic differentiation is not
supported: as for every custom op of PyTorch, torch.func.jvp gives tangents of 0 and torch.func.grad is refused.

An input that is NaN gives a loss of NaN where it counts. At the pixel level, pixels of label 255 do not count, nor do coarse
logits without weight in any pixel that has a label. The gradient is unspecified where the loss is not finite, and where the
logits of a pixel of label 255 are not.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

from common import IGNORE_INDEX

MIN_NORM = 1e-6  # a pooled region below this norm has no direction: its correlations are 0 and it takes no gradient

# ---- pixel level: the references ----


def upsample(logits: torch.Tensor, size) -> torch.Tensor:
    """Logits (B, N, h, w) -> (B, N, *size), bilinear with aligned corners as in the released code, float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logits.shape[2:] == torch.Size(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=True)


def upsample_any(logits: torch.Tensor, size) -> torch.Tensor:
    """`upsample` for logits that may be infinite or NaN, which the gradient does not reach. F.interpolate multiplies also those
    of weight 0, where they do not count. So the finite ones are interpolated without them, and they are added where they count.

    Under torch.compile and in a CUDA graph, which cannot look at values, it is `upsample`.
    """
    blind = torch.compiler.is_compiling() or (logits.is_cuda and torch.cuda.is_current_stream_capturing())
    if blind or logits.shape[2:] == torch.Size(size) or logits.isfinite().all():
        return upsample(logits, size)
    finite = logits.isfinite()
    other = logits.detach().masked_fill(finite, 0.0)
    for dim, target in zip((2, 3), size, strict=True):
        place, steps = torch.arange(target, device=logits.device) * (logits.shape[dim] - 1), max(target - 1, 1)
        first, last = place // steps, -(place // -steps)  # equal where a pixel lies on a coarse one
        other = other.index_select(dim, first) + other.index_select(dim, last)
    return upsample(torch.where(finite, logits, 0.0), size) + other


def pixel_cross_entropies_reference(logits: torch.Tensor, labels: list[torch.Tensor], normalizers=None) -> list[torch.Tensor]:
    """`pixel_cross_entropies` in plain PyTorch, differentiable by autograd. It holds the full-size logits several times."""
    with torch.autocast(logits.device.type, enabled=False):
        log_probabilities = upsample_any(logits, labels[0].shape[1:]).log_softmax(1)
        sums = [F.nll_loss(log_probabilities, label, ignore_index=IGNORE_INDEX, reduction="sum") for label in labels]
    return divide(sums, labels, normalizers)


def upsampled_argmax_reference(logits: torch.Tensor, size: tuple[int, int], threshold: float = 0.0) -> torch.Tensor:
    """`upsampled_argmax` in plain PyTorch."""
    with torch.autocast(logits.device.type, enabled=False):
        logits = upsample_any(logits, size)
        label = logits.argmax(1)
        if threshold > 0:
            label[logits.softmax(1).amax(1) < threshold] = IGNORE_INDEX
        return label


# ---- pixel level: the public functions ----


def pixel_cross_entropies(logits: torch.Tensor, labels: list[torch.Tensor], normalizers=None) -> list[torch.Tensor]:
    """Cross entropies of the same logits against several label maps, each the mean over its pixels that are not 255 (Eq. 1);
    0 where all are.

    logits (B, N, h, w) in float64, float32, float16 or bfloat16, N at most 255, as if they were first brought to the labels'
    size by bilinear interpolation with aligned corners; labels (B, H, W) int64 each -> scalars, float32 or float64. The sums
    are divided by `normalizers`, a scalar tensor each, instead of the numbers of valid pixels: where this is one of several
    micro-batches, by the mean number, so that the mean over the micro-batches is the loss of the batch.

    The large logits are never held whole. The gradient reaches the logits once (no second derivative). Infinite logits are as
    in F.cross_entropy, also between others; NaN and the gradient where the loss is not finite: see the top of this file. Raises
    ValueError where shapes, dtypes or devices do not fit; a label that is neither 255 nor a class raises too, or fails an
    assertion on a GPU. The CUDA kernels take up to 16 label maps, 65,535 images, and maps of under 2^31 logits per image, and
    raise RuntimeError for more.
    """
    if not labels:
        return []
    check_logits("pixel_cross_entropies", logits, labels[0].shape[1:])
    check_labels("pixel_cross_entropies", logits, labels)
    return divide(torch.ops.mgd.upsampled_cross_entropy(logits, list(labels)).unbind(), labels, normalizers)


def divide(sums, labels, normalizers):
    """Divide sums of cross entropies by the numbers of valid pixels of their labels, or by `normalizers`."""
    if normalizers is None:  # not sum(), which on a CPU first makes 8 bytes of each pixel
        normalizers = [(label != IGNORE_INDEX).count_nonzero() for label in labels]
    return [total / normalizer.clamp(min=1e-6) for total, normalizer in zip(sums, normalizers, strict=True)]


def pixel_cross_entropy(logits: torch.Tensor, label: torch.Tensor, normalizer: torch.Tensor | None = None) -> torch.Tensor:
    """`pixel_cross_entropies` against one label map (Eq. 1)."""
    return pixel_cross_entropies(logits, [label], None if normalizer is None else [normalizer])[0]


def upsampled_argmax(logits: torch.Tensor, size: tuple[int, int], threshold: float = 0.0) -> torch.Tensor:
    """Pseudo labels: the class of the largest logit at each pixel of `size`, the first of equals; 255 where its softmax
    probability is below `threshold`.

    logits (B, N, h, w) in float64, float32, float16 or bfloat16, N at most 255, as if they were first brought to `size` by
    bilinear interpolation with aligned corners, -> (B, *size) int64, without gradient. The large logits are never held whole.
    As in torch.argmax, NaN counts as the largest logit; a probability that is NaN is not below the threshold. Raises ValueError
    for anything but a map of floats. The CUDA kernels take up to 65,535 images, and maps of under 2^31 logits per image, and
    raise RuntimeError for more.
    """
    check_logits("upsampled_argmax", logits, size)
    return torch.ops.mgd.upsampled_argmax(logits.detach(), *size, threshold)


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_map(op: str, what: str, tensor: torch.Tensor):
    if tensor.ndim != 4 or 0 in tensor.shape[1:] or tensor.dtype not in FLOATS:
        raise ValueError(f"{op}: {what} of float64, float32, float16 or bfloat16, not {tuple(tensor.shape)} of {tensor.dtype}")


def check_logits(op: str, logits: torch.Tensor, size):
    check_map(op, "logits are (B, N, h, w)", logits)
    if logits.shape[1] > IGNORE_INDEX:
        raise ValueError(
            f"{op}: there are {logits.shape[1]} classes; {IGNORE_INDEX} is the label of ignored pixels, "
            f"so there can be at most {IGNORE_INDEX}"
        )
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{op}: logits cannot be brought to the size {tuple(size)}; it takes a height and a width")


def check_labels(op: str, logits: torch.Tensor, labels: list[torch.Tensor]):
    for label in labels:
        if label.dtype != torch.int64 or label.shape != (logits.shape[0], *labels[0].shape[1:]):
            raise ValueError(
                f"{op}: labels are (B, H, W) of int64 for logits (B, N, h, w), not "
                f"{tuple(label.shape)} of {label.dtype} for {tuple(logits.shape)}"
            )
        if label.device != logits.device:
            raise ValueError(f"{op}: the logits are on {logits.device}, a label on {label.device}")


def ohem_cross_entropy(logits: torch.Tensor, label: torch.Tensor, normalizer=None, threshold=0.7, keep=0.08) -> torch.Tensor:
    """Cross entropy, mean over the hard pixels (Shrivastava et al. 2016): those whose true class has a probability below
    `threshold`, and at least the fraction `keep` of all pixels, hardest first, among those with a label. CPS on Cityscapes
    keeps 50,000 of 800x800. `normalizer` is ignored: it makes the signature that of `pixel_cross_entropy`, and each micro-batch
    has its own hard pixels.

    logits (B, N, h, w) floating, upsampled to the label's size and held whole, since the losses of single pixels are sorted;
    label (B, H, W) int64, 255 = ignore -> scalar, float32 or float64; 0 for an empty batch.
    """
    logits = upsample(logits, label.shape[1:])
    losses = F.cross_entropy(logits, label, ignore_index=IGNORE_INDEX, reduction="none").flatten()
    if losses.numel() == 0:
        return losses.sum()
    valid = label.flatten() != IGNORE_INDEX
    hardest = losses.detach().masked_fill(~valid, 0.0).topk(torch.sym_max(1, torch.sym_int(keep * label.numel()))).values
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
    return (logits * (weights[0][:, None] * weights[1])).sum((2, 3))  # not einsum, which autocast would round


def interpolation(length: int, target: int, like: torch.Tensor) -> torch.Tensor:
    """(length, target): row i holds the weights that coarse pixel i has in the pixels it is interpolated to."""
    eye = torch.eye(length, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(eye, target, mode="linear", align_corners=True)[0]


def image_loss(student: torch.Tensor, teacher: torch.Tensor, size: tuple[int, int], reduction: str = "sum") -> torch.Tensor:
    """Image-level semantic-sensitive loss (Eqs. 3 and 4): L1 distance of the globally averaged logits, of which `size` is the
    resolution they are averaged at.

    student and teacher (B, N, h, w) floating, of equal batch and classes -> scalar, float32 or float64, the batch's mean, 0 for
    an empty batch.
    reduction: `sum` over the classes, or `mean`, which is Eq. 4 as written and N times weaker.
    """
    difference = (global_logits(student, size) - global_logits(teacher, size)).abs()  # (B, N)
    per_image = difference.sum(1) if reduction == "sum" else difference.mean(1)
    return per_image.sum() / torch.sym_max(1, per_image.shape[0])


# ---- region level: the references ----


def pooled_correlation_reference(feat: torch.Tensor, regions: int | tuple[int, int] = 7) -> torch.Tensor:
    """`pooled_correlation` in plain PyTorch, differentiable by autograd."""
    with torch.autocast(feat.device.type, enabled=False):
        feat = feat if feat.dtype == torch.float64 else feat.float()
        vectors = F.adaptive_avg_pool2d(feat, regions).flatten(2)  # (B, C, R)
        squared = vectors.square().sum(1, keepdim=True)
        alive = ~(squared < MIN_NORM**2)  # also where it is NaN, so that NaN reaches the loss
        # both branches of the where stay finite, so that no 0 · inf reaches the gradient
        unit = torch.where(alive, vectors * torch.where(alive, squared, 1.0).rsqrt(), 0.0)
        return unit.transpose(1, 2) @ unit


def region_loss_reference(student: torch.Tensor, teacher: torch.Tensor, regions: int | tuple[int, int] = 7) -> torch.Tensor:
    """`region_loss` in plain PyTorch, differentiable by autograd."""
    ours, theirs = (pooled_correlation_reference(f, regions) for f in (student, teacher))
    difference = ours - theirs
    return difference.square().sum() / max(difference.numel(), 1)


# ---- region level: the public functions ----


def pooled_correlation(feat: torch.Tensor, regions: int | tuple[int, int] = 7) -> torch.Tensor:
    """Self-correlation of pooled regions (Eq. 5): feat (B, C, H, W) -> (B, R, R), R = regions².

    Each region is an adaptive average over its bin, as in `F.adaptive_avg_pool2d`; entry ij is the cosine of the vectors of
    regions i and j, and 0 where either has a norm below 1e-6, or one whose square overflows (1.8e19 in float32). float32, or
    float64 for float64 features; differentiable once. `regions` is a number per side, or (rows, columns). Raises ValueError for
    anything but a map of floats. The CUDA kernels take up to 3,000 regions and maps of under 2^31 pixels per image, and raise
    RuntimeError for more.
    """
    rows, cols = region_counts("pooled_correlation", regions)
    check_map("pooled_correlation", FEATURES, feat)
    return torch.ops.mgd.pooled_correlation(feat, rows, cols)[0]


def region_loss(student: torch.Tensor, teacher: torch.Tensor, regions: int | tuple[int, int] = 7) -> torch.Tensor:
    """Region-level content-aware loss (Eq. 6): the mean over i, j and the batch of (m_ij^S - m_ij^T)², m as in Eq. 5.

    student (B, C, H, W) and teacher (B, C', H', W') in float64, float32, float16 or bfloat16 -> scalar, float32 or float64.
    Channels, sizes and dtypes may differ. The gradient reaches the student alone, once (no second derivative). An empty batch
    gives 0. Raises ValueError where the teacher asks for a gradient, or batches or devices differ. The limits of the CUDA
    kernels are those of `pooled_correlation`.
    """
    rows, cols = region_counts("region_loss", regions)
    check_features("region_loss", student, teacher)
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError("region_loss: the teacher is frozen; detach its features")
    return torch.ops.mgd.region_loss(student, teacher, rows, cols)[0]


FEATURES = "features are (B, C, H, W)"


def check_features(op: str, student: torch.Tensor, teacher: torch.Tensor):
    check_map(op, FEATURES, student)
    check_map(op, FEATURES, teacher)
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"{op}: batches of {student.shape[0]} and {teacher.shape[0]} differ")
    if student.device != teacher.device:
        raise ValueError(f"{op}: the student is on {student.device}, the teacher on {teacher.device}")


def region_counts(op: str, regions: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of regions."""
    pair = tuple(regions) if isinstance(regions, (tuple, list)) else (regions, regions)
    for count in pair:
        if isinstance(count, bool) or not isinstance(count, (int, np.integer, torch.SymInt)) or count < 1 or len(pair) != 2:
            raise ValueError(f"{op}: regions must be an integer per side, or (rows, columns), of at least 1, not {regions}")
    rows, cols = (int(count) if isinstance(count, np.integer) else count for count in pair)
    return rows, cols


# ---- the ops: schema, PyTorch default, fake, gradient ----

library = torch.library.Library("mgd", "DEF")
LIKE = "SymInt height, SymInt width, int rows, int cols, ScalarType dtype, bool channels_last"  # of the features
for schema in (
    # The forward also returns what the gradient needs: pooled vectors, or the loss's gradient with respect to them, (B, R, C).
    "region_loss(Tensor student, Tensor teacher, int rows, int cols) -> (Tensor, Tensor)",
    "pooled_correlation(Tensor feat, int rows, int cols) -> (Tensor, Tensor)",
    f"region_loss_backward(Tensor grad_loss, Tensor grad_pooled, {LIKE}) -> Tensor",
    f"pooled_correlation_backward(Tensor grad, Tensor pooled, {LIKE}) -> Tensor",
    "upsampled_cross_entropy(Tensor logits, Tensor[] labels) -> Tensor",
    "upsampled_cross_entropy_backward(Tensor grad, Tensor logits, Tensor[] labels) -> Tensor",
    "upsampled_argmax(Tensor logits, SymInt height, SymInt width, float threshold) -> Tensor",
):
    library.define(schema)


def default(function):
    """The PyTorch default of the op mgd::NAME, where `function` is NAME_default. Autocast would round its matrix products.

    CompositeExplicitAutograd is the default of every device; a kernel registered for CPU or CUDA takes precedence.
    """

    @functools.wraps(function)
    def in_full_precision(tensor, *arguments):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor, *arguments)

    library.impl(function.__name__.removesuffix("_default"), in_full_precision, "CompositeExplicitAutograd")
    return in_full_precision


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


def unit_vectors(pooled):
    """(B, R, C) -> unit vectors (B, R, C) and norms (B, R, 1), 0 and infinity for a region without direction."""
    squared = pooled.square().sum(2, keepdim=True)
    norm = torch.where(squared < MIN_NORM**2, math.inf, squared.sqrt())
    return pooled / norm, norm


def correlation_gradient(grad, unit, norm):
    """The gradient (B, R, R) of unit · unitᵀ -> the gradient (B, R, C) of the vectors before normalization."""
    grad = (grad + grad.transpose(1, 2)) @ unit
    return (grad - (grad * unit).sum(2, keepdim=True) * unit) / norm


def memory_format(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


def is_channels_last(feat) -> bool:
    return feat.stride(1) == 1 and feat.stride(3) != 1


@default
def region_loss_default(student, teacher, rows, cols):
    check_features("mgd::region_loss", student, teacher)
    region_counts("mgd::region_loss", (rows, cols))
    (unit, norm), (unit_t, _) = (unit_vectors(pool(feat, rows, cols)) for feat in (student, teacher))
    difference = unit @ unit.transpose(1, 2) - unit_t @ unit_t.transpose(1, 2)  # (B, R, R)
    count = max(difference.numel(), 1)
    grad_pooled = correlation_gradient(2 * difference / count, unit.to(difference.dtype), norm.to(difference.dtype))
    return difference.square().sum() / count, grad_pooled


@default
def region_loss_backward_default(grad_loss, grad_pooled, height, width, rows, cols, dtype, channels_last):
    check_pooled("mgd::region_loss_backward", grad_pooled, grad_loss, (), height, width, rows, cols, dtype)
    return unpool(grad_loss * grad_pooled, height, width, rows, cols, dtype, channels_last)


@default
def pooled_correlation_default(feat, rows, cols):
    check_map("mgd::pooled_correlation", FEATURES, feat)
    region_counts("mgd::pooled_correlation", (rows, cols))
    pooled = pool(feat, rows, cols)
    unit, _ = unit_vectors(pooled)
    return unit @ unit.transpose(1, 2), pooled


@default
def pooled_correlation_backward_default(grad, pooled, height, width, rows, cols, dtype, channels_last):
    size = (pooled.shape[0], rows * cols, rows * cols)
    check_pooled("mgd::pooled_correlation_backward", pooled, grad, size, height, width, rows, cols, dtype)
    grad, pooled = (each.to(accumulation_dtype(dtype)) for each in (grad, pooled))
    return unpool(correlation_gradient(grad, *unit_vectors(pooled)), height, width, rows, cols, dtype, channels_last)


def check_pooled(op, pooled, grad, size, height, width, rows, cols, dtype):
    region_counts(op, (rows, cols))
    if pooled.ndim != 3 or pooled.shape[1] != rows * cols or pooled.shape[2] < 1 or grad.shape != size:
        raise ValueError(f"{op}: {tuple(pooled.shape)} and a gradient of {tuple(grad.shape)} do not fit {rows}x{cols} regions")
    if pooled.dtype not in FLOATS or grad.dtype not in FLOATS or dtype not in FLOATS or min(height, width) < 1:
        raise ValueError(f"{op}: {pooled.dtype} and {grad.dtype} cannot become {height}x{width} features of {dtype}")
    if pooled.device != grad.device:
        raise ValueError(f"{op}: a gradient on {grad.device} does not fit a tensor on {pooled.device}")


# One image at a time, so that only one image's large logits exist at once.


@default
def upsampled_cross_entropy_default(logits, labels):
    check_label_maps("mgd::upsampled_cross_entropy", logits, labels)
    sums = [logits.new_zeros(len(labels), dtype=accumulation_dtype(logits.dtype))]
    for image, *maps in zip(logits, *labels, strict=True):
        log_probabilities = upsample_any(image[None], maps[0].shape).log_softmax(1)  # (1, N, H, W)
        sums.append(
            torch.stack([F.nll_loss(log_probabilities, m[None], ignore_index=IGNORE_INDEX, reduction="sum") for m in maps])
        )
    return torch.stack(sums).sum(0)


@default
def upsampled_cross_entropy_backward_default(grad, logits, labels):
    check_label_maps("mgd::upsampled_cross_entropy_backward", logits, labels)
    if grad.shape != (len(labels),) or grad.dtype not in FLOATS or grad.device != logits.device:
        raise ValueError(
            f"mgd::upsampled_cross_entropy_backward: the gradient of {len(labels)} sums on {logits.device} is not "
            f"{tuple(grad.shape)} of {grad.dtype} on {grad.device}"
        )
    grad = grad.to(accumulation_dtype(logits.dtype))
    vertical, horizontal = (interpolation(logits.shape[i + 1], labels[0].shape[i], grad) for i in (1, 2))
    out = empty_gradient(logits)
    for b, maps in enumerate(zip(*labels, strict=True)):
        full = upsample_any(logits[b, None], maps[0].shape).softmax(1)[0]  # (N, H, W)
        weights = [g * (label != IGNORE_INDEX) for g, label in zip(grad, maps, strict=True)]
        full *= sum(weights)
        for weight, label in zip(weights, maps, strict=True):
            full.scatter_add_(0, torch.where(label == IGNORE_INDEX, 0, label)[None], -weight[None])
        out[b] = torch.einsum("nyx,hy,wx->nhw", full, vertical, horizontal)
    return out


def check_label_maps(op, logits, labels):
    if not labels:
        raise ValueError(f"{op}: there is no label map")
    check_logits(op, logits, labels[0].shape[1:])
    check_labels(op, logits, labels)


@default
def upsampled_argmax_default(logits, height, width, threshold):
    check_logits("mgd::upsampled_argmax", logits, (height, width))
    labels = logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)
    for image, label in zip(logits, labels, strict=True):
        label.copy_(upsampled_argmax_reference(image[None], (height, width), threshold)[0])
    return labels


def empty_gradient(logits):
    """Memory for the gradient of logits: dense, and channels_last where they are."""
    return torch.empty(
        logits.shape, dtype=logits.dtype, device=logits.device, memory_format=memory_format(is_channels_last(logits))
    )


def accumulation_dtype(*dtypes):
    return torch.float64 if torch.float64 in dtypes else torch.float32


def region_loss_fake(student, teacher, rows, cols):
    dtype = accumulation_dtype(student.dtype, teacher.dtype)
    pooled = (student.shape[0], rows * cols, student.shape[1])
    return student.new_empty((), dtype=dtype), student.new_empty(pooled, dtype=dtype)


def pooled_correlation_fake(feat, rows, cols):
    batch, channels = feat.shape[:2]
    sizes = (batch, rows * cols, rows * cols), (batch, rows * cols, channels)
    return tuple(feat.new_empty(size, dtype=accumulation_dtype(feat.dtype)) for size in sizes)


def backward_fake(grad, pooled, height, width, rows, cols, dtype, channels_last):
    return torch.empty(
        (pooled.shape[0], pooled.shape[2], height, width),
        dtype=dtype,
        device=pooled.device,
        memory_format=memory_format(channels_last),
    )


def upsampled_cross_entropy_fake(logits, labels):
    return logits.new_empty(len(labels), dtype=accumulation_dtype(logits.dtype))


def upsampled_cross_entropy_backward_fake(grad, logits, labels):
    return empty_gradient(logits)


def upsampled_argmax_fake(logits, height, width, threshold):
    return logits.new_empty((logits.shape[0], height, width), dtype=torch.int64)


def setup_context(ctx, inputs, output):
    feat, rows, cols = inputs[0], inputs[-2], inputs[-1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.like = (feat.shape[2], feat.shape[3], rows, cols, feat.dtype, is_channels_last(feat))


def backward_of(op, inputs: int):
    """The backward of an op whose gradient is made by `op`, for the first of its `inputs` inputs alone."""

    def backward(ctx, grad, _):
        needed = grad is not None and ctx.needs_input_grad[0]
        return op(once(grad), *ctx.saved_tensors, *ctx.like) if needed else None, *[None] * (inputs - 1)

    return backward


def setup_upsampled_context(ctx, inputs, output):
    logits, labels = inputs
    ctx.save_for_backward(logits, *labels)
    ctx.set_materialize_grads(False)


def upsampled_cross_entropy_backward(ctx, grad):
    logits, *labels = ctx.saved_tensors
    grad_logits = None
    if grad is not None and ctx.needs_input_grad[0]:
        grad_logits = torch.ops.mgd.upsampled_cross_entropy_backward(once(grad), logits, labels)
    return grad_logits, [None] * len(labels)


def once(grad):
    """Under create_graph=True, `grad` such that what a backward op makes of it has a derivative, which raises."""
    return grad.detach().requires_grad_() if torch.is_grad_enabled() else grad


def no_second_derivative(ctx, grad):
    raise NotImplementedError("the losses of mgd_ops have no second derivative; their *_reference functions have one")


for name, fake, backward, setup in (
    ("region_loss", region_loss_fake, backward_of(torch.ops.mgd.region_loss_backward, 4), setup_context),
    ("region_loss_backward", backward_fake, no_second_derivative, None),
    ("pooled_correlation", pooled_correlation_fake, backward_of(torch.ops.mgd.pooled_correlation_backward, 3), setup_context),
    ("pooled_correlation_backward", backward_fake, no_second_derivative, None),
    ("upsampled_cross_entropy", upsampled_cross_entropy_fake, upsampled_cross_entropy_backward, setup_upsampled_context),
    ("upsampled_cross_entropy_backward", upsampled_cross_entropy_backward_fake, no_second_derivative, None),
    ("upsampled_argmax", upsampled_argmax_fake, None, None),
):
    torch.library.register_fake(f"mgd::{name}", fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(f"mgd::{name}", backward, setup_context=setup, lib=library)
