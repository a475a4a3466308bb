"""Temperature scaling beside scikit-learn and, where installed, probmetrics and netcal; fit times of every calibrator.

All fit the same 50 000 x 100 scores in turns, so that a slow minute hits all; medians count. The loss is compared with
that of the best temperature, found by bisection in float64.

    python -m benchmarks.bench_calibration [--rounds 5] [--threads 1] [--all]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from torch import Tensor
from torch.nn.functional import nll_loss

from trimtab.calibration import CALIBRATORS, TemperatureScaling

GOALS = {"scikit-learn": 10, "probmetrics": 10, "netcal": 25}
SIZES = ((5_000, 10), (50_000, 100))


def scores(n: int, c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Overconfident logits whose bias and sharpness differ between classes, and labels."""
    generator = torch.Generator().manual_seed(0)
    truth = 2.5 * torch.randn(n, c, generator=generator) + torch.randn(c, generator=generator)
    labels = truth.softmax(1).multinomial(1, generator=generator)[:, 0]
    slope = 1.8 + 0.3 * torch.randn(c, generator=generator)
    return (slope * truth + 0.5 * torch.randn(n, c, generator=generator)).to(dtype), labels


class Logits(ClassifierMixin, BaseEstimator):
    """A classifier whose decision function is its input."""

    def __init__(self, c: int = 2):
        self.c = c

    def fit(self, X: np.ndarray, y: np.ndarray) -> Logits:
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    @property
    def classes_(self) -> np.ndarray:
        return np.arange(self.c)

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        return X

    def predict(self, X: np.ndarray) -> np.ndarray:
        return X.argmax(1)


def of_trimtab(logits: Tensor, labels: Tensor) -> float:
    return float(TemperatureScaling().fit(logits, labels).temperature)


def of_scikit_learn(logits: Tensor, labels: Tensor) -> float:
    frozen = FrozenEstimator(Logits(logits.shape[1]))
    rows = np.arange(len(labels))
    fitted = CalibratedClassifierCV(frozen, method="temperature", cv=[(rows, rows)], ensemble=False)
    fitted.fit(logits.numpy(), labels.numpy())
    return 1 / float(fitted.calibrated_classifiers_[0].calibrators[0].beta_)


def of_probmetrics(logits: Tensor, labels: Tensor) -> float:
    from probmetrics.calibrators import get_calibrator
    from probmetrics.distributions import CategoricalLogits

    fitted = get_calibrator("temp-scaling").fit_torch(CategoricalLogits(logits), labels)
    return 1 / float(fitted.invtemp_)


def of_netcal(logits: Tensor, labels: Tensor) -> float:
    from netcal.scaling import TemperatureScaling as Peer

    peer = Peer().fit(logits.softmax(1).numpy(), labels.numpy())
    return 1 / float(np.asarray(peer.temperature).squeeze())


PEERS = {"probmetrics": of_probmetrics, "netcal": of_netcal}


def best_loss(logits: Tensor, labels: Tensor) -> float:
    """The log loss of the best temperature, by bisection on the slope."""
    low, high = 1e-2, 1e2
    at_label = logits.gather(1, labels[:, None])[:, 0].mean()
    for _ in range(60):
        s = (low * high) ** 0.5
        slope = ((s * logits).softmax(1) * logits).sum(1).mean() - at_label
        low, high = (low, s) if slope > 0 else (s, high)
    return loss_at(logits, labels, 1 / s)


def loss_at(logits: Tensor, labels: Tensor, temperature: float) -> float:
    return float(nll_loss((logits / temperature).log_softmax(1), labels))


def timed(run: Callable[[], float]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds of all threads, and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def compare(dtype: torch.dtype, rounds: int) -> None:
    logits, labels = scores(50_000, 100, dtype)
    contestants = {"trimtab": of_trimtab, "scikit-learn": of_scikit_learn}
    contestants |= {name: fit for name, fit in PEERS.items() if find_spec(name)}
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, fit in contestants.items():
            run = timed(lambda fit=fit: fit(logits, labels))
            if number:
                runs[name].append(run)
    optimum = best_loss(logits.double(), labels)
    print(f"\n50 000 x 100, {str(dtype)[6:]}: median of {rounds} fits; log loss of the optimum {optimum:.9f}")
    print(f"{'':14s}{'wall s':>9s}{'ratio':>7s}{'CPU s':>9s}{'ratio':>7s}{'goal':>6s}{'T':>10s}{'loss - optimum':>16s}")
    ours: tuple[float, float] | None = None
    for name, times in runs.items():
        wall, cpu = (statistics.median(run[i] for run in times) for i in (0, 1))
        ours = ours or (wall, cpu)
        gap = loss_at(logits.double(), labels, times[-1][2]) - optimum
        goal = f"{GOALS[name]}x" if name in GOALS else ""
        line = f"{name:14s}{wall:9.4f}{wall / ours[0]:7.1f}{cpu:9.4f}{cpu / ours[1]:7.1f}{goal:>6s}"
        print(f"{line}{times[-1][2]:10.5f}{gap:16.1e}")


def every(rounds: int) -> None:
    for n, c in SIZES:
        logits, labels = scores(2 * n, c, torch.float32)
        print(f"\n{n} x {c}, float32: median of {rounds} fits, log loss on as many other rows")
        for kind in CALIBRATORS:
            runs = [timed(lambda: kind().fit(logits[:n], labels[:n])) for _ in range(rounds)]  # noqa: B023
            held_out = float(nll_loss(runs[-1][2](logits[n:]), labels[n:]))
            print(f"{kind.__name__:28s}{statistics.median(run[0] for run in runs):9.3f} s {held_out:9.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="fit every calibrator, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for dtype in (torch.float64, torch.float32):
        compare(dtype, options.rounds)
    if options.all:
        every(min(options.rounds, 3))


if __name__ == "__main__":
    main()
