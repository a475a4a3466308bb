"""SWAG-diagonal: a Gaussian posterior of a model's weights, from where training comes by once it has converged.

Maddox, Garipov, Izmailov, Vetrov, Wilson, "A Simple Baseline for Bayesian Uncertainty in Deep Learning", NeurIPS 2019
(arXiv:1902.02476), without its low-rank part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.adaptation import state
from trimtab.adaptation.prepared import Prepared
from trimtab.core import checks, modules, progress
from trimtab.core.checks import InputError
from trimtab.core.precision import HALF
from trimtab.core.predictions import logits_of, take_apart

_ANNEALING = 3
_UNFINISHED = "the fine-tuning of a posterior"


class SwagDiagonal(nn.Module):
    """Running mean and variance of a model's parameters, over snapshots of its training.

    Args:
        model: gives the names and shapes; its values do not count as a snapshot.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> swag = SwagDiagonal(model)
        >>> for value in (1.0, 2.0, 3.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     swag.update(model)
        >>> mean, variance = swag.finalize()
        >>> float(mean["weight"]), round(float(variance["weight"]), 4)
        (2.0, 0.6667)

    Reference:
        Maddox et al., NeurIPS 2019, https://arxiv.org/abs/1902.02476
    """

    count: Tensor

    def __init__(self, model: nn.Module):
        super().__init__()
        zeros = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
        self.means = state.Tensors(zeros)
        self.spreads = state.Tensors(zeros)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def update(self, model: nn.Module) -> None:
        """Take note of where the parameters of `model` are."""
        live = dict(model.named_parameters())
        shapes = {name: tuple(mean.shape) for name, mean in self.means.named().items()}
        if {name: tuple(parameter.shape) for name, parameter in live.items()} != shapes:
            raise InputError("model must have the parameters of the model that the estimator was made for")
        self.count += 1
        spreads = self.spreads.named()
        for name, mean in self.means.named().items():
            gap = live[name].detach().to(mean) - mean
            mean += gap / self.count
            spreads[name] += gap.square() * (1 - 1 / self.count)

    def finalize(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Mean and (biased) variance of every parameter by name, in float64.

        Raises:
            InputError: there was no snapshot.
        """
        if int(self.count) == 0:
            raise InputError("SwagDiagonal must be given at least one snapshot, by update")
        mean = {name: value.clone() for name, value in self.means.named().items()}
        return mean, {name: value / self.count for name, value in self.spreads.named().items()}


def fit_posterior(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int,
    lr: float,
    swa_lr: float,
    momentum: float,
    weight_decay: float,
    seed: int,
    checkpoint: str | Path | None,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Fine-tune a copy of `model`, in eval mode, and follow it with `SwagDiagonal`.

    The first epoch runs at `lr` and leaves no snapshot; each later one leaves one at its end, while the learning rate
    goes from `lr` to `swa_lr` within three. With a `checkpoint`, a file, each epoch's end is kept there, and a run that
    was stopped goes on from it.

    Returns:
        The copy at the mean of the posterior, with batch statistics of its own, and the variance by name.
    """
    device = modules.device_of(model)
    network = deepcopy(model).eval().requires_grad_(True)
    if any(parameter.dtype in HALF for parameter in network.parameters()):
        raise InputError("model must hold its weights in float32 to be fine-tuned: small updates would be lost")
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=momentum, weight_decay=weight_decay)
    swag = SwagDiagonal(network)
    settings = torch.tensor([epochs, lr, swa_lr, momentum, weight_decay, seed], dtype=torch.float64)
    done = 0
    if checkpoint is not None and Path(checkpoint).exists():
        done = _resume(Prepared.load(checkpoint).check(_UNFINISHED, model), settings, network, optimizer, swag)
    for epoch in range(done, epochs):
        optimizer.param_groups[0]["lr"] = lr + (swa_lr - lr) * min(max(epoch - 1, 0) / _ANNEALING, 1)
        with _seeded(seed + epoch, device):
            _train(network, optimizer, progress.track(loader, f"epoch {epoch + 1} of {epochs}"), device)
        if epoch > 0:
            swag.update(network)
        if checkpoint is not None:
            kept = {"settings": settings, "epochs": torch.tensor(epoch + 1), **_tensors(network, optimizer, swag)}
            Prepared(_UNFINISHED, kept, model).save(checkpoint)
    mean, variance = swag.finalize()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(mean[name])
    with _seeded(seed + epochs, device):
        _renew_statistics(network, progress.track(loader, "batch statistics"), device)
    return network, variance


def _train(network: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Any], device: torch.device) -> None:
    seen = 0
    for batch in batches:
        x, labels = take_apart(batch, device)
        if labels is None:
            raise InputError("loader must yield labels with every batch, to fine-tune the model")
        with torch.enable_grad():
            logits = logits_of(network, x)
            loss = F.cross_entropy(logits, checks.labels(labels, len(logits), logits.shape[1]))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
        if not bool(loss.isfinite()):
            raise InputError(f"lr must be smaller: the loss of batch {seen} is {loss.item()}")
        optimizer.step()
        seen += 1
    if seen == 0:
        raise InputError("loader must yield at least one batch, in every epoch anew, it yielded none")


def _renew_statistics(network: nn.Module, batches: Iterable[Any], device: torch.device) -> None:
    """Let every batch normalisation layer keep the plain mean of its statistics over the batches."""
    layers = [m for m in network.modules() if isinstance(m, modules.BATCH_NORMS) and m.running_mean is not None]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    with torch.no_grad():
        for batch in batches:
            logits_of(network, take_apart(batch, device)[0])
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum
        layer.eval()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """A loader without a generator of its own shuffles by `seed`; the global random state is kept."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _tensors(network: nn.Module, optimizer: torch.optim.Optimizer, swag: SwagDiagonal) -> dict[str, Tensor]:
    parts = {
        "network": network.state_dict(),
        "optimizer": state.pack(optimizer, dict(network.named_parameters())),
        "swag": swag.state_dict(),
    }
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _resume(
    kept: Prepared, settings: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer, swag: SwagDiagonal
) -> int:
    """Put everything where the checkpoint left it; returns how many epochs that were."""
    if not torch.equal(kept["settings"], settings):
        raise InputError("checkpoint must come from a run with the same settings, it does not; give another file")

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in kept.items() if name.startswith(prefix)}

    network.load_state_dict(part("network."))
    state.unpack(optimizer, dict(network.named_parameters()), part("optimizer."))
    swag.load_state_dict(part("swag."))
    return int(kept["epochs"])
