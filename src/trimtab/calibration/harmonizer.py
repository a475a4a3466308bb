"""Small networks from features to classes, trained by a loss of the caller's: how they are built, trained and applied.

The harmonizer of `trimtab.calibration.ParetoSelfSupervision`. Training follows microsoft/POLAR: AdamW with its own
weight decay of 0.01, batches without a vote passed over, and the last weights kept, not the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.calibration import scalarisers
from trimtab.core import progress
from trimtab.core.checks import InputError
from trimtab.core.modules import evaluating

Base = Literal["lr", "mlp"] | Callable[[], nn.Module]

_BATCH = 4096  # rows of a prediction at a time


def build(base: Base, x: Float[Tensor, "n d"], classes: int, hidden: int, seed: int) -> nn.Module:
    """A fresh network for features like `x`, its random weights drawn from the seed.

    Args:
        base: ``"lr"``, ``"mlp"`` with `hidden` units, or what returns a module of the caller's own.

    Raises:
        InputError: the caller's is no module, has nothing to train, or gives logits of another shape.
    """
    outs = classes if classes > 2 else 1
    with _seeded(seed, x.device):
        if not isinstance(base, str):
            network = base()
        elif base == "lr":
            network = nn.Linear(x.shape[1], outs, dtype=x.dtype)
        else:
            layers = nn.Linear(x.shape[1], hidden, dtype=x.dtype), nn.Linear(hidden, outs, dtype=x.dtype)
            network = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    if not isinstance(network, nn.Module) or not any(p.requires_grad for p in network.parameters()):
        raise InputError(f"base must return a module with parameters to train, got {type(network).__name__}")
    network.to(x.device)
    with evaluating(network):
        shape = tuple(network(x[:1]).shape)
    if shape not in ((1, classes), (1, outs)):
        raise InputError(f"base must give logits of shape (n, {classes}), got {shape} for one sample")
    return network


def train(
    network: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "n d"],
    labels: Int[Tensor, "n m"],
    validation: tuple[Tensor, Tensor] | None,
    *,
    lr: float,
    epochs: int,
    patience: int,
    batch_size: int,
    seed: int,
) -> float:
    """Train in place, by a loss of logits and labels.

    Args:
        validation: features and gold labels; training stops after `patience` epochs without a lower log loss on them.

    Returns:
        The log loss on the validation set at the end, nan without one.

    Raises:
        InputError: training diverged.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    voted = (labels >= 0).any(1)
    best, waited, current = math.inf, 0, math.nan
    for _ in progress.track(range(epochs), "harmonizer"):
        network.train()
        dropout = int(torch.randint(2**31, (), generator=generator))
        with torch.enable_grad(), _seeded(dropout, x.device):
            for rows in torch.randperm(len(x), generator=generator).to(x.device).split(batch_size):
                if bool(voted[rows].any()):
                    optimizer.zero_grad()
                    loss(network(x[rows]), labels[rows]).backward()
                    optimizer.step()
        if validation is not None:
            current = float(F.nll_loss(log_probs(network, validation[0]).double(), validation[1]))
            waited = 0 if current < best else waited + 1
            best = min(best, current)
            if waited >= patience:
                break
    if not all(bool(p.isfinite().all()) for p in network.parameters()):
        raise InputError(f"training diverged at lr {lr:g}: standardise X, or lower lr")
    network.eval()
    return current


def log_probs(network: nn.Module, x: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
    """Log-probabilities of the classes, a block of rows at a time, without gradients."""
    with evaluating(network):
        return scalarisers.log_probs(torch.cat([network(part) for part in x.split(_BATCH)]))


def layers(
    parameters: Float[Tensor, " p"], sizes: Int[Tensor, " layers"], x: Float[Tensor, "n d"]
) -> Float[Tensor, "n k"]:
    """The logits of ``"lr"`` or ``"mlp"``, from all parameters in one vector and the sizes of input and layers."""
    inputs, outputs = sizes[:-1].tolist(), sizes[1:].tolist()
    for layer, (a, b) in enumerate(zip(inputs, outputs)):
        weight, bias, parameters = parameters.split([a * b, b, len(parameters) - a * b - b])
        x = F.linear(x.relu() if layer else x, weight.view(b, a), bias)
    return x


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What draws from the global random state starts from `seed`, and leaves that state as it was."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
