"""Where every episode starts: at the source, or at what a slow average of all episodes has become."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trimtab.adaptation.state import Tensors
from trimtab.core import checks


class SlowStart(nn.Module):
    """The start of an episode, which follows what episodes end with, slowly.

    After every episode slow <- momentum x slow + (1 - momentum) x what the episode ended with; after every `every`
    episodes the start becomes (1 - weight) x source + weight x slow. Without a momentum the start stays at the source.

    Args:
        source: the tensors that move, at their source values.
        momentum: in [0, 1]; None for episodes that leave no trace.
        every: episodes between two moves of the start.
        weight: share of the slow average in the start, in [0, 1].

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> moving = {"w": torch.zeros(1)}
        >>> starts = SlowStart(moving, momentum=0.5, every=1, weight=1.0)
        >>> starts.absorb({"w": torch.ones(1)})
        >>> starts.rewind(moving)
        >>> moving
        {'w': tensor([0.5000])}
    """

    episodes: Tensor

    def __init__(self, source: Mapping[str, Tensor], *, momentum: float | None, every: int, weight: float):
        super().__init__()
        self.momentum = None if momentum is None else checks.number(momentum, "momentum", low=0.0, high=1.0)
        self.every = checks.integer(every, "update_every", low=1)
        self.weight = checks.number(weight, "update_weight", low=0.0, high=1.0)
        self.source = Tensors(source)
        if momentum is not None:
            self.start, self.slow = Tensors(source), Tensors(source)
        self.register_buffer("episodes", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def absorb(self, ended: Mapping[str, Tensor]) -> None:
        """Take note of what an episode ended with."""
        self.episodes += 1
        if self.momentum is None:
            return
        source, start = self.source.named(), self.start.named()
        for name, slow in self.slow.named().items():
            slow.lerp_(ended[name], 1 - self.momentum)
            if int(self.episodes) % self.every == 0:
                start[name].copy_(source[name].lerp(slow, self.weight))

    @torch.no_grad()
    def rewind(self, moving: Mapping[str, Tensor]) -> None:
        """Put `moving` where the next episode starts."""
        start = (self.source if self.momentum is None else self.start).named()
        for name, tensor in moving.items():
            tensor.copy_(start[name])

    @torch.no_grad()
    def forget(self) -> None:
        """Back to the source."""
        self.episodes.zero_()
        if self.momentum is not None:
            for name, value in self.source.named().items():
                self.start.named()[name].copy_(value)
                self.slow.named()[name].copy_(value)
