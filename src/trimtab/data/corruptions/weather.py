"""Weather: snow, frost, fog, brightness."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.data.corruptions.base import convolve, drag, normal, pick, uniform, zoom


def snow(x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Falling flakes: thresholded noise, dragged downwards, over a whitened image."""
    (mean, spread, size, threshold, radius, sigma, kept), scale = pick(
        x,
        severity,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    )
    flakes = zoom(mean + spread * normal(x, (len(x), 1, *x.shape[-2:]), generator), size * scale)
    flakes = torch.where(flakes < threshold, 0, flakes).clamp(max=1)
    flakes = drag(flakes, round(radius * scale), sigma * scale, uniform(x, (len(x),), generator, -135, -45))
    grey = x if x.shape[1] == 1 else torch.einsum("nchw,c->nhw", x, x.new_tensor([0.299, 0.587, 0.114]))[:, None]
    whitened = kept * x + (1 - kept) * torch.maximum(x, 1.5 * grey + 0.5)
    return whitened + flakes + flakes.flip(-2, -1)


def frost(x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Ice crystals on the lens: a frosted pane added to a darkened image."""
    (kept, ice), _ = pick(
        x,
        severity,
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    )
    return kept * x + ice * pane(x, generator)


# mean red, green and blue, and spread of the brightness, in crops of the five photographs that the reference uses
PANES = (
    (0.31, 0.58, 0.64, 0.06),
    (0.78, 0.80, 0.83, 0.075),
    (0.78, 0.80, 0.83, 0.075),
    (0.57, 0.63, 0.68, 0.10),
    (0.41, 0.45, 0.50, 0.135),
)


def pane(x: Float[Tensor, "n c h w"], generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """Frosted panes the size of `x`, drawn instead of photographed.

    Crystals are the largest of eight ridge responses to white noise: needles in eight directions, about a seventh of
    the side long. With a cloud and some grain they are given the colour and spread of one of the reference's
    photographs.
    """
    h, w = x.shape[-2:]
    length = max(2.0, min(h, w) / 14)
    width = max(0.8, length / 6)
    reach = round(2 * length)
    steps = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    angle = torch.arange(8, dtype=x.dtype, device=x.device)[:, None, None] * (torch.pi / 8)
    along = (steps * angle.cos() + steps[:, None] * angle.sin()) / length
    across = (steps[:, None] * angle.cos() - steps * angle.sin()) / width
    ridge = (1 - across**2) * torch.exp(-0.5 * (along**2 + across**2))
    noise = normal(x, (len(x), 1, h + 2 * reach, w + 2 * reach), generator)
    crystals = _standard(convolve(noise, ridge).amax(1, keepdim=True))
    cloud = _standard(plasma(x, 1.5, generator))
    grain = normal(x, (len(x), 1, h, w), generator)
    which = (uniform(x, (len(x),), generator) * len(PANES)).long()
    colour = x.new_tensor(PANES)[which][:, :, None, None]
    ice = colour[:, :3] + colour[:, 3:] * (0.7 * crystals + 0.5 * cloud + 0.5 * grain)
    return (ice if x.shape[1] == 3 else ice.mean(1, keepdim=True)).clamp(0, 1)


def _standard(field: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n 1 h w"]:
    return (field - field.mean((2, 3), keepdim=True)) / field.std((2, 3), keepdim=True)


def fog(x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """A fractal cloud, brightness kept below the brightest value of the image."""
    (amount, decay), _ = pick(
        x,
        severity,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    )
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * plasma(x, decay, generator)) * brightest / (brightest + amount)


def plasma(x: Float[Tensor, "n c h w"], decay: float, generator: torch.Generator) -> Float[Tensor, "n 1 h w"]:
    """Plasma fractals in 0..1 the size of `x`: diamond-square on a torus, cut from the next power of two.

    Args:
        x: the images.
        decay: the noise shrinks by the square of this factor from one scale to the next.
        generator: where the draws come from.
    """
    h, w = x.shape[-2:]
    size = 1 << (max(h, w) - 1).bit_length()
    height = x.new_zeros(len(x), size, size)

    def between(corners: Tensor) -> Tensor:
        return corners / 4 + uniform(x, corners.shape, generator, -wobble, wobble)

    step, wobble = size, 1.0
    while step >= 2:
        half = step // 2
        corner = height[:, ::step, ::step]
        pairs = corner + corner.roll(-1, 1)
        height[:, half::step, half::step] = between(pairs + pairs.roll(-1, 2))
        centre = height[:, half::step, half::step]
        height[:, ::step, half::step] = between(centre + centre.roll(1, 1) + corner + corner.roll(-1, 2))
        height[:, half::step, ::step] = between(centre + centre.roll(1, 2) + corner + corner.roll(-1, 1))
        step, wobble = half, wobble / decay**2
    low, high = height.amin((1, 2), keepdim=True), height.amax((1, 2), keepdim=True)
    return ((height - low) / (high - low))[:, None, :h, :w]


def brightness(x: Float[Tensor, "n c h w"], severity: int, generator: torch.Generator) -> Float[Tensor, "n c h w"]:
    """More light: the value of the HSV colour raised, hue and saturation kept."""
    strong = (0.1, 0.2, 0.3, 0.4, 0.5)
    more, _ = pick(x, severity, (0.05, 0.1, 0.15, 0.2, 0.3), strong, strong)
    value = x.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, x * (raised / value), raised)
