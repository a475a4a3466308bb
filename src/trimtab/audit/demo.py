"""`trimtab demo`: the audit of a small network that is trained on the spot."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from trimtab.audit.result import AuditResult
from trimtab.audit.run import audit
from trimtab.core import persist


def demo(out: str | Path, **options: Any) -> AuditResult:
    """Train a network on scikit-learn's digits, audit it, and leave everything in `out`.

    Args:
        out: output folder; beside what `audit` leaves it will hold ``setup.py``, the setup that was audited, and the
            trained ``model.safetensors``.
        **options: those of `audit`.
    """
    place = Path(out) / "setup.py"
    persist.write_text(place, resources.files("trimtab.audit").joinpath("demo_setup.py").read_text(encoding="utf-8"))
    return audit(f"{place}:setup", out, **options)
