"""The calibration measures against their goals, beside torchmetrics and netcal (where it is installed).

Ours and the yardstick run in turns on the same arrays, so that a slow minute hits both; the median ratio counts.

    python -m benchmarks.bench_metrics [--pairs 7] [--threads 2] [--table 20000000]
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from trimtab import metrics
from trimtab.core.tables import Table


def predictions(n: int, c: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Over-confident logits, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, c, generator=generator)
    gumbel = -torch.empty_like(logits).exponential_(generator=generator).log()
    return 1.7 * logits, (logits + gumbel).argmax(1)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(what: str, goal: str, ours: Callable[[], object], yardstick: Callable[[], object], pairs: int) -> None:
    ours(), yardstick()
    times = [(seconds(ours), seconds(yardstick)) for _ in range(pairs)]
    ratio = statistics.median(a / b for a, b in times)
    a, b = (1e3 * statistics.median(side) for side in zip(*times))
    print(f"{what:58s} {a:9.1f} ms, yardstick {b:9.1f} ms, ratio {ratio:8.4f} (1 / {1 / ratio:7.1f})   goal {goal}")


def extra_memory(run: Callable[[], object]) -> int:
    """Bytes that a run needs beyond what is held before it (Linux with glibc only)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is no longer held
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def in_memory(pairs: int) -> None:
    logits, labels = predictions(1_000_000, 10)
    probs = logits.softmax(1)
    compare(
        "28 top-label measures, 1e6 x 10, by torchmetrics' ECE-15",
        "<= 4",
        lambda: metrics.top_label_errors(probs, labels),
        lambda: multiclass_calibration_error(probs, labels, 10, 15),
        pairs,
    )
    confidence = probs.amax(1)
    mmce = lambda: metrics.maximum_mean_calibration_error(probs, labels)  # noqa: E731
    compare("MMCE, n = 1e6, by torch.sort of n floats", "<= 4", mmce, lambda: torch.sort(confidence), pairs)
    compare("MMCE, n = 1e6, by numpy.sort of n floats", "-", mmce, lambda: np.sort(confidence.numpy()), pairs)
    if find_spec("netcal"):
        from netcal.metrics.confidence import MMCE

        some, some_labels = probs[:20_000], labels[:20_000]
        arrays, peer = (some.numpy(), some_labels.numpy()), MMCE()
        ours = metrics.maximum_mean_calibration_error(some, some_labels)
        print(f"MMCE at n = 20 000: ours {ours:.9f}, netcal {peer.measure(*arrays):.9f}")
        compare(
            "MMCE, n = 20 000, by netcal",
            "<= 1 / 500",
            lambda: metrics.maximum_mean_calibration_error(some, some_labels),
            lambda: peer.measure(*arrays),
            min(pairs, 3),
        )
    else:
        print("netcal is not installed: pip install 'trimtab[bench]'")

    for n, c in ((50_000, 100), (500_000, 10)):
        logits, labels = predictions(n, c)
        probs = logits.softmax(1)
        suite = lambda: metrics.calibration_suite(logits, labels)  # noqa: B023, E731
        compare(
            f"suite before and after, {n} x {c}, by torch.sort(dim=0)",
            "<= 6",
            suite,
            lambda: torch.sort(probs, dim=0),  # noqa: B023
            pairs,
        )
        if Path("/proc/self/clear_refs").exists():
            del probs
            share = max(extra_memory(suite) for _ in range(3)) / (4 * n * c)
            print(f"{'    its extra memory, by the input':58s} {share:9.2f} times   goal <= 3")

    logits, labels = predictions(10_000, 10)
    took = seconds(lambda: metrics.calibration_intervals(logits, labels))
    print(f"{'100 intervals from 200 resamples, 10 000 x 10':58s} {took:9.2f} s")


def on_disk(n: int) -> None:
    """A Parquet table of n rows and 10 classes, measured by a fresh process whose peak memory is told."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.parquet"
        logits, labels = predictions(1_000_000, 10)
        block = pa.table({f"logit_{k}": logits[:, k].numpy() for k in range(10)} | {"label": labels.numpy()})
        with pq.ParquetWriter(path, block.schema) as writer:
            for start in range(0, n, len(block)):
                writer.write_table(block.slice(0, min(len(block), n - start)))
        subprocess.run([sys.executable, "-m", "benchmarks.bench_metrics", "--measure", str(path)], check=True)


def measure_table(path: Path) -> None:
    with Table.open(path) as table:
        n = table.n
        took = seconds(lambda: metrics.table_suite(table))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{f'table on disk, {n} x 10':58s} {took:9.1f} s, peak memory {peak:.2f} GiB   goal <= 3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", type=int, metavar="ROWS", help="also measure a table of so many rows on disk")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        measure_table(options.measure)
        return
    print(f"torch {torch.__version__}, numpy {np.__version__}, {options.threads} threads, {options.pairs} pairs")
    in_memory(options.pairs)
    if options.table:
        on_disk(options.table)


if __name__ == "__main__":
    main()
