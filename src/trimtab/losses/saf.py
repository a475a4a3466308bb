"""SAF and MESA: flat minima without the second pass of sharpness-aware minimisation (SAM).

Reach for them to train a classifier that generalises a little better, and overfits wrong labels less, at the cost of
one plain step. To the cross-entropy they add a trajectory loss: the divergence of the network's softened outputs from
its own outputs some epochs ago (SAF, which keeps them in a memory) or from those of a moving average of its weights
(MESA, one forward pass more and no memory). A step of gradient descent lowers a batch's loss by about
eta |g|^2 = (eta / rho^2) R^2, with R the sharpness that SAM descends; outputs that leap along the trajectory tell of
sharpness. `trimtab.losses.sharpness` measures R.

Paper: Du, Zhou, Feng, Tan, Zhou, "Sharpness-Aware Training for Free", NeurIPS 2022 (arXiv:2205.14083). The authors'
code (AngusDujw/SAF) is followed where it differs: the divergence is multiplied by temperature^2 (25), which the
paper's Eq. 8 leaves out while its weights 0.3 and 0.8 are the run script's; MESA asks the average before it takes the
step's weights in, where Algorithm 1 takes them in first. Epochs count from 0 and both bounds are strict: ``start=5``
begins in the seventh epoch. Departures: the logarithm of the softmax is taken in one step (theirs is -inf for gaps
above a hundred temperatures); a sample whose outputs were not kept `lookback` epochs ago adds nothing to the
divergence, where theirs is drawn to the uniform distribution, or to older outputs; integer buffers of the average are
copied.

What we found, with a fifth of the labels wrong (the claim, five seeds): SAF gains 0.6 points of accuracy (0.1 to 1.0)
at a sharpness that is a sixth lower, MESA 1.8 points (1.1 to 2.5) at one that is higher than plain training's. SAF adds
0.2 to 0.4 ms to a step whatever the network: little beside convolutions (1.02 to 1.05 of a plain step in the claim,
1.00 of one of 58 ms), and more than half of the half-millisecond step of a small perceptron (1.59). MESA's forward pass
is a quarter of a step in single precision (1.22 to 1.28 of a plain step of 58 ms) and less in half (1.17 to 1.23): call
it under autocast, which narrows the average's pass only; the loss stays in single precision.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.modules import bare
from trimtab.losses import base
from trimtab.losses.output_memory import OutputMemory

Loss = Callable[[Tensor, Tensor], Tensor]


class SAF(nn.Module):
    """Cross-entropy, plus the divergence from the outputs that the same samples had `lookback` epochs ago.

    Needs the samples' numbers in the training set from the loader (`Indexed` adds them) and the epoch from the loop.
    Inputs must be what their number says: no mixing of samples (labels of mixtures are refused).

    Args:
        samples: size of the training set; the memory holds samples x (lookback + 1) x classes numbers on the CPU, or
            where ``.to(device)`` moves it. CIFAR-100 takes 82 MB, ImageNet 20.5 GB, half of it in float16.
        classes: number of classes.
        weight: of the divergence, >= 0; 0.3 as in the paper and its run script.
        temperature: softens both outputs, > 0; 5.
        start: the divergence counts in epochs after this one; 5 as in the run script, at least `lookback`.
        lookback: how many epochs ago, >= 1; 3 as in the paper (the run script for ImageNet takes 2).
        end: and in epochs before this one, at least `start` + 2; by default to the end of training.
        objective: what the divergence is added to, called with logits and labels; cross-entropy. The authors' ImageNet
            runs smooth labels by 0.1.
        dtype: precision of the memory; float32. float16 halves it, see `OutputMemory`.
        path: a file to keep the memory in, mapped, instead of RAM; it lies beside ``state_dict()`` and is gone on with
            when it is there. Processes that train on one machine are to share it: a distributed sampler hands a sample
            to another process in the next epoch, whose memory of its own would lack it.
        persistent: whether a memory in RAM is part of ``state_dict()``. Without it a resumed run teaches nothing for
            `lookback` epochs.

    Raises:
        InputError: a number is out of range, `start` is before `lookback`, no epoch counts, or the file has another
            size.

    Example:
        >>> saf = SAF(samples=4, classes=3, start=1, lookback=1)
        >>> index, labels = torch.arange(4), torch.tensor([0, 1, 2, 0])
        >>> [round(float(saf(step * torch.eye(4, 3), labels, index, epoch=step)), 4) for step in range(4)]
        [1.0986, 0.6882, 0.4812, 0.3736]

    Reference:
        Du et al., NeurIPS 2022, https://arxiv.org/abs/2205.14083
    """

    def __init__(
        self,
        *,
        samples: int,
        classes: int,
        weight: float = 0.3,
        temperature: float = 5.0,
        start: int = 5,
        lookback: int = 3,
        end: int | None = None,
        objective: Loss = F.cross_entropy,
        dtype: torch.dtype = torch.float32,
        path: str | Path | None = None,
        persistent: bool = True,
    ):
        super().__init__()
        self.memory = OutputMemory(samples, classes, lookback=lookback, dtype=dtype, path=path, persistent=persistent)
        self.weight = checks.number(weight, "weight", low=0.0)
        self.temperature = checks.number(temperature, "temperature", low=0.0, low_open=True)
        self.start = checks.integer(start, "start", low=lookback)
        self.end = _end(end, start)
        self.objective = checks.function(objective, "objective")

    def forward(
        self, logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], index: Int[Tensor, " n"], epoch: int
    ) -> Float[Tensor, ""]:
        """The mean loss of a batch; remembers its logits.

        Args:
            logits: (n, c).
            labels: (n,), in 0..c-1.
            index: (n,) numbers of the samples in the training set, in 0..samples-1, on any device. Of a sample that
                is drawn twice, one of the rows is remembered.
            epoch: how many epochs are over, from 0.

        Raises:
            InputError: an input has another shape, type or range.
        """
        logits, labels = base.pair(logits, labels)
        if logits.shape[1] != self.memory.outputs.shape[2]:
            raise InputError(f"logits must have {self.memory.outputs.shape[2]} columns, got {logits.shape[1]}")
        index = checks.labels(index, len(logits), self.memory.samples, "index")
        self.memory.write(index, logits, checks.integer(epoch, "epoch", low=0))
        loss = self.objective(logits, labels)
        if not _counts(epoch, self.start, self.end):
            return loss
        past, there = self.memory.read(index, epoch)
        divergence = _divergence(logits, past.to(logits), self.temperature)
        return loss + self.weight * (divergence * there.to(logits)).mean()


class MESA(nn.Module):
    """Cross-entropy, plus the divergence from the outputs of a moving average of the network's weights.

    One forward pass more a step. Call `update` with the network after each step of the optimizer.

    Args:
        model: the network that is trained; it is copied, and stays as it is. The copy (`average`) is in eval mode.
        decay: share of the average that stays at an update, in [0, 1); 0.9998, timm's default, which the authors keep:
            its memory is 5000 steps, so shorter trainings need less.
        weight: of the divergence, >= 0; 0.8 as in the paper and its run script.
        temperature: softens both outputs, > 0; 5.
        start: the divergence counts in epochs after this one; 5 as in the run script.
        end: and in epochs before this one, at least `start` + 2; by default to the end of training.
        objective: what the divergence is added to, called with logits and labels; cross-entropy.

    Attributes:
        average: the moving average of the weights, and of the buffers, as a network of its own.

    Raises:
        InputError: a number is out of range, or no epoch counts.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> mesa, optimizer = MESA(model, decay=0.99, start=0), torch.optim.SGD(model.parameters(), 0.1)
        >>> x, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> for epoch in range(3):
        ...     loss = mesa(model(x), labels, x, epoch=epoch)
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        ...     mesa.update(model)
        >>> bool(loss > F.cross_entropy(model(x), labels))
        True

    Reference:
        Du et al., NeurIPS 2022, https://arxiv.org/abs/2205.14083
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.9998,
        weight: float = 0.8,
        temperature: float = 5.0,
        start: int = 5,
        end: int | None = None,
        objective: Loss = F.cross_entropy,
    ):
        super().__init__()
        self.decay = checks.number(decay, "decay", low=0.0, high=1.0, high_open=True)
        self.weight = checks.number(weight, "weight", low=0.0)
        self.temperature = checks.number(temperature, "temperature", low=0.0, low_open=True)
        self.start = checks.integer(start, "start", low=0)
        self.end = _end(end, start)
        self.objective = checks.function(objective, "objective")
        self.average = deepcopy(bare(model)).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Train mode for the objective; the average stays in eval mode."""
        super().train(mode)
        self.average.eval()
        return self

    def forward(self, logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], x: Any, epoch: int) -> Float[Tensor, ""]:
        """The mean loss of a batch.

        Args:
            logits: (n, c), the network's on `x`.
            labels: (n,), in 0..c-1.
            x: the batch as the network got it, for the average.
            epoch: how many epochs are over, from 0.

        Raises:
            InputError: an input has another shape, type or range, or the average's logits have another shape.
        """
        logits, labels = base.pair(logits, labels)
        loss = self.objective(logits, labels)
        if not _counts(checks.integer(epoch, "epoch", low=0), self.start, self.end):
            return loss
        base.same_meta(logits=logits, average=next(self.average.parameters(), logits))
        with torch.no_grad():
            taught = checks.finite(base.logits_from(self.average, x, "the average"), "the average's logits")
        _alike(logits, taught)
        return loss + self.weight * _divergence(logits, taught.to(logits), self.temperature).mean()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the network's weights into the average: after each step of the optimizer.

        Raises:
            InputError: `model` has other parameters or buffers than the one that was copied.
        """
        pairs = list(zip(_state(self.average), _state(bare(model))))
        if [a.shape for a in _state(self.average)] != [b.shape for b in _state(bare(model))]:
            raise InputError("model must have the parameters and buffers of the model that MESA was built with")
        for average, current in pairs[:1]:
            base.same_device(average=average, model=current)
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(self.decay)([a for a, _ in floating], [b for _, b in floating], None)
        for average, current in pairs:
            if not average.is_floating_point():
                average.copy_(current)


def trajectory_kl(
    student_logits: Float[Tensor, "n c"], teacher_logits: Float[Tensor, "n c"], temperature: float = 5.0
) -> Float[Tensor, ""]:
    """temperature^2 KL(softmax(teacher / temperature) || softmax(student / temperature)), mean over the batch.

    Args:
        student_logits: (n, c), with gradient.
        teacher_logits: (n, c), taken as constant.
        temperature: > 0; 5 as in SAF.

    Returns:
        A scalar, >= 0.

    Raises:
        InputError: shapes differ, a value is not finite, the temperature is not positive.

    Example:
        >>> round(float(trajectory_kl(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]), temperature=1.0)), 4)
        1.0068

    Reference:
        Du et al., NeurIPS 2022, https://arxiv.org/abs/2205.14083
    """
    checks.number(temperature, "temperature", low=0.0, low_open=True)
    student = base.widened(checks.logits(student_logits, "student_logits"))
    _alike(student, checks.logits(teacher_logits, "teacher_logits"))
    return _divergence(student, teacher_logits.detach().to(student), temperature).mean()


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Float[Tensor, " n"]:
    """temperature^2 KL of every row."""
    log_taught = (teacher / temperature).log_softmax(1)
    log_said = (student / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(log_said, log_taught, reduction="none", log_target=True).sum(1)


def _end(end: int | None, start: int) -> int | None:
    if end is not None and checks.integer(end, "end", low=0) < start + 2:
        raise InputError(f"end must be at least start + 2, {start + 2}, or no epoch counts, got {end}")
    return end


def _counts(epoch: int, start: int, end: int | None) -> bool:
    return epoch > start and (end is None or epoch < end)


def _alike(student: Tensor, teacher: Tensor) -> None:
    base.same_device(student_logits=student, teacher_logits=teacher)
    if student.shape != teacher.shape:
        raise InputError(f"teacher_logits must have the shape {tuple(student.shape)}, got {tuple(teacher.shape)}")


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
