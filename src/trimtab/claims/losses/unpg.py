"""Claim of `trimtab.losses.UNPG`: embeddings verify unknown identities better when the batch's negative pairs count."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.claims.base import Claim, Expectation
from trimtab.claims.losses.training import batches, mlp
from trimtab.losses import UNPG, CosFace, pair_similarities
from trimtab.metrics import tar_at_far

CLASSES, KNOWN, SAMPLES, FACTORS, WIDTH = 200, 120, 12, 20, 40
EPOCHS, BATCH, LR = 30, 128, 0.1


def run(seed: int) -> dict[str, float]:
    """TAR at FAR on all pairs of unseen identities after training with CosFace, alone and with UNPG."""
    generator = torch.Generator().manual_seed(seed)
    x, y = _identities(generator)
    known = y < KNOWN
    measured = {}
    for name in ("cosface", "unpg"):
        fresh = torch.Generator().manual_seed(seed)
        net = mlp(WIDTH, 96, 24, generator=fresh)
        head = CosFace(24, KNOWN, scale=24.0, margin=0.2, generator=fresh)
        _train(net, head if name == "cosface" else UNPG(head, wisk=1.5), x[known], y[known], fresh)
        with torch.no_grad():
            positive, negative = pair_similarities(net(x[~known]), y[~known])
        scores = torch.cat([positive, negative])
        same = torch.arange(len(scores)) < len(positive)
        for far in (1e-2, 1e-3):
            measured[f"tar@{far:g}({name})"] = tar_at_far(scores, same, far)
    measured["improved"] = float(measured["tar@0.01(unpg)"] > measured["tar@0.01(cosface)"])
    return measured


def _identities(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples about Gaussian centres, through a fixed random layer of tanh, and which identity each is of."""
    centres = torch.randn(CLASSES, FACTORS, generator=generator)
    y = torch.arange(CLASSES).repeat_interleave(SAMPLES)
    z = centres[y] + 0.55 * torch.randn(len(y), FACTORS, generator=generator)
    first = torch.randn(FACTORS, WIDTH, generator=generator) / FACTORS**0.5
    second = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    return (1.5 * z @ first).tanh() @ second, y


def _train(net: torch.nn.Module, loss: torch.nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    """SGD with momentum and weight decay on the network and the class weights, the rate falling by a cosine."""
    parameters = [*net.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for chosen in batches(len(x), BATCH, generator):
            optimizer.zero_grad()
            loss(net(x[chosen]), y[chosen]).backward()
            optimizer.step()
        schedule.step()


CLAIM = Claim(
    slug="57-unpg",
    statement="With the negative pairs of the batch in its denominators, CosFace trains embeddings that accept more "
    "pairs of unseen identities rightly at a false accept rate of one per cent.",
    run=run,
    expectations=(
        Expectation("tar@0.01(unpg)", minus="tar@0.01(cosface)", at_least=0.03),
        Expectation("improved", at_least=0.75),
    ),
    budget=120,
    reported={
        "setting": "ResNet-100 on MS1MV2, TAR at FAR 1e-5, head alone and with UNPG",
        "IJB-B, CosFace": {"cosface": 0.8938, "unpg": 0.9061},
        "IJB-B, MagFace": {"magface": 0.8903, "unpg": 0.9093},
        "IJB-C, ArcFace": {"arcface": 0.9393, "unpg": 0.9447},
        "IJB-C, MagFace": {"magface": 0.9330, "unpg": 0.9470},
    },
    notes=(
        "200 synthetic identities of 12 samples, 120 to train on, all pairs of the other 80 to measure on; a "
        "perceptron of one hidden layer, CosFace with scale 24 and margin 0.2, 30 epochs in batches of 128.",
    ),
)
