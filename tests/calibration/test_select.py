"""Ranking by cross-validation, and the choice of the simplest that is as good as the best."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from kinds import FIELDS, fit, quick
from score_sets import generator, log_loss, overconfident

from trimtab import Predictions
from trimtab.calibration import (
    CALIBRATORS,
    Calibrator,
    HCalibration,
    HistogramBinning,
    IsotonicCalibration,
    MatrixScaling,
    TemperatureScaling,
    Uncalibrated,
    VectorScaling,
    select,
)
from trimtab.calibration.select import Score, able, one_standard_error, rank
from trimtab.core.checks import InputError
from trimtab.core.progress import OutOfTime, limit, track

INSTANT = (Uncalibrated, HistogramBinning, IsotonicCalibration)  # no search, nothing to interrupt


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


@pytest.fixture
def quickly(monkeypatch):
    """The calibrators of the stage, with little training."""
    kinds = tuple(quick(kind) for kind in CALIBRATORS)
    monkeypatch.setattr(select, "CALIBRATORS", kinds)
    return kinds


def test_every_calibrator_is_ranked_best_first(predictions, quickly):
    scores = rank(predictions)
    assert {score.calibrator for score in scores} == {kind for kind in quickly if not kind.needs}
    losses = [score.log_loss for score in scores]
    assert losses == sorted(losses)
    assert not any(score.failed for score in scores)
    again = rank(predictions)
    assert [(s.calibrator, s.fold_losses) for s in again] == [(s.calibrator, s.fold_losses) for s in scores]


@pytest.mark.filterwarnings("ignore:SDM found no region")
def test_what_predictions_hold_decides_who_is_ranked(predictions, quickly):
    held = {name: make(predictions.logits) for name, make in FIELDS.items()}
    for names in ((), ("features",), ("views",), ("features", "views")):
        some = Predictions(predictions.logits, predictions.labels, **{name: held[name] for name in names})
        assert able(some) == [kind for kind in quickly if kind.needs <= set(names)]
    scores = rank(some, folds=2)
    assert {score.calibrator for score in scores} == set(quickly)
    assert not any(score.failed for score in scores)


class Endless(Calibrator):
    """One whose training ends when the clock does."""

    def _fit(self, logits, labels, weights):
        for _ in track(itertools.count(), "endless", total=1):
            pass


def clock(monkeypatch):
    """Every look at the time takes a second of it."""
    seconds = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))


def test_who_is_not_through_in_time_has_failed(predictions, monkeypatch):
    clock(monkeypatch)
    scores = rank(predictions, [Uncalibrated, Endless, TemperatureScaling], folds=3, max_seconds=100)
    assert [score.calibrator for score in scores] == [Uncalibrated, Endless, TemperatureScaling]
    assert scores[0].failed is None
    for score in scores[1:]:
        assert score.failed == "not fitted within the 100 s that all calibrators had together"
        assert score.fold_losses == ()
    assert one_standard_error(scores).calibrator is Uncalibrated


def test_those_that_train_wait_for_the_others(predictions, monkeypatch):
    clock(monkeypatch)
    slow = quick(HCalibration)
    scores = rank(predictions, [slow, MatrixScaling], folds=3, max_seconds=0)
    assert [score.calibrator for score in scores] == [MatrixScaling, slow]
    assert scores[0].failed is None


@pytest.mark.parametrize("first", [TemperatureScaling, VectorScaling])
def test_the_first_gets_the_time_that_it_takes(predictions, monkeypatch, first):
    unlimited = rank(predictions, [first], folds=3)
    clock(monkeypatch)
    scores = rank(predictions, [first, MatrixScaling, Uncalibrated], folds=3, max_seconds=0)
    assert scores[0].calibrator is first
    assert scores[0].fold_losses == unlimited[0].fold_losses
    assert all("not fitted within the 0 s" in score.failed for score in scores[1:])


def test_time_enough_changes_nothing(predictions):
    kinds = [Uncalibrated, TemperatureScaling, VectorScaling]
    losses = [score.fold_losses for score in rank(predictions, kinds, max_seconds=1e6)]
    assert losses == [score.fold_losses for score in rank(predictions, kinds)]


def test_time_that_the_caller_has_no_more_of_stops_the_ranking(predictions):
    with limit(-1), pytest.raises(OutOfTime):
        rank(predictions, [Uncalibrated])


@pytest.mark.parametrize("kind", [kind for kind in CALIBRATORS if kind not in INSTANT], ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore:SDM found no region")
def test_every_fit_that_searches_keeps_the_time(kind):
    logits, labels = overconfident(100, 3)
    with limit(-1), pytest.raises(OutOfTime):
        fit(kind, logits, labels)
    fit(kind, logits, labels)


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
