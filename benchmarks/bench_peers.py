"""Every calibrator that netcal, probmetrics, scikit-learn or uncertainty-calibration also has, beside them.

Each contestant is fitted in a process of its own, on the same log-probabilities (or the probabilities, where it wants
those), under a time limit; the held-out log loss is on as many other rows, with probabilities below 1e-7 counted as
1e-7. A fit is timed after one on other, smaller scores, so that compilation and first calls do not count. Peak memory
is what the process took at most, above what the scores and the imports take.

    python -m benchmarks.bench_peers [--families vector ...] [--sizes 5000x10 ...] [--limit 300] [--write FILE.json]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_calibration import Logits, scores
from trimtab.core.persist import write_json

SIZES = ("5000x10", "50000x100", "10000x1000")
Predict = Callable[[Tensor], np.ndarray]
Fit = Callable[[Tensor, Tensor], Predict]


def trimtab(name: str) -> Fit:
    import trimtab.calibration

    def fit(logits: Tensor, labels: Tensor) -> Predict:
        return getattr(trimtab.calibration, name)().fit(logits, labels).predict_proba

    return fit


def scikit_learn(method: str) -> Fit:
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    def fit(logits: Tensor, labels: Tensor) -> Predict:
        frozen = FrozenEstimator(Logits(logits.shape[1]))
        rows = np.arange(len(labels))
        fitted = CalibratedClassifierCV(frozen, method=method, cv=[(rows, rows)], ensemble=False)
        fitted.fit(logits.numpy(), labels.numpy())
        return lambda x: fitted.predict_proba(x.numpy())

    return fit


def netcal(module: str, name: str, **options: Any) -> Fit:
    from importlib import import_module

    def fit(logits: Tensor, labels: Tensor) -> Predict:
        fitted = getattr(import_module(f"netcal.{module}"), name)(**options)
        fitted.fit(logits.double().softmax(1).numpy(), labels.numpy())  # single precision leaves netcal unfitted
        return lambda x: fitted.transform(x.double().softmax(1).numpy())

    return fit


def probmetrics(make: Callable[[], Any]) -> Fit:
    def fit(logits: Tensor, labels: Tensor) -> Predict:
        fitted = make()
        fitted.fit(logits.double().softmax(1).numpy(), labels.numpy())
        return lambda x: np.asarray(fitted.predict_proba(x.double().softmax(1).numpy()))

    return fit


def probmetrics_named(name: str, **options: Any) -> Fit:
    def make() -> Any:
        from probmetrics.calibrators import get_calibrator

        return get_calibrator(name, **options)

    return probmetrics(make)


def probmetrics_class(module: str, name: str) -> Fit:
    def make() -> Any:
        from importlib import import_module

        return getattr(import_module(f"probmetrics.calibrators.{module}"), name)()

    return probmetrics(make)


def uncertainty(name: str, bins: int = 15) -> Fit:
    def fit(logits: Tensor, labels: Tensor) -> Predict:
        import calibration

        fitted = getattr(calibration, name)(len(labels), num_bins=bins)
        fitted.train_calibration(logits.double().softmax(1).numpy(), labels.numpy())

        def predict(x: Tensor) -> np.ndarray:
            p = fitted.calibrate(x.double().softmax(1).numpy())
            return p / p.sum(1, keepdims=True)

        return predict

    return fit


FAMILIES: dict[str, dict[str, Callable[[], Fit]]] = {
    "temperature": {
        "trimtab": lambda: trimtab("TemperatureScaling"),
        "scikit-learn": lambda: scikit_learn("temperature"),
        "netcal": lambda: netcal("scaling", "TemperatureScaling"),
        "probmetrics": lambda: probmetrics_named("temp-scaling"),
    },
    "ensemble temperature": {
        "trimtab": lambda: trimtab("EnsembleTemperatureScaling"),
        "probmetrics": lambda: probmetrics_class("temperature_scaling", "ETSCalibrator"),
    },
    "vector": {
        "trimtab": lambda: trimtab("VectorScaling"),
        "probmetrics": lambda: probmetrics_class("logistic", "VectorScalingCalibrator"),
        "netcal": lambda: netcal("scaling", "LogisticCalibration"),
        "probmetrics SVS": lambda: probmetrics_named("svs"),
        "probmetrics SVS, SAGA": lambda: probmetrics_named("svs", svs_opt="saga"),
    },
    "matrix": {
        "trimtab": lambda: trimtab("MatrixScaling"),
        "probmetrics": lambda: probmetrics_class("logistic", "MatrixScalingCalibrator"),
        "probmetrics SMS": lambda: probmetrics_named("sms"),
        "probmetrics SMS, SAGA": lambda: probmetrics_named("sms", sms_opt="saga"),
    },
    "Platt": {
        "trimtab": lambda: trimtab("PlattScaling"),
        "scikit-learn": lambda: scikit_learn("sigmoid"),
        "uncertainty-calibration": lambda: uncertainty("PlattBinnerMarginalCalibrator"),
    },
    "beta": {
        "trimtab": lambda: trimtab("BetaCalibration"),
        "netcal": lambda: netcal("scaling", "BetaCalibration"),
    },
    "isotonic": {
        "trimtab": lambda: trimtab("IsotonicCalibration"),
        "scikit-learn": lambda: scikit_learn("isotonic"),
        "netcal": lambda: netcal("binning", "IsotonicRegression"),
        "probmetrics": lambda: probmetrics_named("isotonic"),
    },
    "histogram": {
        "trimtab": lambda: trimtab("HistogramBinning"),
        "netcal": lambda: netcal("binning", "HistogramBinning", bins=15),
        "uncertainty-calibration": lambda: uncertainty("HistogramMarginalCalibrator"),
    },
}
PACKAGES = {
    "trimtab": "trimtab",
    "scikit-learn": "sklearn",
    "netcal": "netcal",
    "probmetrics": "probmetrics",
    "uncertainty-calibration": "calibration",
}


def log_loss(probs: Any, labels: Tensor) -> float:
    p = torch.as_tensor(np.asarray(probs), dtype=torch.float64)
    return -float(p.gather(1, labels[:, None]).clamp(min=1e-7).log().mean())


def one(family: str, name: str, size: str, limit: float) -> dict[str, Any]:
    """What one contestant takes; run in a process of its own."""
    n, c = (int(part) for part in size.split("x"))
    logits, labels = scores(2 * n, c, torch.float32)
    logits = logits.log_softmax(1)
    fit = FAMILIES[family][name]()
    start = time.perf_counter()
    small, small_labels = scores(200, 5, torch.float32)
    fit(small, small_labels)
    warm = time.perf_counter() - start
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds: list[float] = []
    while not seconds or (len(seconds) < 5 and sum(seconds) + seconds[-1] < min(20.0, limit / 3)):
        start = time.perf_counter()
        predict = fit(logits[:n], labels[:n])
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    loss = log_loss(predict(logits[n:]), labels[n:])
    return {
        "seconds": statistics.median(seconds),
        "fits": len(seconds),
        "warm_up": warm,
        "log_loss": loss,
        "peak_mib": peak / 1024,
    }


def measured(family: str, name: str, size: str, limit: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.bench_peers", "--one", family, name, size, "--limit", str(limit)]
    row = {"family": family, "contestant": name, "size": size}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit + 60)
    except subprocess.TimeoutExpired:
        return {**row, "failed": f"not within {limit:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return {**row, "failed": last[:200]}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


def show(rows: list[dict[str, Any]]) -> None:
    ours = next((row for row in rows if row["contestant"] == "trimtab"), {})
    for row in rows:
        if "failed" in row:
            print(f"  {row['contestant']:26s} {row['failed']}")
            continue
        ratio = row["seconds"] / ours["seconds"] if "seconds" in ours else float("nan")
        line = f"  {row['contestant']:26s}{row['seconds']:10.4f} s{ratio:9.2f}x"
        print(f"{line}{row['log_loss']:11.5f}{row['peak_mib']:9.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--limit", type=float, default=300, help="seconds that one fit may take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="JSON file for the results; what it holds is not measured again")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        warnings.simplefilter("ignore")
        logging.disable()
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        with contextlib.redirect_stdout(io.StringIO()):
            found = one(*options.one, options.limit)
        print(json.dumps(found))
        return
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[variable] = str(options.threads)
    known = json.loads(options.write.read_text())["rows"] if options.write and options.write.is_file() else []
    rows = list(known)
    for size in options.sizes:
        for family in options.families:
            here: list[dict[str, Any]] = []
            for name in FAMILIES[family]:
                if not find_spec(PACKAGES[name.split(" ")[0]]):
                    continue
                key = {"family": family, "contestant": name, "size": size}
                old = next((row for row in known if key.items() <= row.items()), None)
                here.append(old or measured(family, name, size, options.limit))
                if old is None:
                    rows.append(here[-1])
            print(f"\n{family}, {size}")
            show(here)
            rows.sort(key=lambda row: (SIZES.index(row["size"]), list(FAMILIES).index(row["family"])))
            if options.write:
                versions = {name: metadata.version(name) for name in PACKAGES if find_spec(PACKAGES[name])}
                about = {"threads": options.threads, "machine": platform.machine(), "versions": versions}
                write_json(options.write, {**about, "rows": rows})


if __name__ == "__main__":
    main()
