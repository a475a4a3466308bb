"""Claim of `trimtab.losses.EnsLoss`: it generalises better than the hinge loss, and about as well as the logistic loss.

Perceptrons with batch normalisation learn pairs of similar classes of Fashion-MNIST at 14 x 14 pixels, from 512 images
of which a tenth has the wrong label, until they know all of them by heart.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits
from torch.nn.utils import clip_grad_norm_

from trimtab.claims.base import Claim, Expectation
from trimtab.claims.losses.training import batches, mlp
from trimtab.data.sources import fashion_mnist
from trimtab.losses import EnsLoss

PAIRS = ((2, 6), (2, 4), (0, 6), (4, 6))
TRAIN, FLIPPED, EPOCHS, BATCH = 512, 0.1, 60, 128
Loss = Callable[[Tensor, Tensor], Tensor]


def run(seed: int) -> dict[str, float]:
    """Accuracy on the clean test images, averaged over the pairs, and how often EnsLoss is ahead."""
    accuracies = torch.tensor([_accuracies(pair, seed) for pair in PAIRS], dtype=torch.float64)
    bce, hinge, exponential, ensloss = accuracies.unbind(1)
    return {
        "accuracy(bce)": float(bce.mean()),
        "accuracy(hinge)": float(hinge.mean()),
        "accuracy(exponential)": float(exponential.mean()),
        "accuracy(ensloss)": float(ensloss.mean()),
        "wins(ensloss, hinge)": float((ensloss > hinge).double().mean()),
        "wins(ensloss, bce)": float((ensloss > bce).double().mean()),
    }


def _accuracies(pair: tuple[int, int], seed: int) -> list[float]:
    """Of the logistic, the hinge, the exponential loss and EnsLoss, from the same start and the same batches."""
    generator = torch.Generator().manual_seed(seed)
    x, y = _images("train", pair)
    chosen = torch.randperm(len(x), generator=generator)[:TRAIN]
    flipped = torch.rand(TRAIN, generator=generator) < FLIPPED
    x, y = x[chosen], torch.where(flipped, 1 - y[chosen], y[chosen])
    x_test, y_test = _images("test", pair)
    start = generator.get_state()
    found = []
    for loss, clip in (
        (binary_cross_entropy_with_logits, None),
        (_hinge, None),
        (_exponential, 10.0),
        (EnsLoss(generator=torch.Generator().manual_seed(seed)), None),
    ):
        scores = _scores(x, y, x_test, loss, clip, generator.set_state(start))
        found.append(float(((scores > 0) == (y_test > 0)).float().mean()))
    return found


def _scores(x: Tensor, y: Tensor, x_test: Tensor, loss: Loss, clip: float | None, generator: torch.Generator) -> Tensor:
    """What a network that was trained with the loss says of the test images."""
    network = mlp(x.shape[1], 128, 128, 128, 1, generator=generator, norm=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for rows in batches(TRAIN, BATCH, generator):
            optimizer.zero_grad()
            loss(network(x[rows])[:, 0], y[rows]).backward()
            if clip is not None:
                clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        scores: Tensor = network.eval()(x_test)[:, 0]
    return scores


def _hinge(scores: Tensor, labels: Tensor) -> Tensor:
    return (1 - (2 * labels - 1) * scores).relu().mean()


def _exponential(scores: Tensor, labels: Tensor) -> Tensor:
    return (-(2 * labels - 1) * scores).exp().mean()


def _images(part: str, pair: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The images of two classes in -1..1, pooled, and whether they are of the second."""
    images = fashion_mnist("train" if part == "train" else "test")
    images = images[(images.labels == pair[0]) | (images.labels == pair[1])]
    return 2 * avg_pool2d(images.tensor(), 2).flatten(1) - 1, (images.labels == pair[1]).float()


CLAIM = Claim(
    slug="22-ensloss",
    statement="In networks that learn noisy labels by heart, EnsLoss generalises better than the hinge loss and no "
    "worse than the logistic loss.",
    run=run,
    expectations=(
        Expectation("accuracy(ensloss)", minus="accuracy(hinge)", at_least=0.005),
        Expectation("wins(ensloss, hinge)", at_least=8 / 12),
        Expectation("accuracy(ensloss)", minus="accuracy(bce)", at_least=-0.005),
    ),
    budget=300,
    reported={
        "45 pairs of CIFAR-10, ResNet-50, EnsLoss better / no different / worse": {
            "than BCE": "42 / 3 / 0",
            "than the hinge loss": "43 / 2 / 0",
            "than the exponential loss": "45 / 0 / 0",
        },
        "CIFAR-10 cats and dogs, VGG16, accuracy": {"BCE": 0.7736, "hinge": 0.7813, "EnsLoss": 0.8113},
        "Bioresponse, TabMLP3, accuracy": {"BCE": 0.7821, "hinge": 0.7602, "EnsLoss": 0.7782},
    },
    notes=(
        "Undecided: the means meet the bounds (0.7 points above the hinge loss, ahead in 15 of 20 runs), their "
        "intervals reach below. It is ahead of the hinge loss with every seed.",
        "The paper's gain over the logistic loss is not claimed: in perceptrons of this size it does not appear, nor "
        "in the authors' own on Bioresponse.",
    ),
)
