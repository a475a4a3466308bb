"""Batch normalisation at test time: by the statistics of the batch, or by a mixture of them with the source's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.core.checks import InputError
from trimtab.core.modules import BATCH_NORMS, replace


def use_batch_statistics(model: nn.Module, *, train_mode: bool = False) -> nn.Module:
    """Let every batch normalisation layer of `model` normalise by the batch it sees; returns the model.

    `nn.BatchNorm1d` keeps the source's statistics, unchanged, for a batch of one row, which has none of its own.

    Args:
        model: changed in place.
        train_mode: what the rest of the model is put in: eval mode by default, train mode, with dropout and stochastic
            depth, on request.
    """
    model.train(train_mode)
    for module in model.modules():
        if not isinstance(module, BATCH_NORMS):
            continue
        if isinstance(module, nn.BatchNorm1d):
            module.train()
            module.momentum = 0.0
        else:
            module.track_running_stats = False
            module.running_mean = module.running_var = None
        module.num_batches_tracked = None
    return model


def mix_statistics(model: nn.Module, alpha: float, *, unbiased: bool, follow: bool) -> nn.Module:
    """Swap every batch normalisation layer of `model`, in place, for a `MixedBatchNorm`; returns the model."""

    def build(layer: nn.Module) -> nn.Module:
        assert isinstance(layer, _BatchNorm)
        return MixedBatchNorm(layer, alpha, unbiased=unbiased, follow=follow)

    return replace(model, BATCH_NORMS, build).eval()


class MixedBatchNorm(nn.Module):
    """Batch normalisation by (1 - alpha) source statistics + alpha batch statistics; gradients flow through both.

    Args:
        layer: the batch normalisation layer whose statistics, weight and bias (the same parameters) are taken over.
        alpha: weight of the batch, in [0, 1].
        unbiased: use Bessel's correction in the variance of the batch.
        follow: in train mode store every mixture as the new source statistics, in eval mode use the stored ones as
            they are. False mixes in both modes and stores nothing.

    Raises:
        InputError: the layer keeps no running statistics.
    """

    source_mean: Tensor
    source_var: Tensor

    def __init__(self, layer: _BatchNorm, alpha: float, *, unbiased: bool, follow: bool):
        super().__init__()
        if layer.running_mean is None or layer.running_var is None:
            raise InputError(f"model must keep running statistics in its batch normalisation layers, {layer} does not")
        self.register_buffer("source_mean", layer.running_mean)
        self.register_buffer("source_var", layer.running_var)
        self.weight = layer.weight
        self.bias = layer.bias
        self.eps = layer.eps
        self.alpha = alpha
        self.unbiased = unbiased
        self.follow = follow

    def forward(self, x: Float[Tensor, "n c *rest"]) -> Float[Tensor, "n c *rest"]:
        """Normalise."""
        if self.follow and not self.training:
            return F.batch_norm(x, self.source_mean, self.source_var, self.weight, self.bias, eps=self.eps)
        if self.unbiased and x.numel() == x.shape[1]:
            raise InputError(
                f"x must hold more than one value a channel for an unbiased variance, got {tuple(x.shape)}"
            )
        over = [axis for axis in range(x.ndim) if axis != 1]
        by_channel = (-1, *(1,) * (x.ndim - 2))
        values = x.to(self.source_mean.dtype)
        # in two steps: on the CPU torch.var_mean takes five times as long
        batch_mean = values.mean(over)
        squares = (values - batch_mean.view(by_channel)).square().sum(over)
        batch_var = squares / (x.numel() // x.shape[1] - int(self.unbiased))
        mean = (1 - self.alpha) * self.source_mean + self.alpha * batch_mean
        var = (1 - self.alpha) * self.source_var + self.alpha * batch_var
        if self.follow:
            self.source_mean, self.source_var = mean.detach(), var.detach()
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return torch.addcmul(shift.view(by_channel), values, scale.view(by_channel)).to(x.dtype)
