"""How the time and memory of a fit grow with the number of samples: every calibrator that works on logits alone.

Each fit has a process of its own. Where the last column is 1, twice the samples take twice the time. `HCalibration` is
left out: it draws at most 500 000 events and takes tens of seconds for any number beyond.

    python -m benchmarks.bench_growth [--classes 20] [--write FILE.json]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_peers import trimtab
from trimtab.calibration import CALIBRATORS, HCalibration, Uncalibrated
from trimtab.core.persist import write_json

SAMPLES = (12_500, 25_000, 50_000, 100_000)


def one(name: str, n: int, c: int) -> dict[str, float]:
    """Seconds and MiB of one fit, the median of three, after a small one."""
    import resource
    import statistics
    import time
    import warnings

    from benchmarks.bench_calibration import scores

    warnings.simplefilter("ignore")
    fit = trimtab(name)
    fit(*scores(200, c, torch.float32))
    logits, labels = scores(n, c, torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        fit(logits, labels)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(seconds), "peak_mib": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        print(json.dumps(one(options.one[0], int(options.one[1]), options.classes)))
        return
    rows: list[dict[str, Any]] = []
    for kind in CALIBRATORS:
        if kind.needs or kind in (Uncalibrated, HCalibration):
            continue
        cells = []
        for n in SAMPLES:
            command = [sys.executable, "-m", "benchmarks.bench_growth", "--one", kind.__name__, str(n)]
            command += ["--classes", str(options.classes)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            cells.append(json.loads(done.stdout.splitlines()[-1]))
        power = math.log(cells[-1]["seconds"] / cells[0]["seconds"]) / math.log(SAMPLES[-1] / SAMPLES[0])
        rows.append({"calibrator": kind.__name__, "cells": cells, "power": power})
        text = "".join(f"{cell['seconds']:9.3f} s{cell['peak_mib']:6.0f} MiB" for cell in cells)
        print(f"{kind.__name__:28s}{text}{power:7.2f}", flush=True)
    if options.write:
        write_json(options.write, {"samples": SAMPLES, "classes": options.classes, "rows": rows})


if __name__ == "__main__":
    main()
