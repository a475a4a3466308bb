"""CoTTA: a slow teacher, averaged over augmentations, guides the model; a little of it is put back at random.

Reach for it on streams that change from domain to domain for long, where the whole network may learn and time is not
short: where the source model is unsure of a batch, the batch goes through the teacher 32 times.

Paper: Wang, Fink, Van Gool, Dai, "Continual Test-Time Domain Adaptation", CVPR 2022 (arXiv:2203.13591). The authors'
code (qinenergy/cotta) is followed: the teacher's logits are averaged, not its probabilities; the loss for ImageNet is
symmetric (`symmetric`); parameters that are not called weight or bias (class tokens, position embeddings) are trained
but never put back. Eval mode is used instead of ``model.train()`` (`train_mode` follows the code). The anchor is the
source model; its weights are kept once, and serve the restoring too.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.adaptation.augment import check_first, strong_augment
from trimtab.adaptation.base import ADAM, Adapter, Choice, Inputs, OptimizerFactory, Options, follow
from trimtab.adaptation.batch_stats import use_batch_statistics
from trimtab.core import checks
from trimtab.core.modules import all_parameters

RestoreMask = Callable[[str, Tensor, torch.Generator], Tensor]


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
        parameters_of: chooses the parameters that move, by name; all.
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
        parameters_of: Choice = all_parameters,
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
        self.restore_mask = restore_mask or self._random_mask
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
        loss = _cross_entropy(target, logits)
        if self.symmetric:
            loss = (loss + _cross_entropy(logits, target)) / 2
        if self._descend(loss):
            follow(self.teacher, self.model, self.teacher_momentum)
            self._put_back()
        return target

    def _target(self, x: Inputs) -> Tensor:
        """The teacher's logits: of the batch where the anchor is sure of it, else the mean over augmented views."""
        anchor = self._call(self._anchor, x)
        self.anchor_confidence = anchor.softmax(1).amax(1).mean().double()
        if float(self.anchor_confidence) >= self.confidence:
            return self._call(self.teacher, x)
        views = (self.augment(x, self.generator) for _ in range(self.augmentations))
        return torch.stack([self._call(self.teacher, view) for view in views]).mean(0)

    def _anchor(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.source.named(), args, kwargs)

    def _put_back(self) -> None:
        if self.restore == 0:
            return
        source = self.source.named()
        with torch.no_grad():
            for name, parameter in self.moving.items():
                if name.rpartition(".")[2] in ("weight", "bias"):
                    mask = self.restore_mask(name, parameter, self.generator)
                    parameter.copy_(torch.where(mask, source[name], parameter))

    def _random_mask(self, name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
        return (torch.rand(parameter.shape, generator=generator) < self.restore).to(parameter.device)


def _cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    return -(target.softmax(1) * logits.log_softmax(1)).sum(1).mean()
