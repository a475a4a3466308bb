"""Losses that need no labels: agreement with a teacher, and contrast between views.

From Döbler, Marsden, Yang, "Robust Mean Teacher", CVPR 2023 (arXiv:2211.13081).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError


def symmetric_cross_entropy(
    logits: Float[Tensor, "n c"], target: Float[Tensor, "n c"], alpha: float = 0.5
) -> Float[Tensor, " n"]:
    """(1 - alpha) CE(q, p) + alpha CE(p, q), with p and q the softmax of `logits` and `target`; row by row.

    Raises:
        InputError: the shapes differ, or `alpha` is not in [0, 1].

    Example:
        >>> x = torch.tensor([[2.0, 0.0]])
        >>> float(symmetric_cross_entropy(x, x)) == float(symmetric_cross_entropy(x, x, alpha=1.0))
        True
    """
    if logits.ndim != 2 or logits.shape != target.shape:
        raise InputError(
            f"logits and target must have one shape (n, c), got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    checks.number(alpha, "alpha", low=0.0, high=1.0)
    log_p, log_q = logits.log_softmax(1), target.log_softmax(1)
    return -((1 - alpha) * log_q.exp() * log_p + alpha * log_p.exp() * log_q).sum(1)


def view_contrast(
    views: Float[Tensor, "n v d"], temperature: float = 0.1, labels: Int[Tensor, " n"] | None = None
) -> Float[Tensor, ""]:
    """Contrast of n inputs in v views (Khosla et al. 2020): views of one input attract, all others repel.

    Args:
        views: features of v >= 2 views of every input; only their directions count.
        temperature: > 0; 0.1.
        labels: views of all inputs of one label attract each other instead.

    Returns:
        The mean over all views of the negative log-probability, on average over the positives of a view, that it finds
        the positive among all other views.

    Raises:
        InputError: there is a single view, `temperature` is not above 0, or `labels` are not one an input.

    Example:
        >>> views = torch.eye(3)[:, None].expand(3, 2, 3)  # of one input alike, of two at right angles
        >>> round(float(view_contrast(views)), 4)
        0.0002
    """
    if views.ndim != 3 or views.shape[1] < 2:
        raise InputError(f"views must have shape (n, v, d) with v >= 2, got {tuple(views.shape)}")
    n, v, _ = views.shape
    if labels is not None and labels.shape != (n,):
        raise InputError(f"labels must have shape ({n},), got {tuple(labels.shape)}")
    checks.number(temperature, "temperature", low=0.0, low_open=True)
    points = F.normalize(views.flatten(0, 1), dim=1)
    owner = (torch.arange(n, device=views.device) if labels is None else labels).repeat_interleave(v)
    itself = torch.eye(n * v, dtype=torch.bool, device=views.device)
    similarity = points @ points.T / temperature
    log_probs = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (owner[:, None] == owner) & ~itself
    return -((log_probs * positive).sum(1) / positive.sum(1)).mean()
