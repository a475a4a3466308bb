"""What the objectives' claims share: a small perceptron, images of Fashion-MNIST, batches in random order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torch.nn.utils import skip_init

from trimtab.data.sources import Images, fashion_mnist


class Split(NamedTuple):
    """Inputs and labels to train on, and to measure on."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def mlp(*sizes: int, generator: torch.Generator, norm: bool = False) -> nn.Sequential:
    """Linear layers of these sizes with ReLU between, and batch normalisation after it if `norm`.

    PyTorch's usual random weights, drawn from `generator`.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layer = skip_init(nn.Linear, inputs, outputs)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
        layers += [layer, nn.ReLU(), *([nn.BatchNorm1d(outputs)] if norm else [])]
    return nn.Sequential(*layers[: len(layers) - 1 - norm])


def fashion(train: int, test: int, generator: torch.Generator, *, pool: int = 1) -> Split:
    """Random images of Fashion-MNIST's two parts as rows of pixels in 0..1, averaged over squares of `pool`."""
    split = []
    for images, count in ((fashion_mnist("train"), train), (fashion_mnist("test"), test)):
        chosen: Images = images[torch.randperm(len(images), generator=generator)[:count]]
        split += [avg_pool2d(chosen.tensor(), pool).flatten(1), chosen.labels]
    return Split(*split)


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The numbers below `n` in random order, in batches."""
    return iter(torch.randperm(n, generator=generator).split(size))
