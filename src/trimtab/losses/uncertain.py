"""Batches of what a model is not sure of yet, so that no step is spent on examples that would not move it.

Beside `trimtab.losses.DirectCoverage`, whose factor F(N, p) is next to nothing on answers that the model knows: those
are left out, and the batch is filled up with others. Any score of that kind serves.

Chen, Raventós, Cheng, Ganguli, Druckmann (NeurIPS 2025), arXiv 2502.07154, after the loop in the authors' code: what is
over at the end of an epoch comes first in the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Sampler

from trimtab.core import checks
from trimtab.core.checks import InputError


def select_uncertain(factor: Float[Tensor, " n"], threshold: float = 0.1) -> Int[Tensor, " k"]:
    """Which rows still have something to learn: those with a factor above `threshold`.

    Args:
        factor: (n,), F(N, p) in 0..1, such as `coverage_factor` gives.
        threshold: in 0..1; 0.1 as the authors' code.

    Returns:
        (k,) rows, ascending.

    Raises:
        InputError: an argument is out of its range.

    Example:
        >>> import torch
        >>> from trimtab.losses import select_uncertain
        >>> select_uncertain(torch.tensor([1.0, 0.02, 0.4]))
        tensor([0, 2])

    Reference:
        Chen et al., NeurIPS 2025, arXiv 2502.07154.
    """
    if factor.ndim != 1 or not factor.is_floating_point():
        raise InputError(f"factor must be a floating-point vector, got {factor.dtype} of shape {tuple(factor.shape)}")
    checks.within(factor, "factor", 0, 1)
    return (factor > checks.number(threshold, "threshold", low=0, high=1)).nonzero()[:, 0]


class UncertainBatches(Sampler[list[int]]):
    """Full batches of the examples that still have something to learn, for ``DataLoader(batch_sampler=...)``.

    Each round scores `batch_size` indices with the model as it is, keeps the uncertain ones, and yields a batch as soon
    as one is full; fewer steps an epoch the more the model knows. What does not fill a batch comes first in the next
    epoch, scored anew. With worker processes a loader asks for batches ahead of time, so their scores are some steps
    older.

    Args:
        indices: a sampler, or another iterable that can be gone through once an epoch, of a data set's indices.
        score: a function from a list of indices to their factors (n,), in 0..1; call the model in eval mode without
            gradients there.
        batch_size: >= 1.
        threshold: what a factor must exceed, in 0..1; 0.1 as the authors' code.

    Raises:
        InputError: an argument is out of its range, or `score` gives another number of factors.

    Example:
        >>> import torch
        >>> from trimtab.losses import UncertainBatches
        >>> known = torch.tensor([0.9, 0.0, 0.8, 0.0, 0.7, 0.6])  # factors: 1 and 3 are known
        >>> batches = UncertainBatches(range(6), lambda rows: known[rows], batch_size=3)
        >>> list(batches), list(batches)
        ([[0, 2, 4]], [[5, 0, 2]])

    Reference:
        Chen et al., NeurIPS 2025, arXiv 2502.07154.
    """

    def __init__(
        self,
        indices: Iterable[int],
        score: Callable[[list[int]], Tensor],
        *,
        batch_size: int,
        threshold: float = 0.1,
    ) -> None:
        self.indices = indices
        self.score = score
        self.batch_size = checks.integer(batch_size, "batch_size", low=1)
        self.threshold = checks.number(threshold, "threshold", low=0, high=1)
        self._left: list[int] = []

    def __iter__(self) -> Iterator[list[int]]:
        stream = chain(self._left, self.indices)
        self._left = pool = []
        while rows := list(islice(stream, self.batch_size)):
            factor = self.score(rows)
            if factor.shape != (len(rows),):
                raise InputError(
                    f"score must give {len(rows)} factors for {len(rows)} indices, got {tuple(factor.shape)}"
                )
            pool += [rows[i] for i in select_uncertain(factor, self.threshold).tolist()]
            if len(pool) >= self.batch_size:
                batch = pool[: self.batch_size]
                del pool[: self.batch_size]
                yield batch
