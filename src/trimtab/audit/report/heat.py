"""The shift-by-adapter heat map: numbers in coloured cells, and their difference to the unadapted model in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trimtab.audit.report.tables import shift_name
from trimtab.audit.report.verdict import UNSHIFTED, distinct, mean_of, unadapted
from trimtab.audit.report.words import Change, compare, coverage, decimal, interval, number, points
from trimtab.audit.result import AuditResult, Triple

MEAN = "mean of the shifts"
LEVELS = 7  # shades, from the worst cell to the best
_NOTHING = (math.nan, math.nan, math.nan)


class HeatCell(NamedTuple):
    """One cell: its number, the difference to the unadapted model and whether that is clear, shade and hover text."""

    text: str
    delta: str = ""
    verdict: Change | None = None
    level: int | None = None
    best: bool = False
    tip: str = ""


class Heat(NamedTuple):
    """One heat map: a measure, the adapters as columns, the shifts as rows; the ends of the scale in words."""

    key: str
    label: str
    adapters: list[str]
    rows: list[tuple[str, list[HeatCell]]]
    worst: str
    best: str


def heat_maps(result: AuditResult) -> list[Heat]:
    """Accuracy, calibration error and log loss of every adapter under every shift; empty without shifts."""
    if all(cell.shift == UNSHIFTED for cell in result.shifts):
        return []
    scales = (
        _Scale("accuracy", "Accuracy", True, 1, result),
        _Scale("ece", "ECE", True, -1, result),
        _Scale("log_loss", "Log loss", False, -1, result),
    )
    return [_heat(result, scale) for scale in scales]


def _heat(result: AuditResult, scale: _Scale) -> Heat:
    cells = {(cell.shift, cell.adapter): cell for cell in result.shifts}
    base = unadapted(result.shifts)
    adapters = [base, *(name for name in distinct(cell.adapter for cell in result.shifts) if name != base)]
    shifts = distinct(cell.shift for cell in result.shifts)
    triples = {place: getattr(cell, scale.key) if cell.failed is None else _NOTHING for place, cell in cells.items()}
    changes = {place: cell.change.get(scale.key) for place, cell in cells.items()}
    rows = []
    for shift in shifts:
        reasons = [cells[shift, a].failed or "no number" if (shift, a) in cells else "not run" for a in adapters]
        line = [triples.get((shift, adapter), _NOTHING) for adapter in adapters]
        moved = [changes.get((shift, adapter)) for adapter in adapters]
        rows.append((shift_name(shift), _row(shift_name(shift), adapters, line, moved, reasons, scale)))
    met = [shift for shift in shifts if shift != UNSHIFTED]
    if len(met) > 1:
        line = [mean_of([triples.get((shift, adapter), _NOTHING) for shift in met]) for adapter in adapters]
        moved = [_mean_change([changes.get((shift, adapter)) for shift in met]) for adapter in adapters]
        rows.append((MEAN, _row(MEAN, adapters, line, moved, ["failed on a shift"] * len(adapters), scale)))
    ends = (number(end, scale.share) for end in (scale.worst, scale.best))
    return Heat(scale.key, scale.label, adapters, rows, *ends)


def _mean_change(changes: Sequence[Triple | None]) -> Triple | None:
    known = [change for change in changes if change is not None]
    return mean_of(known) if len(known) == len(changes) else None


def _row(
    shift: str,
    adapters: Sequence[str],
    triples: Sequence[Triple],
    changes: Sequence[Triple | None],
    reasons: Sequence[str],
    scale: _Scale,
) -> list[HeatCell]:
    top = max((scale.better * t[0] for t in triples if math.isfinite(t[0])), default=math.nan)
    base = triples[0]
    cells = []
    for adapter, triple, change, reason in zip(adapters, triples, changes, reasons):
        if not math.isfinite(triple[0]):
            text = "\u2013" if reason == "not run" else "failed"
            cells.append(HeatCell(text, tip=f"{adapter}, {shift}: {reason}."))
            continue
        name = scale.label if scale.label.isupper() else scale.label.lower()
        span = interval(triple, scale.share)
        span = f" ({coverage(scale.level)} interval {span})" if span else ""
        tip = f"{adapter}, {shift}: {name} {number(triple[0], scale.share)}{span}"
        text = decimal(100 * triple[0], 1) if scale.share else decimal(triple[0])
        best, shade = scale.better * triple[0] == top, scale.shade(triple[0])
        if adapter == adapters[0]:
            cells.append(HeatCell(text, level=shade, best=best, tip=f"{tip}; the model as it is."))
            continue
        verdict = compare(base, triple, scale.better, change)
        delta, words = _difference(base, triple, scale.share, verdict)
        cells.append(HeatCell(text, delta, verdict, shade, best, f"{tip}; {words}."))
    return cells


def _difference(base: Triple, triple: Triple, share: bool, verdict: Change) -> tuple[str, str]:
    """The difference to the unadapted model: short for the cell, and in words."""
    if not math.isfinite(base[0]):
        return "", "the unadapted model has no number here"
    if verdict == "same":
        return "=", f"the same as the unadapted model's {number(base[0], share)}"
    difference = triple[0] - base[0]
    short = decimal(100 * difference, 1, signed=True) if share else decimal(difference, signed=True)
    size = f"{points(difference)} points" if share else decimal(abs(difference))
    side = "above" if difference > 0 else "below"
    clear = f"clearly {verdict}" if verdict in ("better", "worse") else "within uncertainty"
    return short, f"{size} {side} the unadapted model's {number(base[0], share)}, {clear}"


@dataclass
class _Scale:
    """What is shown, which way is better, and the range that the shades divide."""

    key: str
    label: str
    share: bool
    better: int
    result: AuditResult

    def __post_init__(self) -> None:
        found = [getattr(cell, self.key)[0] for cell in self.result.shifts if cell.failed is None]
        found = [x for x in found if math.isfinite(x)] or [math.nan]
        self.worst, self.best = (min(found), max(found)) if self.better > 0 else (max(found), min(found))
        self.level = self.result.level

    def shade(self, x: float) -> int:
        if self.best == self.worst:
            return LEVELS // 2
        return min(LEVELS - 1, int(LEVELS * (x - self.worst) / (self.best - self.worst)))
