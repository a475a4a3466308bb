"""Tables that do not fit in memory: the audit of the same numbers, read in passes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trimtab.audit.correct import Budget, Corrected, Settings, check_pair, rank_and_choose, triple, triples
from trimtab.audit.result import Triple
from trimtab.audit.workspace import Workspace
from trimtab.calibration import Calibrator
from trimtab.core.persist import atomic
from trimtab.core.predictions import Predictions
from trimtab.core.progress import track
from trimtab.core.stats import Interval
from trimtab.core.tables import Table
from trimtab.metrics import Summary, sample_rows, table_suite, table_summary

FIT_SCORES = 1_000_000
"""Corrections are fitted on at most so many scores (rows x classes), and ranked on as many others."""


def audit_large(
    table: Table, other: Path | None, out: Path, work: Workspace, settings: Settings, budget: Budget
) -> tuple[int, Summary, Summary, dict[str, Triple], Corrected, list[str]]:
    """Fit and rank corrections on random rows; measure all rows before and after.

    Returns:
        Rows fitted on, the summaries before and after, all measures, the correction, and notes.
    """
    calibration, test, where = _samples(table, other, settings)
    check_pair(calibration, test)
    corrected = rank_and_choose(calibration, test, out, work, settings, budget)

    def suite() -> dict[str, Any]:
        found = table_suite(table, **settings.intervals)
        return {"before": asdict(found.before), "measures": {k: triple(v) for k, v in found.measures.items()}}

    def summary_after() -> dict[str, Any]:
        path = work.folder / "calibrated.parquet"
        _apply(corrected.calibrator, table, path)
        with Table.open(path) as calibrated:
            return asdict(table_summary(calibrated, **settings.intervals))

    measured, after = work.number("measure", suite), work.number("measure corrected", summary_after)
    notes = [
        f"The table was streamed. The corrections were fitted on {where}; the test columns of their ranking are from "
        f"{test.n:,} other random rows.",
        *corrected.notes,
    ]
    return calibration.n, _summary(measured["before"]), _summary(after), triples(measured["measures"]), corrected, notes


def _samples(table: Table, other: Path | None, settings: Settings) -> tuple[Predictions, Predictions, str]:
    """Random rows to fit on, others to compare on, and where they are from."""
    rows = max(1, FIT_SCORES // table.c)
    if other is None:
        both = Predictions(*sample_rows(table, settings.seed, 2 * rows))
        calibration, test = both.split(0.5, 0.5, seed=settings.seed)
        share = calibration.n / table.n
        return calibration, test, f"{calibration.n:,} random rows, {share:.1%} of those that everything is measured on"
    with Table.open(other) as source:
        calibration = Predictions(*sample_rows(source, settings.seed, rows))
    test = Predictions(*sample_rows(table, settings.seed, rows))
    return calibration, test, f"{calibration.n:,} random rows of {other.name}"


def _apply(calibrator: Calibrator, table: Table, path: Path) -> None:
    """Write the calibrated log-probabilities and the labels of all rows as a table of its own."""
    labels = table.labels().numpy()
    names = [f"logit_{k}" for k in range(table.c)]
    with atomic(path) as draft:
        writer: pq.ParquetWriter | None = None
        try:
            for start, logits in track(table.blocks(), "apply the correction", total=-(-table.n // (1 << 17))):
                part = calibrator.transform(Predictions(logits)).logits.numpy()
                columns = {name: np.ascontiguousarray(part[:, k]) for k, name in enumerate(names)}
                block = pa.table({**columns, "label": labels[start : start + len(part)]})
                writer = writer or pq.ParquetWriter(draft, block.schema, compression="none")
                writer.write_table(block)
        finally:
            if writer is not None:
                writer.close()


def _summary(data: dict[str, Any]) -> Summary:
    """A summary from its plain form."""
    headline = {name: Interval(*interval) for name, interval in data["headline"].items()}
    return Summary(**{**data, "headline": headline, "risk_coverage": [tuple(p) for p in data["risk_coverage"]]})
