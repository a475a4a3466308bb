"""Logistic regression that is trained on the metric that counts: AnyLoss's single-layer model, for scikit-learn.

As in the authors' experiments: weights start at zero, and descend the gradient of the loss of all rows a fixed number
of times. Standardise the features first, in a pipeline with `StandardScaler`: one learning rate serves them all.

Han, Moniz, Chawla (KDD 2024), arXiv 2405.14745. Where the authors' gradient is not the true one (it is four times as
long for the geometric mean), the true one is taken.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from trimtab.core import checks
from trimtab.core.checks import InputError
from trimtab.core.threads import one_thread
from trimtab.losses import confusion


class AnyLossLogistic(ClassifierMixin, BaseEstimator):
    """A linear classifier of two classes that maximises a metric of its soft confusion matrix.

    The second of the sorted classes is the positive one.

    Args:
        metric: what `AnyLoss` takes.
        beta: weight of recall in ``"fbeta"``, > 0.
        learning_rate: > 0; the authors take 0.01 for F1 and 0.005 for the others (0.02 gives their steps for the
            geometric mean).
        n_iter: steps of gradient descent, >= 1.
        amplification: L, > 0; 73 as the authors.
        fit_intercept: whether a constant is added to the features.

    Attributes:
        coef_: (1, d) weights.
        intercept_: (1,) the constant, 0 without one.
        loss_curve_: the loss before each step.
        classes_: the two classes, sorted.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.

    Example:
        >>> from sklearn.datasets import make_classification
        >>> from sklearn.metrics import f1_score
        >>> from trimtab.losses import AnyLossLogistic
        >>> X, y = make_classification(500, weights=[0.9], class_sep=0.7, random_state=0)
        >>> fitted = AnyLossLogistic(metric="f1").fit(X, y)
        >>> round(f1_score(y, fitted.predict(X)), 1)
        0.8

    Reference:
        Han et al., AnyLoss: Transforming Classification Metrics into Loss Functions, KDD 2024, arXiv 2405.14745.
    """

    classes_: np.ndarray
    coef_: np.ndarray
    intercept_: np.ndarray
    loss_curve_: list[float]

    def __init__(
        self,
        *,
        metric: confusion.Metric = "f1",
        beta: float = 1.0,
        learning_rate: float = 0.01,
        n_iter: int = 1000,
        amplification: float = confusion.AMPLIFICATION,
        fit_intercept: bool = True,
    ) -> None:
        self.metric = metric
        self.beta = beta
        self.learning_rate = learning_rate
        self.n_iter = n_iter
        self.amplification = amplification
        self.fit_intercept = fit_intercept

    @one_thread()
    def fit(self, X: Any, y: Any) -> Self:
        """Descend from zero.

        Args:
            X: (n, d) features, standardised.
            y: (n,) labels of two classes.

        Raises:
            InputError: an argument is out of its range, or y does not hold two classes.
        """
        metric = self.metric if callable(self.metric) else checks.one_of(self.metric, "metric", confusion.Name)
        beta = checks.number(self.beta, "beta", low=0, low_open=True)
        step = checks.number(self.learning_rate, "learning_rate", low=0, low_open=True)
        amplification = checks.number(self.amplification, "amplification", low=0, low_open=True)
        n_iter = checks.integer(self.n_iter, "n_iter", low=1)
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, positive = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            kind = type_of_target(y)
            raise InputError(
                f"Only binary classification is supported. The type of the target is {kind}: y must hold two classes, "
                f"found {len(self.classes_)} class{'' if len(self.classes_) == 1 else 'es'}"
            )
        features = torch.from_numpy(np.hstack([X, np.ones((len(X), 1))]) if self.fit_intercept else X)
        labels = torch.from_numpy(positive).double()
        theta = torch.zeros(features.shape[1], dtype=torch.float64)
        self.loss_curve_ = []
        for _ in range(n_iter):
            theta.requires_grad_()
            p = torch.sigmoid(features @ theta)
            counted = confusion.soft_confusion(p, labels, labels.sum(), amplification)
            loss = 1 - confusion.score(counted, metric, beta)
            (slope,) = torch.autograd.grad(loss, theta)
            theta = theta.detach() - step * slope
            self.loss_curve_.append(loss.item())
        weights = theta.numpy()
        self.coef_ = weights[None, : X.shape[1]]
        self.intercept_ = weights[X.shape[1] :] if self.fit_intercept else np.zeros(1)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits (n,) of the positive class."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return (X @ self.coef_[0]) + self.intercept_[0]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n, 2), which are not calibrated, in the order of `classes_`."""
        p = expit(self.decision_function(X))
        return np.stack([1 - p, p], 1)

    def predict(self, X: Any) -> np.ndarray:
        """The positive class where its probability exceeds 1/2."""
        chosen = (self.decision_function(X) > 0).astype(int)
        return self.classes_[chosen]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags
