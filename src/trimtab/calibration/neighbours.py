"""Exact nearest neighbours: how many of a kind come before the first of another kind, and how far the first one is.

No neighbour is ever sorted. The run of like neighbours ends at the nearest unlike one, so that its length is the number
of like points nearer than that: one minimum and one count over a row of distances, whatever the length of the run.
Distances are taken in tiles that stay in the cache; memory beside the points does not grow with the queries.

300 queries against a million points in 64 dimensions, one thread of a busy machine: 2.6 to 3.4 s in single and 3.3 to
4.7 s in double precision, with runs of 4 or of 48 000. Searches for the nearest k in single precision, from which a run
is known only if it ends within k: scikit-learn 1.8 s (k = 100) and 2.6 s (1000), blocks of `torch.topk` 4.2 and 5.4 s,
faiss's flat index 11 and 12 s (``benchmarks/bench_neighbours.py``). So faiss is not used, even where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

# distances are taken in tiles that stay in the cache
_ROWS, _COLUMNS = 256, 2048


def runs(
    points: Float[Tensor, "m d"],
    kinds: Int[Tensor, " m"],
    support: Float[Tensor, "n d"],
    support_kinds: Int[Tensor, " n"],
    *,
    itself: bool = False,
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """The length of each point's run of nearest neighbours of its own kind, and the distance to the nearest of all.

    Distances that differ by rounding alone (a few units in the last place of the largest coordinates) are equal; among
    equals the order is that of the support's rows.

    Args:
        points: (m, d), in the precision that distances are to be computed in.
        kinds: (m,) the kind that a point's neighbours must have, >= 0.
        support: (n, d) the points among which neighbours are looked for.
        support_kinds: (n,) their kinds; -1 is like nothing.
        itself: `points` is `support`, and no point is its own neighbour.

    Returns:
        Run lengths (m,), and squared Euclidean distances (m,) to the nearest neighbour.

    Example:
        >>> import torch
        >>> support = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
        >>> runs(torch.tensor([[0.4], [6.0]]), torch.tensor([0, 0]), support, torch.tensor([0, 0, 1, 0]))
        (tensor([2, 1]), tensor([0.1600, 1.0000]))
    """
    order = support_kinds.argsort(stable=True)
    place = order.argsort()
    sorted_kinds = support_kinds[order]
    centre = support.mean(0)
    s, x = support[order] - centre, points - centre
    squares = s.square().sum(1)
    slack = 16 * torch.finfo(x.dtype).eps * (x.norm(dim=1) + squares.max().sqrt()).square()

    def tile(rows: Tensor, columns: range) -> Tensor:
        """Squared distances, short of the point's own square, which is the same for all its neighbours."""
        part = slice(columns.start, columns.stop)
        d = torch.addmm(squares[part], x[rows], s[part].mT, alpha=-2)
        if itself:
            own = ((place[rows] >= columns.start) & (place[rows] < columns.stop)).nonzero()[:, 0]
            d[own, place[rows[own]] - columns.start] = torch.inf
        return d

    length = torch.zeros(len(x), dtype=torch.long, device=x.device)
    distance = x.new_zeros(len(x))
    for kind in kinds.unique():
        start, stop = (int(torch.searchsorted(sorted_kinds, kind, right=right)) for right in (False, True))
        like, unlike = _tiles(start, stop), [*_tiles(0, start), *_tiles(stop, len(s))]
        for rows in (kinds == kind).nonzero()[:, 0].split(_ROWS):
            # the largest number where there is none: a point's own place, at infinity, lies beyond it
            end = x.new_full((len(rows),), torch.finfo(x.dtype).max)
            nearest = torch.zeros_like(rows)
            for columns in unlike:
                end, nearest = _nearer(tile(rows, columns), columns, end, nearest)
            least = end
            first, last = (end - slack[rows])[:, None], (end + slack[rows])[:, None]
            before, within = torch.zeros_like(rows), torch.zeros_like(rows)
            for columns in like:
                d = tile(rows, columns)
                least, nearest = _nearer(d, columns, least, nearest)
                before += _count(d < first)
                within += _count(d <= last)
            distance[rows] = (points[rows] - support[order[nearest]]).square().sum(1)
            length[rows] = before
            tied = (within > before).nonzero()[:, 0]
            if len(tied):
                length[rows[tied]] += _in_order(tile, rows[tied], like, unlike, order, first[tied], last[tied])
    return length, distance


def _tiles(start: int, stop: int) -> list[range]:
    return [range(low, min(low + _COLUMNS, stop)) for low in range(start, stop, _COLUMNS)]


def _nearer(d: Tensor, columns: range, least: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
    value, where = d.min(1)
    return torch.minimum(value, least), nearest.where(least <= value, where + columns.start)


def _count(mask: Tensor) -> Tensor:
    # over bytes it takes two thirds of the time that it takes over booleans
    return mask.view(torch.uint8).sum(1, dtype=torch.int32)


def _in_order(
    tile: Callable[[Tensor, range], Tensor],
    rows: Tensor,
    like: list[range],
    unlike: list[range],
    order: Tensor,
    first: Tensor,
    last: Tensor,
) -> Tensor:
    """Of the like points as far away as the nearest unlike ones, how many come before the first of those."""
    ending = torch.full_like(rows, len(order))[:, None]
    for columns in unlike:
        d, rank = tile(rows, columns), order[columns.start : columns.stop]
        equal = (d >= first) & (d <= last)
        ending = ending.minimum(rank.expand_as(d).masked_fill(~equal, len(order)).amin(1, keepdim=True))
    count = torch.zeros_like(rows)
    for columns in like:
        d, rank = tile(rows, columns), order[columns.start : columns.stop]
        count += ((d >= first) & (d <= last) & (rank < ending)).sum(1)
    return count
