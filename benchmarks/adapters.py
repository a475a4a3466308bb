"""Which adapter for what: all of them over corruptions, streams and batch sizes, with ResNet-20 on CIFAR-10.

Part A: 15 corruptions at severity 5, iid, batches of 200, 2 000 images.
Part B: four of them (noise, blur, contrast, JPEG), 1 000 images each, as Dirichlet-correlated and sorted streams in
batches of 64, and iid in batches of 16 and of 1; and all four together, 250 images each, mixed and one after the other.
Part C: ResNet-56 on the four, iid, batches of 200, 1 000 images.

Each of three seeds draws its images, their corruption and their order. Without the data folder that ``TRIMTAB_DATA``
names, Fashion-MNIST takes the place of CIFAR-10, with a network that is trained on the spot and without part C.

Everything runs with its defaults, but for two things: learning rates are those of batches of 200 and are scaled by the
size of the batch; what must be known of the source comes from 2 000 training images (ITTA trains on them, for 300
steps of 32). One file an adapter is rewritten after every cell, so that a run that was killed goes on.

    python -m benchmarks.adapters [--parts A B C] [--adapters NAME ...] [--seeds 0 1 2] [--minutes M] [--write FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.cifar10 import data_folder, resnet
from trimtab.adaptation import ADAPTERS, ITTA, Adapter, Guard, Prepared, PriorShiftCorrection, Tent, steps
from trimtab.core.checks import InputError
from trimtab.core.persist import write_json
from trimtab.core.predictions import Predictions
from trimtab.data import CORRUPTIONS, corrupt, fashion_mnist, parquet_images
from trimtab.data.streams import batches, continual, dirichlet, iid, mixed, sorted_by_label
from trimtab.metrics import expected_calibration_error, negative_log_likelihood

SEVERITY, SOURCE = 5, 2000
FOUR = ("gaussian_noise", "defocus_blur", "contrast", "jpeg_compression")
PARTS = "ABC"
MAIN = {"cifar10": "resnet20", "fashion": "small"}


@dataclass(frozen=True)
class Cell:
    """One run of an adapter along a stream."""

    part: str
    network: str
    corruption: str
    stream: str
    batch: int
    images: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.part} {self.network} {self.corruption} {self.stream} {self.batch} {self.seed}"


def cells(world: str, parts: str, seeds: list[int]) -> Iterator[Cell]:
    network = MAIN[world]
    for seed in seeds:
        if "A" in parts:
            for corruption in CORRUPTIONS:
                yield Cell("A", network, corruption, "iid", 200, 2000, seed)
        if "B" in parts:
            for stream in ("mixed", "continual"):
                yield Cell("B", network, "all four", stream, 64, 1000, seed)
            for stream, batch in (("dirichlet", 64), ("sorted", 64), ("iid", 16), ("iid", 1)):
                for corruption in FOUR:
                    yield Cell("B", network, corruption, stream, batch, 1000, seed)
        if "C" in parts and world == "cifar10":
            for corruption in FOUR:
                yield Cell("C", "resnet56", corruption, "iid", 200, 1000, seed)


@cache
def test_images(world: str) -> tuple[Tensor, Tensor]:
    data = parquet_images(data_folder() / "cifar10", "test") if world == "cifar10" else fashion_mnist("test")
    return data.tensor(), data.labels


@cache
def source(world: str, batch: int = 200) -> list[tuple[Tensor, Tensor]]:
    """Labelled training images, in batches."""
    data = parquet_images(data_folder() / "cifar10", "train") if world == "cifar10" else fashion_mnist("train")
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))[:SOURCE]
    images = torch.as_tensor(data.images)[chosen].float() / 255
    return list(zip(images.split(batch), data.labels[chosen].split(batch)))


@cache
def network(name: str) -> nn.Module:
    """In the channels-last format, in which a forward pass takes three quarters of the time on a CPU."""
    model = small() if name == "small" else resnet(int(name.removeprefix("resnet")))
    return model.to(memory_format=torch.channels_last)


def small() -> nn.Module:
    """A network for Fashion-MNIST, trained for two epochs."""
    data = fashion_mnist("train")
    images, labels = data.tensor(), data.labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(2):
            for chosen in torch.randperm(len(labels)).split(128):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
    return model.eval()


def loader(world: str, cell: Cell) -> Any:
    images, labels = test_images(world)
    generator = torch.Generator().manual_seed(1000 + cell.seed)
    chosen = torch.randperm(len(labels), generator=generator)[: cell.images]
    if cell.corruption == "all four":
        parts = chosen.chunk(len(FOUR))
        domains = [
            TensorDataset(corrupt(images[part], name, SEVERITY, generator), labels[part])
            for name, part in zip(FOUR, parts)
        ]
        orders = [iid(len(part), generator) for part in parts]
        order = mixed(orders, generator) if cell.stream == "mixed" else continual(orders)
        return batches(domains, order, cell.batch)
    shown = corrupt(images[chosen], cell.corruption, SEVERITY, generator)
    order = {
        "iid": lambda: iid(len(chosen), generator),
        "dirichlet": lambda: dirichlet(labels[chosen], 0.1, generator),
        "sorted": lambda: sorted_by_label(labels[chosen], generator),
    }[cell.stream]()
    return batches(TensorDataset(shown, labels[chosen]), order, cell.batch)


def guarded(model: nn.Module) -> Adapter:
    """Tent, watched for collapse."""
    return Tent(model, guard=Guard(every=1, memory=200))


def corrected(model: nn.Module) -> Adapter:
    """The source's classes are balanced: what the trained label shift adapter refuses to learn from."""
    return PriorShiftCorrection(model, torch.ones(10))


CONTENDERS: dict[str, Callable[..., Adapter]] = {
    **{kind.__name__: kind for kind in ADAPTERS},
    "Tent, guarded": guarded,
    "PriorShiftCorrection": corrected,
    "ITTA": ITTA,
}
BLOCKS = {"small": ("2", "5", "8")}


def built(world: str, cell: Cell, name: str) -> Adapter:
    kind = CONTENDERS[name]
    adapter = kind(network(cell.network), **prepared(world, cell.network, kind))
    if adapter.optimizer is not None:
        for group in adapter.optimizer.param_groups:
            group["lr"] *= cell.batch / 200
    return adapter


def prepared(world: str, name: str, kind: Any) -> dict[str, Prepared]:
    """What `kind` must know of the source, made once and kept in ``out/prepared``."""
    if getattr(kind, "preparation", "none") == "none":
        return {}
    path = Path("out/prepared") / f"{world}-{name}-{kind.__name__}.safetensors"
    if not path.is_file():
        more = {"blocks": BLOCKS.get(name, ("layer1", "layer2", "layer3")), "steps": 300} if kind is ITTA else {}
        kind.prepare(network(name), source(world, 32 if kind is ITTA else 200), **more).save(path)
    return {"prepared": Prepared.load(path)}


def measured(world: str, cell: Cell, name: str) -> dict[str, Any]:
    try:
        adapter = built(world, cell, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = list(steps(adapter, loader(world, cell)))
    except InputError as error:
        return {"refused": str(error)}
    said = Predictions(torch.cat([step.outputs for step in done]), torch.cat([step.labels for step in done]))
    return {
        "accuracy": said.accuracy,
        "ece": float(expected_calibration_error(said.probs, said.labels)),
        "log_loss": float(negative_log_likelihood(said.probs, said.labels)),
        "milliseconds": 1000 * statistics.median(step.seconds for step in done),
        "forward": 1000 * forward(network(cell.network), next(iter(loader(world, cell)))[0]),
        "extra_mb": (held(adapter) - held(network(cell.network))) / 1e6,
        "updates": int(adapter.updates),
        "skipped": int(adapter.skipped),
        "resets": int(adapter.resets),
    }


def forward(model: nn.Module, x: Tensor, times: int = 5) -> float:
    """Seconds of a plain forward pass, the median of some."""
    taken = []
    with torch.no_grad():
        for _ in range(times):
            start = time.perf_counter()
            model(x)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def held(module: nn.Module) -> int:
    """Bytes of all that a module remembers, an optimizer's state included."""
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--adapters", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--write", type=Path, default=Path("results/adapters"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = "cifar10" if "TRIMTAB_DATA" in os.environ else "fashion"
    end = time.monotonic() + 60 * options.minutes
    todo = [(cell, name) for cell in cells(world, "".join(options.parts), options.seeds) for name in options.adapters]
    for number, (cell, name) in enumerate(todo, 1):
        path = options.write / world / f"{name}.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cells": {}}
        if cell.name in known["cells"]:
            continue
        if time.monotonic() > end:
            print("the time is up", flush=True)
            return
        found = measured(world, cell, name)
        versions = {package: metadata.version(package) for package in ("trimtab", "torch")}
        write_json(path, {"adapter": name, "versions": versions, "cells": {**known["cells"], cell.name: found}})
        told = found.get("refused") or f"{found['accuracy']:.3f}, {found['milliseconds']:.0f} ms a batch"
        print(f"{number}/{len(todo)} {cell.name}: {name} {told}", flush=True)


if __name__ == "__main__":
    main()
