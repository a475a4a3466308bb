"""Claim of the baseline adapters: what each gains on a shifted stream, and where it breaks.

Four streams through one network: a shifted domain in random order, in batches that hold every class equally often, and
sorted by class; and four domains one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from trimtab.adaptation import LAME, Adapter, BatchNormAdapt, CoTTA, RoTTA, Source, Tent, run_stream
from trimtab.claims.adaptation.world import CLASSES, World, jitter
from trimtab.claims.base import Claim, Expectation
from trimtab.data.streams import batches, sorted_by_label

BATCH = 50
ADAM = partial(torch.optim.Adam, lr=1e-2)

BUILDERS: dict[str, Callable[[nn.Module], Adapter]] = {
    "source": Source,
    "norm": BatchNormAdapt,
    "tent": partial(Tent, optimizer=ADAM),
    "lame": LAME,
    "rotta": partial(RoTTA, augment=jitter),
    "cotta": partial(CoTTA, optimizer=ADAM, augment=jitter),
}


def run(seed: int) -> dict[str, float]:
    """Accuracy of the adapters on each stream."""
    world = World(seed, spread=0.5)
    network, domain = world.network(), world.domain()
    long, short = world.samples(4000, domain), world.samples(1500, domain)
    domains = [world.samples(1500, world.domain()) for _ in range(4)]
    streams: dict[str, tuple[TensorDataset, Tensor, str]] = {
        "iid": (long, torch.arange(4000), "source norm tent"),
        "balanced": (long, _balanced(long.tensors[1]), "norm tent"),
        "short iid": (short, torch.arange(1500), "source lame"),
        "sorted": (short, sorted_by_label(short.tensors[1], world.generator), "source norm tent lame rotta"),
    }
    measured = {
        f"accuracy({name}, {stream})": _accuracy(BUILDERS[name](network), data, order)
        for stream, (data, order, names) in streams.items()
        for name in names.split()
    }
    for name in ("norm", "tent", "cotta"):
        adapter = BUILDERS[name](network)
        accuracies = [_accuracy(adapter, data, torch.arange(len(data))) for data in domains]
        measured[f"accuracy({name}, fourth domain)"] = accuracies[-1]
    return measured


def _accuracy(adapter: Adapter, data: TensorDataset, order: Tensor) -> float:
    return run_stream(adapter, batches(data, order, BATCH)).accuracy


def _balanced(labels: Tensor) -> Tensor:
    """An order in which every batch holds all classes equally often; what is left over is dropped."""
    by_class = [(labels == c).nonzero()[:, 0] for c in range(CLASSES)]
    share = BATCH // CLASSES
    whole = min(len(rows) for rows in by_class) // share
    return torch.stack([rows[: whole * share].view(whole, share) for rows in by_class], 1).flatten()


CLAIM = Claim(
    slug="00-tta-baselines",
    statement="Under a shift, batch statistics beat the unadapted model and Tent beats batch statistics while classes "
    "are well mixed; on a stream sorted by class both collapse, RoTTA does not, and LAME gains.",
    run=run,
    expectations=(
        Expectation("accuracy(norm, iid)", minus="accuracy(source, iid)", at_least=0.08),
        Expectation("accuracy(norm, iid)", minus="accuracy(source, iid)", at_least=0.0, every_seed=True),
        Expectation("accuracy(tent, iid)", minus="accuracy(norm, iid)", at_least=0.015),
        Expectation("accuracy(tent, iid)", minus="accuracy(norm, iid)", at_least=0.0, every_seed=True),
        Expectation("accuracy(tent, balanced)", minus="accuracy(norm, balanced)", at_least=0.015),
        Expectation("accuracy(tent, balanced)", minus="accuracy(norm, balanced)", at_least=0.0, every_seed=True),
        Expectation("accuracy(lame, short iid)", minus="accuracy(source, short iid)", at_most=0.0),
        Expectation("accuracy(lame, sorted)", minus="accuracy(source, sorted)", at_least=0.03),
        Expectation("accuracy(norm, sorted)", minus="accuracy(source, sorted)", at_most=-0.4),
        Expectation("accuracy(tent, sorted)", minus="accuracy(source, sorted)", at_most=-0.4),
        Expectation("accuracy(rotta, sorted)", minus="accuracy(norm, sorted)", at_least=0.3),
        Expectation("accuracy(cotta, fourth domain)", minus="accuracy(tent, fourth domain)", at_least=0.0),
    ),
    seeds=tuple(range(100, 110)),
    budget=60,
    reported={
        "setting": "mean error (%) over 15 corruptions at severity 5, continual, never reset",
        "CIFAR-10-C, WRN-28": {"source": 43.5, "norm": 20.4, "tent": 20.0, "cotta": 16.5, "rotta": 19.3, "lame": 64.3},
        "ImageNet-C, ResNet-50": {
            "source": 82.0,
            "norm": 68.6,
            "tent": 62.6,
            "cotta": 63.1,
            "rotta": 67.3,
            "lame": 93.5,
        },
        "CIFAR-10-C, label-correlated, RN-26 GN": {
            "source": 32.7,
            "tent": 87.6,
            "cotta": 44.5,
            "rotta": 33.7,
            "lame": 11.3,
        },
        "source of the numbers": "mariodoebler/test-time-adaptation",
    },
    notes=(
        "On the random stream Tent does not gain with every seed: in batches of 50 some classes come twice as often as "
        "others by chance, and Tent learns that. Where every batch holds the classes equally often (balanced), it "
        "gains with every seed. Tried besides, on the random stream with seeds 100 to 115: learning rates 1e-3, 3e-3 "
        "and 1e-2 gain 0.4, 0.9 and 1.9 points in the mean; 1, 2 and 3 of the 16 seeds lose.",
        "CoTTA and Tent end alike on the fourth domain at learning rate 1e-2. Tried besides, with seeds 100 to 107 and "
        "8 augmentations: at 3e-2, where Tent begins to suffer, CoTTA ends 0.9 points ahead, and 1.9 with clusters of "
        "spread 0.7; five rounds through the domains change little.",
        "With half the offset between the domains the unadapted model keeps 87 % instead of 77 %; what batch "
        "statistics and Tent reach stays the same, as batch statistics take an offset out.",
    ),
)
