"""Correcting scores: calibrators ranked by cross-validation, the best chosen, fitted, measured and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trimtab.audit.result import Ranked, Triple, rebuild
from trimtab.audit.setup import Setup
from trimtab.audit.workspace import Workspace
from trimtab.calibration import CALIBRATORS, Calibrator, export, select
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions
from trimtab.core.progress import track
from trimtab.core.stats import Interval
from trimtab.metrics import Summary, compare, essentials, summarise

CALIBRATOR_FILE = "calibrator.safetensors"


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
    calibration: Predictions, test: Predictions, out: Path, work: Workspace, settings: Settings
) -> Corrected:
    """Rank every calibrator whose needs are met, choose by the one-standard-error rule, and measure each on `test`.

    The chosen one is left in `out` as ``calibrator.safetensors`` and ``.json``.
    """
    able = [kind for kind in CALIBRATORS if all(getattr(calibration, need) is not None for need in kind.needs)]

    def rank() -> list[dict[str, Any]]:
        scores = select.rank(calibration, able, folds=settings.folds, seed=settings.seed)
        chosen = select.one_standard_error(scores, able)
        return [_row(score, scores[0], score is chosen) for score in scores]

    rows = work.number("rank calibrators", rank)
    kinds = {kind.__name__: kind for kind in able}

    def measure_all() -> dict[str, dict[str, Any]]:
        ranked = track([row["symbol"] for row in rows], "measure calibrators")
        return {symbol: _measure(kinds[symbol], calibration, test, settings) for symbol in ranked}

    measured = work.number("measure calibrators", measure_all)
    ranking = [rebuild(Ranked, {**row, **measured[row["symbol"]]}) for row in rows]
    chosen = next(row for row in ranking if row.chosen)
    fitted = kinds[chosen.symbol]().fit_predictions(calibration)
    fitted.save(out / CALIBRATOR_FILE)
    change = triples(work.number("compare", lambda: settings.compare(test, fitted.transform(test))))
    skipped = [kind.__name__ for kind in CALIBRATORS if kind not in able]
    notes = [f"Not tried, as the predictions do not hold what they need: {', '.join(skipped)}."] if skipped else []
    return Corrected(fitted, ranking, change, notes)


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
    """``TemperatureScaling`` as ``Temperature scaling``."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in symbol).strip().capitalize()


def _measure(kind: type[Calibrator], calibration: Predictions, test: Predictions, settings: Settings) -> dict[str, Any]:
    """What a calibrator achieves on `test` when fitted to all of `calibration`."""
    names = {"test_log_loss": "log_loss", "test_ece": "ece", "test_accuracy": "accuracy"}
    try:
        headline = settings.essentials(kind().fit_predictions(calibration).transform(test))
    except InputError as error:
        return {name: (float("nan"),) * 3 for name in names} | {"failed": str(error)}
    return {name: triple(headline[measure]) for name, measure in names.items()}


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
    batch = next(iter(setup.test))
    example = batch[0] if isinstance(batch, (tuple, list)) else batch
    try:
        export.to_onnx(setup.model, calibrator, example, out / "model_calibrated.onnx")
    except InputError:
        raise
    except Exception as error:  # the exporter raises whatever a model's code provokes
        return [f"The model could not be exported to ONNX ({type(error).__name__}: {str(error).splitlines()[0]})."]
    return []
