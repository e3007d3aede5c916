"""Array estimators of features, in scikit-learn's manner.

`ArrayClassifier` turns scores of classes into predictions; `LinearClassifier` has the scores that most of these methods
share, and whose arrays a model's head can hold. `IncrementalClassifier` is a linear one that takes further rows and
classes, `StandardisedClassifier` one that a solver of scikit-learn fits to standardised features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

if TYPE_CHECKING:
    from typing_extensions import Self

#: An array of numpy.
Array = Any


def unit_rows(x: Array) -> Array:
    """Rows (rows, width) divided by their Euclidean norms; rows of zeros stay."""
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norms > 0, norms, 1.0)


class ArrayClassifier(ClassifierMixin, BaseEstimator):
    """Base of classifiers on features (rows, width).

    A subclass sets `classes_` in `fit` and gives `class_scores`.
    """

    classes_: Array

    def class_scores(self, X: Array) -> Array:
        """Scores of all classes (rows, classes), also where there are two; float64."""
        raise NotImplementedError

    def decision_function(self, X: Array) -> Array:
        """Scores (rows, classes); of two classes the difference (rows,), as scikit-learn has it."""
        scores = self.class_scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: Array) -> Array:
        """Predict the class of each row."""
        best = self.class_scores(X).argmax(1)
        return self.classes_[best]

    def predict_proba(self, X: Array) -> Array:
        """Softmax of the scores (rows, classes)."""
        return softmax(self.class_scores(X), axis=1)

    def _labelled(self, X: Array, y: Array, reset: bool = True) -> tuple[Array, Array]:
        """Check rows and their labels.

        Raises:
            ValueError: they are not finite numbers with one class each.
        """
        X, y = validate_data(self, X, y, reset=reset, dtype=np.float64)
        check_classification_targets(y)
        return X, y

    def _rows(self, X: Array) -> Array:
        """Check rows to predict."""
        check_is_fitted(self)
        return validate_data(self, X, reset=False, dtype=np.float64)


class LinearClassifier(ArrayClassifier):
    """Classifier whose scores are linear in the scaled features.

    With z = (x - center) * scale, divided by its norm if `unit_norm`, the scores are coef z + intercept; where
    `squared_distance` is set, less |z|² / 2.

    Attributes:
        center_, scale_: (width,).
        coef_: (classes, width), with a row for each of two classes too.
        intercept_: (classes,).
    """

    @property
    def unit_norm(self) -> bool:
        """True if rows are divided by their norms."""
        return False

    @property
    def squared_distance(self) -> bool:
        """True if the scores are minus half the squared distances to `coef_`, up to the intercept's rest."""
        return False

    def scaled(self, X: Array) -> Array:
        """Scale rows as the scores read them."""
        z = (X - self.center_) * self.scale_
        return unit_rows(z) if self.unit_norm else z

    def class_scores(self, X: Array) -> Array:
        z = self.scaled(self._rows(X))
        scores = z @ self.coef_.T + self.intercept_
        return scores - (z**2).sum(1, keepdims=True) / 2 if self.squared_distance else scores

    def _set_linear(self, coef: Array, intercept: Array, center: Array = 0.0, scale: Array = 1.0) -> None:
        """Store the arrays; a row of two classes' difference becomes a row for each."""
        coef, intercept = np.atleast_2d(coef), np.atleast_1d(intercept)
        if len(coef) == 1 and len(self.classes_) == 2:
            coef, intercept = np.concatenate([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
        self.coef_, self.intercept_ = coef, intercept
        self.center_ = np.broadcast_to(center, coef.shape[1:]).astype(np.float64)
        self.scale_ = np.broadcast_to(scale, coef.shape[1:]).astype(np.float64)


class ClassSums:
    """Counts, means and scatter of classes, updated exactly by further rows.

    Source of the update: Chan, Golub and LeVeque 1979.

    Attributes:
        classes: labels in order.
        counts: rows of each class (classes,).
        means: (classes, width).
        scatter: sum of squared distances to the class means, by feature (width,).
    """

    def __init__(self, width: int) -> None:
        self.classes: Array = np.array([])
        self.counts: Array = np.zeros(0)
        self.means: Array = np.zeros((0, width))
        self.scatter: Array = np.zeros(width)

    def add(self, X: Array, y: Array) -> None:
        """Add rows (rows, width) with their labels."""
        self._make_room(np.unique(y))
        for index in np.unique(np.searchsorted(self.classes, y)):
            rows = X[y == self.classes[index]]
            mean, before, count = rows.mean(0), self.counts[index], len(rows)
            shift, total = mean - self.means[index], before + count
            self.scatter += ((rows - mean) ** 2).sum(0) + shift**2 * (before * count / total)
            self.means[index] += shift * (count / total)
            self.counts[index] = total

    def _make_room(self, labels: Array) -> None:
        if not len(self.classes):
            self.classes = labels[:0]
        classes = np.union1d(self.classes, labels)
        places = np.searchsorted(classes, self.classes)
        counts, means = np.zeros(len(classes)), np.zeros((len(classes), self.means.shape[1]))
        counts[places], means[places] = self.counts, self.means
        self.classes, self.counts, self.means = classes, counts, means


class IncrementalClassifier(LinearClassifier):
    """Linear classifier that takes further rows, of known classes or new ones.

    A subclass supplies `_set_scores`.

    Attributes:
        sums_: counts, means and scatter of the classes.
        first_classes_: sorted labels of the first call.
    """

    def fit(self, X: Array, y: Array) -> Self:
        """Fit to features (rows, width) of the first classes."""
        X, y = self._labelled(X, y)
        self.sums_, self.first_classes_ = ClassSums(X.shape[1]), np.unique(y)
        return self._add(X, y)

    def partial_fit(self, X: Array, y: Array, classes: Array | None = None) -> Self:
        """Add rows (rows, width); new classes need not be announced in `classes`."""
        if not hasattr(self, "sums_"):
            return self.fit(X, y)
        return self._add(*self._labelled(X, y, reset=False))

    def _add(self, X: Array, y: Array) -> Self:
        self.sums_.add(X, y)
        self.classes_ = self.sums_.classes
        self._set_scores(X, y)
        return self

    def _set_scores(self, X: Array, y: Array) -> None:
        """Set the linear arrays by `sums_` and the rows of this call."""
        raise NotImplementedError


class StandardisedClassifier(LinearClassifier):
    """Linear classifier that a solver of scikit-learn fits to standardised features.

    A subclass supplies `_solver`.

    Args:
        C: inverse weight of the regulariser.
        tol: tolerance of the solver.
        max_iter: most iterations of the solver.
    """

    def __init__(self, C: float = 1.0, tol: float = 1e-4, max_iter: int = 1000) -> None:
        self.C = C
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Array, y: Array) -> Self:
        """Fit to features (rows, width)."""
        X, y = self._labelled(X, y)
        scaler = StandardScaler().fit(X)
        solver = self._solver().fit(scaler.transform(X), y)
        self.classes_, self.n_iter_ = solver.classes_, solver.n_iter_
        self._set_linear(solver.coef_, solver.intercept_, scaler.mean_, 1 / scaler.scale_)
        return self

    def _solver(self) -> Any:
        """Classifier of scikit-learn that has not been fitted."""
        raise NotImplementedError
