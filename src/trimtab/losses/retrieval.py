"""What objectives for dual encoders share: the scores of a batch, and which of its pairs belong together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.losses.base import full_precision, same_device, widened

Positive = Int[Tensor, " q"] | Bool[Tensor, "q d"] | None


def dual_encoder_scores(
    queries: Float[Tensor, "q k"],
    passages: Float[Tensor, "q k"],
    hard: Float[Tensor, "q h k"] | None = None,
    *,
    normalize: bool = True,
) -> Float[Tensor, "q d"]:
    """Scores of every query with every passage of a batch, the positive ones on the diagonal.

    In distributed training, gather the embeddings of all processes first (``torch.distributed.nn.all_gather``).

    Args:
        queries: embeddings (q, k), floating point.
        passages: embeddings (q, k); row i is the passage that answers query i.
        hard: embeddings (q, h, k) of h further passages a query that do not answer it. Each serves all queries.
        normalize: score by the cosine; False scores by the inner product.

    Returns:
        (q, q + q h), at least float32: the passages, then the hard ones of the first query, of the second, and so on.

    Raises:
        InputError: shapes do not fit, a device differs, or a value is not finite.

    Example:
        >>> queries = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> dual_encoder_scores(queries, queries.flip(1), torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]]))
        tensor([[0.0000, 1.0000, 0.6000, 1.0000],
                [1.0000, 0.0000, 0.8000, 0.0000]])
    """
    same_device(queries=queries, passages=passages, **({} if hard is None else {"hard": hard}))
    q = widened(checks.matrix(queries, "queries"))
    p = widened(checks.matrix(passages, "passages", columns=q.shape[1]))
    if p.shape != q.shape:
        raise InputError(f"passages must have a row for each of the {len(q)} queries, got {len(p)}")
    if hard is not None:
        if hard.ndim != 3 or hard.shape[0] != len(q) or hard.shape[2] != q.shape[1]:
            raise InputError(f"hard must have shape ({len(q)}, h, {q.shape[1]}), got {tuple(hard.shape)}")
        if not hard.is_floating_point():
            raise InputError(f"hard must be floating point, got {str(hard.dtype).removeprefix('torch.')}")
        p = torch.cat([p, widened(checks.finite(hard, "hard")).flatten(0, 1)])
    if normalize:
        q, p = F.normalize(q), F.normalize(p)
    with full_precision(q):
        return q @ p.T


def judged(
    similarity: Tensor, positive: Tensor | None, dropped: Tensor | None
) -> tuple[Float[Tensor, "q d"], Int[Tensor, " q"] | Bool[Tensor, "q d"], Bool[Tensor, "q d"] | None]:
    """Checked scores, at least float32; the positive pairs, by column or as a mask; pairs that are left out, or None.

    Args:
        similarity: (q, d) scores, floating point, finite.
        positive: the column of each row's positive pair (q,), or all positive pairs (q, d); None is the diagonal.
        dropped: pairs that are no negatives (q, d); a positive one stays positive.

    Raises:
        InputError: an argument is malformed, or there is no positive or no negative pair.
    """
    named = {"positive": positive, "dropped": dropped}
    same_device(similarity=similarity, **{name: value for name, value in named.items() if value is not None})
    s = widened(checks.matrix(similarity, "similarity"))
    q, d = s.shape
    if positive is None:
        if d < q:
            raise InputError(f"similarity must have a column for each of its {q} rows, or positive be given, got {d}")
        positive = torch.arange(q, device=s.device)
    elif positive.ndim == 2:
        _mask(positive, s, "positive")
    else:
        positive = checks.labels(positive, q, d, "positive")
    if dropped is not None:
        dropped = _mask(dropped, s, "dropped") & ~as_mask(positive, d)
    if positive.ndim == 2 or dropped is not None:
        right = as_mask(positive, d)
        if not checks.unread(right) and not bool(right.any()):
            raise InputError("positive must hold a positive pair, none is")
        if not checks.unread(right) and bool((right if dropped is None else right | dropped).all()):
            raise InputError("similarity must hold a negative pair, all are positive or dropped")
    elif d == 1:
        raise InputError("similarity must hold a negative pair, each row has its positive one alone")
    return s, positive, dropped


def as_mask(positive: Tensor, columns: int) -> Bool[Tensor, "q d"]:
    """Positive pairs, by column or as a mask, as a mask."""
    return positive if positive.ndim == 2 else F.one_hot(positive, columns).bool()


def _mask(mask: Tensor, like: Tensor, name: str) -> Bool[Tensor, "q d"]:
    if mask.shape != like.shape or mask.dtype != torch.bool:
        raise InputError(f"{name} must be boolean of shape {tuple(like.shape)}, got {checks.described(mask)}")
    return mask
