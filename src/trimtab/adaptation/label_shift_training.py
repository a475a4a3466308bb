"""The training that the label shift adapter needs: a network from a class mix to a change of the last layer.

Park, Yang, Choo, Yun, "Label Shift Adapter for Test-Time Adaptation under Covariate and Label Shifts", ICCV 2023
(arXiv:2308.08810).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.adaptation.changed_linear import Change, changed
from trimtab.core import progress
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions

_BALANCED = 0.01  # squared coefficient of variation of the shares
_AMISS = 0.1  # relative error: half precision stays well below, a scaled or normalised head does not
_TINY = 1e-12


def source_mix(labels: Int[Tensor, " n"], classes: int) -> Float[Tensor, " c"]:
    """The share of each class, in float64; refused where a class is missing or all are as frequent."""
    counts = torch.bincount(labels, minlength=classes).double()
    if bool((counts == 0).any()):
        raise InputError(f"loader must hold every class, class {int(counts.argmin())} has no sample")
    prior = counts / counts.sum()
    if classes * float(prior @ prior) - 1 < _BALANCED:
        raise InputError(
            "loader must hold some classes more often than others: the degree of imbalance of a balanced source "
            "says nothing; use PriorShiftCorrection"
        )
    return prior


def train(
    head: nn.Linear,
    source: Predictions,
    prior: Float[Tensor, " c"],
    *,
    hidden: int,
    tau: float,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> dict[str, Tensor]:
    """The network, trained with Adam on the features, labels and class mix of the source; the head stays as it is.

    Each step draws a batch of the source and one of three class mixes, the source's, the uniform and the inverse, and
    asks the head, changed to suit that mix, to be right where it is met.
    """
    weight = head.weight.detach().float()
    bias = None if head.bias is None else head.bias.detach().float()
    x, y = source.needed("features").to(weight), source.needed("labels").to(weight.device)
    said = source.logits.to(weight)
    if x.shape[1] != head.in_features or (F.linear(x, weight, bias) - said).norm() > _AMISS * said.norm():
        raise InputError("model must return what its head makes of the features, weight @ features + bias, it does not")
    generator = torch.Generator().manual_seed(seed)
    network = _fresh(hidden, head, generator)
    adam = torch.optim.Adam(network.values(), lr=lr)
    mixes = (prior, torch.full_like(prior, 1 / len(prior)), inverse_mix(prior))
    for _ in progress.track(range(steps), "label shift adapter"):
        rows = torch.randint(len(x), (batch,), generator=generator)
        mix = mixes[int(torch.randint(3, (), generator=generator))]
        with torch.enable_grad():
            logits = changed(x[rows], weight, bias, trained_change(network, mix, prior))
            loss = logit_adjusted_loss(logits, y[rows], prior, mix, tau)
        adam.zero_grad()
        torch.autograd.backward(loss)
        adam.step()
    return network


def trained_change(network: Mapping[str, Tensor], mix: Float[Tensor, " c"], prior: Float[Tensor, " c"]) -> Change:
    """What the network says of a class mix, of which it is told the degree of imbalance alone."""
    degree = imbalance_degree(mix, prior).to(network["hidden.bias"])
    units = F.relu(network["hidden.weight"] * degree + network["hidden.bias"])
    outputs = network["output.weight"] @ units + network["output.bias"]
    c = len(prior)
    d = (len(outputs) - c) // (c + 2)
    weight, bias, scale, shift = outputs.split([c * d, c, d, d])
    return Change(weight.view(c, d), bias, scale, shift)


def imbalance_degree(mix: Float[Tensor, " c"], prior: Float[Tensor, " c"]) -> Float[Tensor, ""]:
    """How far `mix` leans to the source's frequent classes: <mix, prior> / <prior, prior>, 1 for the prior itself."""
    return (mix @ prior) / (prior @ prior)


def inverse_mix(prior: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    """The most frequent class's share goes to the rarest, the second's to the second rarest, and so on."""
    order = prior.argsort(stable=True)
    return torch.empty_like(prior).scatter_(0, order, prior[order.flip(0)])


def logit_adjusted_loss(
    logits: Float[Tensor, "n c"],
    labels: Int[Tensor, " n"],
    prior: Float[Tensor, " c"],
    mix: Float[Tensor, " c"],
    tau: float = 1.0,
) -> Float[Tensor, ""]:
    """Cross entropy on samples of the mix `prior` of logits that shall be right where the mix is `mix`."""
    return F.cross_entropy(logits + tau * log_ratio(prior, mix).to(logits), labels)


def log_ratio(above: Float[Tensor, " c"], below: Float[Tensor, " c"]) -> Float[Tensor, " c"]:
    """log above - log below, of shares that may be nought."""
    return above.clamp_min(_TINY).log() - below.clamp_min(_TINY).log()


def _fresh(hidden: int, head: nn.Linear, generator: torch.Generator) -> dict[str, Tensor]:
    """A network whose change is none: its last layer is zero, its first as `nn.Linear` begins."""
    c, d = head.out_features, head.in_features
    outputs = c * d + c + 2 * d
    network = {
        "hidden.weight": 2 * torch.rand(hidden, generator=generator) - 1,
        "hidden.bias": 2 * torch.rand(hidden, generator=generator) - 1,
        "output.weight": torch.zeros(outputs, hidden),
        "output.bias": torch.zeros(outputs),
    }
    return {name: tensor.to(head.weight.device).requires_grad_() for name, tensor in network.items()}
