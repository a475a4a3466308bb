"""Streams that several processes share: each adapts to its own part, and what moves stays the same in all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trimtab.core import modules


def unwrapped(model: nn.Module) -> tuple[nn.Module, Any]:
    """The model itself, and the group of the processes that share the stream; None where there is one alone."""
    return modules.bare(model), model.process_group if isinstance(model, DistributedDataParallel) else None


def share_gradients(parameters: Sequence[nn.Parameter], learnt: bool, sound: bool, group: Any) -> tuple[bool, bool]:
    """Make every gradient the mean over the processes that learn; all must meet here.

    Args:
        parameters: the same in every process; a gradient of None counts as 0.
        learnt: whether this process learns from its batch.
        sound: whether its loss was finite.
        group: the processes.

    Returns:
        Whether any process learns, and whether all are sound.
    """
    gradients = [torch.zeros_like(p) if p.grad is None or not sound else p.grad for p in parameters]
    votes = gradients[0].new_tensor([float(learnt), float(not sound)])
    pooled = torch.cat([votes, *(gradient.flatten() for gradient in gradients)])
    torch.distributed.all_reduce(pooled, group=group)
    learners, unsound = int(pooled[0]), int(pooled[1])
    means = (pooled[2:] / max(learners, 1)).split([p.numel() for p in parameters])
    for parameter, mean in zip(parameters, means):
        parameter.grad = mean.view_as(parameter)
    return learners > 0, unsound == 0


def summed(counts: Tensor, group: Any) -> Tensor:
    """`counts`, summed in place over the processes of `group`, where there is one."""
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    return counts
