"""Linear support vector machine: scikit-learn's own decision function."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from peft_lab.adapters.head.linear_svm import LinearSVM


@pytest.mark.parametrize("classes", [2, 3])
def test_decision_function_is_that_of_scikit_learn(classes):
    X = np.random.default_rng(0).standard_normal((90, 5)) * 4 + 7
    y = np.arange(90) % classes
    expected = make_pipeline(StandardScaler(), LinearSVC(C=0.01, dual=False)).fit(X, y).decision_function(X)
    assert np.allclose(LinearSVM().fit(X, y).decision_function(X), expected)
