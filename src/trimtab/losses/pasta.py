"""PASTA: vary the amplitudes of an image's Fourier spectrum, the more the higher the frequency, and keep the phases.

Strong augmentation for training on synthetic images that shall serve on real ones: textures change, shapes stay. Half
of what `AugCal` takes; on its own it is a transform like any other, applied before images are normalised.

Chattopadhyay, Sarangmath, Vijaykumar, Hoffman 2023, arXiv 2212.00979; the authors' code (prithv1/PASTA) is followed,
with its two slips in the placing of frequencies: for an even side every negative frequency gets the strength of its
neighbour nearer to zero, for an odd side every frequency that of the next higher one. Both leave the method what it is.
The code takes 3 channels; here any number.

What we found: the factors are drawn for each frequency without the symmetry of a real image's spectrum, and the real
part is taken at the end, so that only the mean of the factors of a frequency and its mirror image counts. Hence the
noise that acts is a factor sqrt(2) weaker than the settings say, and real transforms at half the cost give the same
image.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.losses.base import same_device, widened
from trimtab.losses.chance import Chance


class PASTA(nn.Module):
    """Multiplies every amplitude by 1 + sigma N(0, 1), with sigma = (alpha distance)^k + beta.

    The distance is that from the zero frequency, 1 at most. Draws a normal number for each value of an image.

    Args:
        alpha: how fast the noise grows with the frequency, >= 0; 3 as in the authors' notebook (for objects they
            report up to 10).
        beta: noise at the lowest frequencies, >= 0; 0.25.
        k: the power of the growth, > 0; 2.
        generator: draws the noise; on any device. None: a CPU generator with seed 0. Its state is part of
            `state_dict`.

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> import torch
        >>> from trimtab.losses import PASTA
        >>> images = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0))
        >>> varied = PASTA()(images)
        >>> varied.shape, bool(((varied >= 0) & (varied <= 1)).all()), bool((varied != images).any())
        (torch.Size([2, 3, 16, 12]), True, True)

    Reference:
        Chattopadhyay et al., PASTA: Proportional Amplitude Spectrum Training Augmentation for Syn-to-Real Domain
        Generalization, ICCV 2023, arXiv 2212.00979.
    """

    def __init__(
        self, *, alpha: float = 3.0, beta: float = 0.25, k: float = 2.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.alpha = checks.number(alpha, "alpha", low=0)
        self.beta = checks.number(beta, "beta", low=0)
        self.k = checks.number(k, "k", low=0, low_open=True)
        self.chance = Chance(generator)

    def forward(
        self, images: Float[Tensor, "*n c h w"], noise: Float[Tensor, "*n c h w"] | None = None
    ) -> Float[Tensor, "*n c h w"]:
        """Varied images, in 0..1.

        Args:
            images: (c, h, w) or (n, c, h, w) in 0..1, floating point, at least 3 x 3.
            noise: standard normal numbers of the same shape in the place of fresh ones.

        Raises:
            InputError: a shape, type, device or value is wrong.
        """
        x = _checked(images)
        if noise is None:
            noise = self.chance.normal(x.shape)
        else:
            same_device(images=x, noise=noise)
            if noise.shape != x.shape:
                raise InputError(f"noise must have the shape of images, {tuple(x.shape)}, got {tuple(noise.shape)}")
            checks.finite(noise, "noise")
        x = widened(x)
        h, w = x.shape[-2:]
        change = noise.to(x) * self.strength(h, w).to(x)
        mirrored = change.flip(-2, -1).roll((1, 1), (-2, -1))
        factor = 1 + (change + mirrored)[..., : w // 2 + 1] / 2
        return torch.fft.irfft2(torch.fft.rfft2(x) * factor, s=(h, w)).clamp(0, 1).to(images.dtype)

    def strength(self, h: int, w: int) -> Float[Tensor, "{h} {w}"]:
        """The noise's standard deviation for every frequency of an image of h x w pixels, in `torch.fft.fft2`'s order.

        Example:
            >>> PASTA().strength(5, 5)[0]
            tensor([2.5000, 5.8750, 5.8750, 2.5000, 1.3750], dtype=torch.float64)
        """
        distance = torch.hypot(_frequencies(h)[:, None], _frequencies(w))
        return torch.fft.fftshift((self.alpha * distance / distance.amax()) ** self.k + self.beta)


def _frequencies(side: int) -> Float[Tensor, " {side}"]:
    """The authors' frequencies, ascending: zero twice where the side is even."""
    half = side // 2
    if side % 2:
        return torch.arange(-half, half + 1, dtype=torch.float64)
    return torch.cat([torch.arange(1 - half, 1), torch.arange(half)]).double()


def _checked(images: Tensor) -> Tensor:
    x = checks.tensor(images, "images")
    if x.ndim not in (3, 4) or x.numel() == 0 or min(x.shape[-2:]) < 3:
        raise InputError(
            f"images must have shape (c, h, w) or (n, c, h, w), n >= 1, h and w >= 3, got {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise InputError(f"images must be floating point in 0..1, got {str(x.dtype).removeprefix('torch.')}")
    checks.finite(x, "images")
    if not checks.unread(x):
        low, high = (float(end) for end in x.aminmax())
        if low < 0 or high > 1:
            raise InputError(f"images must lie in 0..1, before any normalisation, got {low:.3g} to {high:.3g}")
    return x
