"""Reliability curves: the numbers behind ECE, with exact bands."""

import definitions
import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from trimtab import metrics


def test_the_curve_is_what_ece_adds_up():
    p, y = definitions.some_probs(500, 3)
    curve = metrics.reliability_curve(p, y, bins=12)
    gaps = curve.count / 500 * np.abs(curve.accuracy - curve.confidence)
    assert gaps.sum() == pytest.approx(metrics.expected_calibration_error(p, y, 12), abs=1e-12)
    assert curve.count.sum() == 500
    assert ((curve.lower < curve.confidence) & (curve.confidence <= curve.upper)).all()


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_bands_are_clopper_and_pearsons(level):
    p, y = definitions.some_probs(200, 3)
    curve = metrics.reliability_curve(p, y, bins=7, level=level)
    for count, accuracy, low, high in zip(curve.count, curve.accuracy, curve.accuracy_low, curve.accuracy_high):
        expected = binomtest(round(accuracy * count), int(count)).proportion_ci(level, "exact")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_empty_bins_are_left_out():
    curve = metrics.reliability_curve(torch.tensor([[0.95, 0.05], [0.45, 0.55]]), torch.tensor([0, 0]), bins=10)
    assert curve.lower.tolist() == pytest.approx([0.5, 0.9])
    assert curve.accuracy.tolist() == [0, 1]
    assert curve.accuracy_low.tolist() == pytest.approx([0, 0.025])
    assert curve.accuracy_high.tolist() == pytest.approx([0.975, 1])
