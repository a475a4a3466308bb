"""Ranking by cross-validation, and the choice of the simplest that is as good as the best."""

import math
import time

import numpy as np
import pytest
import torch
from score_sets import generator, log_loss, overconfident

from trimtab import Predictions
from trimtab.calibration import (
    CALIBRATORS,
    Calibrator,
    IsotonicCalibration,
    MatrixScaling,
    TemperatureScaling,
    Uncalibrated,
    VectorScaling,
    select,
)
from trimtab.calibration.select import Score, one_standard_error, rank
from trimtab.core.checks import InputError


class Refuses(Calibrator):
    def _fit(self, logits, labels, weights):
        raise InputError("logits must be nicer")


class Breaks(Calibrator):
    def _fit(self, logits, labels, weights):
        if len(labels) % 2:
            raise ZeroDivisionError("by zero")

    def _log_probs(self, logits):
        return logits.log_softmax(1)


class Spoils(Calibrator):
    def _fit(self, logits, labels, weights):
        time.sleep(0.001)

    def _log_probs(self, logits):
        return logits * torch.nan


class NeedsViews(Calibrator):
    needs = frozenset({"views"})


@pytest.fixture(scope="module")
def predictions():
    return Predictions(*overconfident(400, 3, factor=4.0))


def test_losses_are_those_of_the_folds(predictions):
    (score,) = rank(predictions, [TemperatureScaling], folds=4, seed=3)
    expected = [
        log_loss(TemperatureScaling().fit(fit.logits, fit.labels)(rest.logits), rest.labels)
        for fit, rest in predictions.folds(4, 3)
    ]
    np.testing.assert_allclose(score.fold_losses, expected, rtol=1e-12)
    assert score.log_loss == pytest.approx(np.mean(expected))
    assert score.standard_error == pytest.approx(np.std(expected, ddof=1) / 2)
    assert score.seconds > 0
    assert score.failed is None


def test_weights_count_in_fitting_and_in_judging(predictions):
    weights = torch.rand(400, generator=generator(0), dtype=torch.float64)
    weighted = Predictions(predictions.logits, predictions.labels, weights=weights)
    (score,) = rank(weighted, [TemperatureScaling], folds=3)
    expected = [
        log_loss(TemperatureScaling().fit_predictions(fit)(rest.logits), rest.labels, rest.weights)
        for fit, rest in weighted.folds(3, 0)
    ]
    np.testing.assert_allclose(score.fold_losses, expected, rtol=1e-12)


def test_every_calibrator_is_ranked_best_first(predictions):
    scores = rank(predictions)
    assert {score.calibrator for score in scores} == set(CALIBRATORS)
    losses = [score.log_loss for score in scores]
    assert losses == sorted(losses)
    assert scores[-1].calibrator is Uncalibrated
    again = rank(predictions)
    assert [(s.calibrator, s.fold_losses) for s in again] == [(s.calibrator, s.fold_losses) for s in scores]


def test_a_calibrator_that_raises_is_recorded_and_comes_last(predictions):
    scores = rank(predictions, [Refuses, Breaks, TemperatureScaling, Spoils, NeedsViews], folds=3)
    assert scores[0].calibrator is TemperatureScaling
    failed = {score.calibrator: score.failed for score in scores[1:]}
    assert failed[Refuses] == "logits must be nicer"
    assert failed[Breaks] == "ZeroDivisionError: by zero"
    assert "must be finite" in failed[Spoils]
    assert failed[NeedsViews] == "predictions must hold views, found none"
    for score in scores[1:]:
        assert score.fold_losses == ()
        assert math.isnan(score.log_loss)
        assert math.isnan(score.standard_error)
    assert next(score for score in scores if score.calibrator is Spoils).seconds > 0
    assert one_standard_error(scores).calibrator is TemperatureScaling


def test_every_fold_of_every_calibrator_is_a_step_of_the_progress_bar(predictions, monkeypatch):
    seen = []

    def track(items, description):
        seen.append((len(items), description))
        return iter(items)

    monkeypatch.setattr(select, "track", track)
    rank(predictions, [Uncalibrated, TemperatureScaling], folds=3)
    assert seen == [(6, "rank calibrators")]


def score(kind, *losses):
    return Score(kind, losses, float(np.mean(losses)), float(np.std(losses, ddof=1) / len(losses) ** 0.5), 0.1)


def test_the_simplest_within_one_standard_error():
    best = score(MatrixScaling, 0.30, 0.40, 0.50)
    close = score(VectorScaling, 0.33, 0.39, 0.51)  # 0.01 behind, give or take 0.0115
    worse = score(TemperatureScaling, 0.31, 0.41, 0.51)  # 0.01 behind in every fold
    assert one_standard_error([best, close, worse]).calibrator is VectorScaling
    assert one_standard_error([best, worse]).calibrator is MatrixScaling
    assert one_standard_error([best]) is best


def test_noise_that_all_folds_share_does_not_make_calibrators_equal():
    best = score(MatrixScaling, 0.1, 0.9, 0.5)
    behind = score(Uncalibrated, 0.2, 1.0, 0.6)
    assert behind.log_loss < best.log_loss + best.standard_error
    assert one_standard_error([best, behind]).calibrator is MatrixScaling


def test_the_order_of_simplicity():
    equal = [score(kind, 0.3, 0.4) for kind in reversed(CALIBRATORS)]
    assert one_standard_error(equal).calibrator is Uncalibrated
    assert one_standard_error(equal, (IsotonicCalibration,)).calibrator is IsotonicCalibration
    assert CALIBRATORS[:2] == (Uncalibrated, TemperatureScaling)


def test_nothing_to_choose_from(predictions):
    with pytest.raises(InputError, match="no calibrator could be fitted: logits must be nicer"):
        one_standard_error(rank(predictions, [Refuses], folds=2))
    with pytest.raises(InputError, match="no calibrator could be fitted: scores is empty"):
        one_standard_error([])


def test_bad_input(predictions):
    with pytest.raises(InputError, match="predictions must hold labels"):
        rank(Predictions(predictions.logits))
    with pytest.raises(InputError, match="k must be at least 2"):
        rank(predictions, folds=1)
    with pytest.raises(InputError, match="k must be at most 400"):
        rank(predictions, folds=401)
