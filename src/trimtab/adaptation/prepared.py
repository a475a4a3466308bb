"""What an adapter must know before the stream: named tensors, and the model that they were made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from trimtab.core import checks, modules, persist
from trimtab.core.checks import InputError

_ROUNDING = 0.01  # a half-precision copy is closer, another model is not


class Prepared(Mapping[str, Tensor]):
    """The result of an adapter's ``prepare(model, loader)``: tensors by name, made once, on the source's data.

    It remembers the method and the model it was made for (names, shapes, norms and a projection of all its tensors, so
    that a copy on another device or in half precision is still the same model), and refuses to serve another.

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
        told = {"method": self.method, "model": self._model, "tensors": persist.fingerprint(self._tensors)}
        persist.save(path, self._tensors, told)

    @classmethod
    def load(cls, path: str | Path) -> Prepared:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing, is not what `save` writes, or was changed since.
        """
        tensors, told = persist.load(path)
        try:
            method, written = str(told["method"]), told["tensors"]
            model = {name: (tuple(shape), float(norm), float(at)) for name, (shape, norm, at) in told["model"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path} does not hold the preparation of an adapter") from None
        if written != persist.fingerprint(tensors):
            raise InputError(f"{path} holds other tensors than were saved with its .json; prepare anew")
        loaded = cls(method, tensors, nn.Module())
        loaded._model = model
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
        for name, (shape, norm, projection) in here.items():
            shape_there, norm_there, projection_there = self._model[name]
            if shape != shape_there:
                raise InputError(f"prepared was made for another model: {name!r} is {shape} here, {shape_there} there")
            if max(abs(norm - norm_there), abs(projection - projection_there)) > _ROUNDING * max(norm, norm_there):
                raise InputError(
                    f"prepared was made for another model: {name!r} holds other numbers here (norm {norm:.6g}) than "
                    f"there ({norm_there:.6g})"
                )
        return self


def check_prepared(prepared: Prepared, method: str, model: nn.Module) -> Prepared:
    """`prepared`, if it is what `method` prepared for `model`; see `Prepared.check`."""
    if not isinstance(prepared, Prepared):
        raise InputError(f"prepared must be what {method}.prepare returned, got {type(prepared).__name__}")
    return prepared.check(method, model)


def _signature(model: nn.Module) -> dict[str, tuple[tuple[int, ...], float, float]]:
    """Shape, Euclidean norm and a projection of every floating-point parameter and buffer."""
    signature = {}
    for name, tensor in modules.bare(model).state_dict().items():
        if tensor.is_floating_point():
            values = tensor.detach().flatten().double()
            along = torch.arange(len(values), dtype=torch.float64, device=values.device).cos()
            signature[name] = (tuple(tensor.shape), float(values.norm()), float(values @ along))
    return signature
