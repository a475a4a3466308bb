"""Noise: gaussian, shot, impulse."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.data.corruptions.base import normal, pick, uniform


def gaussian_noise(x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Independent normal noise on every value, as in low light."""
    scale, _ = pick(
        x, severity, (0.04, 0.06, 0.08, 0.09, 0.10), (0.04, 0.08, 0.12, 0.15, 0.18), (0.08, 0.12, 0.18, 0.26, 0.38)
    )
    return x + scale * normal(x, x.shape, generator)


def shot_noise(x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Poisson noise: light counted in few photons; the table holds the photons of a white pixel."""
    photons, _ = pick(x, severity, (500, 250, 100, 75, 50), (250, 100, 50, 30, 15), (60, 25, 12, 5, 3))
    return torch.poisson((x * photons).to(generator.device), generator).to(x.device) / photons


def impulse_noise(x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Salt and pepper: a share of the values becomes 0 or 1, each channel by itself."""
    share, _ = pick(
        x, severity, (0.01, 0.02, 0.03, 0.05, 0.07), (0.01, 0.02, 0.05, 0.08, 0.14), (0.03, 0.06, 0.09, 0.17, 0.27)
    )
    draw = uniform(x, x.shape, generator)
    return torch.where(draw < share, (draw < share / 2).to(x.dtype), x)
