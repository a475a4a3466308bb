"""Summaries: the same numbers as the single measures, in plain data."""

import json
from dataclasses import asdict

import definitions
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from trimtab import metrics
from trimtab.core.checks import InputError


def test_headlines_are_the_single_measures():
    logits, labels = definitions.some_logits(600, 4)
    p = logits.softmax(1)
    confidence, correct = definitions.top(p, labels)
    summary = metrics.summarise(logits, labels, resamples=50)
    expected = {
        "accuracy": correct.mean(),
        "ece": metrics.expected_calibration_error(p, labels),
        "ece_em": metrics.expected_calibration_error_equal_mass(p, labels),
        "mce": metrics.maximum_calibration_error(p, labels),
        "cw_ece": metrics.classwise_calibration_error(p, labels),
        "log_loss": metrics.negative_log_likelihood(p, labels),
        "brier": metrics.brier_score(p, labels),
        "auroc": metrics.roc_auc(confidence, correct),
        "aurc": metrics.aurc(p, labels),
        "mean_confidence": confidence.mean(),
    }
    assert {name: interval.estimate for name, interval in summary.headline.items()} == pytest.approx(expected, abs=1e-9)
    for name, (estimate, low, high) in summary.headline.items():
        assert low < estimate < high, name
    assert (summary.n, summary.c, summary.level) == (600, 4, 0.95)
    assert "bootstrap" in summary.interval_method
    assert "50 resamples" in summary.interval_method


def test_curves_and_classes():
    logits, labels = definitions.some_logits(600, 4)
    labels = labels.clamp(max=2)  # class 3 does not occur
    p = logits.softmax(1)
    summary = metrics.summarise(logits, labels, resamples=5, level=0.9)
    for name, values in metrics.reliability_curve(p, labels, level=0.9)._asdict().items():
        np.testing.assert_allclose(summary.reliability[name], values, atol=1e-9)
    confidence = p.amax(1).numpy()
    assert summary.histogram == np.histogram(confidence, 20, (0, 1))[0].tolist()
    curve = metrics.risk_coverage_curve(p, labels)
    all_points = set(zip(curve.coverage.tolist(), curve.risk.tolist()))
    assert len(summary.risk_coverage) == 200
    assert set(summary.risk_coverage) <= all_points
    assert summary.risk_coverage[-1] == (1, pytest.approx(1 - summary.headline["accuracy"].estimate))
    assert summary.per_class["count"] == np.bincount(labels, minlength=4).tolist()
    assert np.isnan(summary.per_class["recall"][3])
    for k in range(3):
        assert summary.per_class["recall"][k] == pytest.approx((p.argmax(1)[labels == k] == k).double().mean())
    assert summary.per_class["mean_probability"] == pytest.approx(p.mean(0).tolist())
    errors = [definitions.ece(p[:, k].numpy(), (labels == k).numpy(), 15) for k in range(4)]
    assert summary.per_class["ece"] == pytest.approx(errors, abs=1e-9)


@pytest.mark.filterwarnings("error")
@settings(max_examples=25)
@given(given=definitions.predictions())
def test_a_summary_is_plain_data_whatever_the_predictions(given):
    logits, labels = given
    summary = metrics.summarise(logits, labels, resamples=4)
    json.dumps(asdict(summary))
    assert 1 <= len(summary.risk_coverage) <= 200
    assert sum(summary.histogram) == summary.n == sum(summary.per_class["count"])
    one_kind = summary.headline["accuracy"].estimate in (0, 1)
    assert np.isnan(summary.headline["auroc"].estimate) == one_kind
    for name, (estimate, low, high) in summary.headline.items():
        assert np.isnan(low) or low <= estimate <= high, name


def test_the_same_seed_gives_the_same_summary():
    logits, labels = definitions.some_logits(100, 3)
    assert metrics.summarise(logits, labels, resamples=9, seed=5) == metrics.summarise(
        logits, labels, resamples=9, seed=5
    )
    assert metrics.summarise(logits.numpy(), labels.numpy(), resamples=9) == metrics.summarise(
        logits, labels, resamples=9
    )


def test_the_essentials_are_the_headline_without_the_classes():
    logits, labels = definitions.some_logits(300, 4)
    headline = metrics.summarise(logits, labels, resamples=20, seed=1).headline
    found = metrics.essentials(logits, labels, resamples=20, seed=1)
    assert found == {name: interval for name, interval in headline.items() if name != "cw_ece"}


def test_changes_are_differences_with_paired_intervals():
    logits, labels = definitions.some_logits(600, 4)
    before, after = (metrics.summarise(x, labels, resamples=200) for x in (logits, logits / 1.7))
    changes = metrics.compare(logits, logits / 1.7, labels)
    for name, (estimate, low, high) in changes.items():
        one, other = before.headline[name], after.headline[name]
        assert estimate == pytest.approx(other.estimate - one.estimate, abs=1e-12), name
        assert low <= estimate <= high
    apart = np.hypot(*(h.headline["log_loss"].high - h.headline["log_loss"].low for h in (before, after)))
    assert changes["log_loss"].high - changes["log_loss"].low < apart / 2
    assert changes["log_loss"].high < 0
    assert changes["accuracy"] == pytest.approx((0, 0, 0))


@pytest.mark.bad_input
def test_bad_input_is_refused():
    with pytest.raises(InputError, match="logits must be finite, found nan at row 0, column 1"):
        metrics.summarise(torch.tensor([[0.0, torch.nan]]), torch.tensor([0]))
    with pytest.raises(InputError, match="labels must have 1 entries"):
        metrics.summarise(torch.zeros(1, 2), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="after must have 2 columns, got 3"):
        metrics.compare(torch.zeros(2, 2), torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="after must have 2 rows as before has, got 1"):
        metrics.compare(torch.zeros(2, 2), torch.zeros(1, 2), torch.tensor([0, 1]))
