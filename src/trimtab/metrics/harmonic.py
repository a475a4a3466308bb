"""Harmonic calibrated-accuracy score: one number that is high only if a model is both accurate and calibrated.

Reach for it to choose one of many models by accuracy and calibration at once, as in architecture search. For choosing a
calibrator of one model take the log loss.

Tao et al. 2024, arXiv 2308.11838, "A Benchmark Study on Calibration". The form is the weighted harmonic mean of
accuracy and 1 - ECE; the weight enters as in the F-score without the square.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trimtab.core import checks
from trimtab.metrics.binning import bin_sums
from trimtab.metrics.rows import Labels, Matrix, top_label
from trimtab.metrics.sums import SumMetric


def harmonic_calibration_score(probs: Matrix, labels: Labels, bins: int = 15, beta: float = 1.0) -> float:
    """(1 + beta) accuracy (1 - ECE) / (beta accuracy + (1 - ECE)).

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        bins: equal-width bins of the ECE; 15 as in the study's headline.
        beta: weight of calibration, at least 0; 0 gives the accuracy, 1 the harmonic mean.

    Returns:
        The score, in 0..1, higher is better.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(harmonic_calibration_score(probs, np.array([0, 0, 1, 0])), 4)
        0.7241

    Reference:
        Tao et al., ICLR 2024, arXiv 2308.11838.
    """
    checks.integer(bins, "bins", low=1)
    checks.number(beta, "beta", low=0)
    confidence, correct = top_label(probs, labels)
    sums = bin_sums(confidence[None], correct[None], bins)
    return float(_score(sums.gap, sums.hits.sum(), sums.samples.sum(), beta))


def _score(gap: Tensor, right: Tensor, n: Tensor, beta: float) -> Tensor:
    accuracy, calibration = right / n, 1 - gap.abs().sum() / n
    return (1 + beta) * accuracy * calibration / (beta * accuracy + calibration).clamp(min=1e-300)


class HarmonicCalibrationScore(SumMetric):
    """`harmonic_calibration_score` over batches; its state is three sums a bin.

    Example:
        >>> import torch
        >>> metric = HarmonicCalibrationScore()
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.8571, dtype=torch.float64)
    """

    higher_is_better = True
    gap: Tensor
    right: Tensor
    samples: Tensor

    def __init__(self, bins: int = 15, beta: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = checks.integer(bins, "bins", low=1)
        self.beta = checks.number(beta, "beta", low=0)
        self._sum(gap=bins, right=1, samples=1)

    def update(self, probs: Matrix, labels: Labels) -> None:
        """Add a batch: probabilities (n, c) and labels (n,)."""
        confidence, correct = top_label(probs, labels)
        sums = bin_sums(confidence[None], correct[None], self.bins)
        self.gap += sums.gap[0]
        self.right += sums.hits.sum()
        self.samples += sums.samples.sum()

    def compute(self) -> Tensor:
        """The score of all batches together."""
        return _score(self.gap, self.right[0], self.samples[0], self.beta)
