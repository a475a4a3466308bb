"""Numbers that choose among checkpoints and maps of h-calibration: the less, the better.

All with 15 bins, as Huang et al. (2025), arXiv 2506.17968, have them; cheap enough to be taken after every step.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import nll_loss, one_hot

from trimtab.metrics.binning import bin_sums, prefix

Criterion = Literal["nll", "dece", "cwece"]

_BINS = 15


def criterion(name: Criterion, log_p: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
    """The log loss, the debiased error of the predicted class, or the class-wise error of equal-width bins."""
    if name == "nll":
        return float(nll_loss(log_p.double(), labels))
    if name == "cwece":
        hits = one_hot(labels, log_p.shape[1]).bool()
        return float(bin_sums(log_p.exp().mT.contiguous(), hits.mT.contiguous(), _BINS).gap.abs().sum()) / log_p.numel()
    top, predicted = log_p.max(1)
    return debiased_ece(top.double().exp(), (predicted == labels).double())


def ece(log_p: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
    """Equal-width calibration error of the predicted class."""
    top, predicted = log_p.max(1)
    sums = bin_sums(top.exp()[None], (predicted == labels)[None], _BINS)
    return float(sums.gap.abs().sum()) / len(labels)


def debiased_ece(confidence: Float[Tensor, " n"], correct: Float[Tensor, " n"]) -> float:
    """Twice the equal-mass error, less what it would be on average if the accuracies were drawn again around theirs."""
    n = len(confidence)
    bins = max(1, min(_BINS, n // 2))
    edges = (torch.arange(bins + 1, device=confidence.device, dtype=torch.float64) * n / bins).round().long()
    order = confidence.argsort(stable=True)
    counts = edges.diff()
    accuracy, stated = prefix(torch.stack([correct, confidence])[:, order])[:, edges].diff() / counts
    gap = accuracy - stated
    deviation = (accuracy * (1 - accuracy) / counts).sqrt()
    ratio = torch.where(deviation > 0, gap / deviation.clamp(min=1e-300), math.inf) / math.sqrt(2)
    folded = gap.abs() * torch.erf(ratio.abs()) + deviation * math.sqrt(2 / math.pi) * (-(ratio**2)).exp()
    return float((gap.abs() * counts).sum() / n * 2 - folded.mean())
