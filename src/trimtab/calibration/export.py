"""A calibrated model as an ONNX file, for runtimes without PyTorch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.calibration.base import Calibrator
from trimtab.core.checks import InputError
from trimtab.core.persist import atomic


def to_onnx(model: nn.Module | None, calibrator: Calibrator, example: Any, path: str | Path) -> None:
    """Write ``calibrator(model(x))``, log-probabilities (n, c), as ONNX; the number of rows n stays free.

    Args:
        model: a classifier that returns logits (n, c); None exports the calibrator alone.
        calibrator: fitted, and one that works on logits alone.
        example: a batch that the model takes (logits where there is no model); its values do not matter.
        path: file to write, whole or not at all.

    Raises:
        InputError: the calibrator is none, is not fitted or needs more than logits, or the file cannot be written.
        ModuleNotFoundError: the packages of ``trimtab[onnx]`` are not installed.
        Exception: whatever torch's exporter says of a model that it cannot trace.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from trimtab.calibration import TemperatureScaling
        >>> from trimtab.calibration.export import to_onnx
        >>> calibrator = TemperatureScaling().fit(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> path = Path(tempfile.mkdtemp()) / "model.onnx"
        >>> to_onnx(torch.nn.Identity(), calibrator, torch.zeros(2, 3), path)
        >>> path.exists()
        True
    """
    if not isinstance(calibrator, Calibrator):
        raise InputError(f"calibrator must map logits to log-probabilities; a {type(calibrator).__name__} does not")
    if calibrator.counts is None or calibrator.needs:
        what = f"needs {sorted(calibrator.needs)}" if calibrator.needs else "is not fitted"
        raise InputError(f"calibrator must be fitted and work on logits alone; this {type(calibrator).__name__} {what}")
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
                custom_translation_table={torch.ops.aten.searchsorted.Tensor: _searchsorted()},
                verbose=False,
            )
    finally:
        for module, mode in modes.items():
            module.training = mode


def _searchsorted() -> Callable[..., Any]:
    """torch.searchsorted, for which ONNX has no operator: every value counts the entries below it."""
    import onnxscript

    op: Any = onnxscript.opset18

    def count_below(edges: Any, values: Any, **_: Any) -> Any:
        below = op.Greater(op.Unsqueeze(values, [-1]), op.Unsqueeze(edges, [-2]))
        return op.ReduceSum(op.Cast(below, to=onnxscript.INT64.dtype), [-1], keepdims=0)

    return count_below


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
