"""trimtab: small corrections that keep big models true.

Measure how far a PyTorch model's confidence, or its behaviour on shifted data, is from reality; correct it at the
moment of the model's life where that is cheapest; prove the correction.

Stages are submodules (`trimtab.metrics`, `trimtab.calibration`, `trimtab.adaptation`, ...) and load on first use, so
that ``import trimtab`` stays light.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("trimtab")

_SUBMODULES = ("adaptation", "audit", "calibration", "claims", "core", "data", "metrics", "sklearn")
__all__ = ["Predictions", "__version__", *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name == "Predictions":
        return import_module("trimtab.core.predictions").Predictions
    if name in _SUBMODULES:
        return import_module(f"trimtab.{name}")
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
