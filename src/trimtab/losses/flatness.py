"""How sharp a minimum is: what the loss gains at the worst nearby weights, to first order.

Reach for it to see whether an objective or an optimizer did lead to a flat minimum. SAM descends this quantity, SAF a
proxy of it. It compares trainings of one architecture on one data set: rescaling the weights of a network with ReLU
changes it without changing the function.

Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021
(arXiv:2010.01412).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.modules import evaluating
from trimtab.core.precision import doubled
from trimtab.core.progress import track


def sharpness(
    model: nn.Module,
    data: Iterable[tuple[Any, Tensor]],
    *,
    rho: float = 0.05,
    objective: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> float:
    """L(w + rho g / |g|) - L(w), with g the gradient of the loss L over all of `data` at the weights w.

    Two passes over the data. The model is in eval mode meanwhile, and afterwards as it was, gradients included.

    Args:
        model: any network with parameters that require gradients.
        data: batches (x, labels) that can be gone through twice: a loader without shuffling or random views, or a
            list.
        rho: length of the step in weights, > 0; 0.05, SAM's for CIFAR and ImageNet.
        objective: the mean loss of a batch, called with the model's output and the labels; cross-entropy.

    Returns:
        The sharpness, in the units of the loss; 0 where the gradient is zero.

    Raises:
        InputError: no data or none the second time, no parameters to move, or a loss that is not finite.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> round(sharpness(model, [(torch.ones(4, 1), torch.zeros(4, dtype=torch.int64))]), 4)
        0.036

    Reference:
        Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412
    """
    checks.number(rho, "rho", low=0.0, low_open=True)
    checks.function(objective, "objective")
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    if not weights:
        raise InputError("model must have parameters that require gradients, found none")
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def mean_loss(at: dict[str, Tensor], gradients: bool) -> float:
        summed, count = 0.0, 0
        for x, labels in track(checks.loader(data, "data"), "sharpness"):
            with torch.set_grad_enabled(gradients):
                loss = objective(functional_call(model, at, (x,)), labels)
            if not bool(torch.isfinite(loss)):
                raise InputError(f"the loss must be finite, batch at sample {count} gives {loss.item()}")
            if gradients:
                for name, gradient in zip(at, torch.autograd.grad(loss, list(at.values()), allow_unused=True)):
                    if gradient is not None:
                        total[name].add_(gradient, alpha=len(labels))
            summed, count = summed + float(loss.detach()) * len(labels), count + len(labels)
        if count == 0:
            raise InputError("data must yield batches each time that it is gone through, it yielded none")
        return summed / count

    with evaluating(model):
        here = mean_loss(weights, gradients=True)
        norm = torch.linalg.vector_norm(torch.stack([doubled(g).norm() for g in total.values()]).cpu())
        if norm == 0:
            return 0.0
        there = {name: weight.detach().add(total[name], alpha=rho / float(norm)) for name, weight in weights.items()}
        return mean_loss(there, gradients=False) - here
