"""Logit adjustment (Menon et al. 2021, https://arxiv.org/abs/2007.07314): a network that was trained on few pixels of a class
predicts it too seldom. The more frequent a class, the more its logit is lowered against the others."""

from collections.abc import Iterable

import numpy as np
import torch


def log_frequencies(dataset, names: Iterable[str]) -> torch.Tensor:
    """The logarithm of each class's share of the labeled pixels in the masks of `names` -> (N,) float32.

    A class that no mask shows counts as frequent as the rarest class that is shown, since the teachers may know it. Where
    nothing is labeled, all are 0. Raises UserError for a mask that cannot be read.
    """
    counts = sum(np.bincount(np.asarray(dataset.mask(name)).ravel(), minlength=256) for name in names)
    counts = torch.from_numpy(counts[: len(dataset.classes)]).double()
    if not counts.any():
        return torch.zeros(len(counts))
    return (counts.clamp(min=counts[counts > 0].min()) / counts.sum()).log().float()


@torch.no_grad()
def adjust_logits(model, dataset, names: Iterable[str], tau: float):
    """Take `tau` times the logarithm of the class frequencies in the labeled images `names` from the logits of `model`, a
    `DeepLabV3Plus`, by changing the bias of its classifier (Menon et al. 2021, Eq. 9).

    With `tau` = 1 the predictions are those for classes of equal frequency. 0 changes nothing.
    """
    bias = model.classifier.bias
    bias -= tau * log_frequencies(dataset, names).to(bias)
