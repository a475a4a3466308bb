"""Scores with known faults, and calibration sets that are hard to fit."""

import torch
from torch.nn.functional import one_hot


def generator(seed):
    return torch.Generator().manual_seed(seed)


def overconfident(n=600, c=4, seed=0, dtype=torch.float64, factor=2.0):
    """Logits `factor` times too large, each class overrated by its own shift, with labels drawn from the truth."""
    random = generator(seed)
    truth = 1.5 * torch.randn(n, c, generator=random, dtype=torch.float64)
    labels = truth.softmax(1).multinomial(1, generator=random)[:, 0]
    labels[:2] = torch.tensor([0, 1])  # a small set, too, holds two classes
    shift = 0.5 * torch.randn(c, generator=random, dtype=torch.float64)
    return (factor * truth + shift).to(dtype), labels


def log_loss(log_probs, labels, weights=None):
    """Mean log loss in float64, weighted."""
    at_label = log_probs.double().gather(1, labels[:, None])[:, 0]
    return -float(at_label.mean() if weights is None else at_label @ weights.double() / weights.double().sum())


def _hard(c):
    z, y = overconfident(60, c, dtype=torch.float32)
    hits = one_hot(y, c).float()
    last = torch.arange(c) == c - 1
    weights = torch.rand(60, generator=generator(2))
    weights[::3] = 0
    return {
        "ordinary": (z, y),
        "class absent": (z, y.clamp(max=max(1, c - 2))),
        "two rows": (z[:2], torch.tensor([1, 0])),
        "three rows": (z[:3], torch.tensor([0, 1, 1])),
        "constant": (torch.zeros(60, c), y),
        "equal rows": (z[:1].repeat(60, 1), y),
        "repeated rows": (z[:5].repeat(12, 1), y),
        "saturated": (1e4 * z.sign(), y),
        "extreme": (1e4 * z, y),
        "extreme and wrong": (-1e4 * z, y),
        "one huge column": (z.masked_fill(last, 1e4), y),
        "one tiny column": (z.masked_fill(last, -1e4), y),
        "separable": (5 * hits + 0.1 * z, y),
        "separable and extreme": (1e4 * hits, y),
        "always wrong": (-5 * hits, y),
        "tiny": (1e-6 * z, y),
        "columns of all sizes": (z * torch.logspace(-3, 3, c), y),
        "zero weights": (z, y, weights),
        "zero weights but for two rows": (z, y, (torch.arange(60) < 2).float()),
        "tiny weights": (z, y, 1e-8 * weights),
        "double": (z.double(), y),
        "half": (z.half(), y),
    }


HARD = [(f"{c} classes, {name}", *case) for c in (2, 3, 10) for name, case in _hard(c).items()]
