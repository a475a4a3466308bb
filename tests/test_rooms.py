"""One method, one room: a method's file imports no other method's file."""

import ast
import inspect
from pathlib import Path

import pytest

from trimtab import catalog
from trimtab.adaptation import ADAPTERS
from trimtab.calibration import CALIBRATORS

ROOMS = {file for method in catalog.methods() for file in method.rooms}
ROOMS |= {Path(inspect.getfile(kind)) for kind in (*ADAPTERS, *CALIBRATORS)}


def module(file):
    return ".".join(("trimtab", *file.relative_to(catalog.PACKAGE).with_suffix("").parts))


@pytest.mark.parametrize("file", sorted(ROOMS), ids=module)
def test_a_room_opens_into_no_other(file):
    others = {module(other) for other in ROOMS - {file}}
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            imported |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
    assert not imported & others
