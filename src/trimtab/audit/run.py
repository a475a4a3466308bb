"""The audit, step by step: collect, measure, correct, follow the shifts, write."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from trimtab.audit import correct, report, shifts
from trimtab.audit import setup as setups
from trimtab.audit.correct import Budget, Settings, triple, triples
from trimtab.audit.identity import marks, stamp
from trimtab.audit.large import audit_large
from trimtab.audit.objectives import Training
from trimtab.audit.result import AuditResult, ClassRow, Curve, ShiftCell, Triple, rebuild
from trimtab.audit.setup import Setup
from trimtab.audit.workspace import Workspace
from trimtab.calibration import load
from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.persist import atomic
from trimtab.core.predictions import Predictions
from trimtab.core.tables import ENDINGS, Table
from trimtab.metrics import Summary, calibration_intervals

SCORES_IN_MEMORY = 5_000_000
"""A table with more scores (rows x classes) than this is streamed."""
PACKAGES = ("trimtab", "torch", "numpy", "scipy", "scikit-learn", "pyarrow")


def audit(
    source: str | Path | Setup,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    seed: int = 0,
    workers: int = 1,
    resamples: int = 200,
    level: float = 0.95,
    folds: int = 5,
    onnx: bool = True,
    fresh: bool = False,
    max_minutes: float = math.inf,
    objectives: Sequence[str] = (),
    epochs: int = 5,
    learning_rate: float = 1e-3,
) -> AuditResult:
    """Measure a model or a table of scores, correct it, and leave the report and its numbers in `out`.

    Finished pieces are kept in ``out/.work`` until the end, so that a run that was killed goes on where it stopped.

    Args:
        source: a table of scores (Parquet, Feather, CSV, NPZ; columns as in `Predictions.read`), a setup function as
            ``file.py:function`` or ``package.module:function``, or a `Setup`.
        out: folder for ``report.html``, ``metrics.parquet``, ``audit.json``, ``calibrator.safetensors`` and ``.json``,
            and, for a model, ``model_calibrated.onnx`` where ONNX is installed and ``trained-NAME.safetensors`` for
            each objective.
        calibration: for a table: another table to fit the corrections on. Without it the rows are split in two
            halves, stratified by label: one to fit on, one to measure on.
        seed: the same seed gives the same numbers (with the same number of workers).
        workers: processes for the shift-by-adapter runs.
        resamples: bootstrap resamples behind every interval.
        level: coverage of the intervals.
        folds: folds of the cross-validation that ranks the calibrators.
        onnx: for a model: write ``model_calibrated.onnx``.
        fresh: forget the pieces that an unfinished run left.
        max_minutes: time for the whole audit, > 0. What has to be there (the measures, one calibrator, the report) is
            made in any case; calibrators and runs over shifted streams for which there is no time are left out, and
            the report says which. With shifts, calibrators get half of what is left after measuring.
        objectives: for a model whose setup brings ``train``: names of `trimtab.losses.OBJECTIVES`. A copy of the model
            is trained on with each, and with cross-entropy, and measured beside the model as it is, with and without
            temperature scaling.
        epochs: how often each of them goes through ``train``.
        learning_rate: of Adam, in that training.

    Raises:
        InputError: the input cannot be used; the message says which part and why.
    """
    settings = Settings(
        checks.integer(resamples, "resamples", low=20),
        checks.number(level, "level", low=0, high=1, low_open=True, high_open=True),
        checks.integer(seed, "seed", low=0),
        checks.integer(folds, "folds", low=2),
    )
    checks.integer(workers, "workers", low=1)
    training = Training.checked(objectives, epochs, learning_rate)
    if not max_minutes > 0:
        raise InputError(f"max_minutes must be > 0, got {max_minutes}")
    started = time.perf_counter()
    budget = Budget.starting_now(max_minutes)
    limited = {} if math.isinf(max_minutes) else {"max_minutes": max_minutes}
    out = Path(out)
    if isinstance(source, Setup) or (":" in str(source) and Path(source).suffix not in ENDINGS):
        if calibration is not None:
            raise InputError("calibration goes with a table; a setup brings its own calibration batches")
        setup = source if isinstance(source, Setup) else setups.load(str(source))
        spec = None if isinstance(source, Setup) else str(source)
        if training.names and setup.train is None:
            raise InputError("the setup must bring train, batches to train on, where objectives are given")
        trained_on = {"train": setup.train} if training.names else {}
        work = Workspace(out, _identity(settings, spec=spec, **marks(setup, spec, **trained_on)), fresh=fresh)
        with _warnings_kept() as warned:
            result = _audit_model(setup, spec, out, work, workers, settings, budget, training)
        if onnx:
            begun = time.perf_counter()
            export = correct.export_model(setup, load(out / correct.CALIBRATOR_FILE), out)
            work.seconds["export to ONNX"] = time.perf_counter() - begun
            result = replace(result, notes=[*result.notes, *export])
    elif Path(source).suffix == ".py":
        raise InputError(f"{source} must be given with its function: {source}:setup")
    elif training.names:
        raise InputError("objectives go with a setup that brings a model and train, not with a table")
    else:
        path, other = Path(source), Path(calibration) if calibration else None
        with Table.open(path) as table:
            work = Workspace(
                out, _identity(settings, files=[stamp(file) for file in (path, other) if file]), fresh=fresh
            )
            large = table.n * table.c > SCORES_IN_MEMORY
            with _warnings_kept() as warned:
                result = (_audit_large_table if large else _audit_table)(table, other, out, work, settings, budget)
    result = replace(
        result,
        notes=[*result.notes, *dict.fromkeys(f"Warning: {warning.message}." for warning in warned)],
        settings={**settings.__dict__, "workers": workers, **limited, **training.settings},
        versions={name: metadata.version(name) for name in PACKAGES},
        steps=[*work.seconds.items(), ("in all", time.perf_counter() - started)],
    )
    _write_metrics(result, out / "metrics.parquet")
    result.write(out / "audit.json")
    report.write(result, out / "report.html")
    work.remove()
    return result


@contextmanager
def _warnings_kept() -> Iterator[list[warnings.WarningMessage]]:
    """What is warned of in this block goes into the report, not onto the screen."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", RuntimeWarning)
        warnings.simplefilter("always", UserWarning)
        yield caught


def _audit_model(
    setup: Setup,
    spec: str | None,
    out: Path,
    work: Workspace,
    workers: int,
    settings: Settings,
    budget: Budget,
    training: Training,
) -> AuditResult:
    views = 0 if setup.augment is None else setup.views
    more = {"features": setup.features, "views": views, "augment": setup.augment, "seed": settings.seed}

    def collect(part: str, loader: Any, **options: Any) -> Predictions:
        def make() -> Predictions:
            try:
                return Predictions.collect(setup.model, loader, description=f"collect {part}", **options)
            except InputError as error:
                raise InputError(f"{part}: {error}") from error
            except Exception as error:
                raise InputError(f"{part}: the model or its data raised {setups.told(error)}") from error

        return work.predictions(f"collect {part}", make)

    calibration, test = collect("calibration", setup.calibration, **more), collect("test", setup.test, **more)
    if setup.classes is not None and len(setup.classes) != test.c:
        raise InputError(f"classes must name {test.c} classes, got {len(setup.classes)}")
    shifted = {name: collect(f"shift {name}", loader) for name, loader in setup.shifts.items()}
    result = _measure_and_correct(
        setup.title or spec or type(setup.model).__name__,
        "model",
        calibration,
        test,
        shifted,
        out,
        work,
        settings,
        budget,
    )
    trained, untrained = training.compare(setup, calibration, test, out, work, settings, budget)
    cells, late = _follow_shifts(setup, spec, work, workers, settings, budget)
    if setup.classes is not None:
        names = [str(name) for name in setup.classes]
        rows = [replace(row, name=name) for row, name in zip(result.per_class, names)]
        result = replace(result, classes=names, per_class=rows)
    refused = dict.fromkeys(f"{cell.adapter} did not run: {cell.failed}." for cell in cells if cell.failed)
    return replace(result, trained=trained, shifts=cells, notes=[*result.notes, *untrained, *refused, *late])


def _audit_table(
    table: Table, other: Path | None, out: Path, work: Workspace, settings: Settings, budget: Budget
) -> AuditResult:
    if not other:
        table.labels()  # refused before anything is read, with the columns that are there
    rows = Predictions(**table.read())
    if other:
        calibration, test = Predictions.read(other), rows
        note = f"The corrections were fitted on {other.name}."
    else:
        calibration, test = rows.split(0.5, 0.5, seed=settings.seed)
        note = (
            "The rows were split in two halves at random, stratified by label: the corrections were fitted on one, "
            "and everything was measured on the other."
        )
    result = _measure_and_correct(table.path.name, "table", calibration, test, {}, out, work, settings, budget)
    return replace(result, notes=[note, *result.notes])


def _measure_and_correct(
    title: str,
    kind: str,
    calibration: Predictions,
    test: Predictions,
    shifted: Mapping[str, Predictions],
    out: Path,
    work: Workspace,
    settings: Settings,
    budget: Budget,
) -> AuditResult:
    """Everything but the shifts, for predictions in memory; leaves the chosen calibrator in `out`."""
    correct.check_pair(calibration, test)

    def suite() -> dict[str, Triple]:
        measures = calibration_intervals(
            test.logits,
            test.needed("labels"),
            calibration.logits,
            calibration.needed("labels"),
            ood_scores={name: part.probs.amax(1) for name, part in shifted.items()},
            **settings.intervals,
        )
        return {name: triple(interval) for name, interval in measures.items()}

    measures = triples(work.number("measure", suite))
    share = replace(budget, end=time.monotonic() + budget.seconds / 2) if shifted else budget
    corrected = correct.rank_and_choose(calibration, test, out, work, settings, share)
    before, after = settings.summarise(test), settings.summarise(corrected.calibrator.transform(test))
    return _result(title, kind, calibration.n, before, after, measures, corrected, settings)


def _audit_large_table(
    table: Table, other: Path | None, out: Path, work: Workspace, settings: Settings, budget: Budget
) -> AuditResult:
    n_fit, before, after, measures, corrected, notes = audit_large(table, other, out, work, settings, budget)
    result = _result(table.path.name, "table", n_fit, before, after, measures, corrected, settings)
    return replace(result, notes=notes)


def _result(
    title: str,
    kind: str,
    n_fit: int,
    before: Summary,
    after: Summary,
    measures: Mapping[str, Triple],
    corrected: correct.Corrected,
    settings: Settings,
) -> AuditResult:
    both = {"before": before, "after": after}
    curves = {when: cast(dict[str, Any], summary.reliability) for when, summary in both.items()}
    return AuditResult(
        title=title,
        kind=kind,
        n=before.n,
        n_fit=n_fit,
        c=before.c,
        classes=[str(k) for k in range(before.c)],
        interval_method=before.interval_method,
        level=settings.level,
        before={name: triple(interval) for name, interval in before.headline.items()},
        after={name: triple(interval) for name, interval in after.headline.items()},
        measures=dict(measures),
        reliability={when: Curve(**curve) for when, curve in curves.items()},
        histogram={when: summary.histogram for when, summary in both.items()},
        risk_coverage={when: summary.risk_coverage for when, summary in both.items()},
        ranking=corrected.ranking,
        per_class=[_class_row(k, before, after) for k in range(before.c)],
        notes=corrected.notes,
        change=corrected.change,
    )


def _class_row(k: int, before: Summary, after: Summary) -> ClassRow:
    rows = before.per_class
    count, recall, probability = int(rows["count"][k]), rows["recall"][k], rows["mean_probability"][k]
    return ClassRow(str(k), count, recall, probability, rows["ece"][k], after.per_class["ece"][k])


def _follow_shifts(
    setup: Setup, spec: str | None, work: Workspace, workers: int, settings: Settings, budget: Budget
) -> tuple[list[ShiftCell], list[str]]:
    """All (shift, adapter) cells, adapter by adapter, and notes; what an earlier run finished is not run again."""
    if not setup.shifts:
        return [], []
    collected = {shifts.NONE: "collect test", **{name: f"collect shift {name}" for name in setup.shifts}}
    pairs = [
        shifts.Pair(shift, adapter, work.file(name), work.folder / "prepared" / f"{adapter}.safetensors")
        for adapter in shifts.KINDS
        for shift, name in collected.items()
    ]
    missing = [pair for pair in pairs if not work.has(_cell_name(pair.shift, pair.adapter))]
    for cell in shifts.run_cells(setup, spec, missing, workers=workers, settings=settings, end=budget.end):
        work.keep(_cell_name(cell.shift, cell.adapter), cell.__dict__, cell.seconds)
    names = [_cell_name(pair.shift, pair.adapter) for pair in pairs]
    kept = [name for name in names if work.has(name)]
    cells = [rebuild(ShiftCell, work.kept(name)) for name in kept]
    work.seconds["adapt to shifts"] = sum(cell.seconds for cell in cells)
    if len(kept) == len(pairs):
        return cells, []
    late = len(pairs) - len(kept)
    return cells, [f"Not run for want of time: {late} of {len(pairs)} runs of an adapter over a stream."]


def _cell_name(shift: str, adapter: str) -> str:
    return f"shift {shift} with {adapter}"


def _identity(settings: Settings, **of: Any) -> dict[str, Any]:
    return {**settings.__dict__, "trimtab": metadata.version("trimtab"), **of}


def _write_metrics(result: AuditResult, path: Path) -> None:
    """Every number of the audit with its interval, one a row."""
    rows: list[tuple[str, str, str, str, Triple]] = []
    for state, headline in (("before", result.before), ("after", result.after)):
        rows += [(state, "", "", name, value) for name, value in headline.items()]
    rows += [("suite", "", "", name, value) for name, value in result.measures.items()]
    for ranked in result.ranking:
        found = {"accuracy": ranked.test_accuracy, "ece": ranked.test_ece, "log_loss": ranked.test_log_loss}
        rows += [("calibrator", ranked.symbol, "", name, value) for name, value in found.items()]
    for model in result.trained:
        for state, found in (("before", model.before), ("after", model.after)):
            rows += [(f"trained, {state}", model.objective or "as it is", "", name, x) for name, x in found.items()]
    for cell in result.shifts:
        found = {"accuracy": cell.accuracy, "ece": cell.ece, "log_loss": cell.log_loss}
        rows += [("shift", cell.adapter, cell.shift, name, value) for name, value in found.items()]
    columns = zip(*((section, method, shift, name, *value) for section, method, shift, name, value in rows))
    names = ("section", "method", "shift", "measure", "estimate", "low", "high")
    with atomic(path) as draft:
        pq.write_table(pa.table(dict(zip(names, map(list, columns)))), draft)
