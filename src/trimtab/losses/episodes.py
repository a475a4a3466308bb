"""Episodes for few-shot training: some classes, of each some examples to learn from and others to be asked about."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor
from torch.utils.data import Sampler

from trimtab.core import checks
from trimtab.core.checks import InputError


class EpisodeSampler(Sampler[list[int]]):
    """Draws episodes as lists of indices, for ``DataLoader(dataset, batch_sampler=...)``.

    An episode lists the support set first, then the queries, each class by class: ``way * shot`` indices, then
    ``way * queries``. Support and queries of an episode have no example in common; the authors' code of ProtoTriplet
    and ICNN draws them independently, so that a query may be its own support.

    Args:
        labels: (n,) classes of the whole data set, integers >= 0.
        way: classes an episode, at least 2.
        shot: support examples a class, at least 1.
        queries: queries a class, at least 1; 15 in most papers' tests.
        episodes: how many episodes one pass gives.
        seed: of the draws. Another pass gives other episodes.

    Raises:
        InputError: there are fewer classes than `way`, or a class has fewer than shot + queries examples.

    Example:
        >>> import torch
        >>> labels = torch.arange(60) % 6
        >>> sampler = EpisodeSampler(labels, way=3, shot=1, queries=2, episodes=100, seed=0)
        >>> len(sampler), labels[next(iter(sampler))].tolist()
        (100, [2, 5, 3, 2, 2, 5, 5, 3, 3])

    Reference:
        Vinyals et al., Matching Networks for One Shot Learning, NeurIPS 2016.
    """

    def __init__(
        self,
        labels: Integer[Tensor, " n"] | Integer[np.ndarray, " n"],
        *,
        way: int,
        shot: int,
        queries: int,
        episodes: int,
        seed: int = 0,
    ):
        y = checks.tensor(labels, "labels")
        y = checks.labels(y, len(y) if y.ndim else 0, None).cpu()
        self.way = checks.integer(way, "way", low=2)
        self.shot = checks.integer(shot, "shot", low=1)
        self.queries = checks.integer(queries, "queries", low=1)
        self.episodes = checks.integer(episodes, "episodes", low=1)
        classes, counts = y.unique(return_counts=True)
        self._members = y.argsort(stable=True).split(counts.tolist())
        if len(classes) < way:
            raise InputError(f"labels must have at least way = {way} classes, got {len(classes)}")
        if int(counts.min()) < shot + queries:
            raise InputError(
                f"labels must have at least shot + queries = {shot + queries} examples of every class, got "
                f"{int(counts.min())} of class {int(classes[counts.argmin()])}"
            )
        self._generator = torch.Generator().manual_seed(checks.integer(seed, "seed", low=0))

    def __len__(self) -> int:
        return self.episodes

    def __iter__(self) -> Iterator[list[int]]:
        """The episodes of one pass."""
        for _ in range(self.episodes):
            chosen = torch.randperm(len(self._members), generator=self._generator)[: self.way].tolist()
            drawn = torch.stack([self._draw(self._members[c]) for c in chosen])
            yield torch.cat([drawn[:, : self.shot].flatten(), drawn[:, self.shot :].flatten()]).tolist()

    def _draw(self, members: Tensor) -> Tensor:
        return members[torch.randperm(len(members), generator=self._generator)[: self.shot + self.queries]]
