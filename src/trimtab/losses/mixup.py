"""Mixup of two and of more samples: for classes that overlap, where a network must not learn its labels by heart.

Where labels are noisy or classes overlap, a network that fits its training set is sure of what is a coin flip. Mixup
keeps it from that: it trains on weighted means of samples, with the means of their labels. Take `Mixup` first; `DMixup`
with more points smooths further. Leave it where labels are clean and classes apart: there it makes a network
underconfident, which a temperature below 1 undoes.

Zhang, Cisse, Dauphin, Lopez-Paz 2018, arXiv 1710.09412; for d + 1 points Chidambaram, Ge, ICLR 2024, arXiv 2306.00740.
The latter's code (2014mchidamb/temp-scaling-limitations) is followed: plain Dirichlet weights, one set a batch, and
random orders in which a sample may meet itself; their theory's mixtures are others. Its weights come from numpy's
global state; here everything comes from a generator. It measures networks with batch normalisation in train mode.

What we found: their comparison with temperature scaling rests on a fit that stops after one L-BFGS call at a rate of
0.01, close to where it starts: it returns T = 1.096 on logits whose best T is 3.22 (`TemperatureScaling` with
``legacy=True`` does the same). As trained, Mixup has 0.53 to 0.60 times the calibration error of ordinary training on
the claim's overlapping classes, and 0.96 to 0.97 times its log loss. After temperatures fitted to the optimum ordinary
training is ahead: at an overlap of 0.8 its log loss is 0.644, Mixup's 0.675; its calibration error 0.100 and 0.109.
Without overlap Mixup's calibration error is 0.109 where ordinary training has 0.015; a temperature makes them equal.
Four points instead of two lower the calibration error further, and raise the log loss.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.losses.base import batch, pair, same_device
from trimtab.losses.chance import Chance, numpy_generator, permutations


class Mixed(NamedTuple):
    """Mixed inputs (n, ...), the weights (k,) or (k, n) of the k samples in each, and the k - 1 others' rows."""

    inputs: Float[Tensor, "n *shape"]
    weights: Float[Tensor, " k"] | Float[Tensor, "k n"]
    orders: Int[Tensor, "others n"]


class DMixup(nn.Module):
    """The cross-entropy of mixed samples: the weighted mean of those against the labels of each sample in the mixture.

    Each mixture is of `points` samples of the batch: the sample itself, and one from each of `points` - 1 random orders
    of the batch. `mix` makes them; the loss takes the model's logits of them.

    Args:
        points: samples in a mixture, k = d + 1 >= 1; the authors take 2 (which is `Mixup`) to 5. One is ordinary
            training.
        alpha: concentration of the Dirichlet distribution of the weights, > 0; 1, uniform, as the authors.
        per_sample: draw weights for each mixture; by default once a batch, as the authors.
        generator: draws weights and orders; on any device. None: a CPU generator with seed 0. Its state is part of
            `state_dict`.

    Raises:
        InputError: a setting is out of range.

    Example:
        >>> import torch
        >>> from trimtab.losses import DMixup
        >>> x, labels = torch.eye(4), torch.arange(4)
        >>> loss, model = DMixup(points=3), torch.nn.Linear(4, 4)
        >>> mixed = loss.mix(x)
        >>> loss(model(mixed.inputs), labels, mixed).backward()
        >>> mixed.orders.shape, round(float(mixed.weights.sum()), 4)
        (torch.Size([2, 4]), 1.0)

    Reference:
        Chidambaram, Ge, On the Limitations of Temperature Scaling for Distributions with Overlaps, ICLR 2024,
        arXiv 2306.00740.
    """

    def __init__(
        self,
        *,
        points: int = 3,
        alpha: float = 1.0,
        per_sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.points = checks.integer(points, "points", low=1)
        self.alpha = checks.number(alpha, "alpha", low=0, low_open=True)
        self.per_sample = per_sample
        self.chance = Chance(generator)

    def mix(
        self,
        x: Float[Tensor, "n *shape"],
        *,
        weights: Float[Tensor, " k"] | Float[Tensor, "k n"] | None = None,
        orders: Int[Tensor, "others n"] | None = None,
    ) -> Mixed:
        """Mixtures of a batch with itself; gradients flow through `x`, so that features may be mixed.

        Args:
            x: (n, ...) inputs, floating point, n >= 1, finite. In the place of whole numbers (tokens) mix their
                embeddings.
            weights: (k,) or (k, n), >= 0, to sum to one over k, in the place of drawn ones.
            orders: (k - 1, n) row numbers in 0..n-1 in the place of drawn ones.

        Returns:
            The mixtures weights[0] x + sum over j of weights[j + 1] x[orders[j]]. A batch of one is mixed with itself.

        Raises:
            InputError: an argument is malformed.
        """
        x, n, others = batch(x, "x"), len(x), self.points - 1
        weights = (self._weights(n) if weights is None else _weights(weights, self.points, n)).to(x.device)
        drawn = permutations(others, n, self.chance.generator) if orders is None else _orders(orders, others, n)
        orders = drawn.to(x.device)
        shares = weights.to(x.dtype).view(self.points, -1, *[1] * (x.ndim - 1))
        mixed = shares[0] * x
        for share, order in zip(shares[1:], orders):
            mixed = torch.addcmul(mixed, share, x[order])
        return Mixed(mixed, weights, orders)

    def forward(self, logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], mixed: Mixed) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            logits: (n, c) of the mixed inputs, finite.
            labels: (n,) of the batch as it was before it was mixed, integers in 0..c-1.
            mixed: what `mix` returned.

        Raises:
            InputError: a shape, type, device or value is wrong.
        """
        if not isinstance(mixed, Mixed):
            raise InputError(f"mixed must be what mix returned, after logits and labels, got {type(mixed).__name__}")
        same_device(logits=logits, labels=labels, orders=mixed.orders)
        z, y = pair(logits, labels)
        if mixed.orders.shape[1] != len(z):
            raise InputError(f"mixed must be of {len(z)} samples as logits, got {mixed.orders.shape[1]}")
        labels_mixed = torch.cat([y[None], y[mixed.orders]])
        weights = mixed.weights.to(z.dtype).view(len(labels_mixed), -1)
        return -(weights * z.log_softmax(1).gather(1, labels_mixed.T).T).sum(0).mean()

    def _weights(self, n: int) -> Tensor:
        random = numpy_generator(self.chance.generator)
        drawn = random.dirichlet([self.alpha] * self.points, n if self.per_sample else None)
        return torch.from_numpy(drawn.T.astype(np.float32))


class Mixup(DMixup):
    """Mixup of pairs: share x_i + (1 - share) x_j, with the cross-entropies against both labels in the same shares.

    `DMixup` with two points, where the share comes from Beta(alpha, alpha).

    Args:
        alpha: > 0; 1, uniform. Zhang et al. take 1 for CIFAR and 0.2 for ImageNet.
        per_sample: draw a share for each pair; by default once a batch, as the authors.
        generator: as in `DMixup`.

    Example:
        >>> import torch
        >>> from trimtab.losses import Mixup
        >>> x, labels = torch.eye(4), torch.arange(4)
        >>> loss, model = Mixup(), torch.nn.Linear(4, 4)
        >>> mixed = loss.mix(x)
        >>> loss(model(mixed.inputs), labels, mixed).backward()

    Reference:
        Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, arXiv 1710.09412.
    """

    def __init__(
        self, *, alpha: float = 1.0, per_sample: bool = False, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(points=2, alpha=alpha, per_sample=per_sample, generator=generator)


def _weights(value: Tensor, k: int, n: int) -> Tensor:
    w = checks.tensor(value, "weights")
    if tuple(w.shape) not in ((k,), (k, n)) or not w.is_floating_point():
        what = f"{str(w.dtype).removeprefix('torch.')} {tuple(w.shape)}"
        raise InputError(f"weights must be floating point of shape ({k},) or ({k}, {n}), got {what}")
    checks.finite(w, "weights")
    if not checks.unread(w) and not bool((w >= 0).all() and ((w.sum(0) - 1).abs() < 1e-3).all()):
        raise InputError(f"weights must be >= 0 and sum to one over the {k} points")
    return w


def _orders(value: Tensor, others: int, n: int) -> Tensor:
    rows = checks.tensor(value, "orders")
    if rows.shape != (others, n):
        raise InputError(f"orders must have shape ({others}, {n}), got {tuple(rows.shape)}")
    if not others:
        return rows.long()
    return checks.labels(rows.flatten(), others * n, n, "orders").view(others, n)
