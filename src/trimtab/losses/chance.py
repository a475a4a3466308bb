"""Random numbers of losses and transforms: from a generator of their own, whose state is saved with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core import checks


class Chance(nn.Module):
    """A generator as part of a module, so that `state_dict` holds its state.

    Args:
        generator: on any device. None: a CPU generator with seed 0.

    Example:
        >>> first, second = Chance(), Chance(torch.Generator().manual_seed(7))
        >>> _ = first.normal([3])
        >>> second.load_state_dict(first.state_dict())
        <All keys matched successfully>
        >>> bool((first.normal([2]) == second.normal([2])).all())
        True
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = checks.generator(generator, seed=0)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, on the generator's device."""
        return torch.randn(tuple(shape), generator=self.generator, device=self.generator.device, dtype=torch.float32)

    def get_extra_state(self) -> Tensor:
        """The generator's state."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue from a generator's state."""
        self.generator.set_state(state.cpu())


def numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """A NumPy generator seeded by a draw: for Beta and Dirichlet, which torch draws from its global state alone."""
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return np.random.default_rng(int(seed))


def permutations(count: int, n: int, generator: torch.Generator) -> Tensor:
    """(count, n): random orders of the numbers below `n`, on the generator's device."""
    drawn = torch.empty(count, n, dtype=torch.long, device=generator.device)
    for order in drawn:
        torch.randperm(n, generator=generator, out=order)
    return drawn
