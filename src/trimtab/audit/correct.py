"""Correcting scores: calibrators ranked by cross-validation, the best chosen, fitted, measured and kept."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from trimtab.audit.result import NOTHING, Ranked, Triple, rebuild
from trimtab.audit.setup import Setup
from trimtab.audit.workspace import Workspace
from trimtab.calibration import CALIBRATORS, Calibrator, export, load, select
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions
from trimtab.core.progress import OutOfTime, in_time, limit, track
from trimtab.core.stats import Interval
from trimtab.metrics import Summary, compare, essentials, summarise

CALIBRATOR_FILE = "calibrator.safetensors"
_SHARE_FOR_RANKING = 0.8  # of the time; the rest is for fitting to all rows and measuring
_UNMEASURED: dict[str, Triple] = dict.fromkeys(("test_log_loss", "test_ece", "test_accuracy"), NOTHING)


@dataclass(frozen=True)
class Settings:
    """What every number of one audit is made with."""

    resamples: int
    level: float
    seed: int
    folds: int

    @property
    def intervals(self) -> dict[str, Any]:
        """The keyword arguments that all measures with intervals take."""
        return {"resamples": self.resamples, "level": self.level, "seed": self.seed}

    def summarise(self, predictions: Predictions) -> Summary:
        """The summary of labelled predictions."""
        return summarise(predictions.logits, predictions.needed("labels"), **self.intervals)

    def essentials(self, predictions: Predictions) -> dict[str, Interval]:
        """Accuracy, calibration error, log loss and the like of labelled predictions."""
        return essentials(predictions.logits, predictions.needed("labels"), **self.intervals)

    def compare(self, before: Predictions, after: Predictions) -> dict[str, Triple]:
        """After minus before of the headline measures, bootstrapped in pairs."""
        changes = compare(before.logits, after.logits, before.needed("labels"), **self.intervals)
        return {name: triple(change) for name, change in changes.items()}


@dataclass(frozen=True)
class Budget:
    """The minutes that an audit may take, and when (`time.monotonic`) they are over."""

    minutes: float
    end: float

    @classmethod
    def starting_now(cls, minutes: float) -> Self:
        """So many minutes from now."""
        return cls(minutes, time.monotonic() + 60 * minutes)

    @property
    def seconds(self) -> float:
        """What is left."""
        return max(0.0, self.end - time.monotonic())

    def step(self, name: str) -> str:
        """The name of a step whose result depends on the budget."""
        return name if math.isinf(self.minutes) else f"{name} in {self.minutes:g} min"


@dataclass(frozen=True)
class Corrected:
    """The chosen calibrator, fitted to all calibration rows, and how it was found."""

    calibrator: Calibrator
    ranking: list[Ranked]
    change: dict[str, Triple]
    notes: list[str]


def check_pair(calibration: Predictions, test: Predictions) -> None:
    """Refuse what no correction can be fitted on or judged by."""
    if calibration.c != test.c:
        raise InputError(f"calibration must have the {test.c} classes of the measured rows, it has {calibration.c}")
    for name, part in {"calibration": calibration, "measured": test}.items():
        labels = part.needed("labels")
        if bool((labels == labels[0]).all()):
            raise InputError(f"the {name} rows must hold at least two classes, found only class {int(labels[0])}")


def rank_and_choose(
    calibration: Predictions, test: Predictions, out: Path, work: Workspace, settings: Settings, budget: Budget
) -> Corrected:
    """Rank every calibrator whose needs are met, choose by the one-standard-error rule, and measure each on `test`.

    The chosen one is left in `out` as ``calibrator.safetensors`` and ``.json``. The budget is kept, but the
    uncalibrated scores are ranked and the chosen calibrator is fitted and measured in any case.
    """
    kinds = {kind.__name__: kind for kind in select.able(calibration)}

    def rank() -> list[dict[str, Any]]:
        scores = select.rank(
            calibration, folds=settings.folds, seed=settings.seed, max_seconds=_SHARE_FOR_RANKING * budget.seconds
        )
        chosen = select.one_standard_error(scores)
        return [_row(score, scores[0], score is chosen) for score in scores]

    rows = work.number(budget.step("rank calibrators"), rank)
    symbol = next(row["symbol"] for row in rows if row["chosen"])
    path = work.folder / CALIBRATOR_FILE
    work.number(f"fit {symbol}", lambda: kinds[symbol]().fit_predictions(calibration).save(path))
    fitted = load(path)
    fitted.save(out / CALIBRATOR_FILE)

    def measure_all() -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {symbol: {**_measure(fitted, test, settings)}}
        for row in track([row for row in rows if row["symbol"] not in found], "measure calibrators"):
            found[row["symbol"]] = {**_UNMEASURED}
            if row["failed"] is None:
                try:
                    with suppress(OutOfTime), limit(budget.seconds):
                        in_time()
                        other = kinds[row["symbol"]]().fit_predictions(calibration)
                        found[row["symbol"]] = {**_measure(other, test, settings)}
                except InputError as error:
                    found[row["symbol"]] = {**_UNMEASURED, "failed": str(error)}
        return found

    measured = work.number(budget.step("measure calibrators"), measure_all)
    ranking = [rebuild(Ranked, {**row, **measured[row["symbol"]]}) for row in rows]
    change = triples(work.number("compare", lambda: settings.compare(test, fitted.transform(test))))
    return Corrected(fitted, ranking, change, _notes(ranking, kinds))


def _notes(ranking: Sequence[Ranked], able: Mapping[str, type[Calibrator]]) -> list[str]:
    """What was not tried, and why."""
    notes = []
    skipped = {kind.__name__: sorted(kind.needs) for kind in CALIBRATORS if kind.__name__ not in able}
    if skipped:
        names = ", ".join(f"{name} ({', '.join(needs)})" for name, needs in skipped.items())
        notes.append(f"Not tried, as the predictions do not hold what they need: {names}.")
    late = [row.name for row in ranking if row.failed is None and math.isnan(row.test_log_loss[0])]
    if late:
        notes.append(f"Ranked, but not measured on the test rows for want of time: {', '.join(late)}.")
    return notes


def _row(score: select.Score, best: select.Score, chosen: bool) -> dict[str, Any]:
    """What the ranking says of one calibrator, as plain data."""
    return {
        "name": _spaced(score.calibrator.__name__),
        "symbol": score.calibrator.__name__,
        "log_loss": score.log_loss,
        "standard_error": score.standard_error,
        "seconds": score.seconds,
        "chosen": chosen,
        "failed": score.failed,
        "difference_error": float("nan") if score.failed else score.behind(best)[1],
    }


def _spaced(symbol: str) -> str:
    """``TemperatureScaling`` as ``Temperature scaling``; ``SDM`` and ``HCalibration`` stay."""
    return re.sub("(?<=[a-z])[A-Z]", lambda letter: f" {letter[0].lower()}", symbol)


def _measure(calibrator: Calibrator, test: Predictions, settings: Settings) -> dict[str, Triple]:
    """What a fitted calibrator achieves on `test`."""
    headline = settings.essentials(calibrator.transform(test))
    return {name: triple(headline[name.removeprefix("test_")]) for name in _UNMEASURED}


def triples(plain: Mapping[str, Sequence[float]]) -> dict[str, Triple]:
    """Named triples from their plain form."""
    return {name: (value, low, high) for name, (value, low, high) in plain.items()}


def triple(interval: Interval) -> Triple:
    """An interval as plain numbers."""
    return (interval.estimate, interval.low, interval.high)


def export_model(setup: Setup, calibrator: Calibrator, out: Path) -> list[str]:
    """Write the model with the calibrator behind it to ``model_calibrated.onnx``; a note where that cannot be."""
    if not (find_spec("onnx") and find_spec("onnxscript")):
        return ["No ONNX file was written: the packages of trimtab[onnx] are not installed."]
    if calibrator.needs:
        needs = " and ".join(sorted(calibrator.needs))
        return [f"No ONNX file was written: {type(calibrator).__name__} needs {needs} beside the logits."]
    batch = next(iter(setup.test))
    example = batch[0] if isinstance(batch, (tuple, list)) else batch
    try:
        export.to_onnx(setup.model, calibrator, example, out / "model_calibrated.onnx")
    except InputError:
        raise
    except Exception as error:  # the exporter raises whatever a model's code provokes
        return [f"The model could not be exported to ONNX ({type(error).__name__}: {str(error).splitlines()[0]})."]
    return []
