"""All 102 calibration measures of the benchmark study from one call: before and after temperature scaling.

Reach for it to compare models, or a model with itself before and after a change, without choosing one measure first.
Ninety measures are binned (ECE, ECE of equal mass, class-wise ECE of both kinds, and MCE, at nine bin counts, before
and after), ten are KSCE, KDECE, MMCE, log loss and Brier score before and after, and two are areas under the ROC curve,
which tell how well confidence separates known from unknown inputs.

Tao, Zhu, Guo, Dong, Xu 2024, arXiv 2308.11838, "A Benchmark Study on Calibration", ICLR. The code behind the study's
tables is not public; the definitions are those of the same group's package and of h-Calibration, with departures named
in the single measures' files. The score that detects unknown inputs is taken to be the largest probability.

Values with 200 and 500 bins are mostly noise unless n is large: 20 samples in a bin give an error near 0.1 by chance.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.stats import Interval
from trimtab.core.temperature import BOUNDS, fit_temperature
from trimtab.core.threads import one_thread
from trimtab.metrics import ranking, resampling
from trimtab.metrics.binning import BINS
from trimtab.metrics.measures import Named, measure_logits, study_columns
from trimtab.metrics.rows import Labels, Matrix, rows_of

FitMatrix = Float[Tensor, "m c"] | Float[np.ndarray, "m c"]
FitLabels = Int[Tensor, " m"] | Int[np.ndarray, " m"]
Unknown = Float[Tensor, " _"] | Float[np.ndarray, " _"]


def calibration_suite(
    logits: Matrix,
    labels: Labels,
    fit_logits: FitMatrix | None = None,
    fit_labels: FitLabels | None = None,
    *,
    temperature: float | None = None,
    ood_scores: Mapping[str, Unknown] | None = None,
    classes: int | None = None,
) -> dict[str, float]:
    """The study's columns: ``pre_ECE_5`` .. ``pre_Brier``, ``post_ECE_5`` .. ``post_Brier``, ``auc_<name>``.

    Args:
        logits: unnormalised scores or log-probabilities (n, c), finite; tensor or array.
        labels: true classes (n,), integers in 0..c-1.
        fit_logits: held-out logits (m, c) on which the temperature is fitted. Without these and without `temperature`
            it is fitted on `logits` themselves, which flatters the ``post_`` columns, though one parameter little.
        fit_labels: labels of `fit_logits`.
        temperature: take this one instead of fitting.
        ood_scores: largest probabilities of inputs that the model should not know, by name; for ``cifar10c`` and
            ``svhn`` the keys are the study's ``auc_cifar10c`` and ``auc_svhn``.
        classes: class-wise means are over the first so many classes; None for all. The group's package takes
            max(label) + 1.

    Returns:
        100 numbers and one for each of `ood_scores`. KDECE is NaN, with a warning, where no sample is right.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> truth = 2 * torch.randn(4000, 5, generator=generator)
        >>> labels = truth.softmax(1).multinomial(1, generator=generator)[:, 0]
        >>> measures = calibration_suite(3 * truth[:2000], labels[:2000], 3 * truth[2000:], labels[2000:])
        >>> len(measures), measures["post_ECE_15"] < 0.03 < 0.1 < measures["pre_ECE_15"]
        (100, True)

    Reference:
        Tao et al., ICLR 2024, arXiv 2308.11838.
    """
    z, y, t = _checked(logits, labels, fit_logits, fit_labels, temperature, classes)
    estimates = _columns(z, y, t, classes)
    _warn_if_undefined(estimates)
    estimates |= _detection(z, y, _unknown(ood_scores, z))
    return {name: float(value) for name, value in estimates.items()}


def calibration_intervals(
    logits: Matrix,
    labels: Labels,
    fit_logits: FitMatrix | None = None,
    fit_labels: FitLabels | None = None,
    *,
    temperature: float | None = None,
    ood_scores: Mapping[str, Unknown] | None = None,
    classes: int | None = None,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """`calibration_suite` with a bootstrap interval around every number.

    The rows are drawn with replacement `resamples` times; the temperature stays as fitted. Quantile edges are those of
    each resample with its repeated values. Resamples are moved so that their mean is the estimate, since binned errors
    are larger in every resample; intervals tell how a measure varies from sample to sample of this size, and do not
    take back its bias.

    Args:
        logits: as in `calibration_suite`, and so are the arguments up to `classes`.
        labels: true classes.
        fit_logits: held-out logits.
        fit_labels: their labels.
        temperature: instead of fitting.
        ood_scores: largest probabilities of unknown inputs, by name; resampled too.
        classes: number of classes in class-wise means.
        resamples: bootstrap resamples; a byte of memory for each of them and each row.
        level: coverage, in 0..1.
        seed: the same seed gives the same intervals.

    Raises:
        InputError: an argument is malformed.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> logits = torch.randn(500, 3, generator=generator)
        >>> labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
        >>> estimate, low, high = calibration_intervals(logits, labels, resamples=50)["pre_NLL"]
        >>> low < estimate < high
        True

    Reference:
        Efron, Tibshirani 1993, "An Introduction to the Bootstrap".
    """
    z, y, t = _checked(logits, labels, fit_logits, fit_labels, temperature, classes)
    unknown = _unknown(ood_scores, z)
    drawn = resampling.weights(len(z), resamples, seed, z.device)
    drawn_unknown = {
        name: resampling.weights(len(scores), resamples, seed + 1 + i, z.device)
        for i, (name, scores) in enumerate(unknown.items())
    }
    estimates = _columns(z, y, t, classes)
    _warn_if_undefined(estimates)
    replicates = _columns(z, y, t, classes, drawn)
    estimates |= _detection(z, y, unknown)
    replicates |= _detection(z, y, unknown, drawn, drawn_unknown)
    return resampling.intervals(estimates, replicates, level)


class CalibrationSuite(Metric):
    """`calibration_suite` over batches; its state is all logits and labels.

    Args:
        temperature: of the ``post_`` columns; None fits it on the logits seen, as `calibration_suite` does.
        classes: class-wise means are over the first so many classes; None for all.

    Example:
        >>> import torch
        >>> suite = CalibrationSuite()
        >>> logits = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> suite.update(logits[:50], logits[:50].argmax(1))
        >>> suite.update(logits[50:], logits[50:].argmin(1))
        >>> len(suite.compute())
        100
    """

    is_differentiable = False
    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self, temperature: float | None = None, classes: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature = temperature
        self.classes = classes
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, logits: Matrix, labels: Labels) -> None:
        """Add a batch: logits (n, c) and labels (n,)."""
        z = checks.logits(logits).detach()
        self.logits.append(z)
        self.labels.append(checks.labels(labels, *z.shape).to(z.device))

    def compute(self) -> dict[str, Tensor]:
        """All measures of all batches together."""
        z, y = dim_zero_cat(self.logits), dim_zero_cat(self.labels)
        measures = calibration_suite(z, y, temperature=self.temperature, classes=self.classes)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in measures.items()}


@one_thread()
def _checked(
    logits: Any, labels: Any, fit_logits: Any, fit_labels: Any, temperature: float | None, classes: int | None
) -> tuple[Float[Tensor, "n c"], Int[Tensor, " n"], float]:
    """Logits and labels on their device, and the temperature, fitted if need be."""
    z = checks.logits(logits).detach()
    y = checks.labels(labels, *z.shape).to(z.device)
    if classes is not None:
        checks.integer(classes, "classes", low=1, high=z.shape[1])
    if (fit_logits is None) != (fit_labels is None):
        raise InputError("fit_logits and fit_labels must be given together")
    if temperature is not None:
        if fit_logits is not None:
            raise InputError("temperature must not be given together with fit_logits")
        return z, y, checks.number(temperature, "temperature", low=BOUNDS[0], high=BOUNDS[1])
    if fit_logits is None:
        return z, y, fit_temperature(z, y)
    fit_z = checks.logits(fit_logits, "fit_logits", classes=z.shape[1]).detach()
    fit_y = checks.labels(fit_labels, len(fit_z), z.shape[1], "fit_labels").to(fit_z.device)
    return z, y, fit_temperature(fit_z, fit_y)


def _columns(
    logits: Float[Tensor, "n c"],
    labels: Int[Tensor, " n"],
    temperature: float,
    classes: int | None,
    weights: Tensor | None = None,
) -> Named:
    measured = measure_logits(logits, labels, (1.0, temperature), BINS, classes=classes, weights=weights)
    return study_columns([each.named for each in measured])


def _warn_if_undefined(estimates: Mapping[str, Tensor]) -> None:
    if estimates["pre_KDECE"].isnan():
        warnings.warn("no sample is right: the kernel-density error is undefined", RuntimeWarning, stacklevel=3)


def _unknown(ood_scores: Mapping[str, Any] | None, like: Tensor) -> dict[str, Float[Tensor, " m"]]:
    scores = {}
    for name, given in (ood_scores or {}).items():
        s = checks.tensor(given, f"ood_scores[{name!r}]").detach()
        if s.ndim != 1 or len(s) == 0 or not s.is_floating_point():
            raise InputError(f"ood_scores[{name!r}] must be floating point of shape (m,), m >= 1, got {tuple(s.shape)}")
        scores[name] = checks.finite(s, f"ood_scores[{name!r}]").to(like.device)
    return scores


def _detection(
    logits: Float[Tensor, "n c"],
    labels: Int[Tensor, " n"],
    unknown: Mapping[str, Tensor],
    weights: Tensor | None = None,
    unknown_weights: Mapping[str, Tensor] | None = None,
) -> Named:
    """How well the largest probability tells the known inputs, which score higher, from the unknown."""
    if not unknown:
        return {}
    known = rows_of(logits, labels, (1.0,))[0][0].confidence.double()
    areas = {}
    for name, scores in unknown.items():
        both = torch.cat([known, scores.double()])
        is_known = torch.arange(len(both), device=both.device) < len(known)
        drawn = None if weights is None or unknown_weights is None else torch.cat([weights, unknown_weights[name]], 1)
        areas[f"auc_{name}"] = ranking.area_of(both, is_known, drawn)
    return areas
