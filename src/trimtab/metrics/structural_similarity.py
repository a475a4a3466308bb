"""SSIM and MS-SSIM: how alike two images look, by their local means, contrasts and structure.

Reach for it where a pixel error says too little: a blurred image and one with a slight change of brightness may have
the same squared error, but do not look equally near. MS-SSIM compares at several scales and is the more robust of the
two; for training on it see `losses.MSSSIM`.

Wang, Bovik, Sheikh, Simoncelli 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity"; Wang,
Simoncelli, Bovik 2003, "Multiscale Structural Similarity for Image Quality Assessment". The numbers are those of
VainF/pytorch-msssim: Gaussian windows without padding, each scale averaged over pixels before it is raised to its
exponent, luminance at the last scale only, standard exponents that sum to 1.0001. Before an image of odd height or
width is halved, it is given a black border there, also as in that code. Of fewer than five scales that code leaves
the choice of exponents to the user; here the first are taken and divided by their sum. Its window is a float32 one at
every precision, and so is this one: where variances are small beside squared means, the error of its sum, 1e-7, moves
a value by up to 2e-5. Subtracting the variances' parts costs the same in a range of 0..1 as of 0..255.

Four maps are blurred where five are usual: the two variances are only ever needed as a sum. They are blurred with the
batch as the channels of one image, innermost in memory, where a filter along an axis runs over whole vectors; the
gradient is written out and blurs three maps. On one core, forward and backward, pytorch-msssim 1.0 takes five times as
long and torchmetrics 1.9 twelve times for 8 x 3 x 256 x 256, eight and fifty times for 32 x 1 x 64 x 64 at three
scales. pytorch-msssim's values and gradients are equal to rounding; torchmetrics' values differ by up to
6e-4 here, and its gradients by more than 40 % of the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.metrics.sums import MeanMetric

EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the five scales, finest first, from a study with viewers (Wang et al. 2003)."""


def ssim(
    images: Float[Tensor, "n c h w"],
    targets: Float[Tensor, "n c h w"],
    *,
    data_range: float,
    win_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
) -> Float[Tensor, " n"]:
    """Structural similarity of each image and its target, mean over pixels, then channels; differentiable once.

    Args:
        images: (n, c, h, w), n >= 1, floating point; half precision is computed in float32.
        targets: (n, c, h, w), what they are compared with.
        data_range: the difference of the largest and the smallest value that a pixel can have: 1 or 255. Values far
            outside (a hundred times) leave nothing but rounding of the variances.
        win_size: width of the Gaussian window in pixels, odd; 11 as in Wang et al.
        sigma: its standard deviation in pixels; 1.5 as in Wang et al.
        k1: steadies the luminance where both are dark; 0.01 as in Wang et al.
        k2: steadies contrast and structure where both are flat; 0.03 as in Wang et al.

    Returns:
        One value an image, 1 for equal images, negative for anti-correlated ones.

    Raises:
        InputError: an argument is malformed, or an image is smaller than the window.

    Example:
        >>> x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> ssim(x, x, data_range=1.0)
        tensor([1., 1.])
        >>> bool((ssim(x, 1 - x, data_range=1.0) < 0).all())
        True

    Reference:
        Wang et al., IEEE Transactions on Image Processing 2004.
    """
    _, c1, c2 = constants(data_range=data_range, scales=1, win_size=win_size, sigma=sigma, k1=k1, k2=k2)
    x, y = _planes(images, targets, win_size, 1)
    value: Tensor = _Similarity.apply(x, y, _window(win_size, sigma, x), c1, c2, True)  # type: ignore[no-untyped-call]
    return value.view(len(images), -1).mean(1)


def ms_ssim(
    images: Float[Tensor, "n c h w"],
    targets: Float[Tensor, "n c h w"],
    *,
    data_range: float,
    scales: int | Sequence[float] = 5,
    win_size: int = 11,
    sigma: float = 1.5,
    k1: float = 0.01,
    k2: float = 0.03,
    floor: float = 0.0,
) -> Float[Tensor, " n"]:
    """Multi-scale structural similarity of each image and its target, mean over channels; differentiable once.

    The product over scales of contrast and structure, each a mean over pixels raised to its exponent, and at the last
    scale of luminance too. From scale to scale images are halved by averages of 2 x 2 pixels.

    Args:
        images: (n, c, h, w), n >= 1, floating point; half precision is computed in float32.
        targets: (n, c, h, w), what they are compared with.
        data_range: as for `ssim`.
        scales: how many, 1 to 5 with standard exponents (divided by their sum for fewer than 5), or the exponents of
            all scales, finest first. Both sides of the images must exceed ``(win_size - 1) * 2 ** (scales - 1)``: 160
            for five scales and a window of 11; for images of 32 x 32 take 3 scales and a window of 5.
        win_size: width of the Gaussian window in pixels, odd; 11 as in Wang et al.
        sigma: its standard deviation in pixels; 1.5 as in Wang et al.
        k1: as for `ssim`.
        k2: as for `ssim`.
        floor: what the means are raised to where they are below it, at least 0. At 0, anti-correlated images have the
            value 0 and no gradient; `losses.MSSSIM` takes 1e-8.

    Returns:
        One value an image, in 0..1, 1 for equal images.

    Raises:
        InputError: an argument is malformed, or an image is too small.

    Example:
        >>> x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> ms_ssim(x, 0.5 * x, data_range=1.0, scales=3, win_size=5)
        tensor([0.7369, 0.7356])

    Reference:
        Wang, Simoncelli, Bovik, Asilomar Conference on Signals, Systems and Computers 2003.
    """
    exponents, c1, c2 = constants(data_range=data_range, scales=scales, win_size=win_size, sigma=sigma, k1=k1, k2=k2)
    x, y = _planes(images, targets, win_size, len(exponents))
    window = _window(win_size, sigma, x)
    floor = checks.number(floor, "floor", low=0)
    value = x.new_ones(x.shape[1])
    for scale, exponent in enumerate(exponents, 1):
        last = scale == len(exponents)
        means: Tensor = _Similarity.apply(x, y, window, c1, c2, last)  # type: ignore[no-untyped-call]
        value = value * _raised(means, exponent, floor)
        if not last:
            odd = [side % 2 for side in x.shape[2:]]
            x, y = F.avg_pool2d(x, 2, padding=odd), F.avg_pool2d(y, 2, padding=odd)
    return value.view(len(images), -1).mean(1)


class MultiScaleSSIM(MeanMetric):
    """The mean of `ms_ssim` over all images; its state is a sum and a count.

    Args:
        data_range: as for `ssim`.
        scales: as for `ms_ssim`.
        win_size: as for `ms_ssim`.
        sigma: as for `ms_ssim`.
        k1: as for `ssim`.
        k2: as for `ssim`.
        **kwargs: what every `torchmetrics.Metric` takes.

    Example:
        >>> metric = MultiScaleSSIM(data_range=1.0, scales=2, win_size=5)
        >>> x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> metric.update(x, x)
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(
        self,
        *,
        data_range: float,
        scales: int | Sequence[float] = 5,
        win_size: int = 11,
        sigma: float = 1.5,
        k1: float = 0.01,
        k2: float = 0.03,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._call = partial(
            ms_ssim, data_range=data_range, scales=scales, win_size=win_size, sigma=sigma, k1=k1, k2=k2
        )
        constants(**self._call.keywords)

    @torch.no_grad()
    def update(self, images: Float[Tensor, "n c h w"], targets: Float[Tensor, "n c h w"]) -> None:
        """Add a batch of images and their targets."""
        self._add(self._call(images, targets))


def _planes(images: Tensor, targets: Tensor, win_size: int, scales: int) -> tuple[Tensor, Tensor]:
    """Checked images, at least float32, as (1, n c, h, w) with the n c planes innermost in memory."""
    for name, value in (("images", images), ("targets", targets)):
        x = checks.tensor(value, name)
        if x.ndim != 4 or x.numel() == 0 or not x.is_floating_point():
            raise InputError(
                f"{name} must be floating point of shape (n, c, h, w), none of them 0, got {checks.described(x)}"
            )
    if images.shape != targets.shape:
        raise InputError(f"targets must have the shape of images, {tuple(images.shape)}, got {tuple(targets.shape)}")
    if images.device != targets.device:
        raise InputError(f"targets must be on the device of images, {images.device}, got {targets.device}")
    least = (win_size - 1) * 2 ** (scales - 1)
    if min(images.shape[2:]) <= least:
        raise InputError(
            f"images must be larger than {least} x {least} for {scales} scales and a window of {win_size}, got "
            f"{images.shape[2]} x {images.shape[3]}: take fewer scales or a smaller window"
        )
    dtype = torch.promote_types(torch.promote_types(images.dtype, targets.dtype), torch.float32)
    planes = (
        checks.finite(x, name).to(dtype).reshape(1, -1, *x.shape[2:]).contiguous(memory_format=torch.channels_last)
        for name, x in (("images", images), ("targets", targets))
    )
    return next(planes), next(planes)


def constants(
    *, data_range: float, scales: int | Sequence[float], win_size: int, sigma: float, k1: float, k2: float
) -> tuple[tuple[float, ...], float, float]:
    """The exponents, and what keeps luminance, and contrast and structure, from 0 / 0.

    Raises:
        InputError: a setting of `ms_ssim` is out of range.
    """
    if checks.integer(win_size, "win_size", low=1) % 2 == 0:
        raise InputError(f"win_size must be odd, got {win_size}")
    checks.number(sigma, "sigma", low=0, low_open=True)
    width = checks.number(data_range, "data_range", low=0, low_open=True)
    k1, k2 = (checks.number(k, name, low=0, low_open=True) for name, k in (("k1", k1), ("k2", k2)))
    if isinstance(scales, Sequence):
        exponents = tuple(checks.number(exponent, "scales", low=0) for exponent in scales)
        if not sum(exponents) > 0:
            raise InputError(f"scales must hold a positive exponent, got {scales}")
    else:
        exponents = EXPONENTS[: checks.integer(scales, "scales", low=1, high=len(EXPONENTS))]
        if len(exponents) < len(EXPONENTS):
            exponents = tuple(exponent / sum(exponents) for exponent in exponents)
    return exponents, (k1 * width) ** 2, (k2 * width) ** 2


def _raised(means: Tensor, exponent: float, floor: float) -> Tensor:
    """``max(means, floor) ** exponent``, whose gradient is 0 below the floor, also at a floor of 0."""
    above = means > floor
    return torch.where(above, torch.where(above, means, 1.0) ** exponent, floor**exponent)


def _window(size: int, sigma: float, like: Tensor) -> Tensor:
    """A Gaussian of sum 1, as exactly as float32 has it."""
    steps = torch.arange(size, dtype=torch.float32, device=like.device) - size // 2
    weights = torch.exp(-steps.square() / (2 * sigma**2))
    return (weights / weights.sum()).to(like.dtype)


def _blurred(planes: Tensor, window: Tensor, padding: int = 0) -> Tensor:
    """Every plane by the window along both axes."""
    n, size = planes.shape[1], len(window)
    across = window.expand(n, 1, 1, size)
    with torch.autocast(planes.device.type, enabled=False):
        down = F.conv2d(planes, across.transpose(2, 3), groups=n, padding=(padding, 0))
        return F.conv2d(down, across, groups=n, padding=(0, padding))


class _Similarity(torch.autograd.Function):
    """Contrast times structure of each plane, and times luminance if asked, as a mean over its pixels.

    With a, b the blurred planes, s the blurred sum of their squares and p the blurred product:
    luminance = (2 a b + c1) / (a^2 + b^2 + c1), and contrast * structure = 2 (p - a b) + c2 over s - a^2 - b^2 + c2.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, window: Tensor, c1: float, c2: float, luminance: bool
    ) -> Float[Tensor, " m"]:
        a, b = _blurred(x, window), _blurred(y, window)
        squares = _blurred(torch.addcmul(x * x, y, y), window)
        product = _blurred(x * y, window)
        ab, means = a * b, torch.addcmul(a * a, b, b)
        # rounding can leave a negative variance where the planes are flat
        spread = (squares - means).clamp_(min=0).add_(c2)
        structure = (product - ab).mul_(2).add_(c2).div_(spread)
        if luminance:
            means += c1
            light = ab.mul_(2).add_(c1).div_(means)
            ctx.save_for_backward(x, y, window, a, b, spread, structure, means, light)
            return (structure * light).mean((0, 2, 3))
        ctx.save_for_backward(x, y, window, a, b, spread, structure)
        return structure.mean((0, 2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, window, a, b, spread, structure, *bright = ctx.saved_tensors
        share = (gradient / structure[0, 0].numel()).view(1, -1, 1, 1)
        # half of what the means are due to the product, and to the squares with the sign turned
        product = (share * bright[1] if bright else share) / spread
        squares = product * structure
        lit = share * structure / bright[0] if bright else None
        border = len(window) - 1
        wide_product, wide_squares = _blurred(product, window, border), _blurred(squares, window, border)
        gradients: list[Tensor | None] = []
        for one, other, own, across, asked in zip((x, y), (y, x), (a, b), (b, a), ctx.needs_input_grad):
            if not asked:
                gradients.append(None)
                continue
            mean = (own * squares).sub_(across * product)
            if lit is not None:
                mean += (across - own * bright[1]).mul_(lit)
            gradient = _blurred(mean, window, border)
            gradients.append(gradient.sub_(one * wide_squares).add_(other * wide_product).mul_(2))
        return (*gradients, None, None, None, None)
