"""Claim of `trimtab.calibration.CorrectnessAware`: on shifted images its confidence tells right from wrong better.

A small network learns 6000 images of Fashion-MNIST; the calibrators see 5000 others and three transformed versions of
each (turned by 15 degrees, blurred, less contrast), and are measured on 5000 more: as they are, with noise, and turned.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.calibration import CorrectnessAware, TemperatureScaling
from trimtab.claims.base import Claim, Expectation
from trimtab.data.sources import fashion_mnist
from trimtab.metrics import expected_calibration_error, roc_auc

TRAIN, FIT, TEST, EPOCHS, BINS = 6000, 5000, 5000, 25, 25


def run(seed: int) -> dict[str, float]:
    """Calibration error, top-label Brier score and AUROC of right against wrong, on each set under each calibrator."""
    generator = torch.Generator().manual_seed(seed)
    images = fashion_mnist("train")
    images = images[torch.randperm(len(images), generator=generator)[: TRAIN + FIT + TEST]]
    x, y = images.tensor(), images.labels
    network = _trained(x[:TRAIN], y[:TRAIN], generator)
    fit, test = slice(TRAIN, TRAIN + FIT), slice(TRAIN + FIT, None)
    logits, views = _scores(network, x[fit])
    temperature = TemperatureScaling().fit(logits, y[fit])
    with_views = {
        "ce": CorrectnessAware(loss="ce", seed=seed),
        "ca": CorrectnessAware(seed=seed),
        "ca balanced": CorrectnessAware(balance=True, seed=seed),
    }
    for calibrator in with_views.values():
        calibrator.fit(logits, y[fit], views=views)

    noise = 0.25 * torch.randn(x[test].shape, generator=generator)
    sets = {"in": x[test], "noise": (x[test] + noise).clamp(0, 1), "turned": _turned(x[test], 25)}
    measured = {}
    for name, shown in sets.items():
        logits, views = _scores(network, shown)
        probs = {"none": logits.softmax(1), "ts": temperature(logits).exp()}
        probs |= {kind: calibrator(logits, views=views).exp() for kind, calibrator in with_views.items()}
        for kind, p in probs.items():
            confidence, predicted = p.max(1)
            right = predicted == y[test]
            measured[f"ece({kind}, {name})"] = expected_calibration_error(p, y[test], BINS)
            measured[f"brier({kind}, {name})"] = float((confidence - right.float()).square().mean())
            measured[f"auroc({kind}, {name})"] = roc_auc(confidence, right)
        measured[f"accuracy({name})"] = float(right.float().mean())
    measured["ece(ca, in) / ece(ts, in)"] = measured["ece(ca, in)"] / measured["ece(ts, in)"]
    return measured


def _trained(x: Tensor, y: Tensor, generator: torch.Generator) -> nn.Module:
    """A perceptron of two hidden layers of 256."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    network.append(nn.Linear(256, 10))
    for layer in network:
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(128):
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    return network


def _scores(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the images, and of their three versions."""
    versions = (_turned(x, 15), F.avg_pool2d(x, 3, 1, 1), 0.6 * x + 0.1)
    with torch.no_grad():
        return network(x), torch.stack([network(version) for version in versions], 1)


def _turned(x: Tensor, degrees: float) -> Tensor:
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    grid = F.affine_grid(turn.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


CLAIM = Claim(
    slug="02-correctness-aware",
    statement="In distribution, correctness-aware calibration is as well calibrated as temperature scaling, and on "
    "noisy images its confidence tells right from wrong better; the authors' balanced weights ruin the former.",
    run=run,
    expectations=(
        Expectation("ece(ca, in) / ece(ts, in)", at_most=1.1),
        Expectation("auroc(ca, noise)", minus="auroc(ts, noise)", at_least=0.01),
        Expectation("brier(ca, noise)", minus="brier(ts, noise)", at_most=0.0),
        Expectation("ece(ca balanced, in)", at_least=0.1),
    ),
    seeds=tuple(range(100, 110)),
    budget=120,
    reported={
        "setting": "ImageNet-val, -A, -R, -S, ObjectNet, CIFAR-10.1-like sets",
        "result": "competitive or better calibration error and AUROC than temperature scaling, ETS, isotonic, splines",
    },
    notes=(
        "Blur and less contrast stand for greyscale and colour jitter, as the images have one channel.",
        "Undecided after five seeds and, as then five more were run, after ten: on six the network's temperatures rank "
        "noisy images better than one temperature does (AUROC by 0.02 to 0.05), on three slightly worse, and on seed "
        "100 worse by 0.06.",
        "Not claimed: a lower calibration error on shifted images, and a better AUROC on turned ones.",
    ),
)
