"""Claim of UnMix-TNS: on streams whose labels are correlated it keeps what batch statistics lose, alone and below Tent.

One network of the synthetic world and two shifts, a gentle one (overlapping clusters) and a strong one. The maps are of
one pixel, so that an input has no variance of its own: a harsh case.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from trimtab.adaptation import Adapter, AlphaBN, BatchNormAdapt, Source, Tent, UnMixTNS, run_stream, unmix
from trimtab.claims.adaptation.world import World
from trimtab.claims.base import Claim, Expectation
from trimtab.data.streams import batches, sorted_by_label

SAMPLES, BATCH = 1500, 32
SHIFTS = {"gentle": (0.7, 0.35), "strong": (0.5, 0.5)}
ADAM = partial(torch.optim.Adam, lr=1e-3)

BUILDERS: dict[str, Callable[[nn.Module], Adapter]] = {
    "source": Source,
    "norm": BatchNormAdapt,
    "alpha": partial(AlphaBN, source_weight=0.5),
    "unmix": UnMixTNS,
    "tent": partial(Tent, optimizer=ADAM),
    "unmix + tent": lambda network: Tent(unmix(network), optimizer=ADAM),
}


def run(seed: int) -> dict[str, float]:
    """Accuracies under both shifts: sorted by class, sorted in batches of one, and in random order."""
    measured = {}
    for shift, (spread, mix) in SHIFTS.items():
        world = World(seed, spread)
        network, data = world.network(), world.samples(SAMPLES, world.domain(mix))
        by_class = sorted_by_label(data.tensors[1], world.generator)
        streams = {
            "sorted": (by_class, BATCH, BUILDERS.keys()),
            "one by one": (by_class, 1, ("unmix",)),
            "iid": (torch.arange(SAMPLES), BATCH, ("source", "norm", "unmix")),
        }
        for stream, (order, size, names) in streams.items():
            for name in names:
                predictions = run_stream(BUILDERS[name](network), batches(data, order, size))
                measured[f"accuracy({name}, {shift}, {stream})"] = predictions.accuracy
    return measured


CLAIM = Claim(
    slug="30-unmix-tns",
    statement="On a stream sorted by class UnMix-TNS is as accurate as the unadapted model where batch statistics "
    "collapse, down to batches of one; it keeps Tent from collapsing there, and does no harm on a random stream.",
    run=run,
    expectations=(
        *(
            expectation
            for shift in SHIFTS
            for expectation in (
                Expectation(
                    f"accuracy(unmix, {shift}, sorted)",
                    minus=f"accuracy(norm, {shift}, sorted)",
                    at_least=0.4,
                    every_seed=True,
                ),
                Expectation(
                    f"accuracy(unmix, {shift}, sorted)", minus=f"accuracy(source, {shift}, sorted)", at_least=-0.01
                ),
                Expectation(
                    f"accuracy(unmix, {shift}, one by one)", minus=f"accuracy(source, {shift}, sorted)", at_least=-0.01
                ),
                Expectation(
                    f"accuracy(unmix + tent, {shift}, sorted)",
                    minus=f"accuracy(tent, {shift}, sorted)",
                    at_least=0.4,
                    every_seed=True,
                ),
                Expectation(f"accuracy(unmix, {shift}, iid)", minus=f"accuracy(source, {shift}, iid)", at_least=0.0),
            )
        ),
    ),
    seeds=tuple(range(100, 130)),
    budget=200,
    reported={
        "setting": "error (%), severity 5, labels correlated in time (Dirichlet 0.1 and 0.01); numbers from memory",
        "CIFAR-10-C, WRN-28": {"source": 43.5, "norm": 75, "alpha": 40, "rotta": "25 to 30", "unmix": 27},
        "CIFAR-100-C, ResNeXt-29": {"source": 46.4, "norm": "> 80", "unmix": 39},
        "ImageNet-C, ResNet-50": {"source": 82, "unmix": 80},
    },
    notes=(
        "Measured first with the seeds 100 to 109: all means lay within the bounds, and five of the ten expectations "
        "were undecided; hence thirty seeds.",
        "The bound for every seed is missed by seed 119 alone. Its strong shift leaves the unadapted model 45.2 %; "
        "UnMix-TNS reaches 51.7 % and batch statistics 13.2 %, so that 40 points between them are out of reach.",
        "That UnMix-TNS is no worse than the unadapted model in random order is not shown: in the mean it is ahead by "
        "0.2 and 0.9 points, with intervals that reach below nought. Batch statistics are far ahead of both there.",
    ),
)
