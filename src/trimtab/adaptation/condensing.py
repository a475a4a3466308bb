"""Condensing the patches of a vision transformer by what its class token looks at: keep some, merge some, sum the rest.

The part of TCA (`trimtab.adaptation.token_condensation`, arXiv:2410.14729) that saves computing time, without state.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.adaptation import vit_blocks
from trimtab.adaptation.vit_blocks import Block, VisionTransformer
from trimtab.core.checks import InputError

Ranking = Literal["attention", "head_rank"]
Start = int | torch.Generator
_MERGED = 4


def condensed(
    parts: VisionTransformer,
    block: Block,
    tokens: Float[Tensor, "1 t w"],
    drop_rate: float,
    start: Start,
    *,
    anchors: Float[Tensor, "a w"] | None = None,
    ranking: Ranking = "attention",
) -> Float[Tensor, "1 r w"]:
    """One image's tokens through a block of `parts` that condenses them between attention and perceptron.

    The anchor that is most like the class token takes part in attention as a token in front of the others.
    """
    anchor = tokens[:, :0]
    if anchors is not None:
        likeness = F.normalize(anchors, dim=1) @ F.normalize(parts.summary(tokens).to(anchors.dtype), dim=1).T
        anchor = anchors[likeness.argmax()][None, None].to(tokens.dtype)
    guests = anchor.shape[1]
    queries, keys, values = block.split(block.ln_1(torch.cat([anchor, tokens], 1)))
    queries = queries[:, :, guests:]
    if parts.probe is None:
        patches, weights = 1, vit_blocks.attention(queries[:, :, 0], keys)[0, :, guests + 1 :]
    else:
        patches, weights = 0, parts.probe(tokens)[0]
    tokens = tokens + block.gather(queries, keys, values)
    rest = condense(tokens[0, patches:], weights, drop_rate, start, ranking=ranking)
    tokens = torch.cat([tokens[:, :patches], rest[None]], 1)
    return tokens + block.mlp(block.ln_2(tokens))


def condense(
    patches: Float[Tensor, "n w"],
    attention: Float[Tensor, "heads n"],
    drop_rate: float,
    start: Start,
    *,
    ranking: Ranking = "attention",
) -> Float[Tensor, "r w"]:
    """Keep the foremost patches, merge the doubtful into four tokens, sum the disregarded into one.

    Args:
        patches: all tokens but the class token.
        attention: how the class token weighs them, in every head.
        drop_rate: with N = n + 1 tokens, ceil((1 - drop_rate) n) patches are not disregarded; of these as many as twice
            the difference to N are doubtful.
        start: first centre among the doubtful, or a generator to draw it from.
        ranking: see `TokenCondensation`.

    Raises:
        InputError: fewer than four patches are doubtful, or there are not enough for them.
    """
    kept, doubtful, disregarded = partition(attention, drop_rate, ranking)
    merged = coreset_averaging(patches[doubtful], _MERGED, start)
    weights = attention.mean(0)[disregarded]
    return torch.cat([patches[kept], merged, weights[None] @ patches[disregarded]])


def partition(
    attention: Float[Tensor, "heads n"], drop_rate: float, ranking: Ranking = "attention"
) -> tuple[Int[Tensor, " k"], Int[Tensor, " a"], Int[Tensor, " d"]]:
    """Patches that are kept, doubtful and disregarded, foremost first; see `condense`."""
    n = attention.shape[1]
    left = math.ceil((1 - drop_rate) * n)
    doubtful = 2 * (n + 1 - left)
    if not _MERGED <= doubtful <= left:
        raise InputError(
            f"drop_rate must leave {_MERGED} doubtful patches or more, and no more than it keeps: "
            f"{drop_rate:g} of {n} patches leaves {left}, {doubtful} of them doubtful"
        )
    if ranking == "head_rank":
        scores = attention.argsort(dim=1, stable=True).argsort(dim=1).double().mean(0)
    else:
        scores = attention.mean(0)
    order = scores.argsort(descending=True, stable=True)
    return order[: left - doubtful], order[left - doubtful : left], order[left:]


def coreset_averaging(tokens: Float[Tensor, "n w"], k: int, start: Start) -> Float[Tensor, "k w"]:
    """Merge tokens into k: the weighted mean of those nearest to each of k centres, weights the inverse distances.

    A token at distance zero, such as the centre, has weight 1 before weights are made to sum to one. A centre that
    equals an earlier one stays without tokens: its mean is zero.
    """
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    distances = _distances(wide, wide[k_center_greedy(wide, k, start)])
    nearest, cluster = distances.min(1)
    weights = torch.where(nearest == 0, 1.0, 1 / nearest)
    shares = torch.zeros_like(distances).scatter_(1, cluster[:, None], weights[:, None])
    shares = shares / shares.sum(0).clamp_min(torch.finfo(shares.dtype).tiny)
    return (shares.T @ wide).to(tokens.dtype)


def k_center_greedy(tokens: Float[Tensor, "n w"], k: int, start: Start) -> Int[Tensor, " k"]:
    """k centres: the first is `start`, or drawn; each next is the token farthest from all centres so far."""
    if isinstance(start, torch.Generator):
        start = int(torch.randint(len(tokens), (1,), generator=start))
    centres = [start]
    distances = _distances(tokens, tokens[start][None])[:, 0]
    for _ in range(k - 1):
        centres.append(int(distances.argmax()))
        distances = torch.minimum(distances, _distances(tokens, tokens[centres[-1]][None])[:, 0])
    return torch.tensor(centres, device=tokens.device)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
