"""Linear probe: scikit-learn's own probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from peft_lab.adapters.head.linear_probe import LinearProbe


@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_are_those_of_scikit_learn(classes):
    X = np.random.default_rng(0).standard_normal((90, 5)) * 4 + 7
    y = np.arange(90) % classes
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=0.1)).fit(X, y).predict_proba(X)
    assert np.allclose(LinearProbe().fit(X, y).predict_proba(X), expected)
