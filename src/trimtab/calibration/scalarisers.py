"""One number from the losses of several sources that may abstain, and how their answers are checked.

The arithmetic of `trimtab.calibration.ParetoLoss`, with which `trimtab.calibration.ParetoSelfSupervision` trains too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError

Scalarizer = Literal["linear", "square", "2-norm", "max"]
Weights = Sequence[float] | Float[Tensor, " m"] | Float[np.ndarray, " m"]


def scalarised(
    logits: Float[Tensor, "n c"],
    labels: Int[Tensor, "n m"],
    scalarizer: Scalarizer = "linear",
    weights: Float[Tensor, " m"] | None = None,
) -> Float[Tensor, ""]:
    """The mean over samples with a label of the scalarised cross-entropies; with one source, their sum.

    Args:
        logits: (n, c), or (n, 1) for two classes: the log-odds of class 1.
        labels: (n, m), from `source_labels`.
        scalarizer: as in `trimtab.calibration.ParetoLoss`.
        weights: (m,); 1/m each if None.
    """
    voted = labels >= 0
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = -log_probs(precise).gather(1, labels.clamp(min=0)) * voted
    if labels.shape[1] == 1:
        return losses.sum()
    losses = losses / labels.shape[1] if weights is None else losses * weights.to(losses)
    match scalarizer:
        case "linear":
            each = losses.sum(1)
        case "square":
            each = losses.sum(1).square()
        case "2-norm":
            each = torch.linalg.vector_norm(losses, dim=1)  # its gradient at zero is zero
        case "max":
            each = losses.max(1).values
    return each.sum() / voted.any(1).sum().clamp(min=1)


def log_probs(logits: Float[Tensor, "n k"]) -> Float[Tensor, "n c"]:
    """Log-probabilities (n, c) of logits (n, c), or of log-odds (n, 1) of the second of two classes."""
    return (F.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits).log_softmax(1)


def source_labels(value: Any, n: int, c: int, name: str = "weak_labels") -> Int[Tensor, "n m"]:
    """The classes that m >= 1 sources name, as int64 in 0..c-1, -1 where one abstains.

    Raises:
        InputError: a shape, type or range is wrong.
    """
    labels = checks.tensor(value, name)
    if labels.ndim != 2 or len(labels) != n or labels.shape[1] == 0:
        raise InputError(f"{name} must have {n} rows and a column for every source, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"{name} must be integer class indices, got {str(labels.dtype).removeprefix('torch.')}")
    labels = labels.long()
    bad = (labels < -1) | (labels >= c)
    if bool(bad.any()):
        found = f"found {int(labels[bad][0])} at {checks.first_bad(bad)}"
        raise InputError(f"{name} must lie in 0..{c - 1}, or be -1, {found}")
    return labels
