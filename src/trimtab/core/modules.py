"""Choosing parameters, finding and swapping layers, watching what flows through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from trimtab.core.checks import InputError


class BatchNormStandIn(nn.Module):
    """A layer in the place of a batch normalisation layer, whose weight and bias (the same parameters) it holds.

    `NORMS` counts it among the normalisation layers, so adapters let it move as they do the layer that it stands for.
    What a subclass remembers of a batch, it stores by assigning a new tensor to a buffer, never in place. The dropout
    and the activation that timm's layers hold follow the normalisation here too.

    Args:
        layer: the layer whose statistics, weight, bias and eps are taken over.

    Raises:
        InputError: the layer keeps no running statistics, or does more than torch's and timm's layers do.
    """

    source_mean: Tensor
    source_var: Tensor

    def __init__(self, layer: _BatchNorm):
        super().__init__()
        if layer.running_mean is None or layer.running_var is None:
            raise InputError(f"model must keep running statistics in its batch normalisation layers, {layer} does not")
        parts = dict(layer.named_children())
        if set(parts) != {"drop", "act"} and type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            raise InputError(
                f"model must have batch normalisation layers of torch or timm, {type(layer).__name__} has a forward "
                "pass of its own, which would be lost"
            )
        self.drop = parts.get("drop", nn.Identity())
        self.act = parts.get("act", nn.Identity())
        self.register_buffer("source_mean", layer.running_mean)
        self.register_buffer("source_var", layer.running_var)
        self.weight = layer.weight
        self.bias = layer.bias
        self.eps = layer.eps

    def forward(self, x: Tensor) -> Tensor:
        """What the layer would give, were its statistics those of the subclass."""
        out: Tensor = self.act(self.drop(self._normalised(x)))
        return out

    def _normalised(self, x: Tensor) -> Tensor:
        """`x` by the statistics of the subclass, which calls `_normalise` with them."""
        raise NotImplementedError

    def _normalise(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """weight (x - mean) / sqrt(var + eps) + bias, with a mean and a variance a channel, (c,) or (n, c)."""
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        shape = (*mean.shape, *(1,) * (x.ndim - 2))
        return (x * scale.view(shape)).add_(shift.view(shape))


BATCH_NORMS = (_BatchNorm,)
NORMS = (
    _BatchNorm,
    BatchNormStandIn,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.RMSNorm,
)


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of every normalisation layer, by their names in `model`.

    Raises:
        InputError: the model has no normalisation layer with affine parameters.
    """
    chosen = {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in model.named_modules()
        if isinstance(module, NORMS)
        for name, parameter in module.named_parameters(recurse=False)
    }
    if not chosen:
        raise InputError("model must have a normalisation layer with affine parameters, found none")
    return chosen


def all_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of `model`, by name."""
    return dict(model.named_parameters())


def replace(model: nn.Module, match: type | tuple[type, ...], build: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Swap, in place, every submodule of a type in `match` for ``build(submodule)``; returns the model.

    The model itself is swapped too when it matches. A module that appears in several places stays shared.
    """
    if isinstance(model, match):
        return build(model)
    built: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children shows a shared child only once
            if child is not None and isinstance(child, match):
                if child not in built:
                    built[child] = build(child)
                setattr(parent, name, built[child])
    return model


def last_linear(model: nn.Module) -> nn.Linear:
    """The last `nn.Linear` in the order of registration: the classifier head of most networks."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise InputError("model must have an nn.Linear layer to take features from, found none; name a module instead")
    return linears[-1]


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The submodule called `name`, or a message that lists near names."""
    modules = dict(model.named_modules())
    if name not in modules or not name:
        known = ", ".join(n for n in list(modules)[-8:] if n)
        raise InputError(f"model has no module named {name!r}; the last ones are: {known}")
    return modules[name]


def head(model: nn.Module, name: str | None = None) -> nn.Linear:
    """The linear layer that turns features into logits: the one called `name`, or the last in `model`."""
    if name is None:
        return last_linear(model)
    found = submodule(model, name)
    if not isinstance(found, nn.Linear):
        raise InputError(f"model must have an nn.Linear named {name!r} as its head, got {type(found).__name__}")
    return found


@contextmanager
def watch_input(module: nn.Module, *, detach: bool = True) -> Iterator[list[Tensor]]:
    """A list to which each forward pass of `module` in this block appends its first input, detached unless told not."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach() if detach else args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def remembered(model: nn.Module) -> list[tuple[BatchNormStandIn, dict[str, Tensor]]]:
    """What the layers in the place of batch normalisation remember now, for `put_back`."""
    return [(m, dict(m.named_buffers())) for m in model.modules() if isinstance(m, BatchNormStandIn)]


def put_back(before: list[tuple[BatchNormStandIn, dict[str, Tensor]]]) -> None:
    """Let layers remember what they had `remembered`."""
    for layer, buffers in before:
        for name, value in buffers.items():
            setattr(layer, name, value)


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Whatever the layers of `model` in the place of batch normalisation remember of this block is forgotten."""
    before = remembered(model)
    try:
        yield
    finally:
        put_back(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode without gradients; afterwards it is as it was, every submodule in its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), held(model):
            yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def bare(model: nn.Module) -> nn.Module:
    """What a `DistributedDataParallel` wraps; any other model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model
