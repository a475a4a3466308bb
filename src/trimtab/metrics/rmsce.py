"""Root-mean-square calibration error, and its debiased estimate.

Squares weigh large gaps more than ECE does, and their bias is known: a bin of m samples adds accuracy (1 - accuracy) /
(m - 1) on average, even where the model is perfectly calibrated. `debiased` takes it off, so that the estimate no
longer grows with the number of bins. With ``equal_mass=True, debiased=True`` it is Kumar et al.'s estimator, with
``classwise=True`` too the one that they call marginal and prefer.

Kumar, Liang, Ma 2019, arXiv 1909.10155, "Verified Uncertainty Calibration". Bins of equal mass are those of their
package (``uncertainty-calibration``): sizes that differ by one at most, ties kept together, bins with fewer than two
samples left out when debiasing. That package takes scores with many repeated values for discrete and gives each a bin
of its own; here bins are made the same way for all.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from trimtab.core import checks
from trimtab.core.threads import one_thread
from trimtab.metrics.binning import equal_count, equal_width, gap_sums, prefix, rank
from trimtab.metrics.rows import Labels, Matrix, checked


def root_mean_square_calibration_error(
    probs: Matrix,
    labels: Labels,
    bins: int = 15,
    *,
    equal_mass: bool = False,
    debiased: bool = False,
    classwise: bool = False,
) -> float:
    """Square root of the sum over bins of (n_b / n) (accuracy - mean confidence)^2.

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        bins: number of bins; 15 as in `expected_calibration_error` and in Kumar et al.'s package.
        equal_mass: bins of equally many samples instead of equal width.
        debiased: take off what chance alone adds to each bin's square; a negative sum counts as zero.
        classwise: every class's probability against ``label == class``, the squares averaged over the classes, instead
            of the largest probability.

    Returns:
        The error, in 0..1.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import numpy as np
        >>> probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
        >>> round(root_mean_square_calibration_error(probs, np.array([0, 0, 1, 0])), 3)
        0.354

    Reference:
        Kumar, Liang, Ma, NeurIPS 2019, arXiv 1909.10155.
    """
    metric = RootMeanSquareCalibrationError(bins, equal_mass=equal_mass, debiased=debiased, classwise=classwise)
    metric.update(probs, labels)
    return float(metric.compute())


class RootMeanSquareCalibrationError(Metric):
    """`root_mean_square_calibration_error` over batches; its state is all probabilities that it looks at.

    Example:
        >>> import torch
        >>> metric = RootMeanSquareCalibrationError(bins=10)
        >>> metric.update(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    probs: list[Tensor]
    hits: list[Tensor]

    def __init__(
        self,
        bins: int = 15,
        *,
        equal_mass: bool = False,
        debiased: bool = False,
        classwise: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bins = checks.integer(bins, "bins", low=1)
        self.equal_mass, self.debiased, self.classwise = equal_mass, debiased, classwise
        self.add_state("probs", [], dist_reduce_fx="cat")
        self.add_state("hits", [], dist_reduce_fx="cat")

    def update(self, probs: Matrix, labels: Labels) -> None:
        """Add a batch: probabilities (n, c) and labels (n,)."""
        p, y = checked(probs, labels)
        if self.classwise:
            self.probs.append(p)
            self.hits.append(y[:, None] == torch.arange(p.shape[1], device=y.device))
        else:
            confidence, predicted = p.max(1, keepdim=True)
            self.probs.append(confidence)
            self.hits.append(predicted == y[:, None])

    def compute(self) -> Tensor:
        """The error of all batches together."""
        probs, hits = dim_zero_cat(self.probs).T, dim_zero_cat(self.hits).T
        return _squares(probs, hits, self.bins, self.equal_mass, self.debiased).mean().sqrt()


@one_thread()
def _squares(
    probs: Float[Tensor, "g n"], hits: Bool[Tensor, "g n"], bins: int, equal_mass: bool, debiased: bool
) -> Float[Tensor, " g"]:
    """The mean square of every row."""
    ranked = rank(probs, hits)
    places = equal_count(ranked, bins) if equal_mass else equal_width(ranked, [bins])
    samples = places.diff().double()
    held = samples.clamp(min=1)
    gap = gap_sums(ranked).gather(1, places).diff() / held
    squares = gap.square()
    if debiased:
        accuracy = prefix(ranked.hits).gather(1, places).diff() / held
        chance = accuracy * (1 - accuracy) / (samples - 1).clamp(min=1)
        squares = (squares - chance).masked_fill(samples < 2, 0)
    return ((samples * squares).sum(1) / ranked.n).clamp(min=0)
