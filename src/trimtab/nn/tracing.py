"""A network's operations, traced by `torch.fx`, with their layers and the names that its author gave them."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from trimtab.core.checks import InputError

SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
"""How a traced model adds two branches."""


def traced(model: nn.Module) -> list[tuple[fx.Node, nn.Module | None]]:
    """The model's operations, in the order that it carries them out, from its input on; with each layer's its layer.

    Raises:
        InputError: it cannot be traced, as one that asks for more than one input.
    """
    within = nn.Sequential(model)  # the tracer looks into the module that it is given, even if that is one layer
    try:
        nodes = fx.Tracer().trace(within).nodes
    except Exception as error:
        raise InputError(f"model cannot be traced by torch.fx with one input: {error}") from error
    return [(node, within.get_submodule(str(node.target)) if node.op == "call_module" else None) for node in nodes]


def place_of(node: fx.Node, layer: nn.Module | None) -> str:
    """An operation's name and kind, or its kind and where it is called: ``body.0 (Linear)``, ``add in body.1``."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    where = str(node.target) if layer is not None else (stack or ["0"])[-1]
    where = where.removeprefix("0").removeprefix(".") or "the model itself"
    if layer is not None:
        return f"{where} ({type(layer).__name__})"
    return f"{getattr(node.target, '__name__', str(node.target).removeprefix('0.'))} in {where}"
