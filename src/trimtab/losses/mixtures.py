"""Mixtures of a batch with itself: what mixup trains on, and what `RankMixup` and `MNDCG` rank below the raw images.

Zhang, Cisse, Dauphin, Lopez-Paz (2018), arXiv 1710.09412, in the form of RankMixup's authors: several mixtures of every
image, each set of them with one share and one random order of the batch. Their code draws both from numpy's global
state; here from a generator. They are set in order: first the whole batch mixed once, then the whole batch mixed anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from trimtab.core import checks
from trimtab.losses.base import batch, same_device, widened
from trimtab.losses.chance import numpy_generator, permutations


class Mixtures(NamedTuple):
    """Mixed inputs (m n, ...), their soft targets (m n, c), and each set's share of the raw image (m,)."""

    inputs: Float[Tensor, "mn *shape"]
    targets: Float[Tensor, "mn c"]
    shares: Float[Tensor, " m"]


def make_mixtures(
    x: Float[Tensor, "n *shape"],
    labels: Int[Tensor, " n"],
    *,
    classes: int,
    generator: torch.Generator,
    alpha: float = 2.0,
    sets: int = 1,
) -> Mixtures:
    """share x + (1 - share) x[order], and the same of the one-hot labels, `sets` times.

    An image that meets its own class keeps a target of exactly 1, whatever the share's rounding; one that meets itself
    stays exactly as it is. Gradients flow through `x`, so that features may be mixed in the place of images.

    Args:
        x: (n, ...) images or features, floating point, finite.
        labels: (n,) integers in 0..classes-1, on the device of `x`.
        classes: the number of classes c, at least 2.
        generator: draws shares and orders; its state moves on. On any device.
        alpha: shares are drawn from Beta(alpha, alpha), > 0; RankMixup's authors take 2 for CIFAR-10 and 1 for
            Tiny-ImageNet.
        sets: mixtures of each image, m; 1 for `RankMixup`, 3 for `MNDCG`.

    Returns:
        The mixtures of the first set in the batch's order, then those of the second. A batch of one is mixed with
        itself.

    Raises:
        InputError: a shape, type, device or range is wrong.

    Example:
        >>> import torch
        >>> from trimtab.losses import make_mixtures
        >>> x, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> mixed = make_mixtures(x, labels, classes=3, sets=2, generator=torch.Generator().manual_seed(0))
        >>> mixed.inputs.shape, bool((mixed.inputs == mixed.targets).all()), mixed.shares.shape
        (torch.Size([6, 3]), True, torch.Size([2]))

    Reference:
        Noh et al., RankMixup: Ranking-Based Mixup Training for Network Calibration, ICCV 2023, arXiv 2308.11990.
    """
    same_device(x=x, labels=labels)
    x = batch(x, "x")
    checks.integer(classes, "classes", low=2)
    labels = checks.labels(labels, len(x), classes)
    checks.number(alpha, "alpha", low=0, low_open=True)
    checks.integer(sets, "sets", low=1)
    generator = checks.generator(generator)

    shares = numpy_generator(generator).beta(alpha, alpha, sets).tolist()
    orders = permutations(sets, len(x), generator).to(x.device)
    hot = one_hot(labels, classes).to(widened(x).dtype)
    return Mixtures(
        torch.cat([torch.lerp(x[order], x, share) for order, share in zip(orders, shares)]),
        torch.cat([torch.lerp(hot[order], hot, share) for order, share in zip(orders, shares)]),
        torch.tensor(shares, dtype=hot.dtype, device=x.device),
    )
