"""Platt scaling against scikit-learn's sigmoid and logistic regression."""

import pytest
import torch
from score_sets import generator, overconfident
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from trimtab.calibration import PlattScaling


@pytest.mark.filterwarnings("ignore:Since FrozenEstimator")
@pytest.mark.parametrize("weighted", [False, True])
def test_two_classes_as_in_scikit_learn(weighted):
    logits, labels = overconfident(400, 2)
    weights = torch.rand(400, generator=generator(1), dtype=torch.float64) if weighted else None
    margin = (logits[:, 1] - logits[:, 0])[:, None].numpy()
    peer = LogisticRegression().fit(margin, labels.numpy())
    peer.coef_[:], peer.intercept_[:] = 1.0, 0.0  # its decision function is the margin itself
    sigmoid = CalibratedClassifierCV(FrozenEstimator(peer), method="sigmoid", ensemble=False)
    sigmoid.fit(margin, labels.numpy(), sample_weight=None if weights is None else weights.numpy())
    fitted = sigmoid.calibrated_classifiers_[0].calibrators[0]
    calibrator = PlattScaling().fit(logits, labels, weights=weights)
    assert float(calibrator.slope) == pytest.approx(-fitted.a_, abs=1e-4)
    assert float(calibrator.bias) == pytest.approx(-fitted.b_, abs=1e-4)


def test_without_smoothing_it_is_logistic_regression():
    logits, labels = overconfident(400, 2)
    margin = (logits[:, 1] - logits[:, 0])[:, None].numpy()
    peer = LogisticRegression(C=torch.inf, tol=1e-10).fit(margin, labels.numpy())
    calibrator = PlattScaling(smoothing=False).fit(logits, labels)
    assert float(calibrator.slope) == pytest.approx(peer.coef_[0, 0], abs=1e-5)
    assert float(calibrator.bias) == pytest.approx(peer.intercept_[0], abs=1e-5)


def test_more_classes_are_each_against_the_rest():
    logits, labels = overconfident(400, 4)
    calibrator = PlattScaling(smoothing=False).fit(logits, labels)
    p = logits.softmax(1)
    odds = (p / (1 - p)).log()
    for k in range(4):
        peer = LogisticRegression(C=torch.inf, tol=1e-10).fit(odds[:, k : k + 1].numpy(), (labels == k).numpy())
        assert float(calibrator.slope[k]) == pytest.approx(peer.coef_[0, 0], abs=1e-4)
        assert float(calibrator.bias[k]) == pytest.approx(peer.intercept_[0], abs=1e-4)
    q = (calibrator.slope * odds + calibrator.bias).sigmoid()
    assert torch.allclose(calibrator.predict_proba(logits), q / q.sum(1, keepdim=True))


def test_a_constant_added_to_a_row_changes_nothing():
    logits, labels = overconfident(300, 3)
    moved = logits + torch.randn(300, 1, generator=generator(1), dtype=torch.float64)
    assert torch.allclose(
        PlattScaling().fit(moved, labels)(moved), PlattScaling().fit(logits, labels)(logits), atol=1e-6
    )


def test_smoothed_targets_are_the_limit_on_separable_data():
    logits = torch.tensor([[3.0, 0.0]] * 8 + [[0.0, 3.0]] * 3, dtype=torch.float64)
    labels = torch.tensor([0] * 8 + [1] * 3)
    p = PlattScaling().fit(logits, labels).predict_proba(logits)[:, 1]
    assert p[0] == pytest.approx(1 / 10, abs=1e-6)
    assert p[-1] == pytest.approx(4 / 5, abs=1e-6)
