"""The SDM activation, a softmax that sharpens with similarity and flattens with distance, and its log loss.

For training a last layer whose certainty depends on how similar and how near its evidence is; `trimtab.calibration.SDM`
trains one, with everything around it.

Schmaltz (2025), arXiv 2502.20167; code ReexpressAI/sdm, whose single-precision epsilon inside the logarithms is kept,
also in double precision.
"""

from __future__ import annotations

import math

from jaxtyping import Float, Int
from torch import Tensor, nn, ones_like

from trimtab.calibration import adaptor
from trimtab.core import checks
from trimtab.core.checks import InputError


def sdm_activation(
    z: Float[Tensor, "n c"],
    q: Float[Tensor, " n"] | Int[Tensor, " n"],
    d: Float[Tensor, " n"] | None = None,
    *,
    log: bool = False,
) -> Float[Tensor, "n c"]:
    """(2 + q)^(d z) over its sum: a softmax that sharpens with similarity and flattens with distance.

    Args:
        z: scores (n, c), the magnitudes.
        q: similarity (n,), >= 0; e - 2 makes the base that of softmax.
        d: nearness (n,) in 0..1, one for a point as near as any; None for all ones.
        log: give the logarithm to the base 2 + q, with the authors' single-precision epsilon inside it, instead.

    Returns:
        Probabilities (n, c), or logarithms to the base 2 + q.

    Raises:
        InputError: a shape is wrong, q < 0, or d outside 0..1.

    Example:
        >>> import math, torch
        >>> from trimtab.calibration import sdm_activation
        >>> z = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> sdm_activation(z, torch.tensor([math.e - 2, 20.0, 20.0]), torch.tensor([1.0, 1.0, 0.1]))[:, 0]
        tensor([0.8808, 0.9979, 0.6498])

    Reference:
        Schmaltz, Similarity-Distance-Magnitude Universal Verification, 2025.
    """
    z = checks.matrix(z, "z", min_columns=2)
    column = _column(q, "q", z, math.inf)
    nearness = ones_like(column) if d is None else _column(d, "d", z, 1.0)
    return (adaptor.log_activation if log else adaptor.activation)(z, column, nearness)


class SDMLoss(nn.Module):
    """The mean log loss of the SDM activation, each point's to its own base 2 + q.

    Example:
        >>> import torch
        >>> from trimtab.calibration import SDMLoss
        >>> z, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> SDMLoss()(z, labels, q=torch.tensor([8.0, 0.0]), d=torch.tensor([1.0, 0.5]))
        tensor(0.3879)

    Reference:
        Schmaltz, Similarity-Distance-Magnitude Universal Verification, 2025.
    """

    def forward(
        self,
        z: Float[Tensor, "n c"],
        labels: Int[Tensor, " n"],
        q: Float[Tensor, " n"] | Int[Tensor, " n"],
        d: Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of scores z (n, c) at labels (n,), given similarity q and nearness d as in `sdm_activation`."""
        log_probs = sdm_activation(z, q, d, log=True)
        return nn.functional.nll_loss(log_probs, checks.labels(labels, *z.shape))


def _column(value: Tensor, name: str, z: Tensor, high: float) -> Tensor:
    x = checks.tensor(value, name)
    if x.shape != (len(z),):
        raise InputError(f"{name} must have shape ({len(z)},), got {tuple(x.shape)}")
    x = checks.finite(x.to(z), name)
    bad = (x < 0) | (x > high)
    if bool(bad.any()):
        raise InputError(f"{name} must lie in [0, {high:g}], found {float(x[bad][0]):g} at {checks.first_bad(bad)}")
    return x[:, None]
