"""Risk against coverage: the error rate that is left if the model may abstain where it is least confident.

Reach for it where a low confidence leads to a fallback, such as a person. It rewards accuracy and a useful order of
confidences, not their values: calibration by any increasing map leaves it as it is.

Geifman, El-Yaniv 2017, arXiv 1705.08500; Geifman, Uziel, El-Yaniv 2019, arXiv 1805.08206 (the area). Their code takes
tied confidences in the order of the rows; here a tied group is taken as a whole, its errors spread evenly over it.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from trimtab.metrics.binning import Ranked, rank, tie_ends
from trimtab.metrics.confidences import ConfidenceMetric
from trimtab.metrics.ranking import area_under_risk, cumulative
from trimtab.metrics.rows import Labels, Matrix, top_label


class RiskCoverage(NamedTuple):
    """Share of samples kept, and the error rate among them, by falling threshold on the confidence."""

    coverage: Float[Tensor, " points"]
    risk: Float[Tensor, " points"]


def risk_coverage_curve(probs: Matrix, labels: Labels) -> RiskCoverage:
    """Error rate among the most confident samples, for every distinct confidence as threshold.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.

    Returns:
        Coverage rising to 1, and risk; the last risk is the error rate of all samples.

    Raises:
        InputError: probabilities or labels are malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> curve = risk_coverage_curve(probs, np.array([0, 0, 1, 0]))
        >>> curve.coverage.tolist(), curve.risk.tolist()
        ([0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.0, 0.25])

    Reference:
        Geifman, El-Yaniv, arXiv 1705.08500.
    """
    confidence, correct = top_label(probs, labels)
    return curve_of(rank(confidence[None], correct[None]))


def aurc(probs: Matrix, labels: Labels) -> float:
    """Area under the risk-coverage curve: mean over k of the error rate among the k most confident samples.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.

    Returns:
        The area, in 0..1, lower is better; about the error rate if confidence is without information.

    Raises:
        InputError: probabilities or labels are malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(aurc(probs, np.array([0, 0, 1, 0])), 4)
        0.0625

    Reference:
        Geifman, Uziel, El-Yaniv, arXiv 1805.08206.
    """
    confidence, correct = top_label(probs, labels)
    return float(_area(rank(confidence[None], correct[None])))


def curve_of(ranked: Ranked) -> RiskCoverage:
    """The curve of sorted confidences."""
    kept, wrong = _above(ranked)
    return RiskCoverage(kept / ranked.n, wrong / kept)


def _above(ranked: Ranked) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"]]:
    """Samples and errors at or above every distinct confidence, the largest first."""
    ends = tie_ends(ranked.values[0])
    wrong = cumulative(~ranked.hits[0], None, ends)[0]
    right = cumulative(ranked.hits[0], None, ends)[0]
    errors = (wrong[-1] - wrong[:-1]).flip(0)
    return (right[-1] - right[:-1]).flip(0) + errors, errors


def _area(ranked: Ranked) -> Float[Tensor, ""]:
    ends = tie_ends(ranked.values[0])
    right, wrong = (cumulative(kind, None, ends) for kind in (ranked.hits[0], ~ranked.hits[0]))
    return area_under_risk(right + wrong, wrong)[0]


class RiskCoverageCurve(ConfidenceMetric):
    """`risk_coverage_curve` over batches; its state is all confidences.

    Example:
        >>> import torch
        >>> metric = RiskCoverageCurve()
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.4, 0.6]]), torch.tensor([0, 0]))
        >>> metric.compute().risk.tolist()
        [0.0, 0.5]
    """

    def compute(self) -> RiskCoverage:
        """The curve of all batches together."""
        return curve_of(self._ranked())


class AURC(ConfidenceMetric):
    """`aurc` over batches; its state is all confidences.

    Example:
        >>> import torch
        >>> metric = AURC()
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.4, 0.6]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """The area of all batches together."""
        return _area(self._ranked())
