"""TCA: condense the tokens of a CLIP-like model as the images of its stream suggest, and let past images vote.

Reach for it where a frozen CLIP or SigLIP meets images of another domain one at a time, nothing can be trained, and
computing time counts: it costs less than the model alone. In a few blocks, patches that the class token disregards are
summed into one token, doubtful ones are averaged into four. The class tokens of the least uncertain images of every
class stay in a reservoir. They join the attention that decides what is condensed, and correct the logits.

Paper: Wang, Gong, Wang, Huang, Luo, "Is Less More? Exploring Token Condensation as Training-free Test-time Adaptation",
ICCV 2025 (arXiv:2410.14729). Where paper and authors' code (Jo-wang/TCA) differ, the code is followed: patches are
ranked by their attention averaged over heads; the paper's consensus of ranks, which the code computes and never uses,
is ``ranking="head_rank"``. The code's reservoir looks at class tokens alone, not at image features, and so does this
one. Anchors steer only once *every* class holds two images, which with many classes or a one-sided stream may never
happen: ``anchors="available"`` lets the classes that do steer from the start. Departures: in the code a batch shares
the class tokens of its first image, here every image has its own; ties go to the earlier patch.

The released code has no SigLIP. These models have no class token; what plays its part here is of our making: their
final pooling is one learned query, which is asked at every block what it would gather there. Its weights rank the
patches, and the mean that they make, which lives where the tokens live, is what the reservoir keeps.

What we found on small models: the votes are what helps (11 points under blur, 9 under rotation, 1 under noise; nothing
where the model is always wrong). Condensing at 0.1 costs 0.8 points of a small vision transformer's 81, where dropping
as many patches by chance costs 1.7, but from seed to seed this varies; at 0.2 it costs 5.6, no less than chance.
Anchors move accuracy by 0.2 points at most. So begin with a small `drop_rate`, and hold it against 0.

FLOPs are counted by `TokenCondensation.flops`, reservoir included. Counted for CLIP ViT-B/16 and 100 classes: 35.1 G
an image as it is; 10.6 % fewer at a drop rate of 0.035, 32.4 % at 0.1, 54.5 % at 0.2 (the paper reports 12.2 % to
48.9 %). `torch.utils.flop_counter` must not be trusted on fused attention: on the CPU it leaves it out without a word,
4 % of that model and far more of small ones; it is counted in its plain form here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import ClassVar, Literal, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trimtab.adaptation import vit_blocks
from trimtab.adaptation.base import Adapter, Inputs, Options, entropy
from trimtab.adaptation.vision_language import ImageQueries
from trimtab.adaptation.vit_blocks import Block, TowerClassifier, VisionTransformer
from trimtab.core import checks
from trimtab.core.checks import InputError

Anchors = Literal["all", "available", "off"]
Ranking = Literal["attention", "head_rank"]
Start = int | torch.Generator
_MERGED = 4


class Flops(NamedTuple):
    """Floating-point operations for one image: of the model as it is, and of the adapter as it stands."""

    source: int
    adapted: int


class TokenCondensation(Adapter):
    """Condenses tokens on their way through a vision transformer, and corrects its logits by a reservoir of images.

    One forward pass an image, cheaper than the model's own; images are taken one by one, in their order in the batch.
    No parameter changes.

    Args:
        model: a zero-shot classifier, `ImageQueries`, over a CLIP or SigLIP model of ``transformers`` or ``open_clip``
            whose vision tower `vit_blocks.take_apart` knows; or such a tower alone in a `TowerClassifier`.
        blocks: numbers of the blocks that condense, from 0; not the first one. (3, 6, 9), the authors', for 12 blocks.
        drop_rate: share of patches that each of these blocks drops, in [0, 1); 0 condenses nothing. 0.1, the authors'
            driver's: 197 tokens become 143, 104, 77. Their README recommends 0.035: 182, 167, 155. Above a third there
            is not enough to merge.
        ranking: what patches are ranked by: ``"attention"`` of the class token, averaged over heads, or
            ``"head_rank"``, their rank in every head, averaged.
        anchors: whose mean class tokens join the attention of condensing blocks: those of ``"all"`` classes, once each
            has two images, of those that have two (``"available"``), or none (``"off"``).
        size: images that the reservoir keeps of each class, >= 1; 3 (2 on EuroSAT).
        lam: weight of the reservoir's votes, >= 0; 3, the authors' on ImageNet (1.5 to 8 elsewhere).
        beta: how fast votes fall with unlikeness, >= 0; 5, the authors' on ImageNet (2 to 9 elsewhere).
        scale: > 0; votes look at the last block alone when it is small, at all blocks alike when it is large. 0.1, the
            authors' on ImageNet (0.01 to 5.5 elsewhere).
        seed: of the first centres in merging.
        **options: what every `Adapter` takes.

    Attributes:
        reservoir: the `ReservoirCache`.

    Raises:
        InputError: an argument is out of range, the model cannot be taken apart, or, at a call, `drop_rate` leaves too
            few patches.

    Example:
        >>> from transformers import CLIPVisionConfig, CLIPVisionModel
        >>> shape = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2)
        >>> tower = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=4, **shape))
        >>> adapter = TokenCondensation(TowerClassifier(tower, torch.eye(3, 8)), blocks=(1, 2))
        >>> adapter(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).shape
        torch.Size([2, 3])
        >>> int(adapter.reservoir.counts.sum())
        2
        >>> adapter.flops(torch.rand(3, 32, 32))
        Flops(source=856240, adapted=671520)

    Reference:
        Wang et al., ICCV 2025, https://arxiv.org/abs/2410.14729
    """

    forwards: ClassVar[float] = 1

    def __init__(
        self,
        model: nn.Module,
        *,
        blocks: Sequence[int] = (3, 6, 9),
        drop_rate: float = 0.1,
        ranking: Ranking = "attention",
        anchors: Anchors = "all",
        size: int = 3,
        lam: float = 3.0,
        beta: float = 5.0,
        scale: float = 0.1,
        seed: int = 0,
        **options: Unpack[Options],
    ):
        super().__init__(model, **options)
        if self.steps != 1:
            raise InputError(f"steps must be 1, an image enters the reservoir once, got {self.steps}")
        if not isinstance(self.model, ImageQueries | TowerClassifier):
            raise InputError(
                "model must be ImageQueries over a CLIP or SigLIP model, or a TowerClassifier, "
                f"got {type(self.model).__name__}"
            )
        parts = vit_blocks.take_apart(self._tower)
        self.blocks = tuple(
            checks.integer(number, f"blocks[{i}]", low=1, high=len(parts.blocks) - 1) for i, number in enumerate(blocks)
        )
        self.drop_rate = checks.number(drop_rate, "drop_rate", low=0.0, high=1.0, high_open=True)
        self.ranking: Ranking = checks.one_of(ranking, "ranking", Ranking)
        self.anchors: Anchors = checks.one_of(anchors, "anchors", Anchors)
        self.seed = checks.integer(seed, "seed", low=0)
        self.generator = torch.Generator().manual_seed(seed)
        first = next(self.model.parameters())
        self.reservoir = ReservoirCache(
            len(self.model.gallery if isinstance(self.model, ImageQueries) else self.model.class_features),
            len(parts.blocks),
            parts.width,
            size=size,
            lam=lam,
            beta=beta,
            scale=scale,
            dtype=_wide(first.dtype),
        ).to(first.device)
        self._begin()

    @property
    def _tower(self) -> nn.Module:
        if isinstance(self.model, ImageQueries):
            return self.model.face.model
        assert isinstance(self.model, TowerClassifier)
        return self.model.tower

    def flops(self, image: Float[Tensor, "c h w"]) -> Flops:
        """Count the operations for one image; nothing is adapted. They grow by little as the reservoir fills.

        Convolutions, linear layers, attention and the reservoir's cosines are counted, two operations a product and its
        sum; not norms, activations, sorting and the distances of merging, less than a hundredth in a ViT-B.
        """
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            parts = vit_blocks.take_apart(self._tower)
            with FlopCounterMode(display=False) as source:
                self._classify(parts(image[None]))
            with FlopCounterMode(display=False) as adapted:
                self._predict(image[None])
        return Flops(source.get_total_flops(), adapted.get_total_flops())

    def reset(self) -> None:
        """Return to an empty reservoir."""
        super().reset()
        self.reservoir.clear()
        assert self.generator is not None
        self.generator.manual_seed(self.seed)

    def _adapt(self, x: Inputs) -> Tensor:
        assert self.generator is not None
        return self._follow(x, self.generator, learn=True)

    def _predict(self, x: Inputs) -> Tensor:
        """As if each image came next in the stream."""
        assert self.generator is not None
        return self._follow(x, self.generator.clone_state(), learn=False)

    @torch.no_grad()
    def _follow(self, x: Inputs, generator: torch.Generator, *, learn: bool) -> Tensor:
        parts = vit_blocks.take_apart(self._tower)
        return torch.cat([self._judge(parts, image[None], generator, learn) for image in _images(x)])

    def _judge(self, parts: VisionTransformer, image: Tensor, generator: torch.Generator, learn: bool) -> Tensor:
        features, summaries = self._encode(parts, image, generator)
        logits = self._classify(features)
        if not bool(logits.isfinite().all()):
            self.skipped += int(learn)
            return logits
        prediction = int(logits.argmax())
        with nullcontext() if learn else self.reservoir.kept(prediction):
            self.reservoir.update(prediction, entropy(logits.double())[0], summaries)
            return logits + self.reservoir.logits(summaries).to(logits.dtype)

    def _encode(self, parts: VisionTransformer, image: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features (1, d), and the class token after every block (l, w)."""
        condensing = self.blocks if self.drop_rate else ()
        anchors = dict(zip(condensing, self.reservoir.anchors([number - 1 for number in condensing], self.anchors)))
        tokens, summaries = parts.embed(image), []
        for number, block in enumerate(parts.blocks):
            if number in condensing:
                tokens = condensed(
                    parts, block, tokens, self.drop_rate, generator, anchors=anchors.get(number), ranking=self.ranking
                )
            else:
                tokens = block(tokens)
            summaries.append(parts.summary(tokens)[0])
        return parts.finish(tokens), torch.stack(summaries)

    def _classify(self, features: Tensor) -> Tensor:
        if isinstance(self.model, ImageQueries):
            unit = F.normalize(features.to(_wide(features.dtype)), dim=1)
            return self.model.face.logits(unit, self.model.gallery)
        assert isinstance(self.model, TowerClassifier)
        return self.model.classify(features)


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
    mine = anchor.shape[1]
    queries, keys, values = block.split(block.ln_1(torch.cat([anchor, tokens], 1)))
    queries = queries[:, :, mine:]
    if parts.probe is None:
        patches, weights = mine + 1, vit_blocks.attention(queries[:, :, 0], keys)[0, :, mine + 1 :]
    else:
        patches, weights = mine, parts.probe(tokens)[0]
    tokens = tokens + block.gather(queries, keys, values)
    first = patches - mine
    rest = condense(tokens[0, first:], weights, drop_rate, start, ranking=ranking)
    tokens = torch.cat([tokens[:, :first], rest[None]], 1)
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
    wide = tokens.to(_wide(tokens.dtype))
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


class ReservoirCache(nn.Module):
    """Class tokens, block by block, of the images of each class that were least uncertain and least alike.

    Args:
        classes, blocks, width: c, l and w.
        size, lam, beta, scale: see `TokenCondensation`.
        dtype: of the tokens that are kept.

    Attributes:
        counts: images held of each class (c,).
        entropies: theirs in nats, ascending (c, size).
        tokens: their class tokens (c, size, l, w); zero where no image is held.

    Raises:
        InputError: a setting is out of range.
    """

    counts: Tensor
    entropies: Tensor
    tokens: Tensor

    def __init__(
        self,
        classes: int,
        blocks: int,
        width: int,
        *,
        size: int = 3,
        lam: float = 3.0,
        beta: float = 5.0,
        scale: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.size = checks.integer(size, "size", low=1)
        self.lam = checks.number(lam, "lam", low=0.0)
        self.beta = checks.number(beta, "beta", low=0.0)
        self.scale = checks.number(scale, "scale", low=0.0, low_open=True)
        self.register_buffer("counts", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("entropies", torch.zeros(classes, size, dtype=torch.float64))
        self.register_buffer("tokens", torch.zeros(classes, size, blocks, width, dtype=dtype))

    def update(self, prediction: int, entropy: Float[Tensor, ""], tokens: Float[Tensor, "l w"]) -> None:
        """Take in an image; where its class is full, the one that is most uncertain and most like the others leaves."""
        held = int(self.counts[prediction])
        entropies = torch.cat([self.entropies[prediction, :held], entropy[None].to(self.entropies)])
        kept = torch.cat([self.tokens[prediction, :held], tokens[None].to(self.tokens)])
        if held == self.size:
            means = F.normalize(kept.mean(1), dim=1)
            cosines = means @ means.T
            likeness = (cosines.sum(1) - cosines.diagonal()) / held
            stay = torch.arange(held + 1, device=kept.device) != (entropies + likeness).argmax()
            entropies, kept = entropies[stay], kept[stay]
        order = entropies.argsort(stable=True)
        self.counts[prediction] = len(order)
        self.entropies[prediction, : len(order)] = entropies[order]
        self.tokens[prediction, : len(order)] = kept[order]

    def logits(self, tokens: Float[Tensor, "l w"]) -> Float[Tensor, " c"]:
        """lam times the votes of all images held: exp(-beta (1 - a)), a the mean over blocks of cosines."""
        steps = torch.linspace(0, 1, len(tokens), dtype=torch.float64, device=tokens.device)
        blocks = (steps / self.scale).softmax(0).to(self.tokens.dtype)
        directions = F.normalize(tokens.to(self.tokens.dtype), dim=1) * blocks[:, None]
        norms = torch.linalg.vector_norm(self.tokens, dim=3).clamp_min(torch.finfo(self.tokens.dtype).tiny)
        affinity = (torch.einsum("crlw,lw->crl", self.tokens, directions) / norms).sum(2)
        held = torch.arange(self.size, device=tokens.device) < self.counts[:, None]
        return self.lam * torch.where(held, (-self.beta * (1 - affinity)).exp(), 0.0).sum(1)

    def anchors(self, blocks: Sequence[int], policy: Anchors = "all") -> Iterator[Float[Tensor, "a w"]]:
        """For each of `blocks` the mean class token of every class that holds two images; nothing where none steers."""
        ready = self.counts >= 2
        if policy != "off" and bool(ready.all() if policy == "all" else ready.any()):
            for block in blocks:
                yield self.tokens[ready, :, block].sum(1) / self.counts[ready, None]

    @contextmanager
    def kept(self, prediction: int) -> Iterator[None]:
        """What is held of a class is the same after this block as before."""
        before = [(buffer, buffer[prediction].clone()) for buffer in self.buffers()]
        try:
            yield
        finally:
            for buffer, value in before:
                buffer[prediction] = value

    def clear(self) -> None:
        """Hold nothing."""
        for buffer in self.buffers():
            buffer.zero_()


def _images(x: Inputs) -> Tensor:
    """The images of a batch; a mapping must hold nothing else."""
    tensors = [v for v in x.values() if isinstance(v, Tensor)] if isinstance(x, Mapping) else [x]
    if len(tensors) != 1 or tensors[0].ndim != 4:
        raise InputError(f"x must be images (n, c, h, w) alone, got {[tuple(value.shape) for value in tensors]}")
    return tensors[0]


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
