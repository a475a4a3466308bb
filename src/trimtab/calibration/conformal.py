"""Conformal prediction sets: all classes that the truth may be, missed in at most a share alpha of new samples.

The guarantee holds for any model, calibrated or not, and any number n of held-out samples, as long as these and the
new ones are exchangeable (drawn alike): a set holds the label with probability at least 1 - alpha, and at most
1 - alpha + 1 / (n + 1) where scores do not tie. It is an average over samples; `by_class` gives it for every class.
What a better calibrated model wins is smaller sets. Of the scores, ``lac`` makes the smallest sets on average, ``aps``
makes them large where the model is unsure and small where it is not, and ``raps`` is ``aps`` that avoids the long tails
of many unlikely classes: take it from some tens of classes on.

Sadinle, Lei, Wasserman (2019), arXiv 1609.00451 (LAC); Romano, Sesia, Candès (2020), arXiv 2006.02544 (APS);
Angelopoulos, Bates, Malik, Jordan (2021), arXiv 2009.14193 (RAPS). APS and RAPS are randomised in the papers. Here they
are deterministic unless `randomised`: the label's own probability then counts in full, on both sides, and the guarantee
is the same. MAPIE counts it at random when it calibrates and in full when it predicts, which makes its sets larger; its
``include_last_label="randomized"`` agrees with ours for LAC and APS, while its RAPS divides by another term than the
authors' code where a set is larger than k_reg.
"""

from __future__ import annotations

import math
import warnings
from itertools import repeat
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from trimtab.calibration import one_vs_rest
from trimtab.calibration.base import Fitted
from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions
from trimtab.core.threads import one_thread

_SCORES = ("lac", "aps", "raps")
_PENALTIES = (0.001, 0.01, 0.1, 0.2, 0.5)
_TUNING = 0.2
_BLOCK_ELEMENTS = 1 << 16


class ConformalSets(Fitted):
    """Sets of classes whose score is no larger than the finite-sample quantile of the held-out labels' scores.

    With p the probabilities, ``lac`` scores a class by 1 - p, ``aps`` by the mass of the classes from the likeliest up
    to and with it, and ``raps`` adds penalty * max(0, rank - k_reg). The threshold is the ceil((n + 1)(1 - alpha))-th
    smallest score; where that is more than n, no finite number will do: sets then hold every class, and `fit` warns.

    Args:
        score: ``"lac"``, ``"aps"`` or ``"raps"``.
        alpha: share of labels that may be missed, in (0, 1).
        by_class: one threshold a class, from the samples with that label: coverage then holds within every class, and
            sets grow. A class with fewer than 1 / alpha - 1 samples is in every set.
        randomised: APS and RAPS count a random share of the class's own probability: the smallest sets with exact
            coverage, for the price of answers that depend on chance. Needs a generator.
        allow_empty: leave sets empty where no class conforms; False puts the likeliest class in.
        penalty: RAPS's penalty a rank, >= 0; None chooses among 0.001, 0.01, 0.1, 0.2, 0.5 (the authors' list) the one
            with the smallest sets.
        k_reg: the rank up to which RAPS penalises nothing, >= 1; None takes the smallest that holds the label in
            1 - alpha of the samples.
        seed: what RAPS chooses, it chooses on a random fifth of the samples (as MAPIE does), which are then left out of
            the quantile; the seed of that draw.

    Attributes:
        threshold: (c,), the largest score of a class in a set; infinite where there are too few samples. APS and RAPS
            scores are kept less one: probabilities near one would not differ.
        counts: (c,), how many samples (how much weight) of each class the quantile rests on.
        rank_penalty: (c,), what is added at every rank; zero but for RAPS.

    Example:
        >>> import torch
        >>> from trimtab.calibration import ConformalSets
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = 2 * torch.randn(4000, 5, generator=generator)
        >>> labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
        >>> conformal = ConformalSets("aps", alpha=0.1).fit(logits[:2000], labels[:2000])
        >>> sets = conformal(logits[2000:])
        >>> hit = sets.gather(1, labels[2000:, None]).float()
        >>> f"{hit.mean():.2f} covered, {sets.sum(1).float().mean():.1f} classes a set"
        '0.90 covered, 2.6 classes a set'

    Reference:
        Angelopoulos et al., Uncertainty Sets for Image Classifiers using Conformal Prediction, ICLR 2021.
    """

    threshold: Tensor
    counts: Tensor
    rank_penalty: Tensor

    def __init__(
        self,
        score: Literal["lac", "aps", "raps"] = "lac",
        alpha: float = 0.1,
        *,
        by_class: bool = False,
        randomised: bool = False,
        allow_empty: bool = True,
        penalty: float | None = None,
        k_reg: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if score not in _SCORES:
            raise InputError(f"score must be one of {', '.join(_SCORES)}, got {score!r}")
        if score != "raps" and not (penalty is None and k_reg is None):
            raise InputError(f"penalty and k_reg belong to raps, score is {score}")
        if score == "lac" and randomised:
            raise InputError("randomised must be False for lac: nothing in it is random")
        self.score = score
        self.alpha = checks.number(alpha, "alpha", low=0, high=1, low_open=True, high_open=True)
        self.by_class = by_class
        self.randomised = randomised
        self.allow_empty = allow_empty
        self.penalty = None if penalty is None else checks.number(penalty, "penalty", low=0)
        self.k_reg = None if k_reg is None else checks.integer(k_reg, "k_reg", low=1)
        self.seed = checks.integer(seed, "seed", low=0)
        self._declare("threshold", "counts", "rank_penalty")

    def fit(
        self,
        logits: Float[Tensor, "n c"] | Float[np.ndarray, "n c"],
        labels: Int[Tensor, " n"] | Integer[np.ndarray, " n"],
        *,
        weights: Float[Tensor, " n"] | Float[np.ndarray, " n"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Find the threshold on held-out scores: samples on which neither model nor calibrator was fitted.

        Args:
            logits: unnormalised scores or log-probabilities, (n, c), finite.
            labels: true classes, (n,), integers in 0..c-1.
            weights: sample weights (n,), >= 0; a weight counts as so many copies of the sample, a new sample as one.
            generator: source of chance; given exactly when `randomised`.

        Returns:
            self.

        Raises:
            InputError: a shape, type or range is wrong; the message names the argument and the first bad row.
        """
        z = checks.logits(logits).detach()
        n, c = z.shape
        y = checks.labels(labels, n, c).to(z.device)
        w = torch.ones(n) if weights is None else checks.weights(weights, n).detach()
        w, u = w.to(z.device, torch.float64), self._chance(z, generator)
        if self.k_reg is not None and self.k_reg > c:
            raise InputError(f"k_reg must be at most {c}, the number of classes, got {self.k_reg}")
        rank_penalty = z.new_zeros(c, dtype=torch.float32)
        if self.score == "raps":
            tuning = torch.zeros(n, dtype=torch.bool)
            if self.penalty is None or self.k_reg is None:
                order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
                tuning[order[: math.ceil(_TUNING * n)]] = True
            tuning = tuning.to(z.device)
            rank_penalty = self._choose(z[tuning], y[tuning], w[tuning], c).float()  # as it will be stored
            z, y, w, u = z[~tuning], y[~tuning], w[~tuning], None if u is None else u[~tuning]
        self._store(
            torch.empty(0, device=z.device),
            threshold=self._thresholds(self._own_scores(z, y, rank_penalty, u), y, w, c),
            counts=torch.bincount(y, w, minlength=c),
            rank_penalty=rank_penalty,
        )
        self._warn_of_full_sets()
        return self

    def fit_predictions(self, predictions: Predictions, *, generator: torch.Generator | None = None) -> Self:
        """`fit` to the logits, labels and weights of `predictions`."""
        labels = predictions.needed("labels")
        return self.fit(predictions.logits, labels, weights=predictions.weights, generator=generator)

    def forward(self, logits: Float[Tensor, "n c"], u: Float[Tensor, " n"] | None = None) -> Bool[Tensor, "n c"]:
        """Which classes are in each sample's set.

        Values are not checked here, so that a model with the sets behind it traces and exports.

        Args:
            logits: (n, c), as in `fit`.
            u: uniform random numbers in [0, 1), one a sample; given exactly when `randomised`.

        Raises:
            InputError: not fitted, fitted to another number of classes, or `u` is missing or not wanted.
        """
        self._must_be_fitted()
        c = self.threshold.shape[0]
        if logits.shape[-1] != c:
            raise InputError(f"logits must have {c} columns as in fit, got {tuple(logits.shape)}")
        if (u is not None) != self.randomised:
            raise InputError(f"u must be given exactly when randomised, which is {self.randomised}")
        sets = self._scores(logits, self.rank_penalty, u) <= self.threshold
        if self.allow_empty:
            return sets
        return sets | (logits.argmax(-1, keepdim=True) == torch.arange(c, device=logits.device))

    def predict_sets(self, logits: Any, *, generator: torch.Generator | None = None) -> Any:
        """The sets (n, c), true where a class is in: a tensor for a tensor, else a NumPy array."""
        z = checks.logits(logits).detach()
        self._must_be_fitted()
        place = z if isinstance(logits, Tensor) else z.to(self.threshold.device)
        sets = self(place, self._chance(place, generator))
        return sets if isinstance(logits, Tensor) else sets.cpu().numpy()

    def _chance(self, logits: Tensor, generator: torch.Generator | None) -> Tensor | None:
        if (generator is not None) != self.randomised:
            raise InputError(f"generator must be given exactly when randomised, which is {self.randomised}")
        if generator is None:
            return None
        u = torch.rand(len(logits), generator=generator, dtype=torch.float64, device=generator.device)
        return u.to(logits.device)

    def _scores(self, logits: Tensor, rank_penalty: Tensor, u: Tensor | None) -> Float[Tensor, "n c"]:
        """Scores of all classes, computed in double and compared in single precision: roundings do not decide."""
        if self.score == "lac":
            odds = one_vs_rest.log_odds(logits.double())
            return (1 + (torch.cat([-odds, odds], 1) if odds.shape[1] == 1 else odds).exp()).reciprocal().float()
        p = logits.double().softmax(-1)
        ordered, order = p.sort(dim=-1, descending=True)
        tail = ordered.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        beyond = torch.cat([tail, torch.zeros_like(ordered[..., :1])], -1)
        left_out = beyond if u is None else beyond + u.double()[:, None] * ordered
        return torch.zeros_like(p).scatter(-1, order, rank_penalty.double() - left_out).float()

    @one_thread()
    def _own_scores(
        self, logits: Tensor, labels: Tensor, rank_penalty: Tensor, u: Tensor | None
    ) -> Float[Tensor, " n"]:
        """Scores of the labels, in blocks of rows that fit the cache."""
        rows = max(1, _BLOCK_ELEMENTS // logits.shape[1])
        chance = repeat(None) if u is None else u.split(rows)
        parts = zip(logits.split(rows), labels.split(rows), chance)
        return torch.cat([self._scores(z, rank_penalty, v).gather(1, y[:, None])[:, 0] for z, y, v in parts])

    def _thresholds(self, own: Tensor, labels: Tensor, weights: Tensor, c: int) -> Float[Tensor, " c"]:
        """The largest score of a class in a set, from the scores of the labels."""
        if not self.by_class:
            return _quantile(own, weights, self.alpha).expand(c).clone()
        return torch.stack([_quantile(own[labels == k], weights[labels == k], self.alpha) for k in range(c)])

    def _choose(self, logits: Tensor, labels: Tensor, weights: Tensor, c: int) -> Float[Tensor, " c"]:
        """The penalty of every rank: as given, or as the authors choose it on samples set aside."""
        ranks = torch.arange(1, c + 1, dtype=torch.float64, device=logits.device)
        k_reg: float | None = self.k_reg
        if k_reg is None:
            rank = (logits >= logits.gather(1, labels[:, None])).sum(1)
            k_reg = min(c, float(_quantile(rank.double(), weights, self.alpha)))
        beyond = (ranks - k_reg).clamp(min=0)
        if self.penalty is not None:
            return self.penalty * beyond
        sizes = []
        for penalty in _PENALTIES:
            scores = self._scores(logits, penalty * beyond, None)
            own = scores.gather(1, labels[:, None])[:, 0]
            in_set = scores <= self._thresholds(own, labels, weights, c)
            sizes.append(float(weights @ in_set.sum(1).double()))
        return _PENALTIES[int(np.argmin(sizes))] * beyond

    def _warn_of_full_sets(self) -> None:
        full = self.threshold.isinf()
        if not bool(full.any()):
            return
        needed = np.ceil(1 / self.alpha - 1 - 1e-9)
        if self.by_class:
            first = int(full.byte().argmax())
            found, which = (
                f"{self.counts[first]:g} samples of class {first}",
                f"such classes ({int(full.sum())} in all)",
            )
        else:
            found, which = f"{self.counts.sum():g} samples", "every class"
        message = f"{found} are too few for alpha = {self.alpha:g}, which takes {needed:g}: sets always hold {which}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _quantile(scores: Float[Tensor, " n"], weights: Float[Tensor, " n"], alpha: float) -> Float[Tensor, ""]:
    """The smallest score up to which lies (1 - alpha)(total weight + 1) of the weight; infinite if there is none."""
    ordered, order = scores.sort()
    mass = weights[order].cumsum(0)
    total = float(mass[-1]) if len(mass) else 0.0
    needed = mass.new_tensor((1 - alpha) * (total + 1) * (1 - 1e-12))
    return torch.cat([ordered, ordered.new_full((1,), torch.inf)])[torch.searchsorted(mass, needed)]
