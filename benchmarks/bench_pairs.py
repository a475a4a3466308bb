"""Objectives of embeddings and of pairs of samples, beside their peers.

Margin softmax, UNPG, Proto-Triplet; and for growing batches, with the memory of a step, Mann-Whitney, MMCE and ICNN.
Peers are pytorch-metric-learning (where it is installed); "naive" is the form with a table of all pairs, "direct" the
formula in a few lines. How it is measured: `benchmarks.bench_losses`.

    python -m benchmarks.bench_pairs [--turns 9] [--threads 1] [--only cosines episodes pairwise]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_losses import Loss, classified, compare, run
from trimtab import losses as ours


class WithWeights(nn.Module):
    """``form(head, x, y)``, with gradients in the head's weights, as a head has them."""

    def __init__(self, form: Callable[[Any, Tensor, Tensor], Tensor], head: nn.Module):
        super().__init__()
        self.form, self.head = form, head

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.form(self.head, x, y)


def cosines(turns: int) -> None:
    """CosFace, ArcFace, UNPG."""

    def unpg(head: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        unit = F.normalize(x)
        pairs = (unit @ unit.T)[(y[:, None] != y).triu(1)]
        ordered = pairs.detach().sort().values
        first, third = ordered[len(pairs) // 4], ordered[3 * len(pairs) // 4]
        reach = 1.5 * (third - first)
        pairs = head.scale * pairs[(pairs >= first - reach) & (pairs <= third + reach)]
        return F.cross_entropy(torch.cat([head.logits(x, y), pairs.expand(len(x), -1)], 1), y)

    for n, d, c in ((128, 128, 100), (256, 512, 2000), (512, 64, 10)):
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(c, (n,), generator=generator)
        x = (torch.randn(c, d, generator=generator)[y] + torch.randn(n, d, generator=generator)).requires_grad_()
        size = f"{n} x {d}, {c} classes"
        settings: dict[str, dict[str, Any]] = {"CosFace": {"margin": 0.35}, "ArcFace": {"margin": math.degrees(0.5)}}
        for kind, options in settings.items():
            mine = getattr(ours, kind)(d, c)
            peers: dict[str, Loss] = {"direct": WithWeights(direct_head, mine)}
            if find_spec("pytorch_metric_learning"):
                from pytorch_metric_learning import losses

                peer = getattr(losses, f"{kind}Loss")(c, d, scale=64, **options)
                peer.W.data = mine.weight.detach().T.clone()
                peers["pytorch-metric-learning"] = peer
            compare(f"{kind} {size}", 1.05, mine, peers, [x, y], turns)
        mine = ours.UNPG(ours.CosFace(d, c))
        compare(f"UNPG {size}", 1.05, mine, {"naive": WithWeights(unpg, mine.head)}, [x, y], turns, memory=True)


def direct_head(head: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """CosFace or ArcFace."""
    cosines = F.linear(F.normalize(x), F.normalize(head.weight))
    own = F.one_hot(y, cosines.shape[1]).bool()
    if isinstance(head, ours.CosFace):
        target = cosines - head.margin
    else:
        target = (cosines.clamp(-1 + 1e-7, 1 - 1e-7).acos() + head.margin).cos()
    return F.cross_entropy(head.scale * torch.where(own, target, cosines), y)


def episodes(turns: int) -> None:
    """Proto-Triplet."""

    def naive(support: Tensor, support_y: Tensor, x: Tensor, y: Tensor) -> Tensor:
        means = torch.stack([support[support_y == k].mean(0) for k in range(int(support_y.max()) + 1)])
        apart = ((x[:, None] - means).square().sum(2) + 1e-6).sqrt()
        own = F.one_hot(y, len(means)).bool()
        return (apart[own] - apart.masked_fill(own, torch.inf).min(1).values + 0.5).relu().mean()

    for ways, shot, d in ((5, 5, 64), (20, 5, 512), (50, 5, 512)):
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(ways)
        centres = 0.2 * torch.randn(ways, d, generator=generator)
        support, queries = (
            (centres.repeat(k, 1) + torch.randn(ways * k, d, generator=generator)).requires_grad_() for k in (shot, 15)
        )
        peers: dict[str, Loss] = {"naive": naive}
        if find_spec("pytorch_metric_learning"):
            from pytorch_metric_learning import distances, losses, miners, reducers

            distance = distances.LpDistance(normalize_embeddings=False)
            triplet = losses.TripletMarginLoss(margin=0.5, distance=distance, reducer=reducers.MeanReducer())
            hardest = miners.BatchHardMiner(distance=distance)

            def peer(
                s: Tensor, sy: Tensor, x: Tensor, y: Tensor, triplet: Any = triplet, hard: Any = hardest
            ) -> Tensor:
                means, classes = ours.prototypes(s, sy)
                return triplet(x, y, hard(x, y, means, classes), means, classes)

            peers["pytorch-metric-learning"] = peer
        data = [support, y.repeat(shot), queries, y.repeat(15)]
        compare(f"ProtoTriplet {ways} ways, {d} wide", 1.05, ours.ProtoTriplet(), peers, data, turns, memory=True)


def pairwise(turns: int) -> None:
    """What is a sum over pairs, for growing batches."""

    def mann_whitney(p: Tensor, m: Tensor) -> Tensor:
        return F.softplus((m - p[:, None]) / 0.1).mean()

    def icnn(x: Tensor, y: Tensor, k: int = 4) -> Tensor:
        everywhere = (torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square() + 1e-6).sqrt()
        apart, near = everywhere.masked_fill(torch.eye(len(x), dtype=torch.bool), torch.inf).sort(1)
        other = y[near] != y[:, None]
        nearest_other = apart.masked_fill(~other, torch.inf)[:, : k + 1].min(1, keepdim=True).values
        apart, other = apart[:, :k], other[:, :k]
        ratio = apart / (nearest_other + 1e-7)
        ratio = ratio / ratio.max(1, keepdim=True).values.clamp(min=1)
        far = apart * other / ((apart * other).max() + 1e-7)
        together, separate = (
            ((values * mask).sum(1) / (mask.sum(1) + 1e-7)).sum() / (mask.any(1).sum() + 1e-7)
            for values, mask in ((ratio, ~other), (far, other))
        )
        return -((1 - together + separate) / 4 + (~other).float().mean() / 2).log()

    def mmce(logits: Tensor, labels: Tensor) -> Tensor:
        p, predicted = logits.softmax(1).max(1)
        gaps = (predicted == labels).to(p) - p
        return (gaps[:, None] * gaps * (-(p[:, None] - p).abs() / 0.4).exp()).mean().sqrt()

    for n in (128, 512, 2048, 8192):
        generator = torch.Generator().manual_seed(0)
        scores = [torch.randn(n // 2, generator=generator).requires_grad_() for _ in range(2)]
        mine: Loss = ours.MannWhitney(temperature=0.1).from_scores
        compare(f"MannWhitney {n // 2} and {n // 2}", 1.05, mine, {"naive": mann_whitney}, scores, turns, memory=True)
    for n in (128, 512, 2048, 8192):
        compare(f"MMCE {n} x 10", 1.05, ours.MMCE(), {"naive": mmce}, classified(n, 10), turns, memory=True)
    for n in (128, 512, 2048, 4096):
        x, y = classified(n, 64)[0], torch.arange(n) % 10
        compare(f"ICNN {n} x 64", 1.05, ours.ICNN(), {"naive": icnn}, [x, y], turns, memory=True)


def main() -> None:
    run(__doc__, (cosines, episodes, pairwise))


if __name__ == "__main__":
    main()
