"""Random crops as views of one image, and the choice of those that a model is sure of, as in TPT and RLCF."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.adaptation.base import entropy
from trimtab.core.checks import InputError


def resized_crops(
    images: Float[Tensor, "n c h w"],
    generator: torch.Generator,
    *,
    area: tuple[float, float] = (0.08, 1.0),
    flip: bool = True,
) -> Float[Tensor, "n c h w"]:
    """One random crop of every image, at the image's size: torchvision's RandomResizedCrop and a mirror.

    Every view has its own crop; values are interpolated, whatever their range, so images may be normalised already. A
    side that would exceed the image is cut to it, where torchvision draws again.

    Args:
        images: (n, c, h, w).
        generator: a CPU generator, from which everything random is drawn.
        area: smallest and largest share of the image's area.
        flip: mirror half of the views.

    Example:
        >>> images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> resized_crops(images, torch.Generator().manual_seed(1)).shape
        torch.Size([2, 3, 8, 8])
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(
            f"images must be floating point of shape (n, c, h, w) to be cropped, got {tuple(images.shape)}; "
            "pass your own augment"
        )

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator, dtype=torch.float64)

    share, ratio = uniform(*area), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    height, width = images.shape[-2:]
    across = (share * ratio * height / width).sqrt().clamp_max(1)
    down = (share / ratio * width / height).sqrt().clamp_max(1)
    mirrored = torch.where(uniform(0, 1) < (0.5 if flip else 0.0), -1.0, 1.0)
    zero = torch.zeros_like(across)
    rows = (
        torch.stack((across * mirrored, zero, (1 - across) * uniform(-1, 1)), 1),
        torch.stack((zero, down, (1 - down) * uniform(-1, 1)), 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1).to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def confident(logits: Float[Tensor, "v c"], share: float) -> Int[Tensor, " s"]:
    """The int(v x share) views of least entropy, the surest first.

    Example:
        >>> confident(torch.tensor([[0.0, 0.0], [3.0, 0.0], [1.0, 0.0]]), 0.7)
        tensor([1, 2])
    """
    return entropy(logits).argsort()[: int(len(logits) * share)]


def mean_entropy(logits: Float[Tensor, "v c"]) -> Float[Tensor, ""]:
    """Entropy of the mean of softmax(logits) over the views, which TPT minimises.

    Example:
        >>> round(float(mean_entropy(torch.tensor([[9.0, 0.0], [0.0, 9.0]]))), 4)
        0.6931
    """
    log_mean = logits.log_softmax(1).logsumexp(0) - math.log(len(logits))
    log_mean = log_mean.clamp_min(torch.finfo(logits.dtype).min)
    return -(log_mean * log_mean.exp()).sum()
