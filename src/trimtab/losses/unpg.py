"""UNPG: the negative pairs of the batch join the classes in a margin softmax, so that hard ones are seen.

Reach for it where a margin softmax head (`CosFace`, `ArcFace`, `MagFace`) trains embeddings for verification of unknown
identities: class weights stand for the middle of a class, pairs of samples show its rim. One line more in training,
nothing at inference.

Paper: Jung, Lee, Oh, Park, Park, Son, "Unified Negative Pair Generation toward Well-discriminative Feature Space for
Face Recognition", BMVC 2022 (arXiv 2203.11593). The authors' code (Jung-Jun-Uk/UNPG) is followed, on one device: the
similarities of all negative pairs of the batch that a box-and-whisker rule keeps are appended to every row of logits,
the rows of samples that are in none of the pairs too; quartiles are plain entries of the sorted values, where NumPy's
and torch's interpolate. Departures: its code fails on a batch of one class, which here leaves the head's own loss;
with MagFace it is what the code means, as published it does not run.

Appending k = b (b - 1) / 2 columns to (b, c) logits is not needed: log-sum-exp of the pairs is one number, shared by
all rows. Nor are all pairs held: quartiles are selected by their bits, in two passes over blocks of cosines (four in
double precision), and blocks are made once more for the gradient. Memory grows with the batch, time with its square.

What we found, in the claim's setting (TAR at FAR 1e-2, mean of 5 seeds): CosFace 0.658; with UNPG 0.736 at wisk 1.5,
0.722 without the filter, 0.558 at wisk 0.5. With a fifth of the training labels at random: 0.576; 0.687, 0.665, 0.506.
So most of the gain is the pairs', the filter adds one or two points, more under noise, and a tight filter does harm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.losses.base import full_precision, same_device, widened
from trimtab.losses.cosine_head import CosineHead
from trimtab.losses.order_statistics import ranked

_PAIRS_AT_ONCE = 1 << 20


class UNPG(nn.Module):
    """Cross-entropy of a margin softmax head whose denominators hold the batch's negative pairs as well.

    Args:
        head: `CosFace`, `ArcFace`, `MagFace` or another `CosineHead`; its weights are this loss's parameters: give
            the optimizer ``loss.parameters()`` beside the network's.
        wisk: pairs further than this many interquartile ranges outside the quartiles are left out, >= 0: the easiest,
            and the suspiciously hard ones, which may be one identity under two labels. 1.5 as the authors take for
            MS1MV2 with ResNet-100, 1.0 for K-FACE with ResNet-34.

    Raises:
        InputError: `head` is no `CosineHead`, or `wisk` is negative.

    Example:
        >>> from trimtab.losses import CosFace
        >>> loss = UNPG(CosFace(8, 3, scale=16))
        >>> x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
        >>> round(float(loss(x, torch.arange(6) % 3).detach()), 4)
        22.3184

    Reference:
        Jung et al., BMVC 2022, https://arxiv.org/abs/2203.11593
    """

    def __init__(self, head: CosineHead, *, wisk: float = 1.5):
        super().__init__()
        if not isinstance(head, CosineHead):
            raise InputError(f"head must be a CosineHead, such as CosFace, got {type(head).__name__}")
        self.head = head
        self.wisk = checks.number(wisk, "wisk", low=0.0)

    def forward(self, embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """The mean loss; the head's own where all labels are equal.

        Args:
            embeddings: (n, features), not normalised, floating point, n >= 2.
            labels: (n,), integers in 0..classes-1.

        Raises:
            InputError: shapes, types, devices or labels are wrong, a value is not finite, or there is no pair.
        """
        x, y = self.head.checked(embeddings, labels)
        _has_pairs(x)
        logits = self.head.logits(x, y)
        loss = F.cross_entropy(logits, y, reduction="none")
        all_classes = loss + logits.gather(1, y[:, None])[:, 0]
        more = F.softplus(self._negatives(F.normalize(x), y) - all_classes, threshold=40.0)
        return (loss + more).mean() + self.head.penalty(x)

    def _negatives(self, unit: Float[Tensor, "n d"], y: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        """Log-sum-exp of scale times the cosines of the negative pairs that are kept; -inf where none is.

        Cosines are made in blocks of rows, anew for each pass over them and for the gradient.
        """
        size = max(1, _PAIRS_AT_ONCE // len(y))
        blocks = [(unit[i : i + size], y[i : i + size], unit[i:], y[i:]) for i in range(0, len(y), size)]
        members = y.new_zeros(len(self.head.weight)).scatter_add(0, y, torch.ones_like(y))
        count = (len(y) ** 2 - members.square().sum()) // 2
        places = torch.stack([count // 4, 3 * count // 4])
        first, third = ranked(lambda: (_negative_cosines(*block) for block in blocks), places, unit.dtype)
        ends = _whiskers(first, third, self.wisk)
        parts = [checkpoint(self._kept, *ends, *block, use_reentrant=False) for block in blocks]
        return torch.stack(parts).logsumexp(0)

    def _kept(self, low: Float[Tensor, ""], high: Float[Tensor, ""], *block: Tensor) -> Float[Tensor, ""]:
        """The log-sum-exp of a block."""
        cosines = _negative_cosines(*block)
        outside = (cosines < low) | (cosines > high) | cosines.isinf()
        return (self.head.scale * cosines).masked_fill(outside, -torch.inf).flatten().logsumexp(0)


def pair_similarities(
    embeddings: Float[Tensor, "n d"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " p"], Float[Tensor, " m"]]:
    """Cosines of all pairs of a batch, each pair once: those of one label, and those of two.

    Args:
        embeddings: (n, d), floating point, n >= 2.
        labels: (n,), integers >= 0.

    Returns:
        The cosines of positive and of negative pairs, at least float32, in the order (0, 1), (0, 2), ..., (1, 2), ...

    Raises:
        InputError: shapes, types, devices or labels are wrong, a value is not finite, or there is no pair.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
        >>> positive, negative = pair_similarities(x, torch.tensor([0, 0, 1]))
        >>> positive, negative
        (tensor([0.6000]), tensor([0.0000, 0.8000]))

    Reference:
        Jung et al., BMVC 2022, https://arxiv.org/abs/2203.11593
    """
    same_device(embeddings=embeddings, labels=labels)
    x = widened(checks.matrix(embeddings, "embeddings"))
    y = checks.labels(labels, len(x), None)
    _has_pairs(x)
    unit, same = F.normalize(x), y[:, None] == y
    with full_precision(x):
        similarity = unit @ unit.T
    return similarity[same.triu(1)], similarity[(~same).triu(1)]


def whisker_filter(similarities: Float[Tensor, " m"], wisk: float = 1.5) -> Float[Tensor, " k"]:
    """The values within the whiskers of a box plot, ascending.

    With l values the quartiles are the sorted values number int(l / 4) and int(3 l / 4), counted from 0.

    Args:
        similarities: (m,) any finite values; none gives none.
        wisk: how many interquartile ranges beyond the quartiles are kept, ends included, >= 0.

    Raises:
        InputError: the values are malformed or not finite, or `wisk` is negative.

    Example:
        >>> whisker_filter(torch.tensor([0.25, 0.5, 9.0, 0.75, 1.0, 0.5]))
        tensor([0.2500, 0.5000, 0.5000, 0.7500, 1.0000])

    Reference:
        Jung et al., BMVC 2022, https://arxiv.org/abs/2203.11593
    """
    if similarities.ndim != 1 or not similarities.is_floating_point():
        raise InputError(f"similarities must be floating point of shape (m,), got {checks.described(similarities)}")
    checks.number(wisk, "wisk", low=0.0)
    ordered = checks.finite(similarities, "similarities").sort().values
    count = len(ordered)
    if not count:
        return ordered
    low, high = _whiskers(ordered[count // 4], ordered[3 * count // 4], wisk)
    return ordered[(ordered >= low) & (ordered <= high)]


def _has_pairs(x: Float[Tensor, "n d"]) -> None:
    if len(x) < 2:
        raise InputError("embeddings must have at least 2 rows to form a pair, got 1")


def _negative_cosines(
    x: Float[Tensor, "k d"], y: Int[Tensor, " k"], others: Float[Tensor, "n d"], others_y: Int[Tensor, " n"]
) -> Float[Tensor, "k n"]:
    """Cosines of unit vectors with those of a list that begins with them; inf where a pair is of one label, or seen."""
    negative = (y[:, None] != others_y).triu(1)
    with full_precision(x):
        return (x @ others.T).masked_fill(~negative, torch.inf)


def _whiskers(first: Tensor, third: Tensor, wisk: float) -> tuple[Tensor, Tensor]:
    """The ends of the whiskers beyond the quartiles."""
    reach = wisk * (third - first)
    return first - reach, third + reach
