"""Claim of SAR: on a label-sorted stream in batches of four, where Tent collapses, it gains on the source."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader

from trimtab.adaptation import SAR, Source, Tent, run_stream
from trimtab.claims.adaptation.world import World
from trimtab.claims.base import Claim, Expectation
from trimtab.data.streams import sorted_by_label

RATES = {"2e-2": 2e-2, "5e-2": 5e-2}


def run(seed: int) -> dict[str, float]:
    """Accuracies on one sorted stream at two learning rates, and of SAR with parts left out at the larger."""
    world = World(seed, spread=0.7)
    network = world.network(partial(nn.GroupNorm, 4))
    data = world.samples(1600, world.domain(0.35))
    stream = DataLoader(data, 4, sampler=sorted_by_label(data.tensors[1], world.generator).tolist())
    measured = {"accuracy(source)": run_stream(Source(network), stream).accuracy}
    for rate, lr in RATES.items():
        sgd = partial(torch.optim.SGD, lr=lr, momentum=0.9)
        sar = partial(SAR, network, optimizer=sgd)
        adapters = {"tent": Tent(network, optimizer=sgd), "sar": sar()}
        if rate == "5e-2":
            adapters |= {
                "sar as published": sar(reset_constant=0.2, legacy_recovery=True, skip_empty=False),
                "sar, no recovery": sar(reset_constant=0.0),
                "sar, not sharp": sar(rho=0.0),
                "sar, filter alone": sar(rho=0.0, reset_constant=0.0),
            }
        for name, adapter in adapters.items():
            measured[f"accuracy({name}, {rate})"] = run_stream(adapter, stream).accuracy
            if isinstance(adapter, SAR):
                measured[f"recoveries({name}, {rate})"] = int(adapter.resets)
    return measured


CLAIM = Claim(
    slug="18-sar",
    statement="On a label-sorted stream in batches of four, SAR is more accurate than the source model, and far more "
    "accurate than Tent, which collapses.",
    run=run,
    expectations=(
        *(
            Expectation(f"accuracy(sar, {rate})", minus="accuracy(source)", at_least=0.005, every_seed=True)
            for rate in RATES
        ),
        *(
            Expectation(f"accuracy(sar, {rate})", minus=f"accuracy(tent, {rate})", at_least=0.05, every_seed=True)
            for rate in RATES
        ),
        Expectation("accuracy(sar, 5e-2)", minus="accuracy(tent, 5e-2)", at_least=0.30),
        Expectation("accuracy(sar, no recovery, 5e-2)", minus="accuracy(sar, filter alone, 5e-2)", at_least=0.0),
    ),
    budget=120,
    reported={
        "setting": "ImageNet-C, severity 5, label-sorted stream, mean accuracy (%) over 15 corruptions",
        "ResNet-50 with group normalisation": {"source": 30.6, "tent": 22.0, "eata": 31.6, "sar": 37.2},
        "ViT-B": {"source": 29.9, "tent": 47.3, "eata": 49.9, "sar": 58.0},
    },
    notes=(
        "Fails on single seeds, not in the mean: on seed 100 Tent does not collapse at the smaller rate (94 %, SAR "
        "88 %), on seed 101 SAR loses three points to the source at the larger one. In the mean over seeds SAR is 7 "
        "and 5 points ahead of the source, 14 and 30 ahead of Tent.",
        "Recovery carries the gain here: at the larger rate SAR has 87 %, without recovery 48 %, with the filter alone "
        "57 %; Tent has 57 %. Sharpness does not help: the last line is its effect without recovery, and with recovery "
        "SAR is 2 points better without it.",
        "As published (reset at 0.2, again on every batch until the average has climbed) it has 86 %, and was reset "
        "after 124 to 355 of 400 batches; with the constant scaled to ten classes after 12 to 33.",
    ),
)
