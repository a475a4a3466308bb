"""Nearest neighbours among embeddings, in blocks: memory grows with the number of points, not of pairs."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core.precision import doubled
from trimtab.losses import base

_PAIRS_AT_ONCE = 1 << 20


@torch.no_grad()
def nearest(
    origins: Float[Tensor, "n d"], targets: Float[Tensor, "m d"], count: int, leave_out: Int[Tensor, " n"] | None = None
) -> Int[Tensor, "n count"]:
    """The `count` nearest targets of every origin, ascending by Euclidean distance.

    Distances are compared as |t|^2 - 2 o't of centred points in float64, by matrix products: an order that differs from
    the exact one only where distances agree to some 1e-15 of the points' spread.

    Args:
        origins: (n, d).
        targets: (m, d).
        count: 1..m, or 1..m - 1 with `leave_out`.
        leave_out: (n,) for every origin one target that does not count.
    """
    centre = doubled(targets).mean(0)
    targets = doubled(targets) - centre
    half_squares = targets.square().sum(1) / 2
    block = max(1, _PAIRS_AT_ONCE // len(targets))
    found = []
    with base.full_precision(origins):
        for start in range(0, len(origins), block):
            rows = slice(start, start + block)
            far = torch.addmm(half_squares, doubled(origins[rows]) - centre, targets.T, alpha=-1)
            if leave_out is not None:
                far.scatter_(1, leave_out[rows, None], torch.inf)
            found.append(far.topk(count, largest=False).indices)
    return torch.cat(found)


def distances(a: Float[Tensor, "... d"], b: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
    """sqrt(|a - b|^2 + 1e-6): its gradient stays finite where the points meet, and their distance is then 0.001."""
    return ((a - b).square().sum(-1) + 1e-6).sqrt()
