"""The report's tables: which rows and columns they have, how each cell reads, and what it sorts by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from trimtab.audit.report.verdict import clear_best, control_of, judged
from trimtab.audit.report.words import (
    FURTHER,
    HEADLINE,
    MISSING,
    Change,
    Measure,
    compare,
    count,
    decimal,
    difference,
    digits_for,
    interval,
    number,
    percent,
    seconds,
    spaced,
)
from trimtab.audit.result import CONTROL, AuditResult, Curve, DetectionAudit, Ranked, TrainedModel, Triple

LIMIT = 50  # rows shown at first; a button shows the rest


class Cell(NamedTuple):
    """One cell: its text, a smaller note below it, the value that it sorts by, a badge, and the name of a file."""

    text: str
    note: str = ""
    sort: str = ""
    badge: str = ""
    file: str = ""


class Table(NamedTuple):
    """A table: columns as (label, whether numeric), rows of cells whose first is the row's heading."""

    key: str
    caption: str
    columns: tuple[tuple[str, bool], ...]
    rows: Sequence[tuple[Cell, ...]]
    search: str = ""
    limit: int = LIMIT


def headline(result: AuditResult) -> Table:
    """Every headline measure, before and after the chosen calibrator."""
    rows = []
    for measure in (*HEADLINE, *FURTHER):
        if measure.key not in result.before or measure.key not in result.after:
            continue
        before, after = result.before[measure.key], result.after[measure.key]
        verdict = compare(before, after, measure.better, result.change.get(measure.key))
        digits = digits_for([before[0], after[0]]) if measure.share else None
        rows.append(
            (
                Cell(measure.label, measure.meaning),
                triple_cell(before, measure.share, digits),
                triple_cell(after, measure.share, digits),
                change_cell(before, after, measure.share, verdict, digits),
            )
        )
    columns = (("Measure", False), ("Before", True), ("After", True), ("Change", True))
    return Table("headline", "Headline measures before and after the correction, with intervals", columns, rows)


def reliability(curve: Curve, when: str) -> Table:
    """The bins of one reliability diagram."""
    rows = [
        (
            Cell(span(lower, upper), sort=sort_key(lower)),
            Cell(count(n), sort=str(n)),
            number_cell(confidence, True),
            triple_cell((accuracy, low, high), True),
            Cell(_side(confidence, low, high)),
        )
        for lower, upper, n, confidence, accuracy, low, high in zip(*bins(curve))
    ]
    columns = ("Confidence", True), ("Predictions", True), ("Mean confidence", True), ("Share right", True)
    return Table(f"bins-{when}", f"Bins of the reliability diagram, {when}", (*columns, ("Finding", False)), rows)


def bins(curve: Curve) -> tuple[list[Any], ...]:
    """The columns of a curve in the order of its fields."""
    return (
        curve.lower,
        curve.upper,
        curve.count,
        curve.confidence,
        curve.accuracy,
        curve.accuracy_low,
        curve.accuracy_high,
    )


def span(lower: float, upper: float) -> str:
    """The confidences of a bin: ``80–87 %``."""
    return f"{percent(lower, 0)[:-2]}\u2013{percent(upper, 0)}"


def _side(confidence: float, low: float, high: float) -> str:
    return "too confident" if high < confidence else "not confident enough" if low > confidence else "as stated"


def ranking(result: AuditResult) -> Table:
    """Every calibrator, the failed ones last."""
    rows = []
    for row in sorted(result.ranking, key=lambda row: row.failed is not None):
        if row.failed is not None:
            empty = Cell(MISSING)
            rows.append(
                (Cell(row.name, f"not ranked: {row.failed}", row.name), *(empty,) * 4, seconds_cell(row.seconds))
            )
            continue
        loss = Cell(decimal(row.log_loss), behind(row, result.ranking[0]) or "the best", sort_key(row.log_loss))
        rows.append(
            (
                Cell(row.name, sort=row.name, badge="chosen" if row.chosen else ""),
                loss,
                triple_cell(row.test_log_loss, False),
                triple_cell(row.test_ece, True),
                triple_cell(row.test_accuracy, True),
                seconds_cell(row.seconds),
            )
        )
    labels = ("Cross-validated log loss", "Test log loss", "Test ECE", "Test accuracy", "Time")
    columns = (("Calibrator", False), *((label, True) for label in labels))
    return Table("calibrators", "Calibrators, ranked by cross-validated log loss", columns, rows)


def behind(row: Ranked, best: Ranked) -> str:
    """How far a calibrator is behind the best, with the standard error of that; empty for the best itself."""
    if row.name == best.name:
        return ""
    error = f" \u00b1 {decimal(row.difference_error)}" if math.isfinite(row.difference_error) else ""
    return f"{decimal(row.log_loss - best.log_loss, signed=True)}{error}"


def risk_coverage(result: AuditResult) -> Table:
    """The risk-coverage curves at ten coverages."""
    levels = [i / 10 for i in range(1, 11)]
    curves = [risk_at(result.risk_coverage[when], levels) for when in ("before", "after")]
    rows = [
        (Cell(percent(level, 0), sort=sort_key(level)), *(number_cell(risk, True) for risk in risks))
        for level, *risks in zip(levels, *curves)
    ]
    columns = ("Predictions answered", True), ("Wrong among them, before", True), ("Wrong among them, after", True)
    return Table("risks", "Error rate among the most confident predictions", columns, rows)


def risk_at(curve: list[tuple[float, float]], levels: Iterable[float]) -> list[float]:
    """The risk at the smallest recorded coverage that reaches each level; NaN beyond the curve."""
    pairs = sorted((coverage, risk) for coverage, risk in curve)
    return [next((risk for coverage, risk in pairs if coverage >= level - 1e-9), math.nan) for level in levels]


def shifts(result: AuditResult) -> Table:
    """Every shift-by-adapter cell in full."""
    rows = [
        (
            Cell(shift_name(cell.shift), sort=shift_name(cell.shift)),
            Cell(cell.adapter, f"failed: {cell.failed}" if cell.failed else "", cell.adapter),
            Cell(count(cell.n), sort=str(cell.n)),
            triple_cell(cell.accuracy, True),
            triple_cell(cell.ece, True),
            triple_cell(cell.log_loss, False),
            seconds_cell(cell.seconds),
        )
        for cell in result.shifts
    ]
    labels = ("Rows", "Accuracy", "ECE", "Log loss", "Time")
    columns = (("Shift", False), ("Adapter", False), *((label, True) for label in labels))
    return Table("cells", "Every shift with every adapter", columns, rows, search="shift or adapter")


def shift_name(name: str) -> str:
    """How a shift is called in the report."""
    return "no shift" if name == "none" else spaced(name)


def trained(result: AuditResult) -> Table:
    """The model as it is and trained on with other objectives, each with and without temperature scaling."""
    best, control, none = clear_best(result.trained), control_of(result.trained), Cell("\u2013")

    def difference_cell(model: TrainedModel) -> Cell:
        if control is None or model is control or model.failed is not None:
            return none
        verdict = judged(control, model)
        return change_cell(control.after["log_loss"], model.after["log_loss"], False, verdict, None)

    rows = [
        (
            Cell(
                model.objective or "As it is",
                f"failed: {model.failed}" if model.failed else "",
                model.objective,
                "best" if model is best else "",
                model.file,
            ),
            triple_cell(model.before["accuracy"], True),
            triple_cell(model.before["ece"], True),
            triple_cell(model.after["ece"], True),
            triple_cell(model.before["log_loss"], False),
            triple_cell(model.after["log_loss"], False),
            difference_cell(model),
            seconds_cell(model.seconds) if math.isfinite(model.seconds) else none,
        )
        for model in result.trained
    ]
    scaled = ("Log loss after scaling", f"Against {CONTROL}")
    labels = ("Accuracy", "ECE", "ECE after scaling", "Log loss", *scaled, "Training")
    columns = (("Objective", False), *((label, True) for label in labels))
    return Table("trained", "The model as it is, and trained on with other objectives", columns, rows)


def per_class(result: AuditResult) -> Table:
    """Every class, the worst calibrated first."""
    order = sorted(result.per_class, key=lambda row: -row.ece_before if math.isfinite(row.ece_before) else math.inf)
    shares = digits_for([row.count / result.n for row in order] + [row.mean_probability for row in order])
    errors = digits_for([x for row in order for x in (row.ece_before, row.ece_after)])
    rows = [
        (
            Cell(row.name, sort=row.name),
            Cell(count(row.count), sort=str(row.count)),
            number_cell(row.count / result.n, True, shares),
            number_cell(row.mean_probability, True, shares),
            number_cell(row.recall, True),
            number_cell(row.ece_before, True, errors),
            number_cell(row.ece_after, True, errors),
        )
        for row in order
    ]
    labels = ("Rows", "Share of rows", "Mean probability", "Recall", "ECE before", "ECE after")
    columns = (("Class", False), *((label, True) for label in labels))
    return Table("per-class", "Classes, the worst calibrated first", columns, rows, search="class")


_LISTED = (
    Measure("NLL", "Log loss", "mean negative log likelihood", False, -1),
    Measure("Brier", "Brier score", "0 to 2", False, -1),
    Measure("KSCE", "Kolmogorov–Smirnov calibration error", "no bins", True, -1),
    Measure("KDECE", "Kernel-density calibration error", "no bins", True, -1),
    Measure("MMCE", "Maximum mean calibration error", "no bins", False, -1),
    Measure("ECE", "Expected calibration error", "equal-width bins", True, -1),
    Measure("ECE_em", "Expected calibration error", "equal-mass bins", True, -1),
    Measure("cwCE", "Class-wise calibration error", "equal-width bins", True, -1),
    Measure("cwCE_em", "Class-wise calibration error", "equal-mass bins", True, -1),
    Measure("MCE", "Maximum calibration error", "equal-width bins", True, -1),
)
_FAMILIES = {measure.key: measure for measure in _LISTED}


def measures(result: AuditResult) -> Table:
    """All measures, before and after temperature scaling side by side; those without a twin stand alone."""
    rows = []
    for name in sorted({key.removeprefix("pre_").removeprefix("post_") for key in result.measures}, key=_place):
        measure, bins = _measure(name)
        before = result.measures.get(f"pre_{name}", result.measures.get(name))
        after = result.measures.get(f"post_{name}")
        digits = digits_for([t[0] for t in (before, after) if t is not None]) if measure.share else None
        change = Cell("\u2013")
        if before and after:
            change = change_cell(before, after, measure.share, compare(before, after, measure.better), digits)
        rows.append(
            (
                Cell(measure.label, f"{name}, {measure.meaning}" if measure.meaning else name, name),
                Cell(bins or "\u2013", sort=bins),
                triple_cell(before, measure.share, digits) if before else Cell("\u2013"),
                triple_cell(after, measure.share, digits) if after else Cell("\u2013"),
                change,
            )
        )
    labels = ("Bins", "Before", "After temperature scaling", "Change")
    columns = (("Measure", False), *((label, True) for label in labels))
    caption = "All measures, before and after temperature scaling, with intervals"
    return Table("measures", caption, columns, rows, search="measure", limit=0)


def _measure(name: str) -> tuple[Measure, str]:
    """What a column name such as ``ECE_em_15`` measures, and its number of bins."""
    family, _, bins = name.rpartition("_")
    if family in _FAMILIES:
        return _FAMILIES[family], bins
    if name.startswith("auc_"):
        label = f"AUROC against {spaced(name.removeprefix('auc_'))}"
        return Measure(name, label, "confidence as a detector of other data; 0.5 is chance", False, 1), ""
    return _FAMILIES.get(name, Measure(name, name, "", False, -1)), ""


def _place(name: str) -> tuple[int, int, str]:
    """Measures without bins first, then family by family by number of bins."""
    measure, bins = _measure(name)
    family = list(_FAMILIES).index(measure.key) if measure.key in _FAMILIES else len(_FAMILIES)
    return (family, int(bins), name) if bins else (-1, family, name)


def steps(result: AuditResult | DetectionAudit) -> Table:
    """What was run, in order."""
    rows = [(Cell(spaced(name)), seconds_cell(spent)) for name, spent in result.steps]
    return Table("steps", "Steps in the order they ran", (("Step", False), ("Time", True)), rows, limit=0)


def sort_key(x: float) -> str:
    """What a number sorts by in the page."""
    return repr(float(x)) if math.isfinite(x) else ""


def number_cell(x: float, share: bool, digits: int | None = None) -> Cell:
    """A number on its own."""
    return Cell(number(x, share, digits), sort=sort_key(x))


def triple_cell(triple: Triple, share: bool, digits: int | None = None) -> Cell:
    """A number with its interval below it."""
    return Cell(number(triple[0], share, digits), interval(triple, share, digits), sort_key(triple[0]))


def seconds_cell(s: float) -> Cell:
    """A time."""
    return Cell(seconds(s), sort=sort_key(s))


def change_cell(before: Triple, after: Triple, share: bool, verdict: Change, digits: int | None) -> Cell:
    """A difference and its verdict."""
    if verdict == "unknown" and not (math.isfinite(before[0]) and math.isfinite(after[0])):
        return Cell(MISSING)
    mark = difference(before, after, share, verdict)
    delta = after[0] - before[0]
    size = f"{decimal(100 * delta, digits or 1, signed=True)} points" if share else decimal(delta, signed=True)
    return Cell("=" if verdict == "same" else size, mark["words"], sort_key(delta), verdict)
