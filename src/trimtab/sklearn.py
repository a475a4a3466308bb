"""Calibration for those who live in scikit-learn: any of trimtab's calibrators around any classifier."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import BaseCrossValidator, check_cv
from sklearn.utils import Tags, _safe_indexing, column_or_1d, get_tags, indexable
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, has_fit_parameter

from trimtab.calibration import Calibrator, TemperatureScaling
from trimtab.core.checks import InputError


class CalibratedClassifier(ClassifierMixin, MetaEstimatorMixin, BaseEstimator):
    """A classifier with a calibrator behind it, fitted by cross-validation or on held-out data.

    The calibrator sees scores of samples that the classifier was not fitted on: its `decision_function` where it has
    one (for two classes the scores -s/2 and s/2), else the logarithm of its `predict_proba`, zeros raised to the
    machine epsilon.

    Args:
        estimator: the classifier; logistic regression by default.
        calibrator: an unfitted calibrator that works on logits alone; `TemperatureScaling()` by default, which keeps
            the predicted classes. Margins of a linear SVM, which are no log-odds, call for `PlattScaling()`.
        cv: how to hold out: a number of stratified folds (5 by default), a splitter, an iterable of (train, test)
            indices, or ``"prefit"`` for an estimator that is already fitted, to whose data `fit` then must not be
            given. A `sklearn.frozen.FrozenEstimator` counts as fitted, too.
        ensemble: True keeps one pair of classifier and calibrator a fold and averages their probabilities: often a
            little better, and as many times slower to predict. False fits one calibrator to the folds' held-out
            scores together, and one classifier to all data. ``"auto"``, the default, is True as in scikit-learn,
            unless the held-out samples of a fold are all of one class, which cannot calibrate it.

    Attributes:
        classes_: class labels, sorted.
        estimators_, calibrators_: fitted, in pairs: one pair a fold, or one.
        n_features_in_, feature_names_in_: of the classifier, where it has them.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> from sklearn.metrics import log_loss
        >>> from sklearn.model_selection import train_test_split
        >>> from sklearn.naive_bayes import GaussianNB
        >>> from trimtab.calibration import EnsembleTemperatureScaling
        >>> from trimtab.sklearn import CalibratedClassifier
        >>> X, X_test, y, y_test = train_test_split(*load_digits(return_X_y=True), random_state=0)
        >>> classifier = CalibratedClassifier(GaussianNB(), EnsembleTemperatureScaling()).fit(X, y)
        >>> alone = GaussianNB().fit(X, y)
        >>> log_loss(y_test, classifier.predict_proba(X_test)) < 0.5 * log_loss(y_test, alone.predict_proba(X_test))
        True
    """

    classes_: np.ndarray
    estimators_: list[Any]
    calibrators_: list[Calibrator]
    n_features_in_: int
    feature_names_in_: np.ndarray

    def __init__(
        self,
        estimator: Any = None,
        calibrator: Calibrator | None = None,
        *,
        cv: int | BaseCrossValidator | Iterable[Any] | Literal["prefit"] = 5,
        ensemble: bool | Literal["auto"] = "auto",
    ) -> None:
        self.estimator = estimator
        self.calibrator = calibrator
        self.cv = cv
        self.ensemble = ensemble

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit classifier and calibrator.

        Args:
            X: samples, whatever the classifier takes.
            y: class labels, numbers or strings, at least two different ones.
            sample_weight: weights >= 0, for the calibrator and, if it takes them, for the classifier.

        Raises:
            InputError: the calibrator is none, or the held-out samples of a fold cannot calibrate it.
        """
        calibrator = TemperatureScaling() if self.calibrator is None else self.calibrator
        if not isinstance(calibrator, Calibrator) or calibrator.needs:
            raise InputError(f"calibrator must be a Calibrator that works on logits alone, got {calibrator!r}")
        X, y = indexable(X, y)
        check_classification_targets(y)
        y = column_or_1d(y, warn=True)
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        estimator = LogisticRegression() if self.estimator is None else self.estimator
        if isinstance(estimator, FrozenEstimator) or (isinstance(self.cv, str) and self.cv == "prefit"):
            self.classes_ = np.asarray(estimator.classes_)
            held_out = _HeldOut(estimator, _scores(estimator, X), y, weights)
            self._keep([(estimator, held_out.calibrate(calibrator))])
            return self
        self.classes_ = np.unique(y)
        if len(self.classes_) < 2:
            raise InputError(f"y must hold at least two classes, found {len(self.classes_)} in {len(y)} samples")
        folds = [
            _hold_out(clone(estimator), X, y, weights, train, test)
            for train, test in check_cv(self.cv, y, classifier=True).split(X, y)
        ]
        if self.ensemble is True or (self.ensemble == "auto" and all(fold.several_classes for fold in folds)):
            self._keep([(fold.estimator, fold.calibrate(calibrator)) for fold in folds])
            return self
        for number, fold in enumerate(folds):
            if len(fold.estimator.classes_) < len(self.classes_):
                raise InputError(f"fold {number} leaves a class out of training, which ensemble=False cannot mend")
        estimator = _fit(clone(estimator), X, y, weights)
        whole = _HeldOut(
            estimator,
            np.concatenate([fold.scores for fold in folds]),
            np.concatenate([fold.y for fold in folds]),
            None if weights is None else np.concatenate([fold.weights for fold in folds]),
        )
        self._keep([(estimator, whole.calibrate(calibrator))])
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Calibrated probabilities (n, c), in the order of `classes_`."""
        check_is_fitted(self)
        total: np.ndarray = np.zeros(len(self.classes_))
        for estimator, calibrator in zip(self.estimators_, self.calibrators_, strict=True):
            probs = calibrator.predict_proba(_scores(estimator, X))
            columns = np.zeros((len(probs), len(self.classes_)))
            columns[:, np.searchsorted(self.classes_, estimator.classes_)] = probs
            total = total + columns
        return total / len(self.estimators_)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of every sample."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        inner = get_tags(LogisticRegression() if self.estimator is None else self.estimator).input_tags
        tags.input_tags.pairwise, tags.input_tags.sparse = inner.pairwise, inner.sparse
        return tags

    def _keep(self, pairs: list[tuple[Any, Calibrator]]) -> None:
        self.estimators_, self.calibrators_ = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self.estimators_[0], name):
                setattr(self, name, getattr(self.estimators_[0], name))


class _HeldOut(NamedTuple):
    """A classifier and what it says of samples that it was not fitted on."""

    estimator: Any
    scores: np.ndarray
    y: np.ndarray
    weights: np.ndarray | None

    @property
    def several_classes(self) -> bool:
        return len(np.unique(self.y if self.weights is None else self.y[self.weights > 0])) > 1

    def calibrate(self, calibrator: Calibrator) -> Calibrator:
        """A copy of `calibrator`, fitted to the samples whose class the classifier knows."""
        classes = self.estimator.classes_
        known = np.isin(self.y, classes)
        if not known.any():
            raise InputError("y must hold classes that the estimator knows, none of the held-out samples does")
        labels = torch.from_numpy(np.searchsorted(classes, self.y[known]))
        weights = None if self.weights is None else self.weights[known]
        return copy.deepcopy(calibrator).fit(self.scores[known], labels, weights=weights)


def _hold_out(estimator: Any, X: Any, y: np.ndarray, weights: np.ndarray | None, train: Any, test: Any) -> _HeldOut:
    """The classifier fitted to the rows `train`, and its scores of the rows `test`."""
    of_train, of_test = (None, None) if weights is None else (weights[train], weights[test])
    _fit(estimator, _safe_indexing(X, train), y[train], of_train)
    return _HeldOut(estimator, _scores(estimator, _safe_indexing(X, test)), y[test], of_test)


def _fit(estimator: Any, X: Any, y: np.ndarray, weights: np.ndarray | None) -> Any:
    if weights is None:
        return estimator.fit(X, y)
    if has_fit_parameter(estimator, "sample_weight"):
        return estimator.fit(X, y, sample_weight=weights)
    warnings.warn(
        f"{type(estimator).__name__} takes no sample_weight: only the calibrator is weighted", UserWarning, stacklevel=3
    )
    return estimator.fit(X, y)


def _scores(estimator: Any, X: Any) -> np.ndarray:
    """What the classifier says of `X`, as logits (n, c) in float64, columns in the order of its `classes_`."""
    if hasattr(estimator, "decision_function"):
        scores = np.asarray(estimator.decision_function(X), dtype=float)
        scores = np.stack([-scores / 2, scores / 2], 1) if scores.ndim == 1 else scores
    else:
        probs = np.asarray(estimator.predict_proba(X))
        scores = np.log(np.maximum(probs, np.finfo(probs.dtype).eps), dtype=float)
    if scores.shape[1] != len(estimator.classes_):
        raise InputError(
            f"estimator must give one score a class, {type(estimator).__name__} gives {scores.shape[1]} for "
            f"{len(estimator.classes_)} classes (an SVC needs decision_function_shape='ovr')"
        )
    return scores
