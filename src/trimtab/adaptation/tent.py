"""Tent: make the model sure of the stream by moving its normalisation layers only.

Reach for it where batches are large (some hundred inputs) and their classes well mixed: it is the cheapest adapter that
learns. On label-correlated streams and tiny batches it collapses; take LAME or RoTTA there.

Paper: Wang, Shelhamer, Liu, Olshausen, Darrell, "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021
(arXiv:2006.10726). The authors' code calls ``model.train()``, which switches on dropout too; here batch statistics are
used in eval mode, which is the same for networks without dropout (`train_mode` follows the code). The code adapts
BatchNorm2d only; all normalisation layers are adapted here, as in later benchmarks.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from trimtab.adaptation.base import ADAM, Adapter, Choice, Inputs, OptimizerFactory, Options, entropy
from trimtab.adaptation.batch_stats import use_batch_statistics
from trimtab.core.modules import norm_parameters


class Tent(Adapter):
    """Minimises the mean entropy of each batch's predictions.

    One forward and one backward pass a batch.

    Args:
        model: a classifier with normalisation layers, logits (n, c).
        optimizer: builds the optimizer from the parameters that move. Default Adam 1e-3, for CIFAR in batches of 200;
            for ImageNet in batches of 64 the authors take ``partial(SGD, lr=2.5e-4, momentum=0.9)``.
        parameters_of: chooses the parameters that move, by name; weights and biases of all normalisation layers.
        train_mode: keep dropout and stochastic depth active, as the authors' code does.
        **options: what every `Adapter` takes.

    Raises:
        InputError: the model has no normalisation layer with affine parameters.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> tent = Tent(model)
        >>> logits = tent(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
        >>> logits.shape, int(tent.updates)
        (torch.Size([16, 2]), 1)

    Reference:
        Wang et al., ICLR 2021, https://arxiv.org/abs/2006.10726
    """

    backwards = 1
    dense = True

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerFactory = ADAM,
        parameters_of: Choice = norm_parameters,
        train_mode: bool = False,
        **options: Unpack[Options],
    ):
        super().__init__(model, **options)
        use_batch_statistics(self.model, train_mode=train_mode)
        self._begin(parameters_of, optimizer)

    def _adapt(self, x: Inputs) -> Tensor:
        logits = self._call(self.model, x)
        self._descend(entropy(logits).mean())
        return logits
