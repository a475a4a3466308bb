"""`CalibratedClassifier` in scikit-learn's own terms."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from sklearn.datasets import make_classification
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from trimtab.calibration import (
    CALIBRATORS,
    Calibrator,
    HCalibration,
    IsotonicCalibration,
    PlattScaling,
    TemperatureScaling,
    VectorScaling,
)
from trimtab.core.checks import InputError
from trimtab.sklearn import CalibratedClassifier

pytestmark = pytest.mark.filterwarnings("ignore:the best temperature lies outside")


@pytest.fixture
def _global_random_state_is_untouched():
    """scikit-learn's own checks may move NumPy's global random state: it is put back."""
    before = np.random.get_state()  # noqa: NPY002
    yield
    np.random.set_state(before)  # noqa: NPY002


@pytest.mark.bad_input
@pytest.mark.usefixtures("_global_random_state_is_untouched")
@parametrize_with_checks(
    [
        CalibratedClassifier(),
        CalibratedClassifier(LogisticRegression(C=1), PlattScaling(), cv=3),
        CalibratedClassifier(GaussianNB(), VectorScaling(), cv=3, ensemble=False),
    ]
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def blobs(c=3, n=600, seed=0):
    X, y = make_classification(
        n, n_features=8, n_informative=6, n_classes=c, n_clusters_per_class=1, class_sep=0.8, random_state=seed
    )
    return (X[: n // 2], y[: n // 2]), (X[n // 2 :], y[n // 2 :])


@pytest.mark.parametrize("c", [2, 3])
@pytest.mark.parametrize("ensemble", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in CALIBRATORS if not kind.needs], ids=lambda kind: kind.__name__)
def test_probabilities(c, ensemble, kind):
    (X, y), (X_test, _) = blobs(c)
    calibrator = kind(epochs=4) if kind is HCalibration else kind()
    classifier = CalibratedClassifier(GaussianNB(), calibrator, cv=3, ensemble=ensemble).fit(X, y)
    p = classifier.predict_proba(X_test)
    assert p.shape == (300, c)
    np.testing.assert_allclose(p.sum(1), 1)
    assert len(classifier.estimators_) == len(classifier.calibrators_) == (3 if ensemble else 1)
    np.testing.assert_array_equal(classifier.predict(X_test), classifier.classes_[p.argmax(1)])


@pytest.mark.parametrize("model", [GaussianNB(), LinearSVC(), SVC()])
@pytest.mark.parametrize("c", [2, 3])
def test_it_calibrates(model, c):
    (X, y), (X_test, y_test) = blobs(c, 2000)
    calibrated = CalibratedClassifier(model, PlattScaling()).fit(X, y)
    plain = calibrated.set_params(calibrator=CALIBRATORS[0]()).fit(X, y).predict_proba(X_test)
    better = CalibratedClassifier(model, PlattScaling()).fit(X, y).predict_proba(X_test)
    assert log_loss(y_test, better) < log_loss(y_test, plain)


def test_ensemble_by_hand():
    (X, y), (X_test, _) = blobs()
    folds = list(StratifiedKFold(4).split(X, y))
    expected = np.mean(
        [
            IsotonicCalibration()
            .fit(model.decision_function(X[test]), y[test])
            .predict_proba(model.decision_function(X_test))
            for train, test in folds
            for model in [LogisticRegression().fit(X[train], y[train])]
        ],
        axis=0,
    )
    for cv in (4, StratifiedKFold(4), folds):
        classifier = CalibratedClassifier(LogisticRegression(), IsotonicCalibration(), cv=cv).fit(X, y)
        np.testing.assert_allclose(classifier.predict_proba(X_test), expected)


def test_out_of_fold_by_hand():
    (X, y), (X_test, _) = blobs()
    scores = np.zeros((len(X), 3))
    for train, test in StratifiedKFold(4).split(X, y):
        scores[test] = LogisticRegression().fit(X[train], y[train]).decision_function(X[test])
    calibrator = VectorScaling().fit(scores, y)
    expected = calibrator.predict_proba(LogisticRegression().fit(X, y).decision_function(X_test))
    classifier = CalibratedClassifier(LogisticRegression(), VectorScaling(), cv=4, ensemble=False).fit(X, y)
    np.testing.assert_allclose(classifier.predict_proba(X_test), expected, atol=1e-6)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_fitted_classifier_is_not_fitted_again(freeze):
    (X, y), (X_test, _) = blobs()
    model = LogisticRegression().fit(X, y)
    coefficients = model.coef_.copy()
    classifier = (
        CalibratedClassifier(FrozenEstimator(model), cv=3) if freeze else CalibratedClassifier(model, cv="prefit")
    )
    classifier.fit(X[:100], y[:100])
    expected = TemperatureScaling().fit(model.decision_function(X[:100]), y[:100])
    np.testing.assert_allclose(
        classifier.predict_proba(X_test), expected.predict_proba(model.decision_function(X_test))
    )
    np.testing.assert_array_equal(model.coef_, coefficients)
    with pytest.raises(InputError, match="y must hold classes that the estimator knows"):
        classifier.fit(X, y + 10)


def test_two_classes_are_one_score():
    """softmax of -s/2 and s/2 is the sigmoid of s: uncalibrated logistic regression stays what it is."""
    (X, y), (X_test, _) = blobs(2)
    model = LogisticRegression().fit(X, y)
    classifier = CalibratedClassifier(model, CALIBRATORS[0](), cv="prefit").fit(X, y)
    np.testing.assert_allclose(classifier.predict_proba(X_test), model.predict_proba(X_test))


def test_strings_and_unsorted_numbers():
    (X, y), (X_test, y_test) = blobs()
    numbers = CalibratedClassifier().fit(X, y)
    names = np.array(["zebra", "ant", "cow"])
    strings = CalibratedClassifier().fit(X, names[y])
    assert strings.classes_.tolist() == ["ant", "cow", "zebra"]
    np.testing.assert_allclose(strings.predict_proba(X_test)[:, [2, 0, 1]], numbers.predict_proba(X_test), atol=1e-4)
    assert strings.score(X_test, names[y_test]) == pytest.approx(numbers.score(X_test, y_test), abs=0.01)


def test_a_fold_that_leaves_a_class_out():
    """The fold's classifier cannot know the class: the others of the ensemble do."""
    (X, y), (X_test, _) = blobs()
    third = np.arange(len(X)) % 3
    folds = [(np.flatnonzero(third != i), np.flatnonzero(third == i)) for i in range(3)]
    folds[2] = np.flatnonzero((third != 2) & (y != 2)), np.flatnonzero((third == 2) | (y == 2))
    classifier = CalibratedClassifier(cv=folds).fit(X, y)
    assert [len(model.classes_) for model in classifier.estimators_] == [3, 3, 2]
    p = classifier.predict_proba(X_test)
    np.testing.assert_allclose(p.sum(1), 1)
    with pytest.raises(InputError, match="fold 2 leaves a class out of training"):
        CalibratedClassifier(cv=folds, ensemble=False).fit(X, y)


def test_folds_that_cannot_calibrate_are_joined_by_default():
    rows = [0, 1, 2, 0, 1, 2]
    X = np.random.default_rng(0).normal(size=(6, 2)) + np.eye(3)[rows][:, :2]
    each_alone = [(np.setdiff1d(np.arange(6), [i]), [i]) for i in range(6)]
    assert len(CalibratedClassifier(cv=each_alone).fit(X, rows).estimators_) == 1
    with pytest.raises(InputError, match="labels must hold at least two classes to calibrate, found only class 0"):
        CalibratedClassifier(cv=each_alone, ensemble=True).fit(X, rows)


def test_weights_reach_both_and_a_classifier_that_takes_none_is_named():
    (X, y), (X_test, _) = blobs()
    weights = np.random.default_rng(0).integers(0, 3, len(X))
    folds = list(StratifiedKFold(3).split(X, y))
    repeated = np.repeat(np.arange(len(X)), weights)
    copies = [(np.flatnonzero(np.isin(repeated, a)), np.flatnonzero(np.isin(repeated, b))) for a, b in folds]
    model = GaussianNB()
    weighted = CalibratedClassifier(model, PlattScaling(), cv=folds).fit(X, y, sample_weight=weights)
    copied = CalibratedClassifier(model, PlattScaling(), cv=copies).fit(X[repeated], y[repeated])
    np.testing.assert_allclose(weighted.predict_proba(X_test), copied.predict_proba(X_test), atol=1e-6)
    with pytest.warns(
        UserWarning, match="KNeighborsClassifier takes no sample_weight: only the calibrator is weighted"
    ):
        CalibratedClassifier(KNeighborsClassifier()).fit(X, y, sample_weight=weights)


def test_it_works_where_scikit_learn_puts_it():
    (X, y), _ = blobs()
    chain = make_pipeline(StandardScaler(), CalibratedClassifier(cv=3))
    assert cross_val_score(chain, X, y, scoring="neg_log_loss", cv=3).mean() > -1
    search = GridSearchCV(
        CalibratedClassifier(GaussianNB(), cv=3),
        {"calibrator": [CALIBRATORS[0](), PlattScaling()]},
        scoring="neg_log_loss",
    ).fit(X, y)
    assert isinstance(search.best_params_["calibrator"], PlattScaling)


class NeedsFeatures(Calibrator):
    needs = frozenset({"features"})


@pytest.mark.bad_input
def test_bad_input():
    (X, y), _ = blobs()
    for calibrator in (NeedsFeatures(), TemperatureScaling, "sigmoid"):
        with pytest.raises(InputError, match="calibrator must be a Calibrator that works on logits alone"):
            CalibratedClassifier(calibrator=calibrator).fit(X, y)
    with pytest.raises(InputError, match="y must hold at least two classes, found 1 in 300 samples"):
        CalibratedClassifier().fit(X, 0 * y)
    four = blobs(4)[0]
    with pytest.raises(InputError, match="SVC gives 6 for 4 classes"):
        CalibratedClassifier(SVC(decision_function_shape="ovo")).fit(*four)
    with pytest.raises(ValueError, match="Negative values"):
        CalibratedClassifier().fit(X, y, sample_weight=-np.ones(len(X)))


def test_the_calibrator_that_was_given_stays_unfitted():
    (X, y), _ = blobs()
    calibrator = TemperatureScaling()
    CalibratedClassifier(calibrator=calibrator).fit(X, y)
    assert calibrator.counts is None


def test_probabilities_of_zero_do_not_break_the_logarithm():
    (X, y), (X_test, _) = blobs()
    model = KNeighborsClassifier(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = CalibratedClassifier(model, IsotonicCalibration()).fit(X, y).predict_proba(X_test)
    assert p.min() > 0


def test_importing_trimtab_imports_neither_torch_nor_scikit_learn():
    code = (
        "import sys, trimtab; assert not {'torch', 'sklearn'} & set(sys.modules); trimtab.sklearn.CalibratedClassifier"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
