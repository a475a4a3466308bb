"""What one pass over the rows yields, and the probabilities of single classes that follow from it.

The softmax is never held as a whole. A pass over blocks of rows, which stay in the cache, keeps two numbers a row, the
largest logit m and the sum of exp((z - m) / T); with them the probabilities of any class are one line of arithmetic on
that class's logits alone. So the suite needs little memory beside its input, and a table on disk needs one column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.threads import one_thread

_BLOCK_ELEMENTS = 1 << 18
_GROUP_ELEMENTS = 1 << 18

Matrix = Float[Tensor, "n c"] | Float[np.ndarray, "n c"]
Labels = Int[Tensor, "n"] | Int[np.ndarray, "n"]


class Rows(NamedTuple):
    """The rows of logits at one temperature T.

    Attributes:
        peak: the largest logit.
        total: sum over the classes of exp((logit - peak) / T).
        correct: whether the first class with the largest logit is the label.
    """

    peak: Float[Tensor, " n"]
    total: Float[Tensor, " n"]
    correct: Bool[Tensor, " n"]

    @property
    def confidence(self) -> Float[Tensor, " n"]:
        """The largest probability."""
        return self.total.reciprocal()


class Losses(NamedTuple):
    """-log of the label's probability, and the squared distance of the probabilities to the label's corner, in 0..2."""

    log_loss: Float[Tensor, " n"]
    brier: Float[Tensor, " n"]


@one_thread()
def rows_of(
    logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], temperatures: Sequence[float]
) -> tuple[list[Rows], list[Losses]]:
    """One pass over the rows, in blocks; rows and losses at every temperature, which share peak and correct."""
    n, c = logits.shape
    like = working(logits[:0])
    peak, correct = like.new_empty(n), torch.empty(n, dtype=torch.bool, device=logits.device)
    totals = [like.new_empty(n) for _ in temperatures]
    losses = [Losses(like.new_empty(n), like.new_empty(n)) for _ in temperatures]
    size = max(1, _BLOCK_ELEMENTS // c)
    for start in range(0, n, size):
        part = slice(start, start + size)
        z, y = working(logits[part]), labels[part]
        peak[part], predicted = z.max(1)
        correct[part] = predicted == y
        z = z - peak[part, None]
        for temperature, total, loss in zip(temperatures, totals, losses):
            p = z * (1 / temperature)
            own = p.gather(1, y[:, None])
            total[part] = p.exp_().sum(1)
            loss.log_loss[part] = total[part].log() - own[:, 0]
            p /= total[part, None]
            p.scatter_add_(1, y[:, None], torch.full_like(own, -1))
            loss.brier[part] = torch.linalg.vecdot(p, p)
    return [Rows(peak, total, correct) for total in totals], losses


def working(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """Half precision widened to float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def columns(logits: Float[Tensor, "n c"]) -> Iterator[tuple[int, Float[Tensor, "g n"]]]:
    """All classes in groups (first class, their logits as rows); a group is a copy."""
    n, c = logits.shape
    size = max(1, min(c // 4, _GROUP_ELEMENTS // n))
    for first in range(0, c, size):
        group = working(logits[:, first : first + size]).T
        yield first, group.clone(memory_format=torch.contiguous_format)


def probabilities(columns: Float[Tensor, "g n"], rows: Rows, temperature: float) -> Float[Tensor, "g n"]:
    """The probabilities of the classes whose logits are given."""
    return (columns - rows.peak).mul_(1 / temperature).exp_().div_(rows.total)


def top_label(probs: Matrix, labels: Labels) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Check probabilities and labels; the largest probability of each row, and whether its class is the label."""
    p, y = checked(probs, labels)
    confidence, predicted = p.max(1)
    return confidence, predicted == y


def checked(probs: Matrix, labels: Labels) -> tuple[Float[Tensor, "n c"], Int[Tensor, " n"]]:
    """Probabilities (float32 or float64) and labels on their device; refuse what is neither."""
    p = checks.tensor(probs, "probs").detach()
    rounding = torch.finfo(p.dtype).eps if p.is_floating_point() else 0.0
    p = checks.probabilities(p, atol=max(1e-3, rounding))
    return working(p), checks.labels(labels, *p.shape).to(p.device)
