"""Labelled batches of the source, round and round, from any place in a round: for replay, and to warm up with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.checks import InputError


class Replay(nn.Module):
    """A loader's batches without end, whose place is saved and restored with the module that holds this one.

    Args:
        batches: gone through again and again, in the same order if a saved state is to go on bit by bit.
        name: what messages call the batches.

    Attributes:
        taken: batches taken in the current round (buffer); set it, and the next batch is the one after these.

    Raises:
        InputError: at a call of `next`, there are no batches, or none the second time.

    Example:
        >>> replay = Replay("abc")
        >>> [replay.next() for _ in range(4)], int(replay.taken)
        (['a', 'b', 'c', 'a'], 1)
    """

    taken: Tensor

    def __init__(self, batches: Iterable[Any], name: str = "source"):
        super().__init__()
        self.batches = batches
        self.name = name
        self.register_buffer("taken", torch.tensor(0))
        self._ahead: Iterator[tuple[int, Any]] = iter(())
        self._place = -1  # where `_ahead` stands

    def next(self) -> Any:
        """The next batch."""
        if int(self.taken) != self._place:  # at the start, and where a place was set or loaded
            self._ahead = rounds(self.batches, self.name, int(self.taken))
        self._place, batch = next(self._ahead)
        self.taken.fill_(self._place)
        return batch


def rounds(batches: Iterable[Any], name: str, start: int = 0) -> Iterator[tuple[int, Any]]:
    """The batches round and round, after the first `start`; each with how many of its round are taken by then."""
    while True:
        taken = start
        for taken, batch in enumerate(islice(batches, start, None), start + 1):
            yield taken, batch
        if not taken:
            raise InputError(f"{name} must yield batches every time that it is iterated over, it yielded none")
        start = 0
