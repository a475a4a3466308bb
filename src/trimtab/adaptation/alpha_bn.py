"""alpha-BN and CoRe: keep most of the source's batch statistics, and let the classes of a batch stand apart.

Reach for `AlphaBN` where batches are small, or their classes one-sided, and nothing may be learnt: pure statistics of
the batch would be noise there, or would wipe out the class itself. With large, well-mixed batches `BatchNormAdapt` is
better. `CoRe` goes on from there and learns, as Tent does, from a loss that keeps classes from being confused.

Paper: You, Li, Zhao, "Test-time Batch Statistics Calibration for Covariate Shift", 2021 (arXiv:2110.04065), without
code. The layer is held to AlphaBatchNorm of bethgelab/robustness, which gives the letter alpha to the *batch* where the
paper gives it to the *source*; the argument here is called `source_weight`. That code takes the batch's variance with
Bessel's correction (`unbiased`), so `source_weight=0` is not quite `BatchNormAdapt`; it divides by zero where a channel
has one value, which is refused here in words. CoRe's loss is reconstructed from the paper's description: the share of
class correlation that lies between different classes.

What we found, on Fashion-MNIST with a small network and three corruptions (`trimtab claims run 06-alpha-bn`): in
batches of 4 half and half beats the unadapted model by 17 points and batch statistics by 3; in mixed batches of 100
batch statistics win by 4. On a stream sorted by class half and half is 12 points above batch statistics, but 4 below
the unadapted model: there the default, 0.9, holds its level. CoRe gains 0.3 points over 15 mixed batches of 100 with
Adam 1e-3, and more the longer it runs and the larger its steps: 3.7 over 60 batches at 1e-2, where Tent on the same
layers begins to lose at 3e-3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.adaptation.base import ADAM, Adapter, Choice, Inputs, OptimizerFactory, Options, entropy, rows
from trimtab.adaptation.batch_stats import by_layer, mix_statistics
from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.modules import norm_parameters

Weights = float | Sequence[float] | Mapping[str, float]
_EMPTY = 1e-8


class AlphaBN(Adapter):
    """Normalises by source_weight x source statistics + (1 - source_weight) x batch statistics; learns nothing.

    One forward pass a batch. Nothing is carried over from batch to batch.

    Args:
        model: a model with batch normalisation layers that keep running statistics, logits (n, c) or (n, c, ...).
        source_weight: in [0, 1]; 1 is the source model. One for all layers, a list with one a layer in the order of
            ``named_modules()``, or a mapping from every layer's name. 0.9 as the benchmarks take it for single images;
            less where the shift is strong; `from_prior` gives it by the size of the batches.
        unbiased: take the batch's variance with Bessel's correction, as the code does.
        **options: what every `Adapter` takes.

    Raises:
        InputError: the model has no batch normalisation layer, or one without running statistics; `source_weight` is
            out of range or does not fit the layers; at a call, a channel has a single value and `unbiased` is set.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
        >>> x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
        >>> torch.allclose(AlphaBN(model, source_weight=1.0)(x), model(x), atol=1e-6)
        True
        >>> AlphaBN(model, source_weight={"1": from_prior(16, len(x))})(x).shape
        torch.Size([16, 2])

    Reference:
        You et al., 2021, https://arxiv.org/abs/2110.04065
    """

    dense = True

    def __init__(
        self, model: nn.Module, *, source_weight: Weights = 0.9, unbiased: bool = True, **options: Unpack[Options]
    ):
        super().__init__(model, **options)
        self.model = _mixed(self.model, source_weight, unbiased=unbiased)
        self._begin()

    def _adapt(self, x: Inputs) -> Tensor:
        with torch.no_grad():
            return self._predict(x)


class CoRe(Adapter):
    """alpha-BN, and a step on each batch that lowers the correlation between different classes.

    One forward and one backward pass a batch. With P (n, c) the probabilities of the batch and C = P^T P, the loss is
    the share of C that lies off its diagonal, row by row: `class_correlation`.

    Args:
        model: a model with batch normalisation layers that keep running statistics, logits (n, c) or (n, c, ...).
        source_weight: as in `AlphaBN`.
        unbiased: as in `AlphaBN`.
        detach: take the batch's statistics for constants in the gradient; by default it flows through them, as in
            ordinary batch normalisation.
        normalise: divide each row of C by its sum; False takes the mean Gini impurity of the predictions instead, which
            knows nothing of the rest of the batch.
        certainty: weigh inputs by 1 + exp(-entropy).
        optimizer: builds the optimizer from the parameters that move. Default Adam 1e-3, for CIFAR in batches of 200;
            for ImageNet in batches of 64 ``partial(SGD, lr=2.5e-4, momentum=0.9)``, both as for Tent.
        parameters_of: chooses the parameters that move, by name; weights and biases of all normalisation layers.
        train_mode: keep dropout and stochastic depth active.
        **options: what every `Adapter` takes.

    Raises:
        InputError: as `AlphaBN`; or no parameter moves.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> core = CoRe(model, source_weight=0.5)
        >>> logits = core(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))
        >>> logits.shape, int(core.updates)
        (torch.Size([16, 2]), 1)

    Reference:
        You et al., 2021, https://arxiv.org/abs/2110.04065
    """

    backwards = 1
    dense = True

    def __init__(
        self,
        model: nn.Module,
        *,
        source_weight: Weights = 0.9,
        unbiased: bool = True,
        detach: bool = False,
        normalise: bool = True,
        certainty: bool = False,
        optimizer: OptimizerFactory = ADAM,
        parameters_of: Choice = norm_parameters,
        train_mode: bool = False,
        **options: Unpack[Options],
    ):
        super().__init__(model, **options)
        self.normalise = normalise
        self.certainty = certainty
        self.model = _mixed(self.model, source_weight, unbiased=unbiased, detach=detach).train(train_mode)
        self._begin(parameters_of, optimizer)

    def _adapt(self, x: Inputs) -> Tensor:
        logits = self._call(self.model, x)
        self._descend(class_correlation(rows(logits), normalise=self.normalise, certainty=self.certainty))
        return logits


def class_correlation(
    logits: Float[Tensor, "n c"], *, normalise: bool = True, certainty: bool = False
) -> Float[Tensor, ""]:
    """How much the predictions of a batch confuse classes with one another.

    Of the correlation C_jk = sum_i p_ij p_ik of the classes j and k: the mean over j of the share of row j that lies
    off the diagonal; without `normalise`, the sum of all that lies there, over n.

    Args:
        logits: (n, c).
        normalise: divide by the sums of rows.
        certainty: weigh inputs by 1 + exp(-entropy), of mean 1, without a gradient.

    Example:
        >>> sure, torn = torch.tensor([[9.0, -9.0], [-9.0, 9.0]]), torch.zeros(2, 2)
        >>> round(float(class_correlation(sure)), 4), float(class_correlation(torn))
        (0.0, 0.5)
    """
    probs = logits.softmax(1)
    weighted = probs
    if certainty:
        certainties = 1 + (-entropy(logits.detach())).exp()
        weighted = probs * (certainties / certainties.mean())[:, None]
    with torch.autocast(probs.device.type, enabled=False):  # in half precision the small shares drown in the sums
        correlation = weighted.T @ probs
    sums = correlation.sum(1)
    confused = sums - correlation.diagonal()
    return (confused / (sums + _EMPTY)).mean() if normalise else confused.sum() / len(logits)


def from_prior(N: float, n: int) -> float:
    """The source weight N / (N + n) that takes the source's statistics for those of N inputs, beside n of the batch.

    Args:
        N: pseudo-inputs of the source, >= 0; Schneider et al. (2020) find 16 a good choice for ImageNet-C.
        n: size of the batches, >= 1.

    Example:
        >>> from_prior(16, 1), from_prior(16, 64)
        (0.9411764705882353, 0.2)
    """
    N = checks.number(N, "N", low=0.0)
    return N / (N + checks.integer(n, "n", low=1))


def _mixed(model: nn.Module, source_weight: Weights, *, unbiased: bool, detach: bool = False) -> nn.Module:
    weights = by_layer(model, source_weight, "source_weight")
    if not weights:
        raise InputError("model must have a batch normalisation layer, found none")
    return mix_statistics(model, {n: 1 - w for n, w in weights.items()}, unbiased=unbiased, detach=detach)
