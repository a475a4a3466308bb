"""What an adapter must remember, as flat tensors: no pickle, so that safetensors holds a stream's exact middle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.core.checks import InputError


class Tensors(nn.Module):
    """Named tensors that travel with a module: saved, restored, moved and cast with it, never trained.

    Args:
        tensors: copied; names may hold dots, as those of parameters do.

    Example:
        >>> kept = Tensors({"bn1.weight": torch.ones(2)})
        >>> kept.named()
        {'bn1.weight': tensor([1., 1.])}
        >>> list(kept.state_dict())
        ['bn1/weight']
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "/"), tensor.detach().clone())

    def named(self) -> dict[str, Tensor]:
        """The tensors by the names that they were given."""
        return dict(zip(self.names, self.buffers(recurse=False)))


def holding(model: nn.Module, tensors: Tensors) -> Callable[..., Any]:
    """`model` as it would be with `tensors` in place of its own of those names; the model stays as it is."""
    return lambda *args, **kwargs: functional_call(model, tensors.named(), args, kwargs)


def pack(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of `optimizer` as flat tensors: ``lr`` (one a group) and ``<parameter>.<entry>``."""
    packed = {"lr": torch.tensor([float(group["lr"]) for group in optimizer.param_groups], dtype=torch.float64)}
    for name, parameter in parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                packed[f"{name}.{entry}"] = value
            elif value is not None:
                raise InputError(
                    f"optimizer must keep its state in tensors to be saved, {entry} is {type(value).__name__}"
                )
    return packed


def unpack(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], packed: Mapping[str, Tensor]
) -> list[str]:
    """Put what `pack` took back into `optimizer`; returns the names that belong to none of `parameters`."""
    strangers = []
    optimizer.state.clear()
    for name, value in packed.items():
        parameter_name, _, entry = name.rpartition(".")
        if name == "lr":
            for group, lr in zip(optimizer.param_groups, value.tolist()):
                group["lr"] = lr
        elif parameter_name in parameters:
            parameter = parameters[parameter_name]
            # single numbers, such as Adam's step, live on the CPU whatever the parameter's device
            device = parameter.device if value.ndim else value.device
            optimizer.state[parameter][entry] = value.detach().to(device, copy=True)
        else:
            strangers.append(name)
    return strangers


def resize(module: nn.Module, saved: Mapping[str, Tensor], prefix: str) -> None:
    """Give every buffer of `module` itself the shape that it has in `saved`, and its values."""
    for name, buffer in module.named_buffers(recurse=False):
        if f"{prefix}{name}" in saved:
            setattr(module, name, saved[f"{prefix}{name}"].to(buffer.device, copy=True))
