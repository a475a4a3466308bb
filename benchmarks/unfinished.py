"""What a table says of what is not measured yet."""

from __future__ import annotations

from collections.abc import Sequence


def warning(missing: Sequence[str], unit: str) -> str:
    """An admonition that lists what is missing, means being over the `unit` that are there; empty where nothing is."""
    if not missing:
        return ""
    head = f'!!! warning "Not all of it is measured yet"\n    Means are over the {unit} that are there.\n\n    '
    return head + "\n    ".join(missing)
