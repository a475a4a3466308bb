"""Time a batch of every adapter, beside the passes that its algorithm implies: a ResNet-20 and 200 CIFAR-sized images.

The limit is a plain forward pass, Tent's floor a hand-written loop: forward, entropy, backward, step. What an algorithm
implies is its number of forward passes times the first plus its number of backward passes times the difference of the
two, each as the adapter makes them (by the statistics of the batch or of the source, down to the normalisation layers
or to all weights), plus its augmentations. All run in turns on the same batch, so that a slow minute hits all; times
are the process's own, medians. Settings are such that every image is selected and every pass is made.

    python -m benchmarks.bench_adaptation [--rounds 9] [--batch 200] [--threads 1] [--adapters NAME ...]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cifar10 import ResNet
from trimtab.adaptation import ADAPTERS, Adapter, strong_augment
from trimtab.adaptation.destroy import shuffle_patches
from trimtab.core.modules import all_parameters, norm_parameters

GOAL = 1.10
WIDE: dict[str, dict[str, Any]] = {
    "EATA": {"e_margin": 10.0, "d_margin": 1.0},
    "DeYO": {"e_margin": 10.0, "plpd_margin": -1.0},
    "SAR": {"e_margin": 10.0},
    "CoTTA": {"confidence": 1.0},
    "PETAL": {"confidence": 1.0},
    "RoTTA": {"update_every": 200, "capacity": 200},
}
"""Settings under which every image is learnt from and every pass is made."""
SOURCE_STATISTICS = {"Source", "LAME", "AdaNPC"}
ALL_WEIGHTS = {"CoTTA", "PETAL", "RMT"}
PASSES = {"BatchNormAdapt": (1, 0), "RMT": (3, 2), "CoTTA": (34, 1), "PETAL": (34, 1)}
"""Where they differ from the most that an adapter declares: RMT without replay, batch statistics alone."""
VIEWS: dict[str, tuple[int, Callable[[Tensor, torch.Generator], Tensor]]] = {
    **{name: (views, strong_augment) for name, views in (("CoTTA", 32), ("PETAL", 32), ("RMT", 1), ("RoTTA", 1))},
    "DeYO": (1, shuffle_patches),
}
"""How many augmentations of the batch are made, and by what."""


def by_hand(
    model: nn.Module, chosen: Callable[[nn.Module], dict[str, nn.Parameter]], back: bool
) -> Callable[..., None]:
    """Tent as one would write it for this network alone; without `back`, its forward pass."""
    model = deepcopy(model).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    parameters = [parameter.requires_grad_(back) for parameter in chosen(model).values()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def step(x: Tensor) -> None:
        logits = model(x)
        if back:
            loss = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def seconds(step: Callable[..., Any], x: Tensor) -> float:
    start = time.process_time()
    step(x)
    return time.process_time() - start


def built(kind: type[Adapter], model: nn.Module, source: list[tuple[Tensor, Tensor]]) -> Adapter:
    settings = dict(WIDE.get(kind.__name__, {}))
    if kind.preparation == "required":
        settings["prepared"] = kind.prepare(model, source)
    return kind(model, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [kind.__name__ for kind in ADAPTERS]
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--adapters", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet().eval()
    x = torch.rand(options.batch, 3, 32, 32, generator=generator)
    skewed = (10 * torch.rand(options.batch, generator=generator).square()).long()
    source = [(x, skewed)]

    def plain(x: Tensor) -> None:
        with torch.no_grad():
            model(x)

    limits: dict[str, Callable[..., Any]] = {
        "plain": plain,
        "forward": by_hand(model, norm_parameters, back=False),
        "norms": by_hand(model, norm_parameters, back=True),
        "all": by_hand(model, all_parameters, back=True),
    }
    print(
        f"{options.batch} x 3 x 32 x 32, {options.threads} thread(s), medians of {options.rounds} rounds, goal {GOAL}"
    )
    print("adapter              ms   plain forward x   passes   implied ms   ratio")
    for kind in ADAPTERS:
        name = kind.__name__
        if name not in options.adapters:
            continue
        adapter = built(kind, model, source)
        views, augment = VIEWS.get(name, (0, strong_augment))
        steps = {**limits, "augment": partial(augment, generator=generator), "adapter": adapter}
        for step in steps.values():
            step(x)
        rounds = 3 if views > 1 else options.rounds
        taken = [{label: seconds(step, x) for label, step in steps.items()} for _ in range(rounds)]
        ms = {label: 1000 * statistics.median(times[label] for times in taken) for label in steps}
        forwards, backwards = PASSES.get(name, (kind.forwards, kind.backwards))
        forward = ms["plain"] if name in SOURCE_STATISTICS else ms["forward"]
        backward = ms["all" if name in ALL_WEIGHTS else "norms"] - ms["forward"]
        implied = forwards * forward + backwards * backward + views * ms["augment"]
        passes = f"{forwards:g} + {backwards:g}"
        print(
            f"{name:17s} {ms['adapter']:8.1f} {ms['adapter'] / ms['plain']:12.2f} {passes:>12s} {implied:12.1f} "
            f"{ms['adapter'] / implied:7.2f}{'' if ms['adapter'] <= GOAL * implied else '  above the goal'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
