"""Histogram binning: the share of hits in each bin of the score.

The plainest calibrator that assumes nothing but bins, and the one whose answers can be checked by counting. Its
probabilities come in steps, so that it loses the order of scores within a bin; isotonic regression is rarely worse.

Zadrozny and Elkan (2001), ICML: bins of equal mass (equal width on demand), every class against the rest, answers
divided by their sum. As in their paper the share of hits is smoothed by an m-estimate; with m = 1 and a base rate of
1/c, a bin with h hits among m samples answers (h + 1/c) / (m + 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.calibration import one_vs_rest
from trimtab.calibration.base import Calibrator
from trimtab.core import checks


class HistogramBinning(Calibrator):
    """A step function from each class's probability to the smoothed share of hits in its bin.

    Args:
        bins: how many, >= 1; fewer where scores tie or a bin would be empty. The default of 15 is that of Guo et al.
            (2017), who made the method a usual baseline.
        equal_mass: bins hold equal weight; False makes them equally wide in probability.
        allow_zero: use the plain share of hits: probabilities of zero become possible, and a sample of which every
            class's is zero gets the uniform distribution.

    Attributes:
        edges: (k, bins - 1) log-odds that separate the bins, ascending; unused ones are infinite.
        values: (k, bins) probabilities. k = 1 for two classes (class 1 against class 0), else c.

    Example:
        >>> import torch
        >>> from trimtab.calibration import HistogramBinning
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        >>> calibrator = HistogramBinning(bins=2).fit(logits, torch.tensor([0, 0, 0, 1]))
        >>> calibrator(logits).exp()[:, 1]
        tensor([0.1667, 0.1667, 0.5000, 0.5000])

    Reference:
        Zadrozny and Elkan, Obtaining Calibrated Probability Estimates from Decision Trees and Naive Bayesian
        Classifiers, ICML 2001.
    """

    edges: Tensor
    values: Tensor

    def __init__(self, bins: int = 15, *, equal_mass: bool = True, allow_zero: bool = False) -> None:
        super().__init__()
        self.bins = checks.integer(bins, "bins", low=1)
        self.equal_mass = equal_mass
        self.allow_zero = allow_zero
        self._declare("edges", "values")

    def _fit(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        odds = one_vs_rest.log_odds(logits).mT.contiguous()
        c, k = logits.shape[1], len(odds)
        w = torch.ones_like(labels, dtype=torch.float64) if weights is None else weights.double()
        prior = 0.0 if self.allow_zero else 1.0
        edges = odds.new_full((k, self.bins - 1), torch.inf)
        values = torch.zeros(k, self.bins, dtype=torch.float64, device=odds.device)
        members = labels.argsort().split(torch.bincount(labels, minlength=c).tolist())
        for row, rows in enumerate(members[c - k :]):
            x, order, apart = one_vs_rest.ascending(odds[row])
            mass = w if weights is None else w[order]
            cuts = _equal_mass(x, apart, mass, self.bins) if self.equal_mass else _equal_width(x, self.bins)
            ends = torch.cat([torch.searchsorted(x, cuts, right=True), order.new_tensor([len(x)])])
            in_bin = torch.segment_reduce(mass, "sum", lengths=ends.diff(prepend=order.new_zeros(1)))
            hit = torch.bincount(torch.searchsorted(cuts, odds[row, rows]), w[rows], minlength=len(ends))
            edges[row, : len(cuts)] = cuts
            values[row, : len(ends)] = ((hit + prior / c) / (in_bin + prior)).clamp(max=1)  # by rounding only
        self._store(logits, edges=edges, values=values)

    def _log_probs(self, logits: Tensor) -> Tensor:
        odds = one_vs_rest.log_odds(logits)
        index = torch.searchsorted(self.edges.to(logits.dtype), odds.detach().mT.contiguous())
        steps = self.values.to(logits.dtype).gather(1, index).mT
        # the derivative of a step is zero, but it exists: a loss on the output can be propagated
        return one_vs_rest.from_probabilities(steps + 0 * odds)


def _equal_mass(x: Tensor, apart: Tensor, mass: Tensor, bins: int) -> Tensor:
    """Edges half-way between the distinct scores that split the weight most evenly."""
    ends = apart.nonzero()[:, 0]
    if len(ends) == 0:
        return x[:0]
    below = mass.cumsum(0)
    wanted = below[-1] * torch.arange(1, bins, dtype=mass.dtype, device=mass.device) / bins
    below = below[ends]
    after = torch.searchsorted(below, wanted).clamp(max=len(ends) - 1)
    before = (after - 1).clamp(min=0)
    last = ends[torch.where(wanted - below[before] <= below[after] - wanted, before, after).unique()]
    return (x[last] + x[last + 1]) / 2


def _equal_width(x: Tensor, bins: int) -> Tensor:
    """Edges equally spaced in probability, as log-odds, without those that would leave a bin empty."""
    edges = (torch.arange(1, bins, dtype=torch.float64, device=x.device) / bins).logit().to(x)
    return edges[torch.searchsorted(edges, x).unique()[1:] - 1]
