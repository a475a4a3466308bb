"""Every shifted stream with every adapter, against the unadapted model."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from trimtab.adaptation import (
    EATA,
    LAME,
    Adapter,
    BatchNormAdapt,
    CoTTA,
    RoTTA,
    Source,
    Tent,
    run_stream,
)
from trimtab.audit import setup as setups
from trimtab.audit.correct import Settings, triple
from trimtab.audit.result import ShiftCell, Triple
from trimtab.audit.setup import Setup
from trimtab.core.checks import InputError
from trimtab.core.progress import OutOfTime, in_time, limit, track

NONE = "none"


def _eata(model: nn.Module, calibration: Iterable[Any]) -> Adapter:
    return EATA(model, prepared=EATA.prepare(model, calibration))


ADAPTERS: dict[str, Callable[[nn.Module, Iterable[Any]], Adapter]] = {
    "Source": lambda model, _: Source(model),
    "BatchNorm": lambda model, _: BatchNormAdapt(model),
    "Tent": lambda model, _: Tent(model),
    "EATA": _eata,
    "CoTTA": lambda model, _: CoTTA(model),
    "RoTTA": lambda model, _: RoTTA(model),
    "LAME": lambda model, _: LAME(model),
}
"""How each adapter is built from the model and the calibration batches, with its own defaults."""


def cell(setup: Setup, shift: str, adapter: str, settings: Settings) -> ShiftCell:
    """Run one adapter over one stream and measure what it said.

    An adapter that refuses the model (no normalisation layer, say) leaves a cell that holds its words.
    """
    stream = setup.test if shift == NONE else setup.shifts[shift]
    start = time.perf_counter()
    try:
        predictions = run_stream(ADAPTERS[adapter](setup.model, setup.calibration), stream)
    except InputError as error:
        nothing: Triple = (float("nan"), float("nan"), float("nan"))
        return ShiftCell(shift, adapter, 0, nothing, nothing, nothing, 0.0, failed=str(error))
    seconds = time.perf_counter() - start
    headline = settings.essentials(predictions)
    accuracy, ece, log_loss = (triple(headline[name]) for name in ("accuracy", "ece", "log_loss"))
    return ShiftCell(shift, adapter, predictions.n, accuracy, ece, log_loss, seconds)


def run_cells(
    setup: Setup, spec: str | None, pairs: list[tuple[str, str]], *, workers: int, settings: Settings, end: float
) -> Iterator[ShiftCell]:
    """The cells of all (shift, adapter) `pairs`, as they are done; those that are not by `end` are left out.

    With several workers, each process calls the setup function `spec` once; a setup that was handed over as an object
    is run in this process. `end` is a time of `time.monotonic`.
    """
    if workers == 1 or spec is None or len(pairs) < 2:
        for shift, adapter in track(pairs, "adapt to shifts"):
            done = _in_time(setup, shift, adapter, settings, end)
            if done is not None:
                yield done
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(min(workers, len(pairs)), context, _open_worker, (spec, threads)) as pool:
        futures = [pool.submit(_worker_cell, shift, adapter, settings, end) for shift, adapter in pairs]
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


def _worker_cell(shift: str, adapter: str, settings: Settings, end: float) -> ShiftCell | None:
    return _in_time(_worker_setup, shift, adapter, settings, end)


def _in_time(setup: Setup, shift: str, adapter: str, settings: Settings, end: float) -> ShiftCell | None:
    with suppress(OutOfTime), limit(end - time.monotonic()):
        in_time()
        return cell(setup, shift, adapter, settings)
    return None
