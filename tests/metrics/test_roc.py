"""ROC curves and their area against scikit-learn and against all pairs, ties included."""

import definitions
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab import metrics
from trimtab.core.checks import InputError
from trimtab.metrics import ranking

score = st.sampled_from([-1.0, 0.0, 0.5]) | st.floats(-3, 3)
scored = st.builds(
    lambda a, b, rest: [(a, True), *rest, (b, False)],
    score,
    score,
    st.lists(st.tuples(score, st.booleans()), max_size=30),
)


@given(pairs=scored)
def test_area_and_curve_are_scikit_learns(pairs):
    from sklearn.metrics import roc_auc_score, roc_curve

    scores, positives = (np.array(column) for column in zip(*pairs))
    area = metrics.roc_auc(scores, positives)
    assert area == pytest.approx(roc_auc_score(positives, scores), abs=1e-12)
    assert area == pytest.approx(definitions.auc(scores[positives], scores[~positives]), abs=1e-12)
    false, true, thresholds = roc_curve(positives, scores, drop_intermediate=False)
    ours = metrics.roc_curve(torch.tensor(scores), torch.tensor(positives))
    np.testing.assert_allclose(ours.false_positive_rate, false, atol=1e-12)
    np.testing.assert_allclose(ours.true_positive_rate, true, atol=1e-12)
    np.testing.assert_allclose(ours.threshold, thresholds)
    assert float(torch.trapezoid(ours.true_positive_rate, ours.false_positive_rate)) == pytest.approx(area, abs=1e-12)


@given(pairs=scored, far=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_tar_at_far_is_the_best_threshold_that_keeps_to_far(pairs, far):
    scores, positives = (np.array(column) for column in zip(*pairs))
    accepted = [scores >= threshold for threshold in (*scores, np.inf)]
    expected = max(float(a[positives].mean()) for a in accepted if a[~positives].mean() <= far)
    assert metrics.tar_at_far(scores, positives, far) == pytest.approx(expected, abs=1e-12)
    metric = metrics.TarAtFar(far)
    metric.update(scores[:1], positives[:1])
    metric.update(scores[1:], positives[1:])
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-12)


@given(pairs=scored)
def test_batches_equal_one_shot(pairs):
    scores, positives = (torch.tensor(column) for column in zip(*pairs))
    scores = scores.double()
    cut = len(scores) // 2
    for kind, function in ((metrics.RocAuc, metrics.roc_auc), (metrics.RocCurve, metrics.roc_curve)):
        metric, other = kind(), kind()
        metric.update(scores[:cut], positives[:cut].int())
        other.update(scores[cut:], positives[cut:])
        metric.merge_state(other)
        for found, expected in zip(np.atleast_1d(metric.compute()), np.atleast_1d(function(scores, positives))):
            np.testing.assert_allclose(found, expected)


@given(pairs=scored, data=st.data())
def test_weights_are_repetitions(pairs, data):
    scores, positives = (torch.tensor(column) for column in zip(*pairs))
    n = len(scores)
    drawn = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
    weights = torch.bincount(drawn, minlength=n)[None].to(torch.uint8)
    repeated = ranking.area_of(scores[drawn], positives[drawn])
    torch.testing.assert_close(ranking.area_of(scores, positives, weights), repeated, equal_nan=True)


@pytest.mark.bad_input
def test_bad_input_is_refused():
    scores = torch.tensor([0.1, 0.2, 0.3])
    for s, positives, message in (
        (scores, torch.tensor([True, True, True]), "positives must hold both kinds, all 3 are True"),
        (scores, torch.tensor([0, 0, 0]), "positives must hold both kinds, all 3 are False"),
        (scores, torch.tensor([0, 1, 2]), r"positives must lie in 0..1, found 2 at row 2"),
        (scores, torch.tensor([0.0, 1.0, 1.0]), "positives must be integer class indices, got float32"),
        (scores, torch.tensor([0, 1]), "positives must have 3 entries"),
        (torch.tensor([0.1, torch.nan, 0.3]), torch.tensor([0, 1, 1]), "scores must be finite, found nan at row 1"),
        (torch.tensor([1, 2, 3]), torch.tensor([0, 1, 1]), "scores must be floating point"),
        (scores[:0], torch.tensor([]).long(), "scores must be floating point of shape"),
    ):
        for function in (metrics.roc_auc, metrics.roc_curve, metrics.tar_at_far):
            with pytest.raises(InputError, match=message):
                function(s, positives)
    with pytest.raises(InputError, match=r"far must lie in \[0, 1\], got 2"):
        metrics.tar_at_far(scores, torch.tensor([0, 1, 1]), far=2.0)
