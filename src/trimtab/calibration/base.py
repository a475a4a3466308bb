"""The contract of every calibrator, and how one is written to disk and read back."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from trimtab.core import checks, persist
from trimtab.core.checks import InputError
from trimtab.core.predictions import Predictions


class Fitted(nn.Module):
    """What a fit leaves behind: all state in buffers, written to disk as safetensors with its description beside it.

    A subclass's constructor keeps every argument under the argument's own name and names the buffers to come with
    `_declare`; its `fit` hands them to `_store`. It can then be saved, loaded, moved and nested like any module.
    """

    @property
    def fitted(self) -> bool:
        """Whether every declared buffer holds a value."""
        return all(value is not None for value in self._buffers.values())

    def save(self, path: str | Path) -> None:
        """Write the state to `path` (safetensors) and the description beside it (``.json``), for `load`."""
        self._must_be_fitted()
        meta = {"class": type(self).__name__, "arguments": self._arguments(), "trimtab": version("trimtab")}
        persist.save(path, self.state_dict(), meta)

    def extra_repr(self) -> str:
        """The constructor's arguments, for ``repr``."""
        return ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())

    def _must_be_fitted(self) -> None:
        if not self.fitted:
            raise InputError(f"{type(self).__name__} is not fitted: call fit, or load a fitted state, first")

    def _declare(self, *names: str) -> None:
        """Name buffers that `fit` will store; they are None until then."""
        for name in names:
            self.register_buffer(name, None)

    def _store(self, like: Tensor, **state: Tensor) -> None:
        """Keep the fitted state in declared buffers, on the device and in the precision of `like`."""
        for name, value in state.items():
            setattr(self, name, value.to(like) if value.is_floating_point() else value.to(like.device))

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Buffers take the shapes that come, so that a state fits a module that was never fitted."""
        for name, buffer in self._buffers.items():
            incoming = state_dict.get(prefix + name)
            if incoming is not None:
                place = incoming.device if buffer is None else buffer.device
                self._buffers[name] = torch.empty_like(incoming, device=place)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Calibrator(Fitted):
    """Turns logits into calibrated log-probabilities: fitted once on held-out scores, then a layer like any other.

    A new calibrator is a subclass with two methods. `_fit(logits, labels, weights, **needed)` finds the state and
    hands it to `_store`; `_log_probs(logits, **needed)` maps logits to log-probabilities, differentiably. What `_fit`
    receives has been checked: finite logits in at least single precision, labels in range and of at least two classes,
    weights > 0 (rows of weight zero are left out; None where all rows count alike). It runs without gradients: one
    that trains by them does so under `torch.enable_grad`.

    Attributes:
        trains: whether a fit takes many passes over the samples: those that do not are ranked first.
        needs: fields of `Predictions` beyond logits and labels that `fit` and `forward` take by keyword
            (``"features"``, ``"views"``).
        counts: (c,), how many fitting samples (how much weight) each class had; None before `fit`.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    trains: ClassVar[bool] = False
    counts: Tensor | None
    _fit: Callable[..., None]
    _log_probs: Callable[..., Tensor]

    def __init__(self) -> None:
        super().__init__()
        self._declare("counts")

    def fit(
        self,
        logits: Float[Tensor, "n c"] | Float[np.ndarray, "n c"],
        labels: Int[Tensor, " n"] | Integer[np.ndarray, " n"],
        *,
        weights: Float[Tensor, " n"] | Float[np.ndarray, " n"] | None = None,
        **needed: Tensor | np.ndarray,
    ) -> Self:
        """Fit to held-out scores: samples that the model was not trained on.

        Args:
            logits: unnormalised scores or log-probabilities, (n, c), finite.
            labels: true classes, (n,), integers in 0..c-1; at least two classes must occur.
            weights: sample weights (n,), >= 0; a weight counts as so many copies of the sample.
            **needed: what `needs` names.

        Returns:
            self.

        Raises:
            InputError: a shape, type or range is wrong; the message names the argument and the first bad row.
        """
        x = _at_least_single(checks.logits(logits).detach())
        n, c = x.shape
        y = checks.labels(labels, n, c).to(x.device)
        w = None if weights is None else _at_least_single(checks.weights(weights, n).detach()).to(x.device)
        extra = {name: value.detach().to(x.device) for name, value in self._checked(needed, n, c).items()}
        if w is not None and bool((w == 0).any()):
            kept = w > 0
            x, y, w = x[kept], y[kept], w[kept]
            extra = {name: value[kept] for name, value in extra.items()}
        counts = torch.bincount(y, w, minlength=c)
        if int((counts > 0).sum()) < 2:
            raise InputError(f"labels must hold at least two classes to calibrate, found only class {int(y[0])}")
        with torch.no_grad():
            self._fit(x, y, w, **extra)
        self._store(x, counts=counts.to(x.dtype))
        return self

    def fit_predictions(self, predictions: Predictions) -> Self:
        """`fit` to everything in `predictions` that this calibrator needs."""
        needed = {name: predictions.needed(name) for name in sorted(self.needs)}
        return self.fit(predictions.logits, predictions.needed("labels"), weights=predictions.weights, **needed)

    def forward(self, logits: Float[Tensor, "n c"], **needed: Tensor) -> Float[Tensor, "n c"]:
        """Calibrated log-probabilities, differentiable, in the precision of `logits`.

        Values are not checked here, so that a model with a calibrator behind it traces and exports.

        Raises:
            InputError: the calibrator is not fitted, or was fitted to another number of classes.
        """
        self._must_be_fitted()
        assert self.counts is not None
        if logits.shape[-1] != self.counts.shape[0]:
            raise InputError(f"logits must have {self.counts.shape[0]} columns as in fit, got {tuple(logits.shape)}")
        return self._log_probs(_at_least_single(logits), **needed).to(logits.dtype)

    def predict_proba(self, logits: Any, **needed: Any) -> Any:
        """Calibrated probabilities (n, c) whose rows sum to one: a tensor for a tensor, else a NumPy array."""
        x = checks.logits(logits)
        extra = self._checked(needed, *x.shape)
        place = x.device if isinstance(logits, Tensor) or self.counts is None else self.counts.device
        with torch.no_grad():
            probs = self(x.to(place), **{name: value.to(place) for name, value in extra.items()}).softmax(-1)
        return probs if isinstance(logits, Tensor) else probs.cpu().numpy()

    def transform(self, predictions: Predictions) -> Predictions:
        """The same predictions with calibrated log-probabilities in place of the logits."""
        needed = {name: predictions.needed(name) for name in sorted(self.needs)}
        with torch.no_grad():
            log_probs = self(predictions.logits, **needed)
        # a probability of exactly zero becomes the smallest normal number, as in Predictions.read
        log_probs = log_probs.masked_fill(log_probs.isneginf(), math.log(torch.finfo(log_probs.dtype).tiny))
        return Predictions(log_probs, predictions.labels, predictions.features, predictions.views, predictions.weights)

    def _checked(self, needed: Mapping[str, Any], n: int, c: int) -> dict[str, Tensor]:
        """The keyword arguments that `needs` names, checked."""
        if set(needed) != self.needs:
            wanted = ", ".join(sorted(self.needs)) or "logits alone"
            raise InputError(
                f"{type(self).__name__} works on {wanted}; it was given {sorted(needed) or 'nothing else'}"
            )
        out = {}
        for name, value in needed.items():
            out[name] = checks.views(value, n, c) if name == "views" else checks.matrix(value, name)
            if len(out[name]) != n:
                raise InputError(f"{name} must have {n} rows, got {len(out[name])}")
        return out


def load(path: str | Path) -> Any:
    """Read the calibrator, or whatever else of this stage, that `save` wrote.

    Only the classes that `trimtab.calibration` exports are built, and only from tensors and JSON: nothing in the
    files is executed.

    Raises:
        InputError: a file is missing, truncated, or does not describe a fitted calibrator.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from trimtab.calibration import TemperatureScaling, load
        >>> logits, labels = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1, 1])
        >>> calibrator = TemperatureScaling().fit(logits, labels)
        >>> path = Path(tempfile.mkdtemp()) / "calibrator.safetensors"
        >>> calibrator.save(path)
        >>> torch.equal(load(path)(logits), calibrator(logits))
        True
    """
    state, meta = persist.load(path)
    rooms = import_module("trimtab.calibration")
    name = meta.get("class") if isinstance(meta, dict) else None
    kind = getattr(rooms, name) if isinstance(name, str) and name in rooms.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, Fitted) and kind not in (Fitted, Calibrator)):
        raise InputError(f"{path}: the class must be one of trimtab.calibration, found {name!r}")
    try:
        calibrator = kind(**meta["arguments"])
        calibrator.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a {name} that this version of trimtab can read: {error}") from error
    missing = [name for module in calibrator.modules() for name, value in module._buffers.items() if value is None]
    if missing:
        raise InputError(f"{path}: the state of a fitted {kind.__name__} must hold {missing[0]!r}")
    return calibrator


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """torch.logsumexp, kept as a dimension, in operations that ONNX Runtime computes without underflow."""
    top = x.amax(dim, keepdim=True).detach()
    return top + (x - top).exp().sum(dim, keepdim=True).log()


def _at_least_single(x: Tensor) -> Tensor:
    """Half precision is widened; single and double stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
