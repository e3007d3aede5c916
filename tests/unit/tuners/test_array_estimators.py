"""Array estimators: scikit-learn's own checks, exact updates, and scores that a head can hold."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import estimator_checks_generator
from support.properties import FITTED

from peft_lab.tuners.estimators import ArrayClassifier
from peft_lab.tuners.registration import config_class

#: Arguments with which an estimator is built fast.
QUICK: dict[str, dict[str, Any]] = {"prototype_transport": {"max_iter": 50}, "slca": {"samples_per_class": 64}}
CLASSIFIERS = [name for name in FITTED if issubclass(config_class(name).estimator_class, ArrayClassifier)]
#: Those whose result does not depend on how the rows of the same classes are divided into calls.
EXACT = ("nearest_mean", "naive_bayes", "knn")
#: Checks that do not apply, with the reason.
LEFT_OUT: dict[tuple[str, str], str] = {}


def make(name: str, **fields: Any) -> Any:
    return config_class(name).estimator_class(**QUICK.get(name, {}) | fields)


def clusters(classes: int = 4, rows: int = 30, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features around a mean of each class, not centred at zero."""
    random = np.random.default_rng(seed)
    means = 3 + 2 * random.standard_normal((classes, width))
    y = np.arange(classes * rows) % classes
    return means[y] + random.standard_normal((len(y), width)), y


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FITTED)
def test_the_checks_of_scikit_learn_pass(name):
    failed = []
    for estimator, check in estimator_checks_generator(make(name)):
        title = getattr(check, "func", check).__name__
        if (name, title) in LEFT_OUT:
            continue
        try:
            check(estimator)
        except Exception as error:  # all that fail are named, not the first alone
            if type(error).__name__ != "SkipTest":
                failed.append(f"{title}: {error}")
    assert failed == []


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_clusters_are_told_apart_and_proba_follows_the_scores(name):
    X, y = clusters()
    estimator = make(name).fit(X, y)
    assert estimator.score(X, y) > 0.85
    proba = estimator.predict_proba(X)
    assert np.array_equal(estimator.classes_[proba.argmax(1)], estimator.predict(X))
    assert np.allclose(proba.sum(1), 1)


@pytest.mark.parametrize("name", EXACT)
def test_partial_fits_are_one_fit_on_all_rows(name):
    X, y = clusters()
    once, parts = make(name).fit(X, y), make(name)
    # The last part brings a class that the others do not have.
    order = np.argsort(y, kind="stable")
    for part in np.array_split(order, 5):
        parts.partial_fit(X[part], y[part])
    assert np.allclose(parts.class_scores(X), once.class_scores(X))


@pytest.mark.parametrize("name", [n for n in CLASSIFIERS if hasattr(make(n), "partial_fit")])
def test_classes_may_come_one_task_after_the_other(name):
    X, y = clusters()
    estimator = make(name)
    for task in ([0, 1], [2, 3]):
        rows = np.isin(y, task)
        estimator.partial_fit(X[rows], y[rows])
    assert list(estimator.classes_) == [0, 1, 2, 3]
    assert estimator.score(X, y) > 0.8
    fresh = clone(estimator)
    assert not hasattr(fresh, "classes_")


@pytest.mark.parametrize("name", ["linear_svm", "linear_probe", "fetril"])
def test_no_warning_of_convergence_on_easy_rows(name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(name).fit(*clusters())
    assert not [each for each in caught if issubclass(each.category, ConvergenceWarning)]
