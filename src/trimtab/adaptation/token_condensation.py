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

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trimtab.adaptation import vit_blocks
from trimtab.adaptation.base import Adapter, Inputs, Options, entropy
from trimtab.adaptation.condensing import Ranking, condensed
from trimtab.adaptation.reservoir import Anchors, ReservoirCache
from trimtab.adaptation.vision_language import ImageQueries
from trimtab.adaptation.vit_blocks import TowerClassifier, VisionTransformer
from trimtab.core import checks
from trimtab.core.checks import InputError


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
        generator: a CPU generator for the first centres in merging; seeded with 0 by default. Its state is saved.
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

    forwards = 1
    generator: torch.Generator

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
        generator: torch.Generator | None = None,
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
        first = next(self.model.parameters())
        self.reservoir = ReservoirCache(
            len(self.model.gallery if isinstance(self.model, ImageQueries) else self.model.class_features),
            len(parts.blocks),
            parts.width,
            size=size,
            lam=lam,
            beta=beta,
            scale=scale,
            dtype=torch.promote_types(first.dtype, torch.float32),
        ).to(first.device)
        self._begin()
        self.generator = generator or torch.Generator().manual_seed(0)

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

    def _adapt(self, x: Inputs) -> Tensor:
        return self._follow(x, self.generator, learn=True)

    def _predict(self, x: Inputs) -> Tensor:
        """As if each image came next in the stream."""
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
        tokens, summaries = parts.embed(image), []
        for number, block in enumerate(parts.blocks):
            if number in self.blocks and self.drop_rate:
                anchors = self.reservoir.anchors(number - 1, self.anchors)
                tokens = condensed(
                    parts, block, tokens, self.drop_rate, generator, anchors=anchors, ranking=self.ranking
                )
            else:
                tokens = block(tokens)
            summaries.append(parts.summary(tokens)[0])
        return parts.finish(tokens), torch.stack(summaries)

    def _classify(self, features: Tensor) -> Tensor:
        if isinstance(self.model, ImageQueries):
            unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
            return self.model.face.logits(unit, self.model.gallery)
        assert isinstance(self.model, TowerClassifier)
        return self.model.classify(features)


def _images(x: Inputs) -> Tensor:
    """The images of a batch; a mapping must hold nothing else."""
    tensors = [v for v in x.values() if isinstance(v, Tensor)] if isinstance(x, Mapping) else [x]
    if len(tensors) != 1 or tensors[0].ndim != 4:
        raise InputError(f"x must be images (n, c, h, w) alone, got {[tuple(value.shape) for value in tensors]}")
    return tensors[0]
