"""Linear support vector machine on features that are averaged over jittered views of a row."""

from __future__ import annotations

from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from peft_lab.tuners.estimators import Array, LinearClassifier


class LinearSVM(LinearClassifier):
    """scikit-learn's LinearSVC on standardised features.

    Args:
        C: inverse weight of the regulariser.
        tol: tolerance of the solver.
        max_iter: most iterations of the solver.
    """

    def __init__(self, C: float = 0.01, tol: float = 1e-4, max_iter: int = 1000) -> None:
        self.C = C
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Array, y: Array) -> LinearSVM:
        """Fit to features (rows, width)."""
        X, y = self._labelled(X, y)
        scaler = StandardScaler().fit(X)
        solver = LinearSVC(C=self.C, tol=self.tol, dual=False, max_iter=self.max_iter).fit(scaler.transform(X), y)
        self.classes_, self.n_iter_ = solver.classes_, solver.n_iter_
        self._set_linear(solver.coef_, solver.intercept_, scaler.mean_, 1 / scaler.scale_)
        return self
