"""SAR: learn from sure samples only, towards flat places of the loss, and start again when it grows too sure.

Reach for it on wild streams, label-sorted or in tiny batches, where Tent and EATA collapse, and with group or layer
normalisation: batch statistics are the first thing to break there, and SAR does not mend them.

Paper: Niu, Wu, Zhang, Wen, Chen, Zhao, Tan, "Towards Stable Test-Time Adaptation in Dynamic Wild World", ICLR 2023
(arXiv:2302.12400). Where the authors' code (mr-eggplant/SAR) departs from the paper, the paper is followed:

- The code forgets its moving average at a recovery and then puts the old, low value back, so that every batch resets
  the model until the average has climbed; its recovery leaves the optimizer's momentum as it is. Here a recovery starts
  afresh (`legacy_recovery` follows the code).
- Where no sample is reliable, the code's loss is the mean of nothing, NaN with a gradient of zeros, and the optimizer
  steps along it: momentum moves the weights on. Here no step is made (`skip_empty=False` follows the code).
- The code takes a reset constant and compares with 0.2 whatever it is. 0.2 is made for a thousand classes. With ten,
  the moving average of a healthy model lies below: a CIFAR-10 ResNet-20 on clean images in batches of 200 has 0.15, so
  that 0.2 resets it after each of ten batches, and SAR is batch normalisation. Here it is by default a fixed share of
  the largest entropy, as `e_margin` is: 0.2 ln(c) / ln(1000), 0.067 for ten classes; that model is not reset once.

What its parts do, on the sorted stream of its claim (ten classes, batches of four, SGD 0.05): recovery carries the gain
(accuracy 87 % with it, 48 % without; source 81 %, Tent 57 %), and sharpness adds nothing (89 % without it).

Departures from both: eval mode instead of ``model.train()`` (`train_mode` follows the code), and all kinds of
normalisation layers move, not three.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from trimtab.adaptation.base import ADAM, Adapter, Choice, Inputs, OptimizerFactory, Options, entropy
from trimtab.adaptation.batch_stats import use_batch_statistics
from trimtab.adaptation.lower_norms import lower_norm_parameters
from trimtab.core import checks
from trimtab.core.modules import held

_MOMENTUM = 0.9


class SAR(Adapter):
    """Minimises the entropy of reliable samples where it is worst within a small ball around the parameters.

    Two forward and two backward passes a batch; one forward pass where nothing is reliable.

    Args:
        model: a classifier with normalisation layers, logits (n, c); best with group or layer normalisation.
        e_margin: samples whose entropy (nats) is not below it are left out, > 0. Default 0.4 ln(c), the authors'.
        rho: radius of the ball, >= 0: the Euclidean length of the step up before the step down; 0.05 as the authors
            do. 0 learns at the parameters themselves, in two passes all the same.
        reset_constant: return to the source when the moving average of the loss falls below it, >= 0; 0 never does.
            Default 0.2 ln(c) / ln(1000): the authors' 0.2 at ImageNet's thousand classes.
        skip_empty: make no step where no sample is reliable. False lets the optimizer step along a gradient of zeros,
            so that its momentum goes on, as the authors' code does.
        legacy_recovery: return to the source as the authors' code does: the optimizer keeps its momentum, and the
            moving average its low value, so that every batch resets until it has climbed again.
        optimizer: builds the optimizer from the parameters that move. Default Adam 1e-3, for CIFAR in batches of 200;
            the authors take SGD with momentum 0.9: ``partial(SGD, lr=2.5e-4, momentum=0.9)`` for a ResNet-50 on
            ImageNet, 1e-3 for a ViT-B, in batches of 64.
        parameters_of: chooses the parameters that move, by name; weights and biases of the normalisation layers outside
            the top block, see `lower_norm_parameters`.
        train_mode: keep dropout and stochastic depth active, as the authors' code does.
        **options: what every `Adapter` takes.

    Attributes:
        reliable: samples below `e_margin` so far (a buffer).
        mean_loss: moving average (0.9) of the second pass's loss; empty before the first, and after a recovery.
        resets: counts the recoveries too.

    Raises:
        InputError: a setting is out of range, or no normalisation layer is left outside the top block.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> sar = SAR(model, e_margin=0.69)
        >>> logits = sar(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
        >>> logits.shape, int(sar.updates), 0 < int(sar.reliable) <= 16
        (torch.Size([16, 2]), 1, True)

    Reference:
        Niu et al., ICLR 2023, https://arxiv.org/abs/2302.12400
    """

    forwards = 2
    backwards = 2
    reliable: Tensor
    mean_loss: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        e_margin: float | None = None,
        rho: float = 0.05,
        reset_constant: float | None = None,
        skip_empty: bool = True,
        legacy_recovery: bool = False,
        optimizer: OptimizerFactory = ADAM,
        parameters_of: Choice = lower_norm_parameters,
        train_mode: bool = False,
        **options: Unpack[Options],
    ):
        super().__init__(model, **options)
        self.e_margin = None if e_margin is None else checks.number(e_margin, "e_margin", low=0.0, low_open=True)
        self.rho = checks.number(rho, "rho", low=0.0)
        self.reset_constant = (
            None if reset_constant is None else checks.number(reset_constant, "reset_constant", low=0.0)
        )
        self.skip_empty = skip_empty
        self.legacy_recovery = legacy_recovery
        use_batch_statistics(self.model, train_mode=train_mode)
        self._begin(parameters_of, optimizer)
        self.register_buffer("reliable", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean_loss", torch.empty(0, dtype=torch.float64))

    def reset(self) -> None:
        """Return to the source model; the moving average of the loss is cleared too."""
        super().reset()
        self.mean_loss = self.mean_loss.new_empty(0)

    def _adapt(self, x: Inputs) -> Tensor:
        logits = self._call(self.model, x)
        classes = logits.shape[1]
        margin = 0.4 * math.log(classes) if self.e_margin is None else self.e_margin
        entropies = entropy(logits)
        reliable = ~(entropies.detach() >= margin)  # NaN is let through, to make a loss that is skipped and counted
        self.reliable += int(reliable.sum())
        if self._backward(self._mean(entropies[reliable])):
            with self._climbed(), held(self.model):
                entropies = entropy(self._call(self.model, x))[reliable]
                still = entropies[~(entropies.detach() >= margin)]
                sound = self._backward(self._mean(still))
            if sound:
                self._step()
                self._follow(still.detach())
        self._recover(classes)
        return logits

    def _mean(self, entropies: Tensor) -> Tensor | None:
        if len(entropies) == 0 and self.skip_empty:
            return None
        return entropies.sum() / max(len(entropies), 1)

    @contextmanager
    def _climbed(self) -> Iterator[None]:
        """The parameters are `rho` up the gradient in this block, exactly where they were after it."""
        gradients = {name: p.grad for name, p in self.moving.items() if p.grad is not None}
        scale = self.rho / (get_total_norm(list(gradients.values())) + 1e-12)
        before = {name: self.moving[name].detach().clone() for name in gradients}
        with torch.no_grad():
            for name, gradient in gradients.items():
                self.moving[name].add_(gradient * scale)
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    self.moving[name].copy_(value)

    def _follow(self, entropies: Tensor) -> None:
        """Let the moving average take note of the loss: over all processes, so that they recover together."""
        mean = entropies.double().sum() / max(len(entropies), 1)
        total, learners = self.summed(torch.stack((mean, mean.new_tensor(float(len(entropies) > 0)))))
        if learners > 0:
            loss = (total / learners).to(self.mean_loss)
            self.mean_loss = _MOMENTUM * self.mean_loss + (1 - _MOMENTUM) * loss if self.mean_loss.numel() else loss

    def _recover(self, classes: int) -> None:
        known = self.reset_constant
        limit = 0.2 * math.log(classes) / math.log(1000) if known is None else known
        if self.mean_loss.numel() == 0 or float(self.mean_loss) >= limit:
            return
        if self.legacy_recovery:
            self._restore(self.model)
            self.resets += 1
        else:
            self._restart()
