"""Objectives that are parts of a loop: the Z-loss's output layer as classes grow, and a step with SAF and with MESA.

The layer is `FactoredOutput` beside a dense one, both with plain gradient descent: a step of 64 examples with 128
features, with the memory that it needs beyond the weights. SAF and MESA are beside the plain step (forward, backward,
SGD) of a small convolutional network on 64 images of 3 x 32 x 32; MESA's limit is that step and a forward pass of its
average. Times are the process's own, medians of steps in turns.

    python -m benchmarks.bench_loops [--turns 9] [--threads 1] [--only layer steps]
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bench_losses import medians, peak, run
from trimtab.losses import MESA, SAF, ZLoss
from trimtab.nn import FactoredOutput

N, FEATURES = 64, 128
CLASSES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
SAF_GOAL, MESA_GOAL, CONSTANT = 1.1, 1.2, 1.5


def layer(turns: int) -> None:
    """A step of the output layer for 10 000 to a million classes."""
    print("classes     factored ms      MiB     dense ms      MiB   dense / factored")
    first = None
    for classes in CLASSES:
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(N, FEATURES, generator=generator)
        labels = torch.randint(classes, (N,), generator=generator)
        loss = ZLoss()
        factored = FactoredOutput(FEATURES, classes, std=0.1)
        weight = factored.weight().requires_grad_()

        def by_factors() -> Tensor:
            x = h.clone().requires_grad_()  # noqa: B023
            value = factored.step(x, labels, loss.of_sums, lr=0.01)  # noqa: B023
            return torch.autograd.grad(value, x)[0]

        def dense() -> Tensor:
            x = h.clone().requires_grad_()  # noqa: B023
            gradient, slope = torch.autograd.grad(loss(x @ weight.T, labels), [x, weight])  # noqa: B023
            with torch.no_grad():
                weight.sub_(slope, alpha=0.01)  # noqa: B023
            return gradient

        a, b = by_factors(), dense()
        assert (a - b).abs().max() < 1e-4 * b.abs().max(), classes
        moved = (factored.weight()[labels] - weight[labels]).abs().max() / weight.abs().max()
        assert moved < 1e-5, (classes, moved)
        times = medians({"factored": by_factors}, 3 * turns) | medians({"dense": dense}, 3)
        first = first or times["factored"]
        slow = "" if times["factored"] <= CONSTANT * first else f"   above the goal: {CONSTANT} times the first"
        print(
            f"{classes:9d} {1e3 * times['factored']:12.3f} {peak(by_factors) / 2**20:8.2f} "
            f"{1e3 * times['dense']:12.2f} {peak(dense) / 2**20:8.1f} {times['dense'] / times['factored']:12.0f}{slow}",
            flush=True,
        )


def convolutions() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = (3, 32, 32, 64, 64)
        layers = [
            part
            for i, (a, b) in enumerate(pairwise(widths))
            for part in (nn.Conv2d(a, b, 3, stride=1 + i % 2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def steps(turns: int) -> None:
    """A step with SAF and with MESA, by the plain step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(N, 3, 32, 32, generator=generator)
    y, index = torch.randint(10, (N,), generator=generator), torch.arange(N)
    network = convolutions()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    saf = SAF(samples=N, classes=10, start=1, lookback=1)
    mesa = MESA(network, start=0)
    epochs = iter(range(1, 10**9))

    def step(objective: Callable[[Tensor], Tensor]) -> None:
        loss = objective(network(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def with_mesa(half: bool) -> None:
        def objective(logits: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                return mesa(logits, y, x, epoch=1)

        step(objective)
        mesa.update(network)

    def plain() -> None:
        step(lambda logits: F.cross_entropy(logits, y))

    def with_a_pass() -> None:
        plain()
        with torch.no_grad():
            mesa.average(x)

    runs: dict[str, Callable[[], None]] = {
        "plain": plain,
        "SAF": lambda: step(lambda logits: saf(logits, y, index, epoch=next(epochs))),
        "plain, and a pass": with_a_pass,
        "MESA": lambda: with_mesa(half=False),
        "MESA under autocast": lambda: with_mesa(half=True),
    }
    goals = {"SAF": SAF_GOAL, "MESA": MESA_GOAL, "MESA under autocast": MESA_GOAL}
    times = medians(runs, 3 * turns)
    for name, seconds in times.items():
        ratio = seconds / times["plain"]
        slow = "" if ratio <= goals.get(name, ratio) else f"   above the goal {goals[name]}"
        print(f"{name:22s} {1e3 * seconds:10.2f} ms {ratio:8.3f} of the plain step{slow}", flush=True)


def main() -> None:
    run(__doc__, (layer, steps))


if __name__ == "__main__":
    main()
