"""What an audit found: plain data that `audit.json` holds and the report is drawn from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from trimtab.core import persist

Triple = tuple[float, float, float]  # estimate, low, high
NOTHING: Triple = (math.nan, math.nan, math.nan)
CONTROL = "CrossEntropy"  # the objective whose further training the others are held against
Row = TypeVar("Row")


@dataclass(frozen=True)
class Curve:
    """A reliability diagram's bins; arrays of equal length, empty bins left out."""

    lower: list[float]
    upper: list[float]
    count: list[int]
    confidence: list[float]
    accuracy: list[float]
    accuracy_low: list[float]
    accuracy_high: list[float]


@dataclass(frozen=True)
class Ranked:
    """One calibrator in the ranking: `log_loss` and `standard_error` cross-validated, the rest of the test set.

    `difference_error` is the standard error, over the folds, of the difference of its log loss to that of the best;
    the one-standard-error rule goes by it.
    """

    name: str
    symbol: str
    log_loss: float
    standard_error: float
    test_log_loss: Triple
    test_ece: Triple
    test_accuracy: Triple
    seconds: float
    chosen: bool = False
    failed: str | None = None
    difference_error: float = math.nan


@dataclass(frozen=True)
class ShiftCell:
    """One adapter on one shifted stream (shift ``"none"`` is the unshifted test set)."""

    shift: str
    adapter: str
    n: int
    accuracy: Triple
    ece: Triple
    log_loss: Triple
    seconds: float
    failed: str | None = None
    change: dict[str, Triple] = field(default_factory=dict)
    """Measures minus the unadapted model's on the same rows, bootstrapped in pairs."""


@dataclass(frozen=True)
class TrainedModel:
    """The model after further training with one objective; an empty name is the model as it is.

    `before` and `after` temperature scaling: accuracy, ece, log_loss. `file` holds the weights of what was trained.
    """

    objective: str
    before: dict[str, Triple]
    after: dict[str, Triple]
    seconds: float
    failed: str | None = None
    file: str = ""
    change: dict[str, Triple] = field(default_factory=dict)
    """Measures after scaling minus those after training on with cross-entropy, bootstrapped in pairs."""
    gain: dict[str, Triple] = field(default_factory=dict)
    """The same against the model as it is."""


@dataclass(frozen=True)
class ClassRow:
    """How one class fares: share predicted and true, calibration error of its probability, before and after."""

    name: str
    count: int
    recall: float
    mean_probability: float
    ece_before: float
    ece_after: float


@dataclass(frozen=True)
class AuditResult:
    """Everything the report shows.

    Args:
        title: what was audited, one line.
        kind: ``"model"`` or ``"table"``.
        n: rows measured; `n_fit` rows fitted on; `c` classes.
        classes: class names, c of them.
        interval_method: how the intervals were made, one sentence.
        level: coverage of the intervals.
        before, after: headline measures by name (accuracy, ece, ece_em, mce, cw_ece, log_loss, brier, auroc, aurc,
            mean_confidence), of the model as it is and after the chosen calibrator.
        measures: all measures of `metrics.calibration_suite`, by column name.
        reliability: curves by ``"before"`` and ``"after"``.
        histogram: counts of confidence in equal-width cells, by ``"before"`` and ``"after"``.
        risk_coverage: ``"before"`` and ``"after"`` lists of (coverage, risk).
        ranking: calibrators, best first.
        shifts: the shift-by-adapter cells.
        per_class: one row a class.
        trained: the model as it is and after further training with other objectives, where these were asked for.
        steps: (step, seconds) in the order they ran.
        versions: what it was run with.
        settings: seed, workers, and what else was chosen.
        notes: what a reader should know: warnings, steps left out and why.
        change: after minus before of the headline measures whose difference was bootstrapped in pairs, row by row.
    """

    title: str
    kind: str
    n: int
    n_fit: int
    c: int
    classes: list[str]
    interval_method: str
    level: float
    before: dict[str, Triple]
    after: dict[str, Triple]
    measures: dict[str, Triple]
    reliability: dict[str, Curve]
    histogram: dict[str, list[int]]
    risk_coverage: dict[str, list[tuple[float, float]]]
    ranking: list[Ranked]
    shifts: list[ShiftCell] = field(default_factory=list)
    per_class: list[ClassRow] = field(default_factory=list)
    trained: list[TrainedModel] = field(default_factory=list)
    steps: list[tuple[str, float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    change: dict[str, Triple] = field(default_factory=dict)

    def write(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        persist.write_json(path, asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Rebuild from what `write` wrote; null becomes NaN again."""
        data = dict(data)
        for name in ("before", "after", "measures", "change"):
            data[name] = {key: _numbers(value) for key, value in data[name].items()}
        data["reliability"] = {key: Curve(**value) for key, value in data["reliability"].items()}
        data["risk_coverage"] = {
            key: [_numbers(pair) for pair in value] for key, value in data["risk_coverage"].items()
        }
        data["steps"] = [tuple(step) for step in data["steps"]]
        kinds = {"ranking": Ranked, "shifts": ShiftCell, "per_class": ClassRow, "trained": TrainedModel}
        for name, row_class in kinds.items():
            data[name] = [rebuild(row_class, row) for row in data.get(name, [])]
        return cls(**data)


def rebuild(kind: type[Row], row: dict[str, Any]) -> Row:
    """One of the classes above from its plain form."""
    return kind(**{key: value if key == "failed" else _numbers(value) for key, value in row.items()})


def _numbers(value: Any) -> Any:
    """A number, or numbers in tuples or by name, as they were before JSON."""
    if isinstance(value, dict):
        return {name: _numbers(x) for name, x in value.items()}
    if isinstance(value, list):
        return tuple(_numbers(x) for x in value)
    return math.nan if value is None else value


@dataclass(frozen=True)
class RankedDetector:
    """One way of calibrating a detector: `error` is cross-validated, the measures are of the test images.

    Attributes:
        name, kind, classwise: what it is.
        error: root of the mean squared difference of calibrated score and overlap.
        behind, difference_error: how far that is behind the best, and the standard error of that, over images.
        seconds: time of the cross-validation's fits.
        chosen: whether the one-standard-error rule picked it.
        measures: by name, as in `DetectionAudit.before`.
    """

    name: str
    kind: str
    classwise: bool
    error: float
    behind: float
    difference_error: float
    seconds: float
    chosen: bool = False
    measures: dict[str, Triple] = field(default_factory=dict)


@dataclass(frozen=True)
class DetectionRow:
    """One class of a detector: objects, thresholds, and what is passed on with which error, before and after.

    A threshold that is NaN or negative lets all detections through.
    """

    name: str
    objects: int
    threshold_before: float
    threshold_after: float
    overlap: float
    passed_before: int
    score_before: float
    laece_before: float
    lrp_before: float
    passed_after: int
    score_after: float
    laece_after: float
    lrp_after: float


@dataclass(frozen=True)
class DetectionAudit:
    """Findings of the audit of a detector.

    Attributes:
        title: what was audited.
        n, n_fit: images measured, and images that the corrections were fitted on.
        objects, detections: how many there are in the measured images.
        passed: of these detections, how many are above the thresholds, ``"before"`` and ``"after"``.
        c: number of classes.
        level, interval_method: of the intervals.
        before, after: measures by name (laece, laace, lrp, lrp_localisation, lrp_false, lrp_missed, dece, mean_score,
            mean_overlap, gap), of the raw scores above the best thresholds and after the chosen calibrator.
        change: after minus before, bootstrapped in pairs.
        reliability: mean overlap (as ``accuracy``) against mean score (as ``confidence``).
        histogram: counts of scores in equal-width cells.
        ranking: calibrators, best first.
        per_class: one row a class.
        steps, versions, settings, notes: as in `AuditResult`.
    """

    title: str
    n: int
    n_fit: int
    objects: int
    detections: int
    passed: dict[str, int]
    c: int
    level: float
    interval_method: str
    before: dict[str, Triple]
    after: dict[str, Triple]
    change: dict[str, Triple]
    reliability: dict[str, Curve]
    histogram: dict[str, list[int]]
    ranking: list[RankedDetector]
    per_class: list[DetectionRow]
    steps: list[tuple[str, float]]
    versions: dict[str, str]
    settings: dict[str, Any]
    notes: list[str]
