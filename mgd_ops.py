"""The losses of multi-granularity distillation: pixel (Eq. 2), image (Eq. 4) and region level (Eqs. 5 and 6).

Everything is computed in float32 at least, whatever the dtype of the inputs and under autocast.
"""

import torch
import torch.nn.functional as F

IGNORE_INDEX = 255
MIN_NORM = 1e-6  # a pooled region below this norm has no direction: its correlations are 0 and it takes no gradient


def backend() -> str:
    """The path that computes the region loss: `torch`, the PyTorch reference."""
    return "torch"


def pixel_cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Cross entropy, mean over the pixels that are not 255 (Eq. 1); 0 where all are.

    logits (B, N, H, W) floating, label (B, H, W) int64 -> scalar float32.
    """
    total = F.cross_entropy(logits.float(), label, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (label != IGNORE_INDEX).sum().clamp(min=1)


def pixel_loss(logits: torch.Tensor, pseudo_labels: list[torch.Tensor]) -> torch.Tensor:
    """Pixel-level consistency (Eq. 2): the sum of the cross entropies against each teacher's pseudo label.

    logits (B, N, H, W) floating, pseudo labels (B, H, W) int64 with 255 = ignore -> scalar float32.
    """
    return sum(pixel_cross_entropy(logits, label) for label in pseudo_labels)


def image_loss(student: torch.Tensor, teacher: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
    """Image-level semantic-sensitive loss (Eqs. 3 and 4): L1 distance of the globally averaged logits.

    student and teacher (B, N, H, W) floating, of equal batch and classes -> scalar float32, the mean over the batch.
    reduction: `sum` over the classes, or `mean`, which is Eq. 4 to the letter and N times weaker.
    """
    difference = (student.float().mean((2, 3)) - teacher.float().mean((2, 3))).abs()  # (B, N)
    return (difference.sum(1) if reduction == "sum" else difference.mean(1)).mean()


def pooled_correlation_reference(feat: torch.Tensor, regions: int | tuple[int, int] = 7) -> torch.Tensor:
    """Self-correlation of pooled regions (Eq. 5): feat (B, C, H, W) -> (B, R, R), R = regions².

    Each of the regions is an adaptive average; entry ij is the cosine of the vectors of regions i and j.
    """
    with torch.autocast(feat.device.type, enabled=False):
        feat = feat if feat.dtype == torch.float64 else feat.float()
        vectors = F.adaptive_avg_pool2d(feat, regions).flatten(2).transpose(1, 2)  # (B, R, C)
        squared = vectors.square().sum(2, keepdim=True)
        alive = squared >= MIN_NORM**2
        # both branches of the where stay finite, so that no 0 · inf reaches the gradient
        unit = torch.where(alive, vectors * torch.where(alive, squared, 1.0).rsqrt(), 0.0)
        return unit @ unit.transpose(1, 2)


def region_loss_reference(student: torch.Tensor, teacher: torch.Tensor, regions: int | tuple[int, int] = 7) -> torch.Tensor:
    """Region-level content-aware loss (Eq. 6): mean squared difference of the two self-correlations, over the batch too.

    student (B, C, H, W), teacher (B, C', H', W') floating -> scalar. Channels and sizes may differ. Raises ValueError
    where the teacher asks for a gradient or the batches differ.
    """
    if teacher.requires_grad:
        raise ValueError("region_loss: the teacher is frozen; detach its features")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"region_loss: batches of {student.shape[0]} and {teacher.shape[0]} differ")
    ours, theirs = (pooled_correlation_reference(f, regions) for f in (student, teacher))
    return (ours - theirs).square().mean()


pooled_correlation = pooled_correlation_reference
region_loss = region_loss_reference
