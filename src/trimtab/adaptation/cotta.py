"""CoTTA: a slow teacher, averaged over augmentations, guides the model; a little of it is put back at random.

Reach for it on streams that change from domain to domain for long, where the whole network may learn and time is not
short: where the source model is unsure of a batch, the batch goes through the teacher 32 times.

Paper: Wang, Fink, Van Gool, Dai, "Continual Test-Time Domain Adaptation", CVPR 2022 (arXiv:2203.13591). The authors'
code (qinenergy/cotta) is followed: the teacher's logits are averaged, not its probabilities; the loss for ImageNet is
symmetric (`symmetric`); parameters that are not called weight or bias (class tokens, position embeddings) stay as they
are. Eval mode is used instead of ``model.train()`` (`train_mode` follows the code). The anchor is the source model; its
weights are kept once, and serve the restoring too.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from trimtab.adaptation import state
from trimtab.adaptation.augment import check_first, strong_augment
from trimtab.adaptation.base import ADAM, Adapter, Choice, Inputs, OptimizerFactory, Options, follow
from trimtab.adaptation.batch_stats import use_batch_statistics
from trimtab.adaptation.teacher import (
    RestoreMask,
    anchored_target,
    put_back,
    random_mask,
    self_training_loss,
    weights_and_biases,
)
from trimtab.core import checks


class CoTTA(Adapter):
    """Follows the stream by cross-entropy to a mean teacher, and restores source weights at random.

    Three forward passes and one backward pass a batch (model, anchor, teacher); `augmentations` passes through the
    teacher where the anchor is unsure. Memory: three copies of the weights beside optimizer and gradients.

    Args:
        model: a classifier, logits (n, c); with the default `augment`, of images in 0..1.
        confidence: the teacher is averaged over augmentations where the anchor's mean confidence is below it, in
            [0, 1]. 0.92 for CIFAR-10-C, 0.72 for CIFAR-100-C, 0.1 for ImageNet-C.
        augmentations: how many views are averaged; 32.
        teacher_momentum: share of itself that the teacher keeps at every update, in [0, 1]; 0.999.
        restore: share of the weights that is put back to the source after every update, in [0, 1]. 0.01 for CIFAR,
            0.001 for ImageNet-C.
        symmetric: add the cross-entropy of the teacher to the model, half and half, as for ImageNet-C.
        optimizer: builds the optimizer from the parameters that move. Default Adam 1e-3, for CIFAR; SGD 1e-2 for
            ImageNet-C.
        parameters_of: chooses the parameters that move, by name; all that are called weight or bias.
        augment: ``augment(x, generator)`` gives a random view of a batch. The default, the authors', mirrors images:
            give ``partial(strong_augment, flip=False)``, or your own, where that changes what they show.
        restore_mask: ``restore_mask(name, parameter, generator)`` says which entries are put back; drawn with
            probability `restore` by default.
        generator: a CPU generator for everything random; seeded with 0 by default. Its state is saved.
        train_mode: keep dropout and stochastic depth active, as the authors' code does.
        **options: what every `Adapter` takes.

    Attributes:
        anchor_confidence: the anchor's mean confidence on the last batch (buffer).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
        >>> cotta = CoTTA(model, augmentations=2)
        >>> cotta(torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))).shape
        torch.Size([5, 2])

    Reference:
        Wang et al., CVPR 2022, https://arxiv.org/abs/2203.13591
    """

    forwards = 34
    backwards = 1
    anchor_confidence: Tensor
    generator: torch.Generator

    def __init__(
        self,
        model: nn.Module,
        *,
        confidence: float = 0.92,
        augmentations: int = 32,
        teacher_momentum: float = 0.999,
        restore: float = 0.01,
        symmetric: bool = False,
        optimizer: OptimizerFactory = ADAM,
        parameters_of: Choice = weights_and_biases,
        augment: Callable[[Any, torch.Generator], Any] = strong_augment,
        restore_mask: RestoreMask | None = None,
        generator: torch.Generator | None = None,
        train_mode: bool = False,
        **options: Unpack[Options],
    ):
        super().__init__(model, **options)
        self.confidence = checks.number(confidence, "confidence", low=0.0, high=1.0)
        self.augmentations = checks.integer(augmentations, "augmentations", low=1)
        self.teacher_momentum = checks.number(teacher_momentum, "teacher_momentum", low=0.0, high=1.0)
        self.restore = checks.number(restore, "restore", low=0.0, high=1.0)
        self.symmetric = symmetric
        self.augment = augment
        self.restore_mask = restore_mask or random_mask(self.restore)
        use_batch_statistics(self.model, train_mode=train_mode)
        self._begin(parameters_of, optimizer)
        self.generator = generator or torch.Generator().manual_seed(0)
        self.teacher = deepcopy(self.model).requires_grad_(False)
        self.register_buffer("anchor_confidence", torch.zeros((), dtype=torch.float64))

    def reset(self) -> None:
        """Return model and teacher to the source."""
        super().reset()
        self._restore(self.teacher)

    def _predict(self, x: Inputs) -> Tensor:
        return self._call(self.teacher, x)

    def _adapt(self, x: Inputs) -> Tensor:
        check_first(self.augment, x)
        logits = self._call(self.model, x)
        with torch.no_grad():
            target = self._target(x)
        if self._descend(self_training_loss(logits, target, symmetric=self.symmetric)):
            follow(self.teacher, self.model, self.teacher_momentum)
            if self.restore:
                put_back(self.moving, self.source.named(), self._drawn, self._group)
        return target

    def _target(self, x: Inputs) -> Tensor:
        views = (self.augment(x, self.generator) for _ in range(self.augmentations))
        target, self.anchor_confidence = anchored_target(
            partial(self._call, state.holding(self.model, self.source)),
            partial(self._call, self.teacher),
            x,
            views,
            confidence=self.confidence,
        )
        return target

    def _drawn(self, name: str, parameter: Tensor) -> Tensor:
        return self.restore_mask(name, parameter, self.generator)
