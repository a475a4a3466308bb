"""RoTTA: learn from a small memory that is balanced over classes and timely, not from the batch at hand.

Reach for it on streams whose labels are correlated in time and whose domain changes: predictions come from a slow
teacher with slowly moving batch statistics, so no batch can throw it off. It serves inputs that come one by one, too.

Paper: Yuan, Xie, Li, "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023 (arXiv:2303.13899). The authors'
code (BIT-DA/RoTTA) is followed, down to the weights by age, which are float32 in a float64 model too. The popular
re-implementation in mariodoebler/test-time-adaptation hands its loss an argument that it does not take, so it stops
with a TypeError in full precision. Departures: only normalisation layers are put in train mode for an update
(`train_mode` puts the whole network, dropout included, as the authors do); batch normalisation of every dimension
is replaced; LayerNorm and GroupNorm parameters move too; inputs whose prediction is not finite stay out of the
memory.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn

from trimtab.adaptation.augment import check_first, strong_augment
from trimtab.adaptation.base import ADAM, Adapter, Choice, Inputs, OptimizerFactory, Options, follow
from trimtab.adaptation.batch_stats import MixedBatchNorm, mix_statistics
from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.modules import device_of, norm_parameters
from trimtab.core.predictions import Augmentation


class RoTTA(Adapter):
    """Follows the stream through a class-balanced, timely memory, with a mean teacher and robust batch statistics.

    One forward pass a batch; after every `update_every` inputs two more and one backward pass, over the memory.

    Args:
        model: a classifier with normalisation layers, logits (n, c); with the default `augment`, of images in 0..1.
        capacity: inputs that the memory holds; 64.
        update_every: inputs between updates, counted over the stream; 64.
        alpha: share of the memory's batch in the moving statistics at each update, in [0, 1]; 0.05.
        nu: share of the student in the teacher at each update, in [0, 1]; 0.001.
        timeliness, uncertainty: weights of age and entropy in the score by which the memory drops inputs; 1 and 1.
        optimizer: builds the optimizer from the parameters that move; Adam 1e-3.
        parameters_of: chooses the parameters that move, by name; weights and biases of all normalisation layers.
        augment: ``augment(x, generator)`` gives the strong view that the student sees; the default mirrors images, see
            `strong_augment`.
        generator: a CPU generator for the augmentation; seeded with 0 by default. Its state is saved.
        train_mode: put the whole networks in train mode for updates, as the authors' code does.
        **options: what every `Adapter` takes.

    Attributes:
        memory: the inputs remembered, class by class, oldest first; `memory_class`, `memory_entropy` and `memory_born`
            (when each came, counted in inputs) beside it (buffers).
        offered: inputs offered to the memory since the last reset (buffer).

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> rotta = RoTTA(model, augment=lambda x, generator: x + 0.01, capacity=8, update_every=8)
        >>> rotta(torch.randn(16, 3, generator=torch.Generator().manual_seed(0))).shape
        torch.Size([16, 2])
        >>> int(rotta.updates)
        2

    Reference:
        Yuan et al., CVPR 2023, https://arxiv.org/abs/2303.13899
    """

    forwards = 3
    backwards = 1
    memory: Tensor
    memory_class: Tensor
    memory_entropy: Tensor
    memory_born: Tensor
    offered: Tensor
    generator: torch.Generator

    def __init__(
        self,
        model: nn.Module,
        *,
        capacity: int = 64,
        update_every: int = 64,
        alpha: float = 0.05,
        nu: float = 0.001,
        timeliness: float = 1.0,
        uncertainty: float = 1.0,
        optimizer: OptimizerFactory = ADAM,
        parameters_of: Choice = norm_parameters,
        augment: Augmentation = strong_augment,
        generator: torch.Generator | None = None,
        train_mode: bool = False,
        **options: Unpack[Options],
    ):
        super().__init__(model, **options)
        self.capacity = checks.integer(capacity, "capacity", low=1)
        self.update_every = checks.integer(update_every, "update_every", low=1)
        self.alpha = checks.number(alpha, "alpha", low=0.0, high=1.0)
        self.nu = checks.number(nu, "nu", low=0.0, high=1.0)
        self.timeliness = checks.number(timeliness, "timeliness", low=0.0)
        self.uncertainty = checks.number(uncertainty, "uncertainty", low=0.0)
        self.augment = augment
        self.train_mode = train_mode
        chosen = parameters_of(self.model)
        mix_statistics(self.model, alpha, unbiased=False, follow=True)
        self._begin(lambda _: chosen, optimizer)
        self.generator = generator or torch.Generator().manual_seed(0)
        self.teacher = deepcopy(self.model).requires_grad_(False)
        self.register_buffer("offered", torch.zeros((), dtype=torch.int64))
        self._forget()

    def reset(self) -> None:
        """Return student and teacher to the source, and forget the memory."""
        super().reset()
        self._restore(self.teacher)
        self.offered.zero_()
        self._forget()

    def _forget(self) -> None:
        self.register_buffer("memory", torch.empty(0, device=device_of(self.model)))
        self.register_buffer("memory_class", torch.empty(0, dtype=torch.int64))
        self.register_buffer("memory_entropy", torch.empty(0, dtype=torch.float64))
        self.register_buffer("memory_born", torch.empty(0, dtype=torch.int64))

    def _predict(self, x: Inputs) -> Tensor:
        return self._call(self.teacher, x)

    def _adapt(self, x: Inputs) -> Tensor:
        if not isinstance(x, Tensor):
            raise InputError(f"x must be a tensor, which the memory can hold, got {type(x).__name__}")
        check_first(self.augment, x)
        with torch.no_grad():
            logits = self._predict(x)
        probs = logits.softmax(1)
        entropies = -(probs * (probs + 1e-6).log()).sum(1)
        start = 0
        while start < len(x):
            stop = min(len(x), start + self.update_every - int(self.offered) % self.update_every)
            self._remember(x[start:stop], probs[start:stop].argmax(1), entropies[start:stop], probs.shape[1])
            if int(self.offered) % self.update_every == 0 and len(self.memory):
                self._update()
            start = stop
        return logits

    def _remember(self, x: Tensor, labels: Tensor, entropies: Tensor, classes: int) -> None:
        """Offer inputs to the memory, one after the other."""
        held = zip(self.memory_class.tolist(), self.memory_born.tolist(), self.memory_entropy.tolist())
        bank: dict[int, list[Item]] = {}
        for row, (label, born, entropy) in enumerate(held):
            bank.setdefault(label, []).append(Item(row, born, entropy))
        first = int(self.offered)
        for row, (label, entropy) in enumerate(zip(labels.tolist(), entropies.tolist())):
            if math.isfinite(entropy):
                offer(
                    bank,
                    label,
                    Item(len(self.memory) + row, first + row, entropy),
                    capacity=self.capacity,
                    classes=classes,
                    timeliness=self.timeliness,
                    uncertainty=self.uncertainty,
                )
        self.offered += len(x)
        kept = [(label, item) for label in sorted(bank) for item in bank[label]]
        rows = torch.tensor([item.row for _, item in kept], dtype=torch.int64, device=x.device)
        self.memory = (torch.cat((self.memory, x)) if len(self.memory) else x)[rows]
        device = self.memory_class.device
        self.memory_class = torch.tensor([label for label, _ in kept], dtype=torch.int64, device=device)
        self.memory_born = torch.tensor([item.born for _, item in kept], dtype=torch.int64, device=device)
        self.memory_entropy = torch.tensor([item.entropy for _, item in kept], dtype=torch.float64, device=device)

    def _update(self) -> None:
        ages = ((int(self.offered) - self.memory_born).double() / self.capacity).float().to(self.memory.device)
        weights = (-ages).exp() / (1 + (-ages).exp())
        layers = [m for m in (*self.model.modules(), *self.teacher.modules()) if isinstance(m, MixedBatchNorm)]
        before = [(layer.source_mean, layer.source_var) for layer in layers]
        self._training(True)
        try:
            with torch.no_grad():
                target = self._call(self.teacher, self.memory).softmax(1)
            logits = self._call(self.model, self.augment(self.memory, self.generator))
        finally:
            self._training(False)
        loss = (weights * -(target * logits.log_softmax(1)).sum(1)).mean()
        if self._descend(loss):
            follow(self.teacher, self.model, 1 - self.nu)
            return
        for layer, (mean, var) in zip(layers, before):
            layer.source_mean, layer.source_var = mean, var

    def _training(self, mode: bool) -> None:
        for network in (self.model, self.teacher):
            for module in network.modules():
                if self.train_mode or isinstance(module, MixedBatchNorm):
                    module.training = mode


class Item(NamedTuple):
    """One input in the memory: its row, when it came, and the entropy of its prediction."""

    row: int
    born: int
    entropy: float


def offer(
    bank: dict[int, list[Item]],
    label: int,
    new: Item,
    *,
    capacity: int,
    classes: int,
    timeliness: float = 1.0,
    uncertainty: float = 1.0,
) -> bool:
    """Let the memory take `new` in, where it is worth more than what must go for it; returns whether it did.

    Each class may hold its share, capacity / classes. Below it the new input is taken, at the cost of the worst input
    of the fullest classes once the memory is full; at its share, at the cost of the worst of its own class. The worst
    is the oldest and least certain: the largest score, and the later one among equals. It goes only if it scores above
    the new input.
    """
    sizes = {c: len(items) for c, items in bank.items() if items}
    rivals = [label]
    if sizes.get(label, 0) < capacity / classes:
        if sum(sizes.values()) < capacity:
            bank.setdefault(label, []).append(new)
            return True
        fullest = max(sizes.values())
        rivals = sorted(c for c, size in sizes.items() if size == fullest)

    def score(item: Item) -> float:
        age = new.born - item.born
        return timeliness / (1 + math.exp(-age / capacity)) + uncertainty * item.entropy / math.log(classes)

    worst = max(((score(item), c, place) for c in rivals for place, item in enumerate(bank.get(c, []))), default=None)
    if worst is not None:
        if worst[0] <= score(new):
            return False
        del bank[worst[1]][worst[2]]
    bank.setdefault(label, []).append(new)
    return True
