"""A calibrated model as an ONNX file, for runtimes without PyTorch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.calibration.base import Calibrator
from trimtab.core.persist import atomic


def to_onnx(model: nn.Module | None, calibrator: Calibrator, example: Any, path: str | Path) -> None:
    """Write ``calibrator(model(x))``, log-probabilities (n, c), as ONNX; the number of rows n stays free.

    Args:
        model: a classifier that returns logits (n, c); None exports the calibrator alone.
        calibrator: fitted.
        example: a batch that the model takes (logits where there is no model); its values do not matter.
        path: file to write, whole or not at all.

    Raises:
        ModuleNotFoundError: the packages of ``trimtab[onnx]`` are not installed.
        InputError: the file cannot be written.
        Exception: whatever torch's exporter says of a model that it cannot trace.
    """
    chain = nn.Sequential(*([calibrator] if model is None else [model, calibrator]))
    modes = {module: module.training for module in chain.modules()}
    try:
        with atomic(path) as draft, _quiet_exporter():
            torch.onnx.export(
                chain.eval(),
                (example,),
                draft,
                dynamo=True,
                external_data=False,
                input_names=["inputs"],
                output_names=["log_probs"],
                dynamic_shapes=({0: torch.export.Dim("n")},),
                verbose=False,
            )
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's remarks on packages that it could use and on its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
