"""Exact ROC curve, the area under it and its height at a false positive rate, tied scores included.

How well a score tells two kinds apart, whatever the threshold: right from wrong predictions by confidence, or known
from unknown inputs (`calibration_suite` gives the latter for out-of-distribution scores). It sees only the order of the
scores, so that calibration by any increasing map leaves it as it is. Verification (are two faces one person?) runs at
a threshold that few impostors pass: TAR at FAR is the curve's height there.

Hanley, McNeil 1982; the area is the Mann-Whitney statistic, ties counting half.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.metrics.binning import tie_ends
from trimtab.metrics.ranking import area_of, cumulative

Scores = Float[Tensor, " n"] | Float[np.ndarray, " n"]
Positives = Bool[Tensor, " n"] | Bool[np.ndarray, " n"] | Int[Tensor, " n"] | Int[np.ndarray, " n"]


class Roc(NamedTuple):
    """The curve's corners by falling threshold; at each, what scores at least `threshold` is called positive."""

    false_positive_rate: Float[Tensor, " corners"]
    true_positive_rate: Float[Tensor, " corners"]
    threshold: Float[Tensor, " corners"]


def roc_curve(scores: Scores, positives: Positives) -> Roc:
    """The ROC curve, one corner for every distinct score, from (0, 0) at threshold infinity to (1, 1).

    Args:
        scores: any finite numbers (n,), higher for positives; tensor or array.
        positives: which samples are positive (n,), booleans or integers 0 and 1; both kinds must occur.

    Raises:
        InputError: an argument is malformed, or only one kind occurs.

    Example:
        >>> import numpy as np
        >>> curve = roc_curve(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1]))
        >>> curve.true_positive_rate.tolist(), curve.false_positive_rate.tolist()
        ([0.0, 0.5, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0])

    Reference:
        Hanley, McNeil, Radiology 1982.
    """
    return _curve(*_checked(scores, positives))


def roc_auc(scores: Scores, positives: Positives) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting half.

    Args:
        scores: any finite numbers (n,), higher for positives; tensor or array.
        positives: which samples are positive (n,), booleans or integers 0 and 1; both kinds must occur.

    Returns:
        The area, in 0..1; 0.5 is chance.

    Raises:
        InputError: an argument is malformed, or only one kind occurs.

    Example:
        >>> import numpy as np
        >>> roc_auc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1]))
        0.875

    Reference:
        Hanley, McNeil, Radiology 1982.
    """
    return float(area_of(*_checked(scores, positives)))


def tar_at_far(scores: Scores, positives: Positives, far: float = 1e-4) -> float:
    """True accept rate at a false accept rate: the share of positives accepted where at most `far` of the others are.

    Args:
        scores: similarities of pairs (n,), any finite numbers, higher for positives; tensor or array.
        positives: which pairs are of one identity (n,), booleans or integers 0 and 1; both kinds must occur.
        far: the largest share of negative pairs to accept, in 0..1; below one over their number, none is.

    Returns:
        The largest share over all thresholds that keep to `far`, in 0..1; no interpolation.

    Raises:
        InputError: an argument is malformed, or only one kind occurs.

    Example:
        >>> import numpy as np
        >>> scores, positives = np.array([0.1, 0.4, 0.4, 0.8, 0.3]), np.array([0, 0, 1, 1, 0])
        >>> tar_at_far(scores, positives, far=0.1), tar_at_far(scores, positives, far=0.4)
        (0.5, 1.0)

    Reference:
        Phillips, Moon, Rizvi, Rauss, "The FERET Evaluation Methodology for Face-Recognition Algorithms", PAMI 2000.
    """
    checks.number(far, "far", low=0.0, high=1.0)
    return float(_height(_curve(*_checked(scores, positives)), far))


def _checked(scores: Any, positives: Any, *, both: bool = True) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    s = checks.tensor(scores, "scores").detach()
    if s.ndim != 1 or not s.is_floating_point() or len(s) == 0:
        raise InputError(f"scores must be floating point of shape (n,), n >= 1, got {s.dtype} {tuple(s.shape)}")
    checks.finite(s, "scores")
    positive = checks.tensor(positives, "positives")
    positive = checks.labels(positive.long() if positive.dtype == torch.bool else positive, len(s), 2, "positives")
    chosen = positive.bool().to(s.device)
    return (s, _both_kinds(chosen)) if both else (s, chosen)


def _both_kinds(positive: Bool[Tensor, " n"]) -> Bool[Tensor, " n"]:
    if bool(positive.all()) or not bool(positive.any()):
        raise InputError(f"positives must hold both kinds, all {len(positive)} are {bool(positive[0])}")
    return positive


def _curve(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> Roc:
    order = scores.argsort(descending=True)
    ordered, chosen = scores[order], positive[order]
    ends = tie_ends(ordered)
    true, false = (cumulative(kind, None, ends)[0] for kind in (chosen, ~chosen))
    thresholds = torch.cat([ordered.new_full((1,), torch.inf), ordered[ends - 1]])
    return Roc(false / false[-1], true / true[-1], thresholds)


def _height(curve: Roc, false_positive_rate: float) -> Tensor:
    return curve.true_positive_rate[curve.false_positive_rate <= false_positive_rate][-1]


class _ScoreMetric(Metric):
    """Keeps all scores and which are positive; a measure adds `compute`."""

    is_differentiable = False
    full_state_update = False
    scores: list[Tensor]
    positives: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("positives", [], dist_reduce_fx="cat")

    def update(self, scores: Scores, positives: Positives) -> None:
        """Add a batch: scores (n,) and which are positive (n,)."""
        s, positive = _checked(scores, positives, both=False)
        self.scores.append(s)
        self.positives.append(positive)


class RocCurve(_ScoreMetric):
    """`roc_curve` over batches; its state is all scores.

    Example:
        >>> import torch
        >>> metric = RocCurve()
        >>> metric.update(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute().true_positive_rate.tolist()
        [0.0, 0.5, 1.0, 1.0]
    """

    def compute(self) -> Roc:
        """The curve of all batches together."""
        return _curve(dim_zero_cat(self.scores), _both_kinds(dim_zero_cat(self.positives)))


class RocAuc(_ScoreMetric):
    """`roc_auc` over batches; its state is all scores.

    Example:
        >>> import torch
        >>> metric = RocAuc()
        >>> metric.update(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.8750, dtype=torch.float64)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The area of all batches together."""
        return area_of(dim_zero_cat(self.scores), _both_kinds(dim_zero_cat(self.positives)))[0]


class TarAtFar(_ScoreMetric):
    """`tar_at_far` over batches of pairs; its state is all scores.

    Example:
        >>> import torch
        >>> metric = TarAtFar(far=0.1)
        >>> metric.update(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, far: float = 1e-4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.far = checks.number(far, "far", low=0.0, high=1.0)

    def compute(self) -> Tensor:
        """The share of all batches together."""
        return _height(_curve(dim_zero_cat(self.scores), _both_kinds(dim_zero_cat(self.positives))), self.far)
