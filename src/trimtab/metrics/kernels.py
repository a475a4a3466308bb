"""The two kernel measures on sorted confidences: MMCE by a recurrence along the order, KDECE by Fourier transform."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor

from trimtab.core.threads import one_thread
from trimtab.metrics.binning import Ranked, prefix

_BLOCK_ELEMENTS = 1 << 18
_CELLS = 1 << 13
_RESAMPLES = 32


@one_thread()
def laplace_error(ranked: Ranked, width: float) -> Float[Tensor, " r"]:
    """sqrt of the mean over pairs of gap_i gap_j exp(-|p_i - p_j| / width), in one pass over the sorted order.

    For p_j <= p_i the kernel is the product exp(-p_i / width) exp(p_j / width), so the inner sum over j is a prefix
    sum. As p is in 0..1, the factors stay within exp(1 / width).
    """
    values, hits, weights = ranked
    r = 1 if weights is None else len(weights)
    total = torch.zeros(r, dtype=torch.float64, device=values.device)
    carried = torch.zeros(r, 1, dtype=torch.float64, device=values.device)
    size = max(1, _BLOCK_ELEMENTS // r)
    for start in range(0, ranked.n, size):
        part = slice(start, start + size)
        p = values[:, part].double()
        gap = hits[:, part].double() - p
        if weights is not None:
            gap = weights[:, part] * gap
        grown = (p / width).exp_()
        below = torch.cumsum(gap * grown, 1).add_(carried)
        carried = below[:, -1:].clone()
        pairs = torch.linalg.vecdot(gap, below.div_(grown))
        total += 2 * pairs - torch.linalg.vecdot(gap, gap)
    return total.clamp_(min=0).sqrt_() / ranked.n


@one_thread()
def density_error(ranked: Ranked) -> Float[Tensor, " r"]:
    """Integral of |x - accuracy(x)| under the confidences' density; NaN where there is no hit.

    The densities of all confidences and of the hits are sums over a grid, made by linear binning, that is folded with
    the triweight kernel by Fourier transform. The grid has 2^13 cells in 0..1; the outer halves, reflected at 0 and 1,
    make it 2^14 in -0.5..1.5.
    """
    r = 1 if ranked.weights is None else len(ranked.weights)
    device = ranked.values.device
    grids = torch.zeros(2, r, _CELLS + 1, dtype=torch.float64, device=device)
    moments = torch.zeros(3, r, dtype=torch.float64, device=device)
    centre = ranked.values[0, ranked.n // 2]
    size = max(_BLOCK_ELEMENTS // r, 2 * _CELLS)
    for start in range(0, ranked.n, size):
        part = slice(start, start + size)
        p, hit = ranked.values[:, part].clamp(max=1), ranked.hits[:, part]
        weights = torch.ones_like(p) if ranked.weights is None else ranked.weights[:, part].to(p.dtype)
        grids += _share_out(p[0], weights, weights * hit)
        apart = (p[0] - centre).double()
        moments += torch.stack([(weights * hit).double() @ apart**k for k in range(3)])
    total, first, second = moments
    deviation = (second / total - (first / total) ** 2).clamp(min=0).sqrt()
    bandwidth = (deviation * (2 * ranked.n) ** -0.2).clamp(min=1 / _CELLS)
    parts = zip(*(torch.split(x, _RESAMPLES) for x in (*grids, 3 * bandwidth)))
    return torch.cat([_integrate(*part) for part in parts])


def _share_out(p: Float[Tensor, " n"], *weights: Float[Tensor, "r n"]) -> Float[Tensor, "kinds r points"]:
    """Linear binning: each weight shared out between the two grid points beside its value, by nearness."""
    at = p * _CELLS
    above = at - at.floor()
    starts = torch.arange(_CELLS + 2).to(p) / _CELLS
    starts[-1] = 2
    places = torch.searchsorted(p, starts)
    grids = []
    for weight in weights:
        upper = prefix(weight * above)[:, places].diff()
        grid = prefix(weight)[:, places].diff() - upper
        grid[:, 1:] += upper[:, :-1]
        grids.append(grid)
    return torch.stack(grids)


def _integrate(
    everything: Float[Tensor, "r points"], hits: Float[Tensor, "r points"], width: Float[Tensor, " r"]
) -> Float[Tensor, " r"]:
    """Integral of |x f(x) - f_hit(x)| over that of f, where f_hit / f is the accuracy at x."""
    x = torch.linspace(0, 1, _CELLS + 1, dtype=torch.float64, device=width.device)
    lag = torch.arange(-2 * _CELLS, 2 * _CELLS, dtype=torch.float64, device=width.device) / _CELLS
    u = (lag / width[:, None]).clamp_(-1, 1)
    kernel = torch.fft.rfft(torch.fft.ifftshift((1 - u * u) ** 3, dim=1))
    density, density_of_hits = (_reflect_and_fold(grid, kernel) for grid in (everything, hits))
    error = torch.trapezoid((x * density - density_of_hits).abs(), x) / torch.trapezoid(density, x)
    return torch.where(hits.sum(1) > 0, error, math.nan)


def _reflect_and_fold(grid: Float[Tensor, "r points"], kernel: Num[Tensor, "r m"]) -> Float[Tensor, "r points"]:
    """Density at the grid points of 0..1, with the mass near 0 and 1 reflected there."""
    half = _CELLS // 2
    padded = grid.new_zeros(len(grid), 4 * _CELLS)
    padded[:, half : half + _CELLS + 1] = grid
    padded[:, 1 : half + 1] += grid[:, :half].flip(1)
    padded[:, half + _CELLS : 2 * _CELLS + 1] += grid[:, half:].flip(1)
    folded = torch.fft.irfft(torch.fft.rfft(padded) * kernel, n=4 * _CELLS)
    return folded[:, half : half + _CELLS + 1]
