"""A linear layer with a change on top: what a method writes from batch to batch, and no optimizer or reset reaches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.core.checks import InputError


class Change(NamedTuple):
    """What is added to a layer's weight and bias, and the scale (less 1) and shift of its input; numbers serve too."""

    weight: Float[Tensor, "*cd"]
    bias: Float[Tensor, "*c"]
    scale: Float[Tensor, "*d"]
    shift: Float[Tensor, "*d"]


class ChangedLinear(nn.Linear):
    """The given layer, the same parameters under the same names, with `change` applied where there is one.

    It is an `nn.Linear` still: what looks for the model's head, or for the features that it is given, finds them.

    Raises:
        InputError: the layer computes something else, or its weight is computed from other parameters.
    """

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        if not isinstance(layer.weight, nn.Parameter) or not _is_linear(layer):
            raise InputError(f"model must have a plain nn.Linear as its head, {type(layer).__name__} is none")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.change: Change | None = None

    def forward(self, features: Float[Tensor, "*n d"]) -> Float[Tensor, "*n c"]:
        """The outputs of the layer as it is changed."""
        if self.change is None:
            return F.linear(features, self.weight, self.bias)
        return changed(features, self.weight, self.bias, self.change)


def changed(
    features: Float[Tensor, "*n d"], weight: Float[Tensor, "c d"], bias: Float[Tensor, " c"] | None, change: Change
) -> Float[Tensor, "*n c"]:
    """(W + dW) ((1 + scale) h + shift) + b + db."""
    bias = change.bias if bias is None else bias + change.bias
    return F.linear((1 + change.scale) * features + change.shift, weight + change.weight, bias)


@torch.no_grad()
def _is_linear(layer: nn.Linear) -> bool:
    probe = torch.linspace(-1, 1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)[None]
    expected = F.linear(probe, layer.weight, layer.bias)
    return bool((layer(probe) - expected).norm() <= 1e-2 * expected.norm())
