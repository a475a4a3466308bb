"""Claim of RLCF: a judge that knows better lifts the policy, input by input; sureness alone does not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from trimtab.adaptation import RLCF, ClipScoreReward
from trimtab.adaptation.rlcf import adamw
from trimtab.claims.base import Claim, Expectation

TRAIN, TEST, NOISE = 900, 300, 0.45


class Cosines(nn.Module):
    """Features of an image against one learned vector a class: a zero-shot classifier in small."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 24))
        self.texts = nn.Parameter(torch.randn(10, 24))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return 20 * F.normalize(self.encoder(x), dim=1) @ F.normalize(self.texts, dim=1).T


def trained(seed: int, x: Tensor, y: Tensor, *, epochs: int, noise: float) -> Cosines:
    """A network of its own seed, trained under Gaussian noise of random strength up to `noise`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Cosines()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(64):
            strength = noise * torch.rand(len(rows), 1, generator=generator)
            seen = x[rows] + strength * torch.randn(len(rows), 64, generator=generator)
            loss = F.cross_entropy(network(seen), y[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return network.eval().requires_grad_(False)


def run(seed: int) -> dict[str, float]:
    """Accuracies on noisy digits, one at a time: as it is, by entropy, by reward, by a reward of permuted classes."""
    images, classes = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(classes)[order]
    policy = trained(seed, x[:TRAIN], y[:TRAIN], epochs=30, noise=0.0)
    judge = trained(seed + 1000, x[:TRAIN], y[:TRAIN], epochs=60, noise=0.8)
    held_out, labels = x[TRAIN : TRAIN + TEST], y[TRAIN : TRAIN + TEST]
    noisy = held_out + NOISE * torch.randn(held_out.shape, generator=generator)

    def accuracy(logits: Tensor) -> float:
        return float((logits.argmax(1) == labels).double().mean())

    def adapted(texts: Tensor, **settings: Any) -> float:
        reward = ClipScoreReward(judge.encoder, texts)
        shared: dict[str, Any] = {"views": 32, "selection": 0.2, "augment": jitter, "parameters_of": encoder_parameters}
        return accuracy(RLCF(policy, reward, optimizer=adamw(5e-3), **shared, **settings)(noisy))

    return {
        "accuracy(frozen)": accuracy(policy(noisy)),
        # one score for all leaves nothing of the policy gradient
        "accuracy(entropy)": adapted(torch.ones(10, 24), entropy_weight=1.0),
        "accuracy(rlcf)": adapted(judge.texts),
        "accuracy(rlcf, permuted judge)": adapted(judge.texts.roll(1, 0)),
        "accuracy(distilled)": adapted(judge.texts, teacher=judge),
        "accuracy(judge)": accuracy(judge(noisy)),
    }


def encoder_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All but the class vectors."""
    return {name: parameter for name, parameter in model.named_parameters() if name != "texts"}


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """A view: noise with a standard deviation of 0.15 more."""
    return x + 0.15 * torch.randn(x.shape, generator=generator)


CLAIM = Claim(
    slug="48-rlcf",
    statement="Three steps of policy gradient on a judge's scores lift a classifier on noisy digits, one at a time, "
    "above its frozen self and above entropy minimisation over the same views; with a judge whose classes are "
    "permuted they harm it.",
    run=run,
    expectations=(
        Expectation("accuracy(rlcf)", minus="accuracy(entropy)", at_least=0.08, every_seed=True),
        Expectation("accuracy(rlcf)", minus="accuracy(frozen)", at_least=0.08, every_seed=True),
        Expectation("accuracy(rlcf, permuted judge)", minus="accuracy(frozen)", at_most=0.0, every_seed=True),
    ),
    budget=180,
    reported={
        "setting": "CLIP ViT-B/16 judged by ViT-L/14 on ImageNet's variants, 64 views, 3 steps",
        "direction": "RLCF above TPT (entropy minimisation) above zero-shot CLIP on A, V2, R and Sketch; tuning the "
        "image encoder above tuning the prompt",
    },
    notes=(
        "Policy and judge are two perceptrons with cosine logits on scikit-learn's digits; the judge was trained under "
        "noise, the policy was not, and the test images carry noise of standard deviation 0.45.",
        "The judge as the classifier is better still on every seed; distillation from it, the paper's ablation, gains "
        "less than the reward on average.",
    ),
)
