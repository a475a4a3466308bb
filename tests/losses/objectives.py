"""Every training objective, as the tests of the contract call it on a batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.losses.base import pair


@dataclass(frozen=True)
class Builder:
    """Builds a loss, and calls it on scores that it is asked about.

    Args:
        make: a function that returns the loss; called anew for every test.
        batch: ``batch(n, generator)`` returns ``(scores, rest)``: a tensor of n rows that gradients are taken for, in
            float64, and what else a call takes; two classes in n >= 2 rows.
        call: ``call(loss, scores, *rest)`` returns the scalar; by default ``loss(scores, *rest)``.
        smallest: the smallest batch that it takes; below it, an InputError.
        compiled: whether ``torch.compile(fullgraph=True)`` captures it.
        differentiable: whether the value's gradient is what backward returns (False where a surrogate is used, whose
            docstring says so).
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], tuple[Tensor, tuple[Tensor, ...]]]
    call: Callable[..., Tensor] = lambda loss, scores, *rest: loss(scores, *rest)
    smallest: int = 1
    compiled: bool = True
    differentiable: bool = True


def classified(n: int, generator: torch.Generator, classes: int = 5) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits of some classes, and labels."""
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, (torch.arange(n) % classes,)


def binary(n: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Scores (n,) and labels 0 or 1."""
    return 2 * torch.randn(n, generator=generator, dtype=torch.float64), (torch.arange(n) % 2,)


class CrossEntropy(nn.Module):
    """What every classification objective stands beside, at the same door."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(*pair(logits, labels))


BUILDERS: dict[str, Builder] = {
    "cross_entropy": Builder(CrossEntropy, classified),
}
