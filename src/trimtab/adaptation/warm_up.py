"""What a mean teacher brings from the source into a stream: the mean features of the classes, and a warm-up.

Döbler, Marsden, Yang, "Robust Mean Teacher", CVPR 2023 (arXiv:2211.13081); `trimtab.adaptation.RMT` says where their
code is followed.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.adaptation import state
from trimtab.adaptation.base import Choice, OptimizerFactory, follow
from trimtab.adaptation.objectives import symmetric_cross_entropy
from trimtab.adaptation.replay import Replay
from trimtab.core import checks, modules, progress
from trimtab.core.checks import InputError
from trimtab.core.predictions import logits_of, take_apart


def class_means(network: nn.Module, head: nn.Module, loader: Iterable[Any], n: int) -> Float[Tensor, "c d"]:
    """Mean of what `head` is given, class by class, over the first n inputs, in whole batches.

    Raises:
        InputError: the loader is empty, has no labels or lacks a class, or a feature is not finite.
    """
    device = modules.device_of(network)
    sums = counts = torch.empty(0, device=device)
    seen = 0
    for batch in progress.track(loader, "prototypes"):
        x, labels = take_apart(batch, device)
        with torch.no_grad(), modules.watch_input(head) as inputs:
            logits = logits_of(network, x)
        if labels is None:
            raise InputError("loader must yield (inputs, labels), a batch came without labels")
        labels = checks.labels(labels, len(logits), logits.shape[1])
        features = checks.matrix(inputs[-1], "features").double()
        if not seen:
            sums = features.new_zeros(logits.shape[1], features.shape[1])
            counts = features.new_zeros(logits.shape[1])
        sums.index_add_(0, labels, features)
        counts += labels.bincount(minlength=len(counts))
        seen += len(labels)
        if seen >= n:
            break
    if not seen:
        raise InputError("loader must yield at least one batch, it yielded none")
    if missing := (counts == 0).nonzero()[:, 0].tolist():
        raise InputError(f"loader must show every class, it shows none of {missing[:5]} in {seen} inputs")
    return (sums / counts[:, None]).to(inputs[-1].dtype)


def warmed_up(
    student: nn.Module,
    loader: Iterable[Any],
    steps: int,
    *,
    alpha: float,
    teacher_momentum: float,
    optimizer: OptimizerFactory,
    parameters_of: Choice,
) -> dict[str, Tensor]:
    """Let `student`, in place, follow its mean teacher on source batches while the learning rate rises.

    Returns:
        The parameters that moved as ``student.*`` and ``teacher.*``, the optimizer's state as ``optimizer.*``, and how
        many batches of the current round were ``replayed``.

    Raises:
        InputError: the loss is not finite.
    """
    teacher = deepcopy(student).requires_grad_(False)
    moving = parameters_of(student.requires_grad_(False))
    for parameter in moving.values():
        parameter.requires_grad_(True)
    built = optimizer(list(moving.values()))
    rates = [group["lr"] for group in built.param_groups]
    device = modules.device_of(student)
    replay = Replay(loader, "loader")
    for step in progress.track(range(1, steps + 1), "warm-up"):
        x, _ = take_apart(replay.next(), device)
        for group, rate in zip(built.param_groups, rates):
            group["lr"] = rate * step / steps
        with torch.enable_grad():
            loss = symmetric_cross_entropy(logits_of(student, x), logits_of(teacher, x), alpha).mean()
        if not bool(loss.isfinite()):
            raise InputError(f"optimizer must keep the loss of the warm-up finite, it is {loss:g} at step {step}")
        built.zero_grad()
        torch.autograd.backward(loss)
        built.step()
        follow(teacher, student, teacher_momentum)
    slow = dict(teacher.named_parameters())
    return {
        **{f"student.{name}": parameter for name, parameter in moving.items()},
        **{f"teacher.{name}": slow[name] for name in moving},
        **{f"optimizer.{name}": value for name, value in state.pack(built, moving).items() if name != "lr"},
        "replayed": replay.taken,
    }
