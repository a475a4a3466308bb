"""Claim of CAFA: features come closer to their class relative to the others, and accuracy gains a little by it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trimtab.adaptation import CAFA, Adapter, BatchNormAdapt, Tent, run_stream
from trimtab.adaptation.cafa import distances
from trimtab.claims.adaptation.world import World
from trimtab.claims.base import Claim, Expectation
from trimtab.core import modules

BATCH, SAMPLES = 50, 3000


def run(seed: int) -> dict[str, float]:
    """Accuracies on one domain, and how far features are from their true class before and after."""
    world = World(seed, spread=0.5)
    network = world.network()
    prepared = CAFA.prepare(network, DataLoader(world.samples(2000), BATCH), covariance="class")
    stream = DataLoader(world.samples(SAMPLES, world.domain()), BATCH)
    adam = partial(torch.optim.Adam, lr=3e-3)
    cafa = CAFA(network, prepared, optimizer=adam)
    before = _mean_distances(cafa, cafa, stream)
    adapters = {
        "norm": BatchNormAdapt(network),
        "cafa": cafa,
        "cafa intra": CAFA(network, prepared, form="intra", optimizer=adam),
        "tent": Tent(network, optimizer=adam),
    }
    measured = {f"accuracy({name})": run_stream(adapter, stream).accuracy for name, adapter in adapters.items()}
    for name in ("cafa", "cafa intra"):
        intra, inter = _mean_distances(adapters[name], cafa, stream)
        measured[f"intra({name}) / intra(norm)"] = intra / before[0]
        measured[f"inter({name}) / inter(norm)"] = inter / before[1]
        measured[f"separation({name}) / separation(norm)"] = (inter / intra) / (before[1] / before[0])
    return measured


def _mean_distances(adapter: Adapter, cafa: CAFA, stream: DataLoader[tuple[Tensor, ...]]) -> tuple[float, float]:
    """Mean distance to the true class and to the others, as the adapter stands."""
    intra = inter = 0.0
    for x, y in stream:
        with adapter.frozen(), modules.watch_input(modules.head(adapter.model)) as seen:
            adapter(x)
        away = distances(seen[-1], cafa.means, cafa.whiten)
        own = away.gather(1, y[:, None])[:, 0]
        intra += float(own.sum())
        inter += float((away.sum(1) - own).sum() / (away.shape[1] - 1))
    return intra / SAMPLES, inter / SAMPLES


CLAIM = Claim(
    slug="11-cafa",
    statement="Aligning features with the source's Gaussian of their predicted class brings them closer to their true "
    "class relative to the other classes, and beats batch statistics alone.",
    run=run,
    expectations=(
        Expectation("accuracy(cafa)", minus="accuracy(norm)", at_least=0.002),
        Expectation("intra(cafa) / intra(norm)", at_most=1.0),
        Expectation("separation(cafa) / separation(norm)", at_least=1.0),
    ),
    seeds=tuple(range(100, 120)),
    budget=90,
    reported={
        "setting": "CIFAR-10-C, CIFAR-100-C, TinyImageNet-C, ImageNet-C (severity 5), OfficeHome, DomainNet",
        "accuracy": "above the source, batch statistics, Tent and global feature alignment on all six",
        "distances": "global alignment shortens both distances, CAFA shortens intra and lengthens inter",
    },
    notes=(
        "Twenty seeds, since five left the gain in accuracy undecided (+0.07 points; the bound is 0.2).",
        "Tried on the same seeds, gain over batch statistics in points: Adam at 1e-3, 3e-3, 1e-2 with batches of 50: "
        "0.00, -0.07, -0.62 (standard errors 0.03, 0.09, 0.23), Tent +0.27, +0.71, +1.57; with batches of 200: 0.02, "
        "0.03, -0.02, Tent +0.09, +0.22, +0.69. Tied and diagonal covariances do no better than by 0.35 points. Every "
        "feature is pulled to its predicted class, and a wrong prediction becomes the surer for it.",
        "The effect on the distances is the paper's: with the ratio, features come closer to their true class and go "
        "away from the others; with the first distance alone both shrink.",
    ),
)
