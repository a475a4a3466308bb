"""Shapes and types are checked at run time in every test that does not hand over bad input on purpose."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import jaxtyping
import pytest
import typer
from beartype import BeartypeConf, FrozenDict, beartype
from hypothesis import HealthCheck, settings

# jaxtyping decorates methods one by one, where beartype cannot know what Self is; what typer hands over
# is no typer.Context; an int is a float, as in PEP 484
shapes = ModuleType("trimtab_shapes")
shapes.check = beartype(
    conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any, typer.Context: Any}), is_pep484_tower=True)
)
sys.modules["trimtab_shapes"] = shapes
jaxtyping.install_import_hook("trimtab", "trimtab_shapes.check")

GOLDEN = Path(__file__).parent / "golden"
settings.register_profile("trimtab", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("trimtab")


def pytest_collection_modifyitems(config, items):
    reasons = {}
    if not (find_spec("open_clip") and find_spec("timm")):
        reasons["vision"] = "needs timm and open_clip: make test-vision"
    if "slow" not in config.option.markexpr:
        reasons["slow"] = "takes minutes: pytest -m slow"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _shape_checks(request):
    if request.node.get_closest_marker("bad_input") or request.node.get_closest_marker("compiled"):
        jaxtyping.config.update("jaxtyping_disable", True)
        yield
        jaxtyping.config.update("jaxtyping_disable", False)
    else:
        yield


@pytest.fixture(autouse=True)
def _global_random_state_is_untouched():
    import numpy
    import torch

    before = torch.get_rng_state(), numpy.random.get_state()[1].copy()  # noqa: NPY002
    yield
    assert torch.equal(before[0], torch.get_rng_state()), "the test moved torch's global random state"
    after = numpy.random.get_state()[1]  # noqa: NPY002
    assert (before[1] == after).all(), "the test moved numpy's global random state"
