"""The confusion matrix of probabilities, and the metrics that are made of it, as differentiable functions.

A probability counts as sigmoid(L (p - 1/2)): nearly 0 or 1, but for those near 1/2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from trimtab.core import checks
from trimtab.core.checks import InputError

Name = Literal["accuracy", "f1", "fbeta", "balanced_accuracy", "gmean", "precision", "recall"]
Metric = Name | Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
NAMES: tuple[Name, ...] = get_args(Name)
AMPLIFICATION = 73.0


class Confusion(NamedTuple):
    """How many rows are right and wrong in each class, as scalar tensors."""

    tp: Tensor
    fp: Tensor
    fn: Tensor
    tn: Tensor


def soft_confusion(p: Tensor, y: Tensor, positives: Tensor, amplification: float) -> Confusion:
    """The confusion matrix of probabilities p (n,) of class 1, for labels y (n,), 0 or 1 in the type of `p`."""
    h = torch.sigmoid(amplification * (p - 0.5))
    tp = (h * y).sum()
    fp = h.sum() - tp
    return Confusion(tp, fp, positives - tp, len(y) - positives - fp)


def score(of: Confusion, metric: Metric, beta: float) -> Tensor:
    """The metric of a confusion matrix; `beta` is the weight of recall in ``"fbeta"``."""
    tp, fp, fn, tn = of
    if callable(metric):
        value = metric(*of)
        if not isinstance(value, Tensor) or value.shape != ():
            raise InputError(f"metric must give a scalar tensor, got {value!r}")
        return checks.finite(value, "what metric gives")
    if metric == "accuracy":
        return (tp + tn) / (tp + fp + fn + tn)
    if metric == "precision":
        return _share(tp, tp + fp)
    if metric in ("f1", "fbeta"):
        weight = 1.0 if metric == "f1" else beta**2
        hits = (1 + weight) * tp
        return _share(hits, hits + weight * fn + fp)
    sensitivity = tp / (tp + fn)
    if metric == "recall":
        return sensitivity
    specificity = tn / (tn + fp)
    if metric == "balanced_accuracy":
        return (sensitivity + specificity) / 2
    # the slope of the root is infinite at 0
    return (sensitivity * specificity).clamp(min=1e-12).sqrt()


def present(metric: Metric, positives: Tensor, n: int) -> Tensor:
    """Whether n rows, of which so many are positive, hold the classes that the metric is made for."""
    if metric == "accuracy":
        return positives >= 0
    if metric in ("f1", "fbeta", "precision", "recall"):
        return positives > 0
    return (positives > 0) & (positives < n)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / (whole + torch.finfo(whole.dtype).tiny)
