"""Choosing among calibrators: cross-validated log loss, and the simplest that is as good as the best.

The log loss is what to rank by: it is proper, so that no calibrator can win by hiding what the model knows, and far
less noisy than any binned error. Of those within one standard error of the best the simplest is chosen (Breiman et al.
1984), since a difference that the folds cannot tell from chance is not worth a parameter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.calibration import CALIBRATORS, Calibrator
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions
from trimtab.core.progress import OutOfTime, in_time, limit, track


@dataclass(frozen=True)
class Score:
    """How one calibrator did on held-out folds.

    Attributes:
        calibrator: its class.
        fold_losses: mean log loss of each held-out fold; empty if it failed.
        log_loss: their mean; NaN if it failed.
        standard_error: of the mean, over the folds; NaN if it failed.
        seconds: spent on fitting and predicting, in all.
        failed: what it raised on a fold; None if it did not.
    """

    calibrator: type[Calibrator]
    fold_losses: tuple[float, ...]
    log_loss: float
    standard_error: float
    seconds: float
    failed: str | None = None

    def behind(self, best: Score) -> tuple[float, float]:
        """How much larger the loss is than that of `best`, fold by fold: the mean, and its standard error."""
        differences = np.subtract(self.fold_losses, best.fold_losses)
        return float(differences.mean()), float(differences.std(ddof=1) / math.sqrt(len(differences)))


def rank(
    predictions: Predictions,
    calibrators: Sequence[type[Calibrator]] | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
    max_seconds: float = math.inf,
) -> list[Score]:
    """Cross-validate calibrators with their defaults; best first, those that failed last.

    Args:
        predictions: scores that the model was not trained on, with labels and whatever the calibrators need.
        calibrators: classes, tried in this order, but those that train after all others; `Uncalibrated` among them
            shows what the model is worth as it is. By default all whose needs `predictions` meet, the simplest first.
        folds: how many, at least 2, stratified by label.
        seed: chooses the folds.
        max_seconds: time for all of them. One that is not through when it is up counts as failed; the first always
            gets the time that it takes.

    Raises:
        InputError: there are no labels, or fewer rows than folds.

    Example:
        >>> import torch
        >>> from trimtab import Predictions
        >>> from trimtab.calibration.select import one_standard_error, rank
        >>> generator = torch.Generator().manual_seed(0)
        >>> truth = 2 * torch.randn(1000, 3, generator=generator)
        >>> labels = truth.softmax(1).multinomial(1, generator=generator)[:, 0]
        >>> scores = rank(Predictions(3 * truth, labels), seed=1)
        >>> one_standard_error(scores).calibrator.__name__
        'TemperatureScaling'
    """
    predictions.needed("labels")
    if calibrators is None:
        calibrators = able(predictions)
    calibrators = sorted(calibrators, key=lambda kind: kind.trains)
    parts = predictions.folds(folds, seed)
    jobs = [(kind, fit, held_out) for kind in calibrators for fit, held_out in parts]
    losses: dict[type[Calibrator], list[float]] = {kind: [] for kind in calibrators}
    seconds = dict.fromkeys(calibrators, 0.0)
    failed: dict[type[Calibrator], str] = {}
    end = time.monotonic() + max_seconds
    for kind, fit, held_out in track(jobs, "rank calibrators"):
        if kind in failed:
            continue
        start = time.monotonic()
        try:
            with limit(math.inf if kind is calibrators[0] else end - start):
                in_time()
                losses[kind].append(_log_loss(kind().fit_predictions(fit).transform(held_out)))
        except OutOfTime:
            failed[kind] = f"not fitted within the {max(0, max_seconds):.3g} s that all calibrators had together"
        except InputError as error:
            failed[kind] = str(error)
        except Exception as error:  # one calibrator's fault must not cost the others their ranking
            failed[kind] = f"{type(error).__name__}: {error}"
        seconds[kind] += time.monotonic() - start
    scores = [_score(kind, losses[kind], seconds[kind], failed.get(kind)) for kind in calibrators]
    return sorted(scores, key=lambda score: math.inf if score.failed else score.log_loss)


def able(predictions: Predictions) -> list[type[Calibrator]]:
    """The calibrators that `predictions` hold everything for, the simplest first."""
    return [kind for kind in CALIBRATORS if all(getattr(predictions, need) is not None for need in kind.needs)]


def one_standard_error(scores: Sequence[Score], simplest_first: Sequence[type[Calibrator]] = CALIBRATORS) -> Score:
    """The simplest calibrator whose log loss is within one standard error of the best.

    The standard error is that of the difference to the best, fold by fold: all calibrators meet the same folds, and
    what makes a fold hard for one makes it hard for all.

    Args:
        scores: from `rank`.
        simplest_first: the order of simplicity; what is not in it comes last. That of `CALIBRATORS`: nothing fitted;
            one number (temperature); four (ensemble temperature); two or three a class, each class by itself (Platt,
            beta); two a class, all classes at once (vector); one for every pair of classes (matrix); a curve of many
            temperatures (h-calibration); a temperature for every sample (correctness-aware); then the maps without a
            form, whose answers jump (histogram, isotonic); and last what keeps the samples themselves (SDM).

    Raises:
        InputError: no calibrator could be fitted.
    """
    sound = [score for score in scores if score.failed is None]
    if not sound:
        raise InputError(f"no calibrator could be fitted: {scores[0].failed if scores else 'scores is empty'}")
    best = min(sound, key=lambda score: score.log_loss)
    order = {kind: place for place, kind in enumerate(simplest_first)}

    def as_good(score: Score) -> bool:
        mean, error = score.behind(best)
        return mean <= error

    return min(filter(as_good, sound), key=lambda score: (order.get(score.calibrator, len(order)), score.log_loss))


def _log_loss(calibrated: Predictions) -> float:
    at_label = calibrated.logits.double().gather(1, calibrated.needed("labels")[:, None])[:, 0]
    weights = calibrated.weights
    return -float(at_label.mean() if weights is None else at_label @ weights.double() / weights.double().sum())


def _score(kind: type[Calibrator], losses: list[float], seconds: float, failed: str | None) -> Score:
    if failed is not None:
        return Score(kind, (), math.nan, math.nan, seconds, failed)
    spread = np.std(losses, ddof=1) / math.sqrt(len(losses))
    return Score(kind, tuple(losses), float(np.mean(losses)), float(spread), seconds)
