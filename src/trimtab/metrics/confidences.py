"""The states of measures of the largest probability: sums over its bins, or all confidences where order counts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from trimtab.core import checks
from trimtab.metrics.binning import Ranked, bin_sums, rank
from trimtab.metrics.rows import Labels, Matrix, top_label
from trimtab.metrics.sums import SumMetric


class ConfidenceBins(SumMetric):
    """Sums up confidence minus hit, and counts samples, in equal-width bins; a measure adds `compute`."""

    higher_is_better = False
    gap: Tensor
    samples: Tensor

    def __init__(self, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = checks.integer(bins, "bins", low=1)
        self._sum(gap=bins, samples=bins)

    def update(self, probs: Matrix, labels: Labels) -> None:
        """Add a batch: probabilities (n, c) and labels (n,)."""
        confidence, correct = top_label(probs, labels)
        sums = bin_sums(confidence[None], correct[None], self.bins)
        self.gap += sums.gap[0]
        self.samples += sums.samples[0]


class ConfidenceMetric(Metric):
    """Keeps every prediction's confidence and whether it was right; a measure adds `compute`."""

    is_differentiable = False
    full_state_update = False
    confidence: list[Tensor]
    correct: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("confidence", [], dist_reduce_fx="cat")
        self.add_state("correct", [], dist_reduce_fx="cat")

    def update(self, probs: Matrix, labels: Labels) -> None:
        """Add a batch: probabilities (n, c) and labels (n,)."""
        confidence, correct = top_label(probs, labels)
        self.confidence.append(confidence)
        self.correct.append(correct)

    def _ranked(self) -> Ranked:
        """All batches together, by ascending confidence."""
        return rank(dim_zero_cat(self.confidence)[None], dim_zero_cat(self.correct)[None])
