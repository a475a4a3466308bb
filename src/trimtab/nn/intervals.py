"""Interval bounds: what a network can give for every input of a box, for one to two more passes.

A box around an input, with a centre and a radius, is carried through the network beside the input itself. An affine
layer W moves the centre as it does any input, and the radius by |W|; a ReLU clips both ends. What comes out contains
every output that an input of the box can have (up to rounding). Reach for it to certify a classifier or to train one
that can be certified (`losses.CertifiedIBP`); bounds of a network that was not trained for them are too wide to say
anything, they grow from layer to layer.

Gowal et al. 2018, "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models", arXiv
1810.12715. Batch normalisation follows Shi et al. 2021, arXiv 2103.17268: in training the statistics are those of the
inputs themselves, not of the bounds, and gradients flow through them. Centre and radius are kept where the authors'
code keeps the two ends: a radius of 1e-6 about 1 has lost 5 % of its length as the difference of two float32 numbers.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.nn.tracing import SUMS, place_of, traced


class Interval(NamedTuple):
    """Inputs, and the box about each: ``centre - radius`` to ``centre + radius`` in every coordinate."""

    clean: Float[Tensor, "n ..."]
    centre: Float[Tensor, "n ..."]
    radius: Float[Tensor, "n ..."]

    @property
    def lower(self) -> Float[Tensor, "n ..."]:
        """The boxes' lower ends."""
        return self.centre - self.radius

    @property
    def upper(self) -> Float[Tensor, "n ..."]:
        """The boxes' upper ends."""
        return self.centre + self.radius


class Margins(NamedTuple):
    """What a classifier gives for inputs and for the boxes about them.

    Args:
        logits: (n, c) of the inputs themselves.
        lower: (n, c) lower bounds of "logit of the label minus logit of class j", over the box; 0 at the label. The
            input is certified if none of them is negative.
        before_relu: the bounds that each ReLU is given, in the order of the network.
    """

    logits: Float[Tensor, "n c"]
    lower: Float[Tensor, "n c"]
    before_relu: list[Interval]


class IntervalBounds(nn.Module):
    """A network that carries boxes.

    The model is traced once by `torch.fx`; its layers stay the model's own, so it trains, moves and changes between
    train and eval mode as they do. In training, the running statistics of batch normalisation see the inputs once, as
    in an ordinary forward pass. There are rules for linear and convolution layers, batch normalisation, ReLU and other
    monotone activations, pooling, flattening and reshaping, dropout in eval mode, and sums of two branches.

    Args:
        model: a classifier that ends in an `nn.Linear`; control flow that depends on the input cannot be traced.

    Raises:
        InputError: the model cannot be traced, ends in something else, or holds an operation without a rule.

    Example:
        >>> bounds = IntervalBounds(nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)))
        >>> for layer in (bounds.model[0], bounds.model[2]):
        ...     _ = nn.init.eye_(layer.weight)
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> out = bounds(Interval(x, x, torch.full_like(x, 0.1)))
        >>> out.lower, out.upper
        (tensor([[0.9000, 0.0000]], grad_fn=<SubBackward0>), tensor([[1.1000, 0.1000]], grad_fn=<AddBackward0>))
        >>> bounds.margins(Interval(x, x, torch.full_like(x, 0.1)), torch.tensor([0])).lower
        tensor([[0.0000, 0.8000]], grad_fn=<SubBackward0>)

    Reference:
        Gowal et al. 2018, https://arxiv.org/abs/1810.12715
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        (entry, _), *nodes = traced(model)
        self.steps = [_step(node, layer) for node, layer in nodes if node.op != "output"]
        self.entry = entry.name
        if not self.steps or not isinstance(self.steps[-1].layer, nn.Linear):
            raise InputError("model must end in an nn.Linear layer, whose outputs are the logits")

    def forward(self, box: Interval) -> Interval:
        """The logits of the inputs, and bounds of the logits over their boxes.

        Raises:
            InputError: the parts of the box differ in shape, or do not fit the model, or a radius is negative or NaN.
        """
        last, _ = self._before_head(box)
        return _linear(self.head, last)

    def margins(self, box: Interval, labels: Int[Tensor, " n"]) -> Margins:
        """The logits of the inputs, and lower bounds of the margins by which the labels win over their boxes.

        The difference of two logits is taken within the last layer, where it is bounded more tightly than as the
        difference of two bounds.

        Raises:
            InputError: as in `forward`, or labels are wrong.
        """
        head = self.head
        labels = checks.labels(labels, len(box.clean), head.out_features)
        last, before_relu = self._before_head(box)
        logits, centre = F.linear(torch.cat((last.clean, last.centre)), head.weight, head.bias).chunk(2)
        ahead = head.weight[labels][:, None] - head.weight  # (n, c, features)
        spread = torch.einsum("ncd,nd->nc", ahead.abs(), last.radius)
        return Margins(logits, centre.gather(1, labels[:, None]) - centre - spread, before_relu)

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        head = self.steps[-1].layer
        assert isinstance(head, nn.Linear)
        return head

    def _before_head(self, box: Interval) -> tuple[Interval, list[Interval]]:
        """What the last layer is given, and what each ReLU is given."""
        if not box.clean.shape == box.centre.shape == box.radius.shape:
            raise InputError(f"box must have parts of one shape, got {', '.join(str(tuple(x.shape)) for x in box)}")
        checks.within(box.radius, "box.radius", 0.0, torch.inf)
        values: dict[str, Any] = {self.entry: box}
        before_relu: list[Interval] = []
        for step in self.steps[:-1]:
            args, kwargs = step.given(values)
            if step.rule is _relu:
                before_relu.append(args[0])
            values[step.name] = step.rule(step.layer, *args, **kwargs)
        (last,), _ = self.steps[-1].given(values)
        return last, before_relu


@dataclass(frozen=True)
class _From:
    """The value of an earlier step."""

    name: str


@dataclass(frozen=True)
class _Step:
    """One operation: ``rule(layer, *args, **kwargs)``; `place` is what the user calls it."""

    name: str
    place: str
    rule: Callable[..., Any]
    layer: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def given(self, values: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Its arguments, with the values of earlier steps in their places; an input fits the layer."""
        args, kwargs = _filled(self.args, values), {name: _filled(arg, values) for name, arg in self.kwargs.items()}
        axis, width, axes = _taken(self.layer)
        if width is not None:
            shape = args[0].clean.shape
            if len(shape) <= axis or shape[axis] != width or axes not in (None, len(shape)):
                wanted = f"{axes} axes and " if axes else ""
                raise InputError(
                    f"inputs must fit the model: {self.place} takes {wanted}a size of {width} in axis {axis}, "
                    f"its input is {tuple(shape)}"
                )
        return args, kwargs


def _taken(layer: nn.Module | None) -> tuple[int, int | None, int | None]:
    """The axis of a layer's input that must be of a width, the width, and how many axes there must be."""
    match layer:
        case nn.Linear():
            return -1, layer.in_features, None
        case _ConvNd():
            return 1, layer.in_channels, len(layer.kernel_size) + 2
        case _BatchNorm():
            return 1, layer.num_features, None
    return 0, None, None


def _step(node: fx.Node, layer: nn.Module | None) -> _Step:
    if layer is not None:
        rule = next((rule for kinds, rule in _LAYERS if isinstance(layer, kinds)), None)
    else:
        rule = _FUNCTIONS.get(node.target)
    place = place_of(node, layer)
    if rule is None:
        raise InputError(f"model must hold operations with an interval rule only, {place} has none")
    kwargs = {name: _kept(arg) for name, arg in node.kwargs.items()}
    operands = (kwargs.pop(name) for name in ("input", "other") if name in kwargs)
    args = (*map(_kept, node.args), *operands)
    try:
        inspect.signature(rule).bind(layer, *args, **kwargs)
    except TypeError as error:
        raise InputError(f"model must call {place} with arguments that the interval rule has: {error}") from error
    return _Step(node.name, place, rule, layer, args, kwargs)


def _kept(arg: Any) -> Any:
    """An operation's argument, with earlier operations by name."""
    if isinstance(arg, fx.Node):
        return _From(arg.name)
    return tuple(map(_kept, arg)) if isinstance(arg, (tuple, list)) else arg


def _filled(arg: Any, values: dict[str, Any]) -> Any:
    """An operation's argument, with the values of earlier steps in their places."""
    if isinstance(arg, _From):
        return values[arg.name]
    return tuple(_filled(a, values) for a in arg) if isinstance(arg, (tuple, list)) else arg


def _affine(box: Interval, layer: Callable[..., Tensor], weight: Tensor, bias: Tensor | None) -> Interval:
    """Through ``layer(x, weight, bias)``, which is linear in x and weight."""
    clean, centre = layer(torch.cat((box.clean, box.centre)), weight, bias).chunk(2)
    return Interval(clean, centre, layer(box.radius, weight.abs(), None))


def _linear(layer: nn.Linear, box: Interval) -> Interval:
    return _affine(box, F.linear, layer.weight, layer.bias)


def _convolution(layer: _ConvNd, box: Interval) -> Interval:
    return _affine(box, layer._conv_forward, layer.weight, layer.bias)


def _batch_norm(layer: _BatchNorm, box: Interval) -> Interval:
    if layer.training or layer.running_mean is None or layer.running_var is None:
        if box.clean.numel() == box.clean.shape[1]:
            raise InputError("batch normalisation in training must see more than one value a channel, got one")
        axes = [axis for axis in range(box.clean.ndim) if axis != 1]
        var, mean = torch.var_mean(box.clean, axes, correction=0)
    else:
        mean, var = layer.running_mean, layer.running_var
    scale = (var + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight
    shift = -mean * scale if layer.bias is None else layer.bias - mean * scale
    shape = (-1, *(1,) * (box.clean.ndim - 2))
    scale, shift = scale.view(shape), shift.view(shape)
    return Interval(layer(box.clean), torch.addcmul(shift, box.centre, scale), box.radius * scale.abs())


def _relu(layer: nn.Module | None, box: Interval, inplace: bool = False) -> Interval:
    """The radius stays where the box is above zero, and is half the upper end where it is cut."""
    top = (box.centre + box.radius).relu()
    radius = torch.minimum(top, 2 * box.radius) / 2
    return Interval(box.clean.relu(), top - radius, radius)


def _dropout(layer: nn.Module, box: Interval) -> Interval:
    if layer.training:
        raise InputError(f"model must not drop units at random while it is bounded, found {layer} in training")
    return box


def _sum(layer: None, left: Any, right: Any) -> Interval:
    if not (isinstance(left, Interval) and isinstance(right, Interval)):
        raise InputError("model must add two branches of the network, found a sum with something else")
    return Interval(*(a + b for a, b in zip(left, right)))


def _attribute(layer: None, box: Interval, name: str) -> Any:
    if name != "shape":
        raise InputError(f"model must read no attribute of an activation but its shape, found {name}")
    return box.clean.shape


def _size(layer: None, box: Interval, dim: int | None = None) -> Any:
    return box.clean.size(dim)


def _each(function: Callable[..., Tensor]) -> Callable[..., Interval]:
    """Through a linear function without negative weights: a mean, another shape."""

    def rule(layer: None, box: Interval, *args: Any, **kwargs: Any) -> Interval:
        return Interval(*(function(part, *args, **kwargs) for part in box))

    return rule


def _ends(function: Callable[..., Tensor]) -> Callable[..., Interval]:
    """Through a function that never falls where an input rises."""

    def rule(layer: None, box: Interval, *args: Any, **kwargs: Any) -> Interval:
        parts = (box.clean, box.centre - box.radius, box.centre + box.radius)
        clean, lower, upper = (function(part, *args, **kwargs) for part in parts)
        return Interval(clean, (lower + upper) / 2, (upper - lower) / 2)

    return rule


def _item(layer: None, of: Any, index: Any) -> Any:
    return Interval(*(part[index] for part in of)) if isinstance(of, Interval) else of[index]


_LAYERS: tuple[tuple[tuple[type[nn.Module], ...], Callable[..., Any]], ...] = (
    ((nn.Linear,), _linear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    ((_BatchNorm,), _batch_norm),
    ((nn.ReLU,), _relu),
    ((nn.Dropout, nn.Dropout1d, nn.Dropout2d), _dropout),
    (
        (nn.Identity, nn.Flatten, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
        lambda layer, box: _each(layer)(None, box),
    ),
    ((nn.MaxPool1d, nn.MaxPool2d, nn.Sigmoid, nn.Tanh, nn.Softplus), lambda layer, box: _ends(layer)(None, box)),
)
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(SUMS, _sum),
    **dict.fromkeys((torch.relu, F.relu, "relu", "relu_"), _relu),
    **{name: _each(getattr(Tensor, name)) for name in ("flatten", "view", "reshape", "mean")},
    **{function: _each(function) for function in (torch.flatten, torch.mean, F.avg_pool2d, F.adaptive_avg_pool2d)},
    **{function: _ends(function) for function in (F.max_pool2d, torch.sigmoid, torch.tanh, F.softplus)},
    operator.getitem: _item,
    getattr: _attribute,
    "size": _size,
}
