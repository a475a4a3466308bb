"""Claim of CAFA: features come closer to their class relative to the others, and accuracy gains a little by it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
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
    source = DataLoader(world.samples(2000), BATCH)
    stream = DataLoader(world.samples(SAMPLES, world.domain()), BATCH)
    by_class, tied = (CAFA.prepare(network, source, covariance=kind) for kind in ("class", "tied"))
    adam = {lr: partial(torch.optim.Adam, lr=lr) for lr in (3e-3, 1e-2)}
    cafa = CAFA(network, by_class, optimizer=adam[3e-3])
    before = _ratios(cafa, cafa, stream)
    adapters = {
        "norm": BatchNormAdapt(network),
        "cafa": cafa,
        "cafa tied": CAFA(network, tied, optimizer=adam[3e-3]),
        "cafa intra": CAFA(network, by_class, form="intra", optimizer=adam[3e-3]),
        "tent": Tent(network, optimizer=adam[3e-3]),
        "cafa fast": CAFA(network, by_class, optimizer=adam[1e-2]),
        "tent fast": Tent(network, optimizer=adam[1e-2]),
    }
    measured = {f"accuracy({name})": run_stream(adapter, stream).accuracy for name, adapter in adapters.items()}
    for name in ("cafa", "cafa intra"):
        intra, inter = _ratios(adapters[name], cafa, stream)
        measured[f"intra({name}) / intra(norm)"] = intra / before[0]
        measured[f"inter({name}) / inter(norm)"] = inter / before[1]
        measured[f"separation({name}) / separation(norm)"] = (inter / intra) / (before[1] / before[0])
    return measured


def _ratios(adapter: Adapter, cafa: CAFA, stream: DataLoader[tuple[Tensor, ...]]) -> tuple[float, float]:
    """Mean distance to the true class and to the others, as the adapter stands."""
    head: nn.Module = modules.head(adapter.model)
    intra = inter = 0.0
    for x, y in stream:
        with adapter.frozen(), modules.watch_input(head) as seen:
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
    budget=60,
    reported={
        "setting": "CIFAR-10-C, CIFAR-100-C, TinyImageNet-C, ImageNet-C (severity 5), OfficeHome, DomainNet",
        "accuracy": "above the source, batch statistics, Tent and global feature alignment on all six",
        "distances": "global alignment shortens both distances, CAFA shortens intra and lengthens inter",
    },
    notes=(),
)
