"""Mixed styles: an image's feature maps with the means and spreads of another's. Its look changes, not what it shows.

Zhou, Yang, Qiao, Xiang, "Domain Generalization with MixStyle", ICLR 2021 (arXiv:2104.02008), as ITTA uses it: without
mixing by domain, in every pass, with lambda drawn anew for each image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.core import modules
from trimtab.core.checks import InputError
from trimtab.core.predictions import logits_of


class Style(NamedTuple):
    """How the styles of one batch are mixed.

    Attributes:
        after: 0 mixes after the first block, 1 after the second.
        shares: (n,) how much of its own style each image keeps, in [0, 1].
        order: (n,) whose style it is mixed with: a permutation of the batch.
    """

    after: int
    shares: Float[Tensor, " n"]
    order: Int[Tensor, " n"]


StyleDraw = Callable[[int, torch.Generator], Style]


def draw_style(n: int, generator: torch.Generator) -> Style:
    """A random style for n images: block by a fair coin, shares from Beta(0.1, 0.1), any permutation."""
    after = int(torch.randint(2, (), generator=generator))
    seed = int(torch.randint(2**62, (), generator=generator))
    shares = np.random.default_rng(seed).beta(0.1, 0.1, n)  # torch's Beta takes no generator
    return Style(after, torch.from_numpy(shares), torch.randperm(n, generator=generator))


def mixstyle(
    x: Float[Tensor, "n c *where"], shares: Float[Tensor, " n"], order: Int[Tensor, " n"], eps: float = 1e-6
) -> Float[Tensor, "n c *where"]:
    """Standardise every channel of every image, and give it a mixture of its own mean and spread and another image's.

    Means and spreads are constants: gradients flow through the standardised values alone.

    Args:
        x: feature maps with two positions or more.
        shares: how much of its own style each image keeps, in [0, 1].
        order: whose style it is mixed with.
        eps: added to the (unbiased) variances; 1e-6 as the authors do.

    Example:
        >>> x = torch.tensor([[[0.0, 2.0]], [[5.0, 9.0]]])
        >>> mixstyle(x, torch.tensor([0.0, 1.0]), torch.tensor([1, 0])).round(decimals=3)
        tensor([[[5., 9.]],
        <BLANKLINE>
                [[5., 9.]]])
    """
    shape = (len(x), x.shape[1]) + (1,) * (x.ndim - 2)
    positions = x.detach().flatten(2)
    mean, spread = positions.mean(2).view(shape), (positions.var(2) + eps).sqrt().view(shape)
    share, order = shares.to(x).view(-1, *(1,) * (x.ndim - 1)), order.to(x.device)
    new_spread = share * spread + (1 - share) * spread[order]
    return (x - mean) / spread * new_spread + share * mean + (1 - share) * mean[order]


def in_two_styles(
    network: nn.Module, block: nn.Module, head: nn.Linear, x: Any, style: Style
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"], Float[Tensor, "2*n c"]]:
    """One pass over a batch as it is and, from `block` on, in the mixed style too.

    Args:
        network: the whole network.
        block: what the styles are mixed after.
        head: the linear layer, whose inputs are the features.
        x: n inputs.
        style: the mixture.

    Returns:
        Clean features, mixed features, and the logits of clean and mixed inputs, one after the other.

    Raises:
        InputError: the network does not give its head one feature vector an input.
    """

    def twice(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return torch.cat((output, mixstyle(output, style.shares, style.order)))

    handle = block.register_forward_hook(twice)
    try:
        with modules.watch_input(head, detach=False) as seen:
            logits = logits_of(network, x)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].shape != (2 * len(style.order), head.in_features):
        shapes = [tuple(features.shape) for features in seen]
        raise InputError(f"model must pass one feature vector an input to its head, it passed {shapes}; name the head")
    clean, mixed = seen[0].chunk(2)
    return clean, mixed, logits
