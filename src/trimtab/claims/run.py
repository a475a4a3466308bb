"""Measure claims: every (claim, seed) is a cell of its own, kept on disk until the whole run is written.

A run that was killed goes on where it stopped, as long as the code is the same; cells of other code are dropped after
a day.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from trimtab import catalog
from trimtab.catalog import Method
from trimtab.claims.base import Claim, worst
from trimtab.core import checks, persist, progress

FAST = 60.0  # seconds: claims whose budget is at most this are measured on every change
_DAY = 86_400.0


class ClaimError(RuntimeError):
    """A claim's experiment broke off; says which claim, which seed, and why."""


def load(method: Method) -> Claim:
    """The claim of a method, imported on demand."""
    claim: Claim = import_module(method.claim).CLAIM
    if claim.slug != method.slug:
        raise ClaimError(f"{method.claim} holds the claim of {claim.slug}, the catalogue says {method.slug}")
    return claim


def chosen(slugs: Sequence[str], *, fast: bool = False) -> list[Method]:
    """The methods called `slugs`, or all; `fast` keeps those whose claim takes at most `FAST` seconds."""
    found = [catalog.find(slug) for slug in slugs] or list(catalog.methods())
    return [method for method in dict.fromkeys(found) if not fast or load(method).budget <= FAST]


def run(
    methods: Iterable[Method], folder: str | Path, *, workers: int = 1, seeds: int | None = None
) -> list[dict[str, Any]]:
    """Measure the claims of `methods` and write ``<slug>.json`` into `folder`, each as soon as its seeds are done.

    Args:
        methods: entries of the catalogue.
        folder: where results, and until the end the finished cells, are written.
        workers: processes; each computes with one thread.
        seeds: how many seeds a claim is measured with; by default, those that it names.

    Returns:
        What was written, in the order of `methods`.

    Raises:
        ClaimError: at least one cell broke off; all other claims have been measured and written by then.
    """
    checks.integer(workers, "workers", low=1)
    folder = Path(folder)
    claims = {method: load(method) for method in methods}
    wanted = {method: _seeds(claim, seeds) for method, claim in claims.items()}
    cells = _cells(folder)
    paths = {(m, seed): cells / f"{m.slug}-{seed}.json" for m in claims for seed in wanted[m]}
    results: dict[Method, dict[str, Any]] = {}
    broken: dict[Method, BaseException] = {}

    def write_if_complete(method: Method) -> None:
        mine = {seed: paths[method, seed] for seed in wanted[method]}
        if all(path.exists() for path in mine.values()):
            measured = {seed: json.loads(path.read_text(encoding="utf-8")) for seed, path in mine.items()}
            results[method] = _result(claims[method], measured)
            persist.write_json(folder / f"{method.slug}.json", results[method])

    for method in claims:
        write_if_complete(method)
    waiting = [cell for cell, path in paths.items() if not path.exists()]
    for (method, seed), future in _measured(waiting, paths, workers):
        error = future.exception()
        if error is None:
            write_if_complete(method)
        elif method not in broken:
            broken[method] = ClaimError(f"{method.slug}, seed {seed}: {type(error).__name__}: {error}")
            broken[method].__cause__ = error
    if broken:
        raise ClaimError("; ".join(str(error) for error in broken.values())) from next(iter(broken.values()))
    for path in paths.values():
        path.unlink(missing_ok=True)
    for emptied in (cells, cells.parent):
        with suppress(OSError):
            emptied.rmdir()
    return [results[method] for method in claims]


def check(methods: Sequence[Method], published: Path | None = None, *, workers: int = 1) -> list[dict[str, str]]:
    """Measure the claims again and put each verdict beside the published one (read from the folder `published`)."""
    with tempfile.TemporaryDirectory() as folder:
        measured = run(methods, folder, workers=workers)
    verdicts = [(catalog.result(m.slug, published) or {"verdict": "nothing"})["verdict"] for m in methods]
    return [
        {"slug": result["slug"], "published": verdict, "measured": result["verdict"]}
        for result, verdict in zip(measured, verdicts, strict=True)
    ]


def _seeds(claim: Claim, count: int | None) -> tuple[int, ...]:
    """The first `count` of the claim's seeds, continued upwards where it names fewer."""
    if count is None:
        return claim.seeds
    checks.integer(count, "seeds", low=1)
    top = max(claim.seeds)
    return (claim.seeds + tuple(range(top + 1, top + 1 + count)))[:count]


def _cells(folder: Path) -> Path:
    """Where the cells of this very code lie; those of any other code are removed once they have lain for a day."""
    sources = sorted(catalog.PACKAGE.rglob("*.py"))
    digest = hashlib.sha256(f"{platform.python_version()} {torch.__version__}".encode())
    for source in sources:
        digest.update(source.read_bytes())
    current = folder / ".cells" / digest.hexdigest()[:16]
    for other in (folder / ".cells").glob("*"):
        if other != current and time.time() - other.stat().st_mtime > _DAY:
            shutil.rmtree(other, ignore_errors=True)
    return current


def _measured(
    waiting: list[tuple[Method, int]], paths: dict[tuple[Method, int], Path], workers: int
) -> Iterable[tuple[tuple[Method, int], Future[None]]]:
    """Each waiting cell with its future, as they are done."""
    if not waiting:
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(waiting)), mp_context=spawn, initializer=_start_worker) as pool:
        futures = {pool.submit(_measure, m.claim, seed, paths[m, seed]): (m, seed) for m, seed in waiting}
        try:
            for future in progress.track(as_completed(futures), "claims", total=len(futures)):
                yield futures[future], future
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _start_worker() -> None:
    """One thread a worker; Ctrl-C is the parent's to handle; a worker does not outlive its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _measure(module: str, seed: int, path: Path) -> None:
    claim: Claim = import_module(module).CLAIM
    start = time.process_time()
    with threadpool_limits(1):
        values = {key: float(value) for key, value in claim.run(seed).items()}
    for expectation in claim.expectations:
        expectation.effect(values)
    persist.write_json(path, {"values": values, "seconds": round(time.process_time() - start, 2)})


def _result(claim: Claim, measured: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What ``<slug>.json`` holds."""
    judgements = claim.judge({seed: cell["values"] for seed, cell in measured.items()})
    return {
        "slug": claim.slug,
        "statement": claim.statement,
        "verdict": worst([judgement.verdict for judgement in judgements]),
        "expectations": [
            {
                "text": str(judgement.expectation),
                "verdict": judgement.verdict,
                "effect": judgement.effect._asdict(),
                **asdict(judgement.expectation),
            }
            for judgement in judgements
        ],
        "values": {seed: cell["values"] for seed, cell in measured.items()},
        "reported": claim.reported,
        "notes": claim.notes,
        "cpu_seconds": {seed: cell["seconds"] for seed, cell in measured.items()},
        "budget": claim.budget,
        "versions": {"python": platform.python_version(), "machine": platform.machine()}
        | {package: version(package) for package in ("trimtab", "torch", "numpy", "scipy")},
    }
