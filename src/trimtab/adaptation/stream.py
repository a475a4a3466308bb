"""A stream through an adapter: step by step, or as `Predictions`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.adaptation.base import Adapter
from trimtab.core import modules, progress
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions, take_apart


class Step(NamedTuple):
    """One batch of a stream.

    Attributes:
        number: from 0.
        outputs: what was said about it before the update that followed, on the CPU: logits, or log-probabilities where
            the adapter gives probabilities, (n, c).
        labels: its classes (n,), on the CPU; None where the stream has none.
        seconds: what predicting and adapting took.
    """

    number: int
    outputs: Tensor
    labels: Tensor | None
    seconds: float


def steps(adapter: Adapter, loader: Iterable[Any], *, first: int = 0, description: str = "adapt") -> Iterator[Step]:
    """Let `adapter` predict and follow a stream, batch by batch; labels are kept beside it, never shown to it.

    Args:
        adapter: where it stands when the stream ends is where it is left.
        loader: batches in the order of the stream: inputs, (inputs, labels), or mappings, as in `Predictions.collect`.
        first: so many batches are passed over, for an adapter that has seen them.
        description: the name of the progress bar.

    Raises:
        InputError: a batch is refused by the adapter (its number is named), or labels come with some batches only.
    """
    if not isinstance(adapter, Adapter):
        raise InputError(f"adapter must be an Adapter, got {type(adapter).__name__}")
    device = modules.device_of(adapter.model)
    labelled: bool | None = None
    for number, batch in enumerate(islice(progress.track(loader, description), first, None), first):
        inputs, labels = take_apart(batch, device)
        if labelled is None:
            labelled = labels is not None
        if labelled != (labels is not None):
            raise InputError("loader must yield labels with every batch or with none")
        started = time.perf_counter()
        try:
            outputs = adapter(inputs) if adapter.outputs == "logits" else adapter.log_probs(inputs)
        except InputError as error:
            raise InputError(f"batch {number}: {error}") from error
        outputs = outputs.cpu()
        yield Step(number, outputs, None if labels is None else labels.cpu(), time.perf_counter() - started)


def run_stream(adapter: Adapter, loader: Iterable[Any], *, description: str = "adapt") -> Predictions:
    """All of `steps` as `Predictions`: what was said about each batch before the update that followed.

    Args:
        adapter: where it stands when the stream ends is where it is left.
        loader: batches in the order of the stream: inputs, (inputs, labels), or mappings, as in `Predictions.collect`.
        description: the name of the progress bar.

    Raises:
        InputError: the loader is empty, a batch is refused by the adapter (its number is named), or labels come with
            some batches only.

    Example:
        >>> from torch import nn
        >>> from trimtab.adaptation import Tent
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
        >>> stream = [(x[:8], torch.arange(8) % 2), (x[8:], torch.arange(8) % 2)]
        >>> adapter = Tent(model)
        >>> predictions = run_stream(adapter, stream)
        >>> predictions.n, int(adapter.updates)
        (16, 2)
    """
    said, true = [], []
    for step in steps(adapter, loader, description=description):
        said.append(step.outputs)
        if step.labels is not None:
            true.append(step.labels)
    if not said:
        raise InputError("loader must yield at least one batch, it yielded none")
    return Predictions(torch.cat(said), torch.cat(true) if true else None)
