"""Intervals from replicates: centred, scaled, and inside the measures' range."""

import numpy as np
import pytest
import torch

from trimtab.metrics import resampling


def found(name, estimate, replicates, level=0.8, scale=1.0):
    replicates = torch.as_tensor(replicates, dtype=torch.float64)
    return resampling.intervals({name: torch.tensor(estimate)}, {name: replicates}, level, scale)[name]


def test_replicates_are_moved_to_the_estimate_and_scaled():
    replicates = np.linspace(0.5, 0.7, 11)
    assert found("pre_ECE_15", 0.3, replicates) == pytest.approx((0.3, 0.22, 0.38))
    assert found("pre_ECE_15", 0.3, replicates, scale=0.1) == pytest.approx((0.3, 0.292, 0.308))


@pytest.mark.parametrize(
    ("name", "highest"),
    [("pre_ECE_500", 1), ("post_Brier", 2), ("brier", 2), ("post_NLL", 3.9), ("log_loss", 3.9), ("auroc", 1)],
)
def test_intervals_end_where_the_measure_does(name, highest):
    low, high = found(name, 0.9, np.linspace(-5, 5, 101), level=0.6)[1:]
    assert low == 0
    assert high == pytest.approx(highest)


def test_undefined_replicates_are_left_out():
    assert found("pre_KDECE", 0.3, [0.2, np.nan, 0.4, np.nan], level=0.5) == pytest.approx((0.3, 0.25, 0.35))
    assert np.isnan(found("pre_KDECE", np.nan, [0.2, 0.4])).all()
    assert np.isnan(found("pre_KDECE", 0.3, [np.nan, np.nan])[1:]).all()
