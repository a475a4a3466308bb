"""What methods with a mean teacher and an anchor share: the target, the loss towards it, and putting weights back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.core.checks import InputError

Predict = Callable[[Any], Tensor]
RestoreMask = Callable[[str, Tensor, torch.Generator], Tensor]


def weights_and_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter whose own name is ``weight`` or ``bias``: layers, but no class tokens or position embeddings.

    Raises:
        InputError: the model has none.
    """
    chosen = {
        name: parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] in ("weight", "bias")
    }
    if not chosen:
        raise InputError("model must have parameters that are called weight or bias, found none")
    return chosen


def anchored_target(
    anchor: Predict, teacher: Predict, x: Any, views: Iterable[Any], *, confidence: float
) -> tuple[Float[Tensor, "n c"], Float[Tensor, ""]]:
    """The teacher's logits, and the anchor's mean confidence on the batch.

    Where that reaches `confidence` they are those of the batch itself, else their mean over `views`, which are not
    drawn before.
    """
    sure = anchor(x).softmax(1).amax(1).mean().double()
    if float(sure) >= confidence:
        return teacher(x), sure
    return torch.stack([teacher(view) for view in views]).mean(0), sure


def self_training_loss(
    logits: Float[Tensor, "n c"], target: Float[Tensor, "n c"], *, symmetric: bool = False
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the model's `logits` to the `target`'s probabilities; half and half with its mirror."""
    loss = _cross_entropy(target, logits)
    return (loss + _cross_entropy(logits, target)) / 2 if symmetric else loss


def put_back(
    moving: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    mask: Callable[[str, Tensor], Tensor],
    group: Any = None,
) -> None:
    """Set the entries of every tensor of `moving` where ``mask(name, tensor)`` is true to those of `source`.

    In a distributed stream, the processes of `group` all take the first one's mask: their generators may have gone
    different ways, over batches of different sizes.
    """
    with torch.no_grad():
        for name, tensor in moving.items():
            back = mask(name, tensor)
            if group is not None:
                torch.distributed.broadcast(back, group=group, group_src=0)
            tensor.copy_(torch.where(back, source[name], tensor))


def random_mask(share: float) -> RestoreMask:
    """True with probability `share`, entry by entry."""

    def mask(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
        return (torch.rand(tensor.shape, generator=generator) < share).to(tensor.device)

    return mask


def _cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return -(target.softmax(1) * logits.log_softmax(1)).sum(1).mean()
