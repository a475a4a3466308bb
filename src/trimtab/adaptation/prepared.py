"""What an adapter must know before the stream: named tensors, and the model that they were made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from trimtab.core import checks, persist
from trimtab.core.checks import InputError

_ROUNDING = 0.01  # the norms of a model's half-precision copy are closer, those of another model are not


class Prepared(Mapping[str, Tensor]):
    """The result of an adapter's ``prepare(model, loader)``: tensors by name, made once, on the source's data.

    It remembers the method and the model it was made for (names, shapes and norms of all its tensors, so that a copy
    on another device or in half precision is still the same model), and refuses to serve another.

    Args:
        method: name of the adapter's class.
        tensors: what the adapter needs, by name; detached.
        model: the model that the preparation looked at.

    Raises:
        InputError: a tensor holds NaN or infinities.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(3, 2)
        >>> prepared = Prepared("EATA", {"weight": torch.ones(2, 3)}, model)
        >>> folder = Path(tempfile.mkdtemp())
        >>> prepared.save(folder / "eata.safetensors")
        >>> again = Prepared.load(folder / "eata.safetensors").check("EATA", model)
        >>> again.method, list(again)
        ('EATA', ['weight'])
        >>> again.check("EATA", nn.Linear(3, 4))
        Traceback (most recent call last):
        trimtab.core.errors.InputError: prepared was made for another model: 'weight' is (4, 3) here, (2, 3) there
    """

    def __init__(self, method: str, tensors: Mapping[str, Tensor], model: nn.Module):
        self.method = method
        self._tensors = {name: checks.finite(tensor.detach(), name) for name, tensor in tensors.items()}
        self._model = _signature(model)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in self.items())
        return f"Prepared({self.method!r}, {{{shapes}}})"

    def save(self, path: str | Path) -> None:
        """Write the tensors to `path` (safetensors) and what they belong to beside it (JSON)."""
        persist.save(path, self._tensors, {"method": self.method, "model": self._model})

    @classmethod
    def load(cls, path: str | Path) -> Prepared:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or is not what `save` writes.
        """
        tensors, told = persist.load(path)
        if not isinstance(told.get("method"), str) or not isinstance(told.get("model"), dict):
            raise InputError(f"{path} does not hold the preparation of an adapter")
        loaded = cls(told["method"], tensors, nn.Module())
        loaded._model = {name: (tuple(shape), float(norm)) for name, (shape, norm) in told["model"].items()}
        return loaded

    def check(self, method: str, model: nn.Module) -> Prepared:
        """Itself, if it was made by `method` for `model`.

        Raises:
            InputError: it was made by another method or for another model; the message says what differs.
        """
        if self.method != method:
            raise InputError(f"prepared must come from {method}.prepare, it was made by {self.method}")
        here = _signature(model)
        strangers = sorted(here.keys() ^ self._model.keys())
        if strangers:
            where = "not there" if strangers[0] in here else "not here"
            raise InputError(f"prepared was made for another model: {strangers[0]!r} is {where}")
        for name, (shape, norm) in here.items():
            shape_there, norm_there = self._model[name]
            if shape != shape_there:
                raise InputError(f"prepared was made for another model: {name!r} is {shape} here, {shape_there} there")
            if abs(norm - norm_there) > _ROUNDING * max(norm, norm_there):
                raise InputError(
                    f"prepared was made for another model: {name!r} has norm {norm:.6g} here, {norm_there:.6g} there"
                )
        return self


def _signature(model: nn.Module) -> dict[str, tuple[tuple[int, ...], float]]:
    """Shape and Euclidean norm of every floating-point parameter and buffer."""
    model = getattr(model, "module", model) if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return {
        name: (tuple(tensor.shape), float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64)))
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    }
