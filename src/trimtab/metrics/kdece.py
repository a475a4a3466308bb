"""Kernel-density calibration error: the expected distance between confidence and accuracy, both as smooth curves.

The density of the confidences and of those that are right give accuracy as a function of confidence, without bins.
Reach for it where the binning of ECE is in doubt and n is some hundreds at least.

Zhang, Kailkhura, Han 2020, arXiv 2003.07329, "Mix-n-Match"; the measure of order 1. Density estimation follows their
code: triweight kernel of bandwidth std(confidence | right) (2n)^(-1/5), the same for both densities, reflected at 0 and
1, evaluated on 2^14 points by linear binning and Fourier transform. As there, with two classes the probability of class
1 and the label take the place of confidence and hit.
Departures, each below the noise on ordinary data: where the density vanishes the integrand is zero, while in the code
it repeats its last value, which inflates the error of a narrow density; the bandwidth is never less than a cell of
the grid, so that confidences that are all equal give |confidence - accuracy|, where the code divides by zero;
the grid has points at 0 and 1 exactly (-0.5..1.5 instead of -0.6..1.6), so that reflection is exact.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from trimtab.metrics.binning import rank
from trimtab.metrics.kernels import density_error
from trimtab.metrics.rows import Labels, Matrix, checked


def kernel_density_error(probs: Matrix, labels: Labels) -> float:
    """Integral of |x - accuracy(x)| f(x) over confidence x, accuracy(x) = P(right) f_right(x) / f(x).

    Args:
        probs: probabilities (n, c), rows sum to one; tensor or array.
        labels: true classes (n,), integers in 0..c-1.

    Returns:
        The error, in 0..1; NaN, with a warning, if no sample is right (with two classes: if class 1 does not occur).

    Raises:
        InputError: probabilities or labels are malformed.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> probs = torch.rand(2000, 3, generator=generator).softmax(1)
        >>> honest = probs.multinomial(1, generator=generator)[:, 0]
        >>> kernel_density_error(probs, honest) < 0.05
        True

    Reference:
        Zhang, Kailkhura, Han, arXiv 2003.07329.
    """
    metric = KernelDensityError()
    metric.update(probs, labels)
    return float(metric.compute())


class KernelDensityError(Metric):
    """`kernel_density_error` over batches; its state is all confidences.

    Example:
        >>> import torch
        >>> metric = KernelDensityError()
        >>> metric.update(torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]]), torch.tensor([0, 1]))
        >>> round(float(metric.compute()), 3)
        0.3
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    score: list[Tensor]
    hit: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("score", [], dist_reduce_fx="cat")
        self.add_state("hit", [], dist_reduce_fx="cat")

    def update(self, probs: Matrix, labels: Labels) -> None:
        """Add a batch: probabilities (n, c) and labels (n,)."""
        p, y = checked(probs, labels)
        score, predicted = (p[:, 1], torch.ones_like(y)) if p.shape[1] == 2 else p.max(1)
        self.score.append(score)
        self.hit.append(predicted == y)

    def compute(self) -> Tensor:
        """The error of all batches together."""
        error = density_error(rank(dim_zero_cat(self.score)[None], dim_zero_cat(self.hit)[None]))[0]
        if error.isnan():
            warnings.warn("no sample is right: the kernel-density error is undefined", RuntimeWarning, stacklevel=2)
        return error
