"""The suite and the report's summaries for tables that are larger than memory.

Two passes over blocks of rows and one over the columns. The first pass keeps a random sample of the rows, on which the
temperature is fitted and the intervals rest. The second keeps a few numbers a row: the largest logit, the sum that the
softmax divides by before and after scaling, whether the prediction is right, and the label, 15 bytes a row in all for
float32 scores. Then one class at a time is read, turned into probabilities with those numbers, sorted, and dropped. A
column of lists cannot be read by class; then several classes are kept of each pass over the blocks, as memory allows.

All point estimates are exact: they come from the same functions as those of tables in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, sqrt

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.progress import track
from trimtab.core.stats import Interval
from trimtab.core.tables import Table
from trimtab.core.temperature import BOUNDS, fit_temperature
from trimtab.metrics import resampling
from trimtab.metrics.binning import BINS
from trimtab.metrics.measures import Named, measure, measure_logits, study_columns
from trimtab.metrics.resampling import intervals
from trimtab.metrics.rows import Rows, rows_of, working
from trimtab.metrics.summary import HEADLINE_BINS, Summary, assemble, headline

SAMPLE_ROWS = 1_000_000
_SAMPLE_ELEMENTS = 1 << 26
_BLOCK_ELEMENTS = 1 << 21
_GROUP_ELEMENTS = 1 << 27
_BOOTSTRAP_ELEMENTS = 1 << 24
_SUBSET_ROWS = 500


@dataclass(frozen=True)
class TableSuite:
    """What was measured of a table.

    Args:
        n: rows.
        n_fit: rows that the temperature was fitted on; 0 if it was given.
        c: classes.
        temperature: of everything that is called after.
        measures: the columns of `calibration_suite`, with intervals.
        before: summary of the scores as they are.
        after: summary after temperature scaling.
        interval_method: how the intervals were made, one sentence.
        level: coverage of the intervals.
    """

    n: int
    n_fit: int
    c: int
    temperature: float
    measures: dict[str, Interval]
    before: Summary
    after: Summary
    interval_method: str
    level: float


def table_suite(
    table: Table,
    *,
    temperature: float | None = None,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> TableSuite:
    """Measure a table of scores in memory that does not grow with its number of classes.

    Args:
        table: an open table with labels; Parquet with columns ``logit_k`` or ``prob_k`` is read class by class.
        temperature: of the measures after scaling; None fits it on the sample (all rows of a table of up to a million).
        resamples: bootstrap resamples for a table of up to 2^24 scores; for a larger one the number of subsets.
        level: coverage of the intervals.
        seed: chooses the sample and the resamples or subsets.

    Raises:
        InputError: a column is missing or malformed; the message names the column and the row.

    Example:
        >>> import tempfile, torch
        >>> from trimtab import Predictions
        >>> logits = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
        >>> path = tempfile.mkdtemp() + "/scores.parquet"
        >>> labels = logits.softmax(1).multinomial(1, generator=torch.Generator().manual_seed(1))[:, 0]
        >>> Predictions(logits, labels).write(path)
        >>> with Table.open(path) as table:
        ...     suite = table_suite(table, resamples=20)
        >>> len(suite.measures), 0.9 < suite.temperature < 1.1
        (100, True)

    Reference:
        Politis, Romano, Wolf 1999, "Subsampling".
    """
    checks.integer(resamples, "resamples", low=1)
    if temperature is not None:
        checks.number(temperature, "temperature", low=BOUNDS[0], high=BOUNDS[1])
    sample, sample_labels = sample_rows(table, seed, SAMPLE_ROWS)
    n_fit = len(sample) if temperature is None else 0
    if temperature is None:
        temperature = fit_temperature(sample, sample_labels)
    temperatures = (1.0, float(temperature))
    labels = _labels(table)
    rows, means = _read_rows(table, labels, temperatures)
    measured = measure(rows, means, partial(_columns, table, sample.dtype), labels, temperatures, BINS)
    replicates, scale, sentence = _replicates(sample, sample_labels, temperatures, BINS, table.n, resamples, seed)
    before, after = (
        assemble(
            one,
            labels,
            rows[0].correct,
            intervals(headline(one), head, level, scale),
            sentence,
            level,
            BINS,
        )
        for one, (_, head) in zip(measured, replicates)
    )
    columns, replicated = study_columns([m.named for m in measured]), study_columns([named for named, _ in replicates])
    return TableSuite(
        n=table.n,
        n_fit=n_fit,
        c=table.c,
        temperature=temperatures[1],
        measures=intervals(columns, replicated, level, scale),
        before=before,
        after=after,
        interval_method=sentence,
        level=level,
    )


def table_summary(table: Table, *, resamples: int = 200, level: float = 0.95, seed: int = 0) -> Summary:
    """`summarise` for a table larger than memory; the arguments are those of `table_suite`."""
    checks.integer(resamples, "resamples", low=1)
    sample, sample_labels = sample_rows(table, seed, SAMPLE_ROWS)
    labels, bins = _labels(table), (HEADLINE_BINS,)
    rows, means = _read_rows(table, labels, (1.0,))
    (measured,) = measure(rows, means, partial(_columns, table, sample.dtype), labels, (1.0,), bins, kernel=False)
    ((_, head),), scale, sentence = _replicates(
        sample, sample_labels, (1.0,), bins, table.n, resamples, seed, kernel=False
    )
    found = intervals(headline(measured), head, level, scale)
    return assemble(measured, labels, rows[0].correct, found, sentence, level, bins)


def sample_rows(table: Table, seed: int, rows: int = SAMPLE_ROWS) -> tuple[Float[Tensor, "m c"], Int[Tensor, " m"]]:
    """Logits and labels of random rows in the order of the file: at most `rows`, or 2^26 scores.

    What is fitted to a table larger than memory is fitted to these.
    """
    m = min(table.n, rows, max(1, _SAMPLE_ELEMENTS // table.c))
    random = np.random.default_rng(checks.integer(seed, "seed", low=0))
    chosen = np.sort(random.choice(table.n, m, replace=False, shuffle=False))
    parts = []
    for start, block in _blocks(table, "sample rows"):
        first, last = np.searchsorted(chosen, (start, start + len(block)))
        parts.append(block[torch.from_numpy(chosen[first:last] - start)])
    return torch.cat(parts), _labels(table)[torch.from_numpy(chosen)].long()


def _labels(table: Table) -> Int[Tensor, " n"]:
    return table.labels().to(torch.int16 if table.c < 1 << 15 else torch.int32)


def _blocks(table: Table, description: str) -> Iterator[tuple[int, Float[Tensor, "rows c"]]]:
    size = max(1, _BLOCK_ELEMENTS // table.c)
    return track(table.blocks(size), description, total=ceil(table.n / size))


def _read_rows(
    table: Table, labels: Int[Tensor, " n"], temperatures: tuple[float, ...]
) -> tuple[list[Rows], list[Named]]:
    """The rows at every temperature, and the mean losses."""
    n = table.n
    correct = torch.empty(n, dtype=torch.bool)
    peak, totals = torch.empty(0), [torch.empty(0) for _ in temperatures]
    sums = torch.zeros(len(temperatures), 2, dtype=torch.float64)
    for start, logits in _blocks(table, "read rows"):
        z, part = working(logits), slice(start, start + len(logits))
        if not len(peak):
            peak, totals = z.new_empty(n), [z.new_empty(n) for _ in temperatures]
        for i, (rows, losses) in enumerate(zip(*rows_of(z, labels[part].long(), temperatures))):
            peak[part], totals[i][part], correct[part] = rows
            sums[i] += torch.stack([loss.sum(dtype=torch.float64) for loss in losses])
    means = [{"NLL": nll[None] / n, "Brier": brier[None] / n} for nll, brier in sums]
    return [Rows(peak, total, correct) for total in totals], means


def _columns(table: Table, dtype: torch.dtype) -> Iterator[tuple[int, Float[Tensor, "1 n"]]]:
    """The logits of one class after the other, in the precision of the blocks."""
    if table.columnar:
        for k in track(range(table.c), "read classes"):
            scores = table.column(k).to(dtype)
            if table.kind == "prob":
                scores = scores.clamp_(min=torch.finfo(dtype).tiny).log_()
            yield k, working(scores)[None]
        return
    size = max(1, _GROUP_ELEMENTS // table.n)
    for first in range(0, table.c, size):
        group = torch.empty(min(size, table.c - first), table.n, dtype=dtype)
        for start, block in _blocks(table, "read classes"):
            group[:, start : start + len(block)] = block[:, first : first + size].T
        for k, scores in enumerate(group, first):
            yield k, working(scores)[None]


def _replicates(
    logits: Float[Tensor, "m c"],
    labels: Int[Tensor, " m"],
    temperatures: tuple[float, ...],
    bins: Sequence[int],
    n: int,
    resamples: int,
    seed: int,
    *,
    kernel: bool = True,
) -> tuple[list[tuple[Named, Named]], float, str]:
    """Measures and headline of resamples or of subsets, what deviations are scaled with, and how it was done."""
    m, c = logits.shape
    if m == n and n * c <= _BOOTSTRAP_ELEMENTS:
        weights = resampling.weights(n, resamples, seed, logits.device)
        measured = measure_logits(logits, labels, temperatures, bins, weights=weights, kernel=kernel)
        return [(each.named, headline(each)) for each in measured], 1.0, resampling.bootstrap_sentence(resamples)
    subsets = min(resamples, max(2, m // _SUBSET_ROWS))
    size = m // subsets
    order = torch.from_numpy(np.random.default_rng(seed).permutation(m)[: subsets * size])
    found: list[list[tuple[Named, Named]]] = [[] for _ in temperatures]
    for rows in track(torch.split(order, size), "measure subsets"):
        for one, pairs in zip(measure_logits(logits[rows], labels[rows], temperatures, bins, kernel=kernel), found):
            pairs.append((one.named, headline(one)))
    joined = [(_join([named for named, _ in pairs]), _join([head for _, head in pairs])) for pairs in found]
    return joined, sqrt(size / n), resampling.subsampling_sentence(subsets, size)


def _join(parts: Sequence[Named]) -> Named:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
