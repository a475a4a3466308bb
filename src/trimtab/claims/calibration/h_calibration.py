"""Claim of `trimtab.calibration.HCalibration`: it straightens what no temperature can, close to the true probabilities.

Labels follow softmax(z) with z ~ N(0, 2^2) in five classes; the model reports -1.3 (-log p)^1.5, a monotone distortion
of the truth that no temperature undoes. As the truth is known, the distance of every probability from it can be told.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from trimtab.calibration import HCalibration, TemperatureScaling
from trimtab.calibration.monotone_maps import monotone_network
from trimtab.claims.base import Claim, Expectation
from trimtab.metrics import classwise_calibration_error, expected_calibration_error

CLASSES, FIT, TEST, STEPS, LR, HIDDEN, NODES = 5, 3000, 20_000, 150, 0.01, 10, 20


def run(seed: int) -> dict[str, float]:
    """Distance from the true probabilities and calibration errors of the model, a temperature and h-calibration."""
    generator = torch.Generator().manual_seed(seed)
    truth = (2 * torch.randn(FIT + TEST, CLASSES, generator=generator)).log_softmax(1)
    labels = truth.exp().multinomial(1, generator=generator)[:, 0]
    logits = -1.3 * (-truth) ** 1.5
    fit, test = slice(0, FIT), slice(FIT, None)
    h = HCalibration("nonlinear", HIDDEN, steps=NODES, lr=LR, epochs=STEPS, plateau=STEPS, seed=seed)
    calibrated = {
        "none": logits[test].log_softmax(1),
        "ts": TemperatureScaling().fit(logits[fit], labels[fit])(logits[test]),
        "h": h.fit(logits[fit], labels[fit])(logits[test]),
        "log loss": _by_log_loss(logits[fit].log_softmax(1), labels[fit], logits[test].log_softmax(1), generator),
    }
    measured = {}
    for name, log_p in calibrated.items():
        p = log_p.exp()
        measured[f"distance({name})"] = float((p - truth[test].exp()).abs().sum(1).mean())
        measured[f"ece({name})"] = expected_calibration_error(p, labels[test])
        measured[f"classwise_ece({name})"] = classwise_calibration_error(p, labels[test])
    for quantity in ("distance", "ece"):
        measured[f"{quantity}(h) / {quantity}(ts)"] = measured[f"{quantity}(h)"] / measured[f"{quantity}(ts)"]
    return measured


def _by_log_loss(log_p: Tensor, labels: Tensor, test: Tensor, generator: torch.Generator) -> Tensor:
    """The same map, start and steps with the log loss in place of the h-calibration loss."""
    mean, deviation = log_p.mean(), log_p.std()
    inputs = [1.0] * (2 * HIDDEN) + [HIDDEN**-0.5] * (HIDDEN * HIDDEN + 2 * HIDDEN + 1)
    network = (2 * torch.rand(len(inputs), generator=generator) - 1) * torch.tensor(inputs)
    network.requires_grad_()
    optimizer = torch.optim.Adam([network], LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        scores = monotone_network((log_p - mean) / deviation, network, NODES)
        nll_loss(scores.log_softmax(1), labels).backward()
        optimizer.step()
    with torch.no_grad():
        return monotone_network((test - mean) / deviation, network, NODES).log_softmax(1)


CLAIM = Claim(
    slug="05-h-calibration",
    statement="Where a monotone distortion bends the probabilities, h-calibration comes much closer to the true ones "
    "than temperature scaling does, with little more than half its calibration error.",
    run=run,
    expectations=(
        Expectation("distance(h) / distance(ts)", at_most=0.7, every_seed=True),
        Expectation("ece(h) / ece(ts)", at_most=0.6, every_seed=True),
    ),
    budget=300,
    reported={
        "setting": "15 tasks: CIFAR-10, CIFAR-100, SVHN, Birds, Cars, ImageNet; up to 19 measures",
        "rank": "best on average, before temperature scaling, ensembles, BBQ, beta, Dirichlet, splines and others",
    },
    notes=(
        "The same map fitted by the log loss stands beside: where the map can express the truth, the paper's loss is "
        "about level with it.",
        "On four seeds of five both bounds are met by far; on seed 102 they are missed (0.74 of the distance), as a "
        "temperature happens to do well there and the map, at its 150th step, has not caught up with the log loss.",
        "Tried: halving the rate on a plateau of 40 steps, as the authors train; the same seed misses the bounds.",
    ),
)
