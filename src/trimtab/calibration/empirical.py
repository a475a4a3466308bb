"""Empirical distribution functions, one for each class."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ByClass(NamedTuple):
    """A sample of every class, sorted: two tensors hold them all, however many each class has.

    Attributes:
        values: (n,) class after class, ascending within each.
        starts: (c + 1,) where each class begins in `values`, and the end of the last.

    Example:
        >>> import torch
        >>> sample = ByClass.of(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0, 0, 2]), 3)
        >>> sample.sizes, sample.below(torch.tensor([2.5]))
        (tensor([2, 0, 1]), tensor([[1, 0, 1]]))
    """

    values: Tensor
    starts: Tensor

    @classmethod
    def of(cls, values: Float[Tensor, " n"], labels: Int[Tensor, " n"], c: int) -> Self:
        """Sort `values` by class."""
        order = values.argsort()
        order = order[labels[order].argsort(stable=True)]
        counts = torch.bincount(labels, minlength=c)
        return cls(values[order], torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    @property
    def sizes(self) -> Int[Tensor, " c"]:
        """How many values each class has."""
        return self.starts.diff()

    def of_class(self, k: int) -> Float[Tensor, " k"]:
        """The values of class k, ascending."""
        return self.values[int(self.starts[k]) : int(self.starts[k + 1])]

    def below(self, x: Float[Tensor, " m"] | Float[Tensor, "m c"]) -> Int[Tensor, "m c"]:
        """How many values of each class are smaller than x; a matrix holds one x for every class."""
        columns = [x] * len(self.sizes) if x.ndim == 1 else list(x.unbind(1))
        counts = [torch.searchsorted(self.of_class(k), column.contiguous()) for k, column in enumerate(columns)]
        return torch.stack(counts, 1)

    def share_not_below(self, x: Float[Tensor, " m"]) -> Float[Tensor, "m c"]:
        """The share of each class's values that are at least x; zero for a class without values."""
        sizes = self.sizes.to(x.dtype)
        return torch.where(sizes > 0, 1 - self.below(x) / sizes.clamp(min=1), 0.0)

    def quantile(self, x: Float[Tensor, "m c"]) -> Float[Tensor, "m c"]:
        """The share of class k's values that are below x_k: one from the largest value on, zero without values."""
        sizes = self.sizes.to(x.dtype)
        last = self.values[(self.starts[1:] - 1).clamp(min=0)] if len(self.values) else x.new_zeros(len(sizes))
        share = torch.where(x >= last, 1.0, self.below(x) / sizes.clamp(min=1))
        return torch.where(sizes > 0, share, 0.0)
