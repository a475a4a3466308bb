"""Claim of `trimtab.losses.Mixup` and `DMixup`: where classes overlap, they beat a network that is right by heart.

Ten Gaussian classes of which each pair shares a centre that a share of both comes from, so that the labels there are
coin flips; two wide Gaussians in 300 dimensions; and, without overlap, handwritten digits. A perceptron is trained on
each, and a temperature fitted afterwards, to the optimum and as the paper's code does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trimtab.calibration import TemperatureScaling
from trimtab.claims.base import Claim, Expectation
from trimtab.claims.losses.training import Split, batches, mlp
from trimtab.data.sources import digits
from trimtab.losses import DMixup, Mixup
from trimtab.metrics import expected_calibration_error

CLASSES, DIMENSIONS, DEVIATION = 10, 20, 0.5
BATCH, BINS = 250, 15
OVERLAPS = (0.5, 0.8)


def run(seed: int) -> dict[str, float]:
    """Log loss and calibration error, as trained and with temperatures, of ordinary training and both mixtures."""
    generator = torch.Generator().manual_seed(seed)
    measured: dict[str, float] = {}
    worlds = {f"overlap {share}": (overlapping(share, generator), 500, 120) for share in OVERLAPS}
    worlds["gaussians"] = gaussians(0.05, generator), 1000, 60
    worlds["digits"] = _digits(generator), 300, 120
    for world, (split, held_out, epochs) in worlds.items():
        for name, loss in _losses(seed).items():
            logits = _logits(loss, split, epochs, torch.Generator().manual_seed(seed))
            measured |= {f"{key}({name}, {world})": v for key, v in _measured(logits, split.y_test, held_out).items()}
        for key in ("nll", "ece"):
            ratio = measured[f"{key}(mixup, {world})"] / measured[f"{key}(erm, {world})"]
            measured[f"{key}(mixup) / {key}(erm), {world}"] = ratio
    return measured


def overlapping(share: float, generator: torch.Generator) -> Split:
    """Classes 2j and 2j + 1 have a centre each, and one in common that a `share` of both comes from."""
    own = torch.randn(CLASSES, DIMENSIONS, generator=generator)
    common = torch.randn(CLASSES // 2, DIMENSIONS, generator=generator)

    def drawn(n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(CLASSES, (n,), generator=generator)
        shared = torch.rand(n, 1, generator=generator) < share
        centre = torch.where(shared, common[y // 2], own[y])
        return centre + DEVIATION * torch.randn(n, DIMENSIONS, generator=generator), y

    return Split(*drawn(800), *drawn(500 + 4000))


def gaussians(shift: float, generator: torch.Generator) -> Split:
    """Two classes in 300 dimensions, `shift` apart in each: the paper's."""

    def drawn(n: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(2, (n,), generator=generator)
        return torch.randn(n, 300, generator=generator) + shift * y[:, None], y

    return Split(*drawn(4000), *drawn(1000 + 1000))


def _digits(generator: torch.Generator) -> Split:
    images = digits()
    images = images[torch.randperm(len(images), generator=generator)]
    x, y = images.tensor().flatten(1), images.labels
    return Split(x[:800], y[:800], x[800:], y[800:])


def _losses(seed: int) -> dict[str, DMixup]:
    def chance() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    return {
        "erm": DMixup(points=1, generator=chance()),
        "mixup": Mixup(generator=chance()),
        "dmixup": DMixup(points=4, generator=chance()),
    }


def _logits(loss: DMixup, split: Split, epochs: int, generator: torch.Generator) -> Tensor:
    """What a perceptron trained with the loss says of the inputs to fit a temperature and to test on."""
    model = mlp(split.x.shape[1], 128, 128, int(split.y.max()) + 1, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in batches(len(split.x), BATCH, generator):
            mixed = loss.mix(split.x[rows])
            optimizer.zero_grad()
            loss(model(mixed.inputs), split.y[rows], mixed).backward()
            optimizer.step()
    with torch.no_grad():
        logits: Tensor = model(split.x_test)
    return logits


def _measured(logits: Tensor, labels: Tensor, held_out: int) -> dict[str, float]:
    """On what is left after the first rows, which temperatures are fitted to."""
    fit, test = (logits[:held_out], labels[:held_out]), (logits[held_out:], labels[held_out:])
    measured = {}
    for key, temperature in (
        ("", torch.ones(())),
        (" after TS", TemperatureScaling().fit(*fit).temperature),
        (" after legacy TS", TemperatureScaling(legacy=True).fit(*fit).temperature),
    ):
        scaled = test[0] / temperature
        measured[f"nll{key}"] = float(cross_entropy(scaled, test[1]))
        measured[f"ece{key}"] = expected_calibration_error(scaled.softmax(1), test[1], BINS)
    return measured


CLAIM = Claim(
    slug="04-ts-limitations",
    statement="With overlapping classes Mixup has a lower log loss and at most 0.7 times the calibration error of "
    "ordinary training, both as trained; without overlap its calibration is worse.",
    run=run,
    expectations=(
        *(Expectation(f"ece(mixup) / ece(erm), overlap {share}", at_most=0.7) for share in OVERLAPS),
        *(
            Expectation(f"nll(mixup, overlap {share})", minus=f"nll(erm, overlap {share})", at_most=0.0)
            for share in OVERLAPS
        ),
        Expectation("nll(mixup) / nll(erm), gaussians", at_most=0.6),
        Expectation("ece(mixup, digits)", minus="ece(erm, digits)", at_least=0.0),
    ),
    budget=100,
    reported={
        "Gaussians (ResNeXt-50), CIFAR-10, CIFAR-100, SVHN with noisy labels": "lower log loss and calibration error "
        "than ordinary training with temperature scaling, the more so the noisier",
    },
    notes=(
        "The paper's headline, that Mixup is ahead of ordinary training even after temperature scaling, is not "
        "claimed: it rests on a temperature fit that stops close to 1. The figures after a fit to the optimum, and "
        "after theirs, stand beside.",
    ),
)
