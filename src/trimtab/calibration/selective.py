"""Selective prediction: answer only where the model is sure enough that the error rate stays below a stated risk.

For models with a fallback (a person, a larger model, "I don't know"): from held-out samples it finds the threshold on
the confidence that answers most often while, with probability 1 - delta over the held-out samples, at most a share
`risk` of the answers on new samples is wrong. Nothing is assumed about the model; held-out and new samples are drawn
alike. The guarantee is about all answers together, not about each of them.

Geifman, El-Yaniv (2017), arXiv 1705.08500, whose bound is Clopper and Pearson's. Their algorithm bisects, with delta
shared among the about log2(n) thresholds that it visits; but which ones it visits depends on the errors found, so that
sharing among the visited alone proves nothing. Here the coverages that are tried are fixed in advance and delta is
shared among all of them (Angelopoulos et al. 2021, arXiv 2110.01052, call this learn then test). The threshold is the
next confidence below the samples that it is tested on, and only higher ones are accepted: given that threshold, their
errors are exactly binomial, ties included.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from trimtab.calibration.base import Fitted, logsumexp
from trimtab.core import checks, stats
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions


class SelectivePrediction(Fitted):
    """Accept a prediction where its confidence lies above a threshold that keeps the error rate below `risk`.

    Confidence is the log-odds of the predicted class, which orders samples as its probability does but still tells them
    apart where probabilities round to one.

    Args:
        risk: largest share of accepted predictions that may be wrong, in (0, 1); 0.05 by default.
        delta: largest probability that the guarantee fails, in (0, 1); 0.05 by default.
        steps: the coverages 1/steps, 2/steps, .. 1 are tried, and delta is shared among them; more steps find a finer
            threshold and need more samples. 20 by default: steps of 5 %.

    Attributes:
        threshold: accepted is what has a higher confidence (log-odds); -inf where everything is accepted, inf where no
            threshold meets the risk.
        coverage: share of the fitting samples that are accepted.
        bound: upper confidence bound of the error rate among the accepted; NaN where there are none.

    Example:
        >>> import torch
        >>> from trimtab.calibration import SelectivePrediction
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = 3 * torch.randn(4000, 3, generator=generator)
        >>> labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
        >>> selective = SelectivePrediction(risk=0.05).fit(logits[:2000], labels[:2000])
        >>> accepted = selective(logits[2000:])
        >>> wrong = (logits.argmax(1) != labels)[2000:][accepted].float().mean()
        >>> f"accepts {accepted.float().mean():.2f}, {wrong:.3f} of them wrong, {float(selective.bound):.3f} at most"
        'accepts 0.39, 0.022 of them wrong, 0.045 at most'

    Reference:
        Geifman and El-Yaniv, Selective Classification for Deep Neural Networks, NeurIPS 2017.
    """

    threshold: Tensor
    coverage: Tensor
    bound: Tensor

    def __init__(self, risk: float = 0.05, delta: float = 0.05, *, steps: int = 20) -> None:
        super().__init__()
        self.risk = checks.number(risk, "risk", low=0, high=1, low_open=True, high_open=True)
        self.delta = checks.number(delta, "delta", low=0, high=1, low_open=True, high_open=True)
        self.steps = checks.integer(steps, "steps", low=1)
        self._declare("threshold", "coverage", "bound")

    def fit(
        self,
        logits: Float[Tensor, "n c"] | Float[np.ndarray, "n c"],
        labels: Int[Tensor, " n"] | Integer[np.ndarray, " n"],
    ) -> Self:
        """Find the threshold on held-out scores: samples on which neither model nor calibrator was fitted.

        Warns, and accepts nothing, where no threshold meets the risk.

        Args:
            logits: unnormalised scores or log-probabilities, (n, c), finite.
            labels: true classes, (n,), integers in 0..c-1.

        Returns:
            self.

        Raises:
            InputError: a shape, type or range is wrong; the message names the argument and the first bad row.
        """
        z = checks.logits(logits).detach()
        y = checks.labels(labels, *z.shape).to(z.device)
        n = len(z)
        confidence, order = _confidence(z).sort(descending=True, stable=True)
        wrong = torch.cat([z.new_zeros(1), (z.argmax(1) != y)[order].cumsum(0)]).cpu().numpy().astype(float)
        below = torch.cat([confidence, confidence.new_full((1,), -torch.inf)])
        tried = [math.ceil(n * step / self.steps) for step in range(1, self.steps + 1)]
        thresholds = below[torch.tensor(tried, device=z.device)]
        accepted = (confidence > thresholds[:, None]).sum(1).cpu().numpy()
        bounds = stats.binomial_upper(wrong[accepted], accepted.astype(float), 1 - self.delta / self.steps)
        met = np.flatnonzero((bounds <= self.risk) & (accepted > 0))
        if len(met):
            best = met[-1]
            found = thresholds[best], accepted[best] / n, bounds[best]
        else:
            found = z.new_tensor(torch.inf), 0.0, math.nan
            self._warn_of_nothing_accepted(n)
        names = ("threshold", "coverage", "bound")
        like = torch.empty(0, device=z.device)
        self._store(like, **{name: torch.as_tensor(value).float() for name, value in zip(names, found)})
        return self

    def fit_predictions(self, predictions: Predictions) -> Self:
        """`fit` to the logits and labels of `predictions`, which may not be weighted.

        Raises:
            InputError: labels are missing, or there are weights: the binomial bound counts samples.
        """
        if predictions.weights is not None:
            raise InputError("predictions must not be weighted: the bound counts samples, each as one")
        return self.fit(predictions.logits, predictions.needed("labels"))

    def forward(self, logits: Float[Tensor, "n c"]) -> Bool[Tensor, " n"]:
        """Which predictions are accepted; values are not checked, so that it traces and exports.

        Raises:
            InputError: not fitted.
        """
        self._must_be_fitted()
        return _confidence(logits) > self.threshold

    def accepts(self, logits: Any) -> Any:
        """Which predictions are accepted, (n,): a tensor for a tensor, else a NumPy array."""
        z = checks.logits(logits).detach()
        self._must_be_fitted()
        if isinstance(logits, Tensor):
            return self(z)
        return self(z.to(self.threshold.device)).cpu().numpy()

    def _warn_of_nothing_accepted(self, n: int) -> None:
        least = np.ceil(math.log(self.delta / self.steps) / math.log1p(-self.risk))
        warnings.warn(
            f"no threshold keeps the risk at {self.risk:g} with probability {1 - self.delta:g} on {n} samples: nothing "
            f"will be accepted; it takes {least:g} accepted samples without an error, and more with errors",
            RuntimeWarning,
            stacklevel=3,
        )


def _confidence(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Log-odds of the likeliest class, computed in double and compared in single precision: roundings do not decide."""
    z = logits.double()
    top, index = z.max(-1, keepdim=True)
    is_top = torch.arange(z.shape[-1], device=z.device) == index
    return (top - logsumexp(z.masked_fill(is_top, -torch.inf), -1))[..., 0].float()
