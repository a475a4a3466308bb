"""Maps of log-probabilities with few parameters: one monotone function for all classes, or a mixture of temperatures.

Every map takes normalised log-probabilities (n, c). Parameters may have any sign: a slope, an inverse temperature or a
mixture weight counts by its absolute value, as in the code of Huang et al. (2025), from which the maps come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import elu

from trimtab.calibration.base import logsumexp

Map = Literal["temperature", "linear", "pwlinear", "nonlinear"]
REACH = 100.0
"""Pieces of `piecewise_linear` divide the log-probabilities from 0 down to minus this."""
_KNOTS = 256


def tempered_mixture(
    log_p: Float[Tensor, "n c"], factors: Float[Tensor, " k"], shares: Float[Tensor, " k"]
) -> Float[Tensor, "n c"]:
    """Log-probabilities of the mixture of softmax(|factor| log_p), weighted by |share| / sum of |shares|.

    Example:
        >>> log_p = torch.tensor([[0.75, 0.25]]).log()
        >>> tempered_mixture(log_p, torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])).exp()
        tensor([[0.6250, 0.3750]])
    """
    parts = (factors.abs()[:, None, None] * log_p).log_softmax(-1)
    weights = shares.abs() / shares.abs().sum()
    return logsumexp(parts + weights.log()[:, None, None], 0)[0]


def piecewise_linear(
    log_p: Float[Tensor, "n c"], slopes: Float[Tensor, " pieces"], exact: bool = True
) -> Float[Tensor, "n c"]:
    """Scores -g(-log_p) with a function g of s equal pieces on 0..100 and one more beyond, from s + 1 slopes.

    Args:
        log_p: log-probabilities (n, c).
        slopes: |slope| of every piece, s >= 1 of them, and of what lies beyond; all one is the identity.
        exact: g is continuous and rises. False is the authors' formula, which interpolates from an output where it
            should from an input: it jumps at the pieces' ends, not always upwards, and is constant beyond 100.

    Example:
        >>> piecewise_linear(torch.tensor([[-1.0, -60.0]]), torch.tensor([1.0, 2.0, 1.0]))
        tensor([[ -1., -70.]])
    """
    steep = slopes.abs()
    pieces = len(slopes) - 1
    width = REACH / pieces
    t = -log_p
    piece = (t / width).floor().clamp(0, pieces).long()
    if exact:
        height = width * (steep.cumsum(0) - steep)
        return -(height[piece] + steep[piece] * (t - width * piece))
    height = width * (steep.cumsum(0) - 1)
    low, high = height[piece], height[((t + width) / width).floor().clamp(0, pieces).long()]
    return -(low + (high - low) / width * (t - low))


def monotone_network(
    x: Float[Tensor, " *shape"], network: Float[Tensor, " parameters"], steps: int = 50
) -> Float[Tensor, " *shape"]:
    """g(x) = integral from 0 to x of ELU(MLP(t)) + 1, by Clenshaw-Curtis quadrature.

    Args:
        x: anything, best of mean 0 and deviation 1.
        network: the MLP 1 -> h -> h -> 1 with ReLU in one vector of h^2 + 4h + 1 numbers: weights and biases of the
            first layer (h and h), of the second (h x h and h), of the third (h and one).
        steps: the integrand is taken at so many points and one, even. 50 as the authors.

    Example:
        >>> monotone_network(torch.tensor([[-1.0, 2.0]]), torch.zeros(6))  # the integrand is 1 everywhere
        tensor([[-1., 2.]])
    """
    h = math.isqrt(len(network) + 3) - 2
    first, first_bias, second, second_bias, third, third_bias = network.split([h, h, h * h, h, h, 1])
    total = torch.zeros_like(x)
    for node, weight in zip(*_clenshaw_curtis(steps)):
        hidden = (x[..., None] * node * first + first_bias).relu()
        hidden = (hidden @ second.view(h, h).mT + second_bias).relu()
        total = total + weight * (elu(hidden @ third + third_bias) + 1)
    return total * x


@lru_cache
def _clenshaw_curtis(steps: int) -> tuple[list[float], list[float]]:
    """Nodes in 0..1, and weights that add up to one; for an even number of steps."""
    k = np.arange(steps + 1)
    ends = np.where((k == 0) | (k == steps), 0.5, 1.0)
    moments = np.where(k % 2 == 0, ends / (1.0 - np.where(k % 2 == 0, k, 0) ** 2), 0.0)
    cosines = np.cos(np.outer(k, k) * np.pi / steps)
    weights = 2 / steps * ends * (cosines @ moments)
    return ((1 + np.cos(k * np.pi / steps)) / 2).tolist(), weights.tolist()


def start(name: Map, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A map's parameters before training, as the authors begin: drawn for the mixture and the network."""

    def uniform(count: int, inputs: int) -> Tensor:
        return (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1) / math.sqrt(inputs)

    if name == "temperature":
        return {"factors": torch.ones(1), "shares": torch.ones(1)}
    if name == "linear":
        return {"factors": uniform(size, size), "shares": uniform(size, size)}
    if name == "pwlinear":
        return {"slopes": torch.ones(size + 1)}
    return {"network": torch.cat([uniform(2 * size, 1), uniform(size * size + 2 * size + 1, size)])}


def apply(
    log_p: Float[Tensor, "n c"],
    standard: Float[Tensor, "2"],
    state: Mapping[str, Tensor],
    exact: bool = True,
    steps: int = 50,
) -> Float[Tensor, "n c"]:
    """Log-probabilities under the map whose parameters are there and not empty.

    Args:
        log_p: log-probabilities (n, c).
        standard: mean and deviation, which the network's input is rid of.
        state: ``slopes``, or ``network``, or ``factors`` and ``shares``.
        exact: of `piecewise_linear`.
        steps: of `monotone_network`.
    """
    if len(state.get("slopes", ())):
        return piecewise_linear(log_p, state["slopes"], exact).log_softmax(-1)
    if len(state.get("network", ())):
        return monotone_network((log_p - standard[0]) / standard[1], state["network"], steps).log_softmax(-1)
    return tempered_mixture(log_p, state["factors"], state["shares"])


def trainee(
    log_p: Float[Tensor, "n c"], standard: Float[Tensor, "2"], state: Mapping[str, Tensor], exact: bool, steps: int
) -> Callable[[Tensor | slice], Tensor]:
    """`apply` to chosen rows, with the parameters as they are at the time.

    The network's integral is taken at 512 knots, and interpolated between them: for training that is near enough, and a
    hundredth of the work.
    """
    if "network" not in state:
        return lambda rows: apply(log_p[rows], standard, state, exact, steps)
    x = (log_p - standard[0]) / standard[1]
    by_rank = x.flatten().sort().values[torch.linspace(0, x.numel() - 1, _KNOTS).long()]
    evenly = torch.linspace(float(x.min()), float(x.max()), _KNOTS).to(x)
    knots = torch.cat([by_rank, evenly]).unique()
    knots = torch.cat([knots, knots[-1:] + 1])
    place = (torch.searchsorted(knots, x, right=True) - 1).clamp(0, len(knots) - 2)
    share = (x - knots[place]) / (knots[place + 1] - knots[place])

    def scores(rows: Tensor | slice) -> Tensor:
        height = monotone_network(knots, state["network"], steps)
        at = place[rows]
        return torch.lerp(height[at], height[at + 1], share[rows]).log_softmax(1)

    return scores
