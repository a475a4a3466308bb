"""A reservoir of class tokens: of each class the few past images that were least uncertain and least alike.

The part of TCA (`trimtab.adaptation.token_condensation`, arXiv:2410.14729) that remembers: it votes on new images, and
its means are the anchors that steer what is condensed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.core import checks

Anchors = Literal["all", "available", "off"]


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

    def anchors(self, block: int, policy: Anchors = "all") -> Float[Tensor, "a w"] | None:
        """The mean class token after `block` of every class that holds two images; None where nothing steers."""
        ready = self.counts >= 2
        if policy == "off" or not bool(ready.all() if policy == "all" else ready.any()):
            return None
        return self.tokens[ready, :, block].sum(1) / self.counts[ready, None]

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
