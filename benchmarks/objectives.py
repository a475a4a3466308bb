"""Which objective for what: one network, one budget, every classification objective, four data sets.

Fashion-MNIST (4 000 images), CIFAR-10 (5 000 images, where ``TRIMTAB_DATA`` names the data folder), and scikit-learn's
breast cancer (is the tumour benign?) and diabetes (is the progression above the median?) tables. Images go through
three convolutions with batch normalisation, tables through two hidden layers of 64; Adam at 1e-3 along a cosine,
batches of 128, no augmentation, no weight decay, so long that the training images are learnt by heart: 25 epochs of
images, 200 of tables. Each of three seeds draws the training rows, the weights and the order. All else is the
objectives' defaults in `trimtab.losses.OBJECTIVES`. Temperature scaling is fitted on rows of their own. One file a data
set is rewritten after every run, so that a killed study goes on. With ``--clock`` nothing is trained: the steps of all
objectives are timed in turns, so that a slow minute hits all.

    python -m benchmarks.objectives [--data fashion cifar10 cancer diabetes] [--objectives NAME ...] [--seeds 0 1 2]
    python -m benchmarks.objectives --clock
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.cifar10 import data_folder
from trimtab.calibration import TemperatureScaling
from trimtab.core.checks import InputError
from trimtab.core.persist import write_json
from trimtab.core.predictions import Predictions
from trimtab.data import Images, fashion_mnist, parquet_images
from trimtab.losses import OBJECTIVES, Batch, Indexed, Objective, Task, train
from trimtab.metrics import expected_calibration_error, negative_log_likelihood, roc_auc

ROWS = {
    "fashion": (4000, 1000, 5000),
    "cifar10": (5000, 1000, 5000),
    "cancer": (250, 119, 200),
    "diabetes": (220, 112, 110),
}
EPOCHS = {"fashion": 25, "cifar10": 25, "cancer": 200, "diabetes": 200}
Part = tuple[Tensor, Tensor]


@cache
def images(name: str) -> tuple[Images, Images]:
    if name == "fashion":
        return fashion_mnist("train"), fashion_mnist("test")
    folder = data_folder() / "cifar10"
    return parquet_images(folder, "train"), parquet_images(folder, "test")


def table(name: str) -> Part:
    """Standardised columns, and which of two classes a row is of."""
    bundle = load_breast_cancer() if name == "cancer" else load_diabetes()
    x, target = (torch.from_numpy(part).float() for part in (bundle.data, bundle.target))
    labels = target if name == "cancer" else target > target.median()
    return (x - x.mean(0)) / x.std(0), labels.long()


def drawn(name: str, generator: torch.Generator) -> tuple[Part, Part, Part]:
    """Rows to train on, to fit the temperature on, and to measure on."""
    sizes = ROWS[name]
    if name in ("cancer", "diabetes"):
        x, labels = table(name)
        train, held, test = torch.randperm(len(x), generator=generator)[: sum(sizes)].split(sizes)
        return (x[train], labels[train]), (x[held], labels[held]), (x[test], labels[test])
    known, unseen = images(name)
    first, second = torch.randperm(len(known), generator=generator)[: sum(sizes[:2])].split(sizes[:2])
    third = torch.randperm(len(unseen), generator=generator)[: sizes[2]]
    parts = (known[first], known[second], unseen[third])
    train, held, test = ((part.tensor(), part.labels) for part in parts)
    return train, held, test


def network(x: Tensor, classes: int) -> nn.Sequential:
    if x.ndim == 2:
        return nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes))
    layers: list[nn.Module] = []
    for inputs, outputs in ((x.shape[1], 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, classes))
    return model.to(memory_format=torch.channels_last)


def measured(name: str, objective: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    (x, labels), held, test = drawn(name, generator)
    classes = int(labels.max()) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(x, classes)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(Indexed(TensorDataset(x, labels)), 128, shuffle=True, generator=order, drop_last=True)
    epochs = EPOCHS[name]
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)
    try:
        train(model, loader, objective, epochs=epochs, classes=classes, schedule=schedule, seed=seed)
    except InputError as error:
        return {"refused": str(error)}
    calibration, before, learnt = (said(model.eval(), *part) for part in (held, test, (x, labels)))
    after = TemperatureScaling().fit_predictions(calibration).transform(before)
    return {
        "accuracy": before.accuracy,
        "training_accuracy": learnt.accuracy,
        "auc": auc(before),
        **{f"ece_{when}": float(expected_calibration_error(p.probs, p.labels)) for when, p in both(before, after)},
        **{f"log_loss_{when}": float(negative_log_likelihood(p.probs, p.labels)) for when, p in both(before, after)},
    }


def clocked(name: str, rounds: int = 25) -> dict[str, float]:
    """Milliseconds of the process for a step with each objective that takes these classes, medians."""
    generator = torch.Generator().manual_seed(0)
    x, labels = (part[:128] for part in drawn(name, generator)[0])
    classes, index = int(labels.max()) + 1, torch.arange(128)
    steps: dict[str, Callable[[], None]] = {}
    for objective, build in OBJECTIVES.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = network(x, classes)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        with suppress(InputError):
            made = build(Task(model, classes, 128, EPOCHS[name], 0))
            run = partial(step, model, made, optimizer, Batch(x, labels, index, 9))
            run()
            steps[objective] = run
    taken: dict[str, list[float]] = {objective: [] for objective in steps}
    for _ in range(rounds):
        for objective, run in steps.items():
            start = time.process_time()
            run()
            taken[objective].append(1000 * (time.process_time() - start))
    return {objective: statistics.median(times) for objective, times in taken.items()}


def step(model: nn.Module, objective: Objective, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    objective.loss(model, batch).backward()
    optimizer.step()
    objective.after(model)


def both(before: Predictions, after: Predictions) -> list[tuple[str, Any]]:
    return [("before", before), ("after", after)]


def said(model: nn.Module, x: Tensor, labels: Tensor) -> Predictions:
    with torch.no_grad():
        return Predictions(torch.cat([model(part) for part in x.split(500)]), labels)


def auc(predictions: Predictions) -> float:
    """The mean over classes of the area under the curve of each against the rest."""
    assert predictions.labels is not None
    return statistics.fmean(
        roc_auc(predictions.probs[:, k], predictions.labels == k) for k in range(predictions.probs.shape[1])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--clock", action="store_true")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--write", type=Path, default=Path("results/objectives"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * options.minutes
    for name in options.data:
        if name == "cifar10" and "TRIMTAB_DATA" not in os.environ:
            print("cifar10: left out, TRIMTAB_DATA names no data folder", flush=True)
            continue
        path = options.write / f"{name}.json"
        if options.clock:
            known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cells": {}}
            write_json(path, {**known, "milliseconds": clocked(name)})
            continue
        for seed in options.seeds:
            for objective in options.objectives:
                known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cells": {}}
                key = f"{objective} {seed}"
                if key in known["cells"]:
                    continue
                if time.monotonic() > end:
                    print("the time is up", flush=True)
                    return
                found = measured(name, objective, seed)
                versions = {package: metadata.version(package) for package in ("trimtab", "torch")}
                write_json(path, {**known, "data": name, "versions": versions, "cells": {**known["cells"], key: found}})
                told = found.get("refused") or (
                    f"accuracy {found['accuracy']:.3f}, log loss {found['log_loss_before']:.3f} to "
                    f"{found['log_loss_after']:.3f}"
                )
                print(f"{name}, seed {seed}: {objective}: {told}", flush=True)


if __name__ == "__main__":
    main()
