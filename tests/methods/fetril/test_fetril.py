"""FeTrIL: translated features by the formula, all of them normalised."""

from __future__ import annotations

import numpy as np
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC

from peft_lab.adapters.head.fetril import FeTrIL

RANDOM = np.random.default_rng(0)
MEANS = 3 * RANDOM.standard_normal((5, 6))
Y = np.arange(1000) % 5
X = MEANS[Y] + RANDOM.standard_normal((1000, 6))


def test_past_classes_have_moved_rows_of_the_nearest_new_class():
    past, new = Y < 3, Y >= 3
    estimator = FeTrIL().fit(X[past], Y[past]).partial_fit(X[new], Y[new])
    rows, labels = [X[new]], [Y[new]]
    for label in range(3):
        mean = X[label == Y].mean(0)
        source = min((3, 4), key=lambda other: np.linalg.norm(X[other == Y].mean(0) - mean))
        rows.append(X[source == Y] + mean - X[source == Y].mean(0))
        labels.append(np.full(len(rows[-1]), label))
    solver = LinearSVC(dual=False).fit(normalize(np.concatenate(rows)), np.concatenate(labels))
    assert np.allclose(estimator.class_scores(X), solver.decision_function(normalize(X)), atol=1e-6)
    assert estimator.score(X, Y) > 0.8


def test_without_past_classes_it_is_a_linear_support_vector_machine():
    solver = LinearSVC(dual=False).fit(normalize(X), Y)
    assert np.allclose(FeTrIL().fit(X, Y).class_scores(X), solver.decision_function(normalize(X)))
