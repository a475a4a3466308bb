"""The package itself: submodules load on first use, and the names it offers are there."""

from importlib.metadata import version

import pytest

import trimtab


def test_every_name_it_offers_is_there():
    assert dir(trimtab) == sorted(trimtab.__all__)
    for name in trimtab.__all__:
        assert getattr(trimtab, name) is not None
    assert trimtab.__version__ == version("trimtab")


def test_every_stage_exports_what_it_lists():
    for stage in ("metrics", "calibration", "adaptation", "data", "audit"):
        module = getattr(trimtab, stage)
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            assert getattr(module, name).__doc__ or not callable(getattr(module, name)), f"trimtab.{stage}.{name}"


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'trimtab' has no attribute 'nothing'"):
        _ = trimtab.nothing
