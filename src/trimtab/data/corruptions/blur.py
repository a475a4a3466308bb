"""Blur: defocus, glass, motion, zoom."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trimtab.data.corruptions.base import convolve, drag, pick, smooth, uniform, zoom


def defocus_blur(x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """An image out of focus: every point becomes a disk."""
    (radius, alias), scale = pick(
        x,
        severity,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    )
    kernel = disk(radius * scale, alias).to(x)
    return convolve(F.pad(x, [kernel.shape[0] // 2] * 4, mode="reflect"), kernel)


def disk(radius: float, alias: float) -> Float[Tensor, "k k"]:
    """A flat disk, its rim softened by a small Gaussian of standard deviation `alias`."""
    soft = 1 if radius <= 8 else 2
    reach = max(8, int(radius))
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    flat = (steps[:, None] ** 2 + steps**2 <= radius**2).double()
    bell = torch.exp(-0.5 * (torch.arange(-soft, soft + 1, dtype=torch.float64) / alias) ** 2)
    bell = (bell / bell.sum())[:, None]
    rim = F.pad((flat / flat.sum())[None], [soft] * 4, mode="reflect")
    empty = max(0, reach - int(radius) - soft)
    return convolve(rim, bell @ bell.T)[0, empty : 2 * reach + 1 - empty, empty : 2 * reach + 1 - empty]


def glass_blur(x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Frosted glass: pixels change places with neighbours, between two small blurs."""
    (sigma, reach, rounds), scale = pick(
        x,
        severity,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    )
    reach = round(reach * scale)
    out = smooth(x, sigma * scale, truncate=4.0, mirror=False)
    for _ in range(rounds):
        source = shuffle(uniform(x, (2, len(x), *x.shape[-2:]), generator, -reach, reach).floor().long(), reach)
        out = out.flatten(2).gather(2, source[:, None].expand(-1, x.shape[1], -1)).view_as(x)
    return smooth(out, sigma * scale, truncate=4.0, mirror=False)


def shuffle(offsets: Tensor, reach: int) -> Tensor:
    """Where each pixel's value comes from after the reference's pass over the image.

    The reference walks from the last pixel to the first and means to swap each with a neighbour; what its code does
    (and the published data sets hold) is copy the neighbour's current value. A neighbour that was visited before is a
    copy itself, so sources form chains; these are followed by pointer doubling instead of pixel by pixel.

    Args:
        offsets: (2, n, h, w), vertical and horizontal, in -reach..reach - 1.
        reach: pixels this close to the border (``reach + 1`` at the top and left) stay.

    Returns:
        (n, h * w) flat indices into the image.
    """
    _, n, h, w = offsets.shape
    place = torch.arange(h * w, device=offsets.device).view(h, w)
    moves = torch.zeros(h, w, dtype=torch.bool, device=offsets.device)
    moves[reach + 1 : h - reach + 1, reach + 1 : w - reach + 1] = True
    # offsets end at reach - 1, so a move from row h - reach stays inside
    neighbour = torch.where(moves, place + offsets[0] * w + offsets[1], place).flatten(1)
    visited_before = moves.flatten()[neighbour] & (neighbour > place.flatten())
    # node p is the final value of pixel p, node h * w + p its original value
    final = torch.where(visited_before, neighbour, neighbour + h * w)
    pointer = torch.cat((final, torch.arange(h * w, 2 * h * w, device=offsets.device).expand(n, -1)), 1)
    while bool((pointer < h * w).any()):
        pointer = pointer.gather(1, pointer)
    return pointer[:, : h * w] - h * w


def motion_blur(x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """A moving camera: a trail in a direction within 45 degrees of the horizontal."""
    (radius, sigma), scale = pick(
        x,
        severity,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    )
    return drag(x, round(radius * scale), sigma * scale, uniform(x, (len(x),), generator, -45, 45))


def zoom_blur(x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """A camera that moves towards the object: the mean of the image at growing zoom factors."""
    small = ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01))
    large = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
    (stop, step), _ = pick(x, severity, small, small, large)
    factors = np.arange(1, stop, step).tolist()
    return (x + sum(zoom(x, factor) for factor in factors)) / (len(factors) + 1)
