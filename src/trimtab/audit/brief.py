"""An audit's findings in a terminal: the verdict, the headline numbers, and where the rest lies."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trimtab.audit.report import detection
from trimtab.audit.report.verdict import failures, verdict
from trimtab.audit.report.words import HEADLINE, Measure, interval, number
from trimtab.audit.result import AuditResult, DetectionAudit


def brief(result: AuditResult | DetectionAudit, out: Path) -> RenderableType:
    """What `trimtab audit` prints."""
    measures: tuple[Measure, ...] = HEADLINE
    if isinstance(result, DetectionAudit):
        judgement, measures, rows, failed = detection.verdict(result), detection.HEADLINE, "images", []
    else:
        judgement, rows, failed = verdict(result), "rows", failures(result.trained)
    table = Table(pad_edge=False)
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for measure in measures:
        both = (result.before[measure.key], result.after[measure.key])
        table.add_row(measure.label, *(f"{number(t[0], measure.share)}  ({interval(t, measure.share)})" for t in both))
    return Group(
        Text(" ".join(judgement.headline), style="bold"),
        Text(" ".join((*judgement.sentences, *failed))),
        table,
        Text(f"{result.n:,} {rows} measured, corrections fitted on {result.n_fit:,}. Report: {out / 'report.html'}"),
    )
