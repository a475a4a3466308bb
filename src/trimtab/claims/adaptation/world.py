"""The synthetic world that the adapters' claims share: Gaussian clusters, and domains that mix and move them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

DIMENSIONS, CLASSES, WIDTH = 16, 10, 32


class Domain(NamedTuple):
    """An affine change of the inputs."""

    matrix: Tensor
    offset: Tensor


class World:
    """Ten Gaussian clusters in sixteen dimensions, as images of one pixel.

    Args:
        seed: everything random follows from it.
        spread: standard deviation of a cluster; the means are standard normal.
    """

    def __init__(self, seed: int, spread: float):
        self.seed = seed
        self.spread = spread
        self.generator = torch.Generator().manual_seed(seed)
        self.means = self._normal(CLASSES, DIMENSIONS)

    def samples(self, n: int, domain: Domain | None = None) -> TensorDataset:
        """n inputs (n, 16, 1, 1) and their classes, from the source or as `domain` shows them."""
        y = torch.randint(CLASSES, (n,), generator=self.generator)
        x = self.means[y] + self.spread * self._normal(n, DIMENSIONS)
        if domain is not None:
            x = x @ domain.matrix.T + domain.offset
        return TensorDataset(x[:, :, None, None], y)

    def domain(self, mix: float = 0.5) -> Domain:
        """A new domain: the matrix I + 2 mix N / sqrt(16) and the offset 2 mix N, with N standard normal."""
        matrix = torch.eye(DIMENSIONS) + 2 * mix * self._normal(DIMENSIONS, DIMENSIONS) / DIMENSIONS**0.5
        return Domain(matrix, 2 * mix * self._normal(DIMENSIONS))

    def network(self, normalise: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
        """Two convolutions with normalisation and a linear layer, trained on the source."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = nn.Sequential(
                nn.Conv2d(DIMENSIONS, WIDTH, 1, bias=False),
                normalise(WIDTH),
                nn.ReLU(),
                nn.Conv2d(WIDTH, WIDTH, 1),
                normalise(WIDTH),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(WIDTH, CLASSES),
            )
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(300):
            x, y = self.samples(128).tensors
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        return net.eval()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """This world's augmentation: noise with a standard deviation of 0.05."""
    return x + 0.05 * torch.randn(x.shape, generator=generator)
