"""k nearest neighbours: scikit-learn's votes, and the cap on stored rows."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from peft_lab.adapters.head.knn import KNN

X = np.random.default_rng(0).standard_normal((120, 5))
Y = np.r_[np.zeros(100), np.ones(15), np.full(5, 2)].astype(int)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_shares_of_votes_are_those_of_scikit_learn(metric):
    rows = normalize(X) if metric == "cosine" else X
    expected = KNeighborsClassifier(5).fit(rows, Y).predict_proba(rows)
    assert np.allclose(KNN(metric=metric).fit(X, Y).predict_proba(X), expected)


def test_at_most_max_rows_are_stored_and_every_class_is_kept(caplog):
    estimator = KNN(max_rows=12).fit(X, Y)
    assert list(np.bincount(estimator.labels_)) == [4, 4, 4]
    assert "12 of 120 rows" in caplog.text
    estimator.partial_fit(X, Y)
    assert len(estimator.rows_) == 12
