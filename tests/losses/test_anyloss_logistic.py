"""AnyLossLogistic (70-anyloss): the authors' single-layer model, in scikit-learn's terms."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import make_classification
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from trimtab.core.checks import InputError
from trimtab.losses import AnyLossLogistic

GOLDEN = sorted((Path(__file__).parents[1] / "golden" / "70-anyloss").glob("*.npz"))


@pytest.mark.golden
def test_the_authors_descent():
    checked = 0
    for path in GOLDEN:
        with np.load(path) as arrays:
            for case, metric in (name.split("/")[:2] for name in arrays.files if name.endswith("/theta")):
                fitted = AnyLossLogistic(
                    metric=metric,
                    learning_rate=float(arrays[f"{case}/lr"]),
                    n_iter=int(arrays[f"{case}/iters"]),
                    amplification=float(arrays[f"{case}/L"]),
                    fit_intercept=False,
                ).fit(arrays[f"{case}/X"], arrays[f"{case}/y"])
                there = f"{case}/{metric}/"
                np.testing.assert_allclose(fitted.loss_curve_, arrays[there + "loss_per_iter"], rtol=1e-8)
                np.testing.assert_allclose(fitted.coef_[0], arrays[there + "theta"], rtol=1e-8)
                checked += 1
    assert checked


@pytest.fixture
def _global_random_state_is_untouched():
    """scikit-learn's own checks may move NumPy's global random state: it is put back."""
    before = np.random.get_state()  # noqa: NPY002
    yield
    np.random.set_state(before)  # noqa: NPY002


@pytest.mark.bad_input
@pytest.mark.usefixtures("_global_random_state_is_untouched")
@parametrize_with_checks([AnyLossLogistic(n_iter=100, learning_rate=0.1)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_it_alone_brings_scikit_learn():
    code = "import sys, trimtab.losses; assert 'sklearn' not in sys.modules; trimtab.losses.AnyLossLogistic"
    subprocess.run([sys.executable, "-c", code], check=True)


def unbalanced(seed=0):
    return make_classification(
        1000, 10, n_informative=4, n_redundant=2, weights=[0.9], class_sep=0.8, flip_y=0.02, random_state=seed
    )


def test_the_metric_rises_and_the_threshold_is_a_half():
    X, y = unbalanced()
    names = np.array(["common", "rare"])[y]
    model = make_pipeline(StandardScaler(), AnyLossLogistic(n_iter=200)).fit(X, names)
    curve = model[-1].loss_curve_
    assert curve[-1] < curve[0]
    p = model.predict_proba(X)
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_array_equal(model.predict(X) == "rare", p[:, 1] > 0.5)
    assert f1_score(y, p[:, 1] > 0.5) == pytest.approx(1 - curve[-1], abs=0.1)


def test_another_metric_gives_another_model():
    X, y = unbalanced()
    few, many = (AnyLossLogistic(metric="fbeta", beta=beta, n_iter=300).fit(X, y).predict(X) for beta in (0.3, 3.0))
    assert few.sum() < many.sum()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"metric": "auc"}, "metric must be one of"),
        ({"n_iter": 0}, "n_iter must be at least 1"),
        ({"learning_rate": 0}, "learning_rate must lie in"),
        ({"amplification": -1}, "amplification must lie in"),
        ({"beta": 0}, "beta must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(settings, told):
    with pytest.raises(InputError, match=told):
        AnyLossLogistic(**settings).fit(*unbalanced())


@pytest.mark.bad_input
def test_two_classes_it_must_be():
    X, y = unbalanced()
    with pytest.raises(InputError, match=r"Only binary classification is supported\..*found 3 classes"):
        AnyLossLogistic().fit(X, np.arange(len(y)) % 3)
    with pytest.raises(InputError, match="y must hold two classes, found 1 class"):
        AnyLossLogistic().fit(X, np.zeros(len(y)))
