"""Batch normalisation at test time: by the statistics of the batch, or by a mixture of them with the source's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.modules import BATCH_NORMS, BatchNormStandIn, replace


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


def mix_statistics(
    model: nn.Module,
    alpha: float | Sequence[float] | Mapping[str, float],
    *,
    unbiased: bool = True,
    follow: bool = False,
    detach: bool = False,
) -> nn.Module:
    """Swap every batch normalisation layer of `model`, in place, for a `MixedBatchNorm`; returns the model.

    Args:
        model: changed in place, and put in eval mode.
        alpha: weight of the batch, in [0, 1]: one for all layers, or one for each, as in `by_layer`.
        unbiased, follow, detach: as in `MixedBatchNorm`.

    Raises:
        InputError: a layer keeps no running statistics; `alpha` is out of range, or does not fit the layers.
    """
    names = {module: name for name, module in model.named_modules()}
    alphas = by_layer(model, alpha, "alpha")

    def build(layer: nn.Module) -> nn.Module:
        assert isinstance(layer, _BatchNorm)
        return MixedBatchNorm(layer, alphas[names[layer]], unbiased=unbiased, follow=follow, detach=detach)

    return replace(model, BATCH_NORMS, build).eval()


def by_layer(
    model: nn.Module, weight: float | Sequence[float] | Mapping[str, float], argument: str
) -> dict[str, float]:
    """A weight in [0, 1] for each batch normalisation layer of `model`, by its name.

    Args:
        model: its layers are taken in the order of ``named_modules()``, a shared one once.
        weight: one for all layers, a list with one a layer, or a mapping that names every layer.
        argument: what messages call `weight`.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
    if isinstance(weight, Mapping):
        if set(weight) != set(names):
            raise InputError(f"{argument} must name every batch normalisation layer, {names}, it names {list(weight)}")
        weights = dict(weight)
    elif isinstance(weight, Sequence):
        if len(weight) != len(names):
            raise InputError(f"{argument} must hold one number for each of {names}, it holds {len(weight)}")
        weights = dict(zip(names, weight))
    else:
        weights = dict.fromkeys(names, checks.number(weight, argument, low=0.0, high=1.0))
    return {name: checks.number(w, f"{argument} of {name!r}", low=0.0, high=1.0) for name, w in weights.items()}


class MixedBatchNorm(BatchNormStandIn):
    """Batch normalisation by (1 - alpha) source statistics + alpha batch statistics.

    Args:
        layer: the batch normalisation layer whose statistics, weight and bias (the same parameters) are taken over.
        alpha: weight of the batch, in [0, 1].
        unbiased: use Bessel's correction in the variance of the batch.
        follow: in train mode store every mixture as the new source statistics, in eval mode use the stored ones as
            they are. False mixes in both modes and stores nothing.
        detach: take the statistics of the batch for constants; by default gradients flow through them.

    Raises:
        InputError: the layer keeps no running statistics; at a call, a channel has one value and `unbiased`.
    """

    def __init__(
        self, layer: _BatchNorm, alpha: float, *, unbiased: bool = True, follow: bool = False, detach: bool = False
    ):
        super().__init__(layer)
        self.alpha = alpha
        self.unbiased = unbiased
        self.follow = follow
        self.detach = detach

    def _normalised(self, x: Float[Tensor, "n c *rest"]) -> Float[Tensor, "n c *rest"]:
        if self.follow and not self.training:
            return F.batch_norm(x, self.source_mean, self.source_var, self.weight, self.bias, eps=self.eps)
        if self.unbiased and x.numel() == x.shape[1]:
            raise InputError(
                f"x must hold more than one value a channel for an unbiased variance, got {tuple(x.shape)}"
            )
        values = x.to(torch.promote_types(self.source_mean.dtype, torch.float32))
        free = x.numel() // x.shape[1] - int(self.unbiased)
        with torch.no_grad():
            batch_mean = values.mean([axis for axis in range(x.ndim) if axis != 1])
            batch_var = squares(values, batch_mean).sum(0) / free
            mean = (1 - self.alpha) * self.source_mean + self.alpha * batch_mean
            var = (1 - self.alpha) * self.source_var + self.alpha * batch_var
        if self.follow:
            self.source_mean, self.source_var = mean, var
        learnt = any(tensor is not None and tensor.requires_grad for tensor in (values, self.weight, self.bias))
        if self.detach or not (learnt and torch.is_grad_enabled()):
            return self._normalise(values, mean, var).to(x.dtype)
        weight = torch.ones_like(mean) if self.weight is None else self.weight
        bias = torch.zeros_like(mean) if self.bias is None else self.bias
        apply: Callable[..., Tensor] = _ByMixture.apply
        return apply(values, weight, bias, mean, var, batch_mean, self.alpha, free, self.eps).to(x.dtype)


class _ByMixture(torch.autograd.Function):
    """Normalisation by given statistics, of which the batch has the share alpha, with the gradient through that share.

    Autograd's own gradient of the same formula takes three times as long.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        batch_mean: Tensor,
        alpha: float,
        free: int,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, batch_mean)
        ctx.settings = alpha, free, eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, batch_mean = ctx.saved_tensors
        alpha, free, eps = ctx.settings
        scale = (var + eps).rsqrt()
        by_weight = torch.ops.aten.native_batch_norm_backward
        grad_x, grad_weight, grad_bias = by_weight(
            grad, x, weight, mean, var, mean, scale, False, eps, (True, True, True)
        )
        # d mean / d x = alpha / n, d var / d x = 2 alpha (x - batch mean) / free
        by_channel = (-1, *(1,) * (x.ndim - 2))
        slope = -alpha / free * grad_weight * weight * scale.square()
        level = -alpha * x.shape[1] / x.numel() * grad_bias * weight * scale - slope * batch_mean
        grad_x.addcmul_(x, slope.view(by_channel)).add_(level.view(by_channel))
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None


def squares(x: Float[Tensor, "n c *rest"], mean: Tensor) -> Float[Tensor, "n c"]:
    """Sums over the map of (x - mean)^2, with a mean a channel, (c,) or (n, c)."""
    centred = x - mean.view(*mean.shape, *(1,) * (x.ndim - 2))
    # a norm takes half the time of squares and their sum on the CPU, torch.var_mean several times as long
    return torch.linalg.vector_norm(centred.reshape(*x.shape[:2], -1), dim=2).square()


@contextmanager
def source_statistics(model: nn.Module) -> Iterator[None]:
    """Every `nn.BatchNorm1d` of `model` in eval mode in this block: one row alone has no statistics."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d) and m.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
