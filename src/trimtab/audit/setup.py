"""What an audit of a model is given, and how it is found."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.predictions import Augmentation


@dataclass(frozen=True)
class Setup:
    """A model and the data to audit it with.

    Args:
        model: a classifier that maps a batch of inputs to logits (n, c).
        calibration: batches of (inputs, labels) that the corrections are fitted on; not seen in training.
        test: batches of (inputs, labels) that everything is measured on.
        shifts: batches of (inputs, labels) under the conditions the model may meet, by name, in stream order. Labels
            are used to measure only. Each loader is iterated several times and must yield the same batches each time.
        augment: ``augment(inputs, generator)``, a random copy of a batch that shows the same things: then `views`
            copies of the calibration and test batches are passed through the model too, for calibrators that read how
            it wavers.
        views: how many copies.
        features: keep what the last linear layer sees (True), or what the module of that name sees, for calibrators
            that work on features and train a network of their own on them.
        train: batches the model was trained on, for adapters that want them, and for training copies of it on with
            other objectives; may stay None.
        classes: names of the c classes; numbers are used where None.
        title: what is audited, one line for the report; where the setup was found if None.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])), batch_size=2)
        >>> Setup(torch.nn.Linear(3, 2), calibration=loader, test=loader).shifts
        {}
    """

    model: nn.Module
    calibration: Iterable[Any]
    test: Iterable[Any]
    shifts: Mapping[str, Iterable[Any]] = field(default_factory=dict)
    augment: Augmentation | None = None
    views: int = 3
    features: bool | str = False
    train: Iterable[Any] | None = None
    classes: Sequence[str] | None = None
    title: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        for name, loader in {"calibration": self.calibration, "test": self.test, **self.shifts}.items():
            if not isinstance(loader, Iterable):
                raise InputError(f"{name} must be an iterable of batches, got {type(loader).__name__}")
            if isinstance(loader, Iterator):
                raise InputError(f"{name} must be iterable more than once (a DataLoader or a list), got an iterator")
        if self.augment is not None and not callable(self.augment):
            raise InputError(f"augment must be a function of inputs and generator, got {type(self.augment).__name__}")
        checks.integer(self.views, "views", low=1)
        if "none" in self.shifts:
            raise InputError("shifts must not use the name 'none', which stands for the test set itself")


def load(spec: str) -> Setup:
    """Call the setup function named by ``path/to/file.py:function`` or ``package.module:function``.

    Raises:
        InputError: the file or function is missing, it raised, or it did not return a `Setup`.
    """
    try:
        setup = function(spec)()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{spec} raised {told(error)}") from error
    if not isinstance(setup, Setup):
        raise InputError(f"{spec} must return a trimtab.audit.Setup, returned {type(setup).__name__}")
    return setup


def function(spec: str) -> Callable[..., Any]:
    """The function named by ``path/to/file.py:function`` or ``package.module:function``.

    Raises:
        InputError: the file or function is missing.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise InputError(f"{spec!r} must have the form file.py:function or package.module:function")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{place} cannot be imported: {told(error)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"{place} has no function {name!r}")
    return found


def told(error: Exception) -> str:
    """An error in one line: a refusal in its own words, one of a user's code with the place where it was raised."""
    if isinstance(error, InputError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module
    found.loader.exec_module(module)
    return module
