"""Every shifted stream with every adapter, against the unadapted model."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from trimtab.adaptation import ADAPTERS, Adapter, Prepared, run_stream
from trimtab.audit import setup as setups
from trimtab.audit.correct import Settings, triple
from trimtab.audit.result import NOTHING, ShiftCell
from trimtab.audit.setup import Setup
from trimtab.core.checks import InputError
from trimtab.core.persist import write_text
from trimtab.core.predictions import Predictions
from trimtab.core.progress import OutOfTime, in_time, limit, track
from trimtab.core.stats import paired_share

NONE = "none"
KINDS = {kind.__name__: kind for kind in ADAPTERS}


@dataclass(frozen=True)
class Pair:
    """What one cell is made of.

    Attributes:
        shift, adapter: names.
        before: file of what the model, as it is, says about the same stream.
        prepared: file for what the adapter must know beforehand: read where it exists, made where not. A refusal is
            kept beside it.
    """

    shift: str
    adapter: str
    before: Path
    prepared: Path


def cell(setup: Setup, pair: Pair, settings: Settings) -> ShiftCell:
    """Run one adapter, with its own defaults, over one stream and measure what it said.

    An adapter that refuses the model (no normalisation layer, say), or fails on it, leaves a cell that holds the words.
    """
    stream = setup.test if pair.shift == NONE else setup.shifts[pair.shift]
    try:
        adapter = _built(setup, pair)
        start = time.perf_counter()
        predictions = run_stream(adapter, stream)
    except OutOfTime:
        raise
    except Exception as error:
        return ShiftCell(pair.shift, pair.adapter, 0, NOTHING, NOTHING, NOTHING, 0.0, failed=setups.told(error))
    seconds = time.perf_counter() - start
    headline = settings.essentials(predictions)
    accuracy, ece, log_loss = (triple(headline[name]) for name in ("accuracy", "ece", "log_loss"))
    before = Predictions.read(pair.before)
    change = settings.compare(before, predictions)
    right = [(part.logits.argmax(1) == part.needed("labels")).numpy() for part in (before, predictions)]
    change["accuracy"] = triple(paired_share(*right, level=settings.level))
    return ShiftCell(pair.shift, pair.adapter, predictions.n, accuracy, ece, log_loss, seconds, change=change)


def _built(setup: Setup, pair: Pair) -> Adapter:
    kind = KINDS[pair.adapter]
    if kind.preparation == "none":
        return kind(setup.model)
    refused = pair.prepared.with_suffix(".refused")
    if refused.is_file():
        raise InputError(refused.read_text(encoding="utf-8"))
    if not pair.prepared.is_file():
        known = setup.calibration if setup.train is None else setup.train
        try:
            kind.prepare(setup.model, known).save(pair.prepared)
        except InputError as error:  # a pass over the source, not to be made again for every shift
            write_text(refused, str(error))
            raise
    return kind(setup.model, prepared=Prepared.load(pair.prepared))  # type: ignore[call-arg]


def run_cells(
    setup: Setup, spec: str | None, pairs: list[Pair], *, workers: int, settings: Settings, end: float
) -> Iterator[ShiftCell]:
    """The cells of all `pairs`, as they are done; those that are not by `end` are left out.

    With several workers, each process calls the setup function `spec` once; a setup that was handed over as an object
    is run in this process. `end` is a time of `time.monotonic`.
    """
    if workers == 1 or spec is None or len(pairs) < 2:
        for pair in track(pairs, "adapt to shifts"):
            done = _in_time(setup, pair, settings, end)
            if done is not None:
                yield done
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(min(workers, len(pairs)), context, _open_worker, (spec, threads)) as pool:
        futures = [pool.submit(_worker_cell, pair, settings, end) for pair in pairs]
        try:
            for future in track(as_completed(futures), "adapt to shifts", total=len(futures)):
                done = future.result()
                if done is not None:
                    yield done
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker_setup: Setup


def _open_worker(spec: str, threads: int) -> None:
    global _worker_setup
    torch.set_num_threads(threads)
    _worker_setup = setups.load(spec)


def _worker_cell(pair: Pair, settings: Settings, end: float) -> ShiftCell | None:
    return _in_time(_worker_setup, pair, settings, end)


def _in_time(setup: Setup, pair: Pair, settings: Settings, end: float) -> ShiftCell | None:
    with suppress(OutOfTime), limit(end - time.monotonic()):
        in_time()
        return cell(setup, pair, settings)
    return None
