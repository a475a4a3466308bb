"""A stream through an adapter, as `Predictions`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from trimtab.adaptation.base import Adapter
from trimtab.core import modules, progress
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions, take_apart


def run_stream(adapter: Adapter, loader: Iterable[Any], *, description: str = "adapt") -> Predictions:
    """Let `adapter` predict and follow a stream, batch by batch; labels are kept beside it, never shown to it.

    Args:
        adapter: where it stands when the stream ends is where it is left.
        loader: batches in the order of the stream: inputs, (inputs, labels), or mappings, as in `Predictions.collect`.
        description: the name of the progress bar.

    Returns:
        What was said about each batch before the update that followed, on the CPU: logits, or log-probabilities where
        the adapter gives probabilities.

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
    device = modules.device_of(adapter.model)
    said, true = [], []
    for number, batch in enumerate(progress.track(loader, description)):
        inputs, labels = take_apart(batch, device)
        try:
            outputs = adapter(inputs) if adapter.outputs == "logits" else adapter.log_probs(inputs)
        except InputError as error:
            raise InputError(f"batch {number}: {error}") from error
        said.append(outputs.cpu())
        if labels is not None:
            true.append(labels.cpu())
    if not said:
        raise InputError("loader must yield at least one batch, it yielded none")
    if true and len(true) != len(said):
        raise InputError("loader must yield labels with every batch or with none")
    return Predictions(torch.cat(said), torch.cat(true) if true else None)
