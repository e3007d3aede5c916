"""Prototype transport: barycentres of a plan by Sinkhorn's plain iteration, and the sentence without POT."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from peft_lab.adapters.head.prototype_transport import PrototypeTransport
from peft_lab.errors import ConfigError

RANDOM = np.random.default_rng(0)
MEANS = RANDOM.standard_normal((3, 5))
Y = np.arange(60) % 3
X = 2 * MEANS[Y] + RANDOM.standard_normal((60, 5))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_prototypes_move_to_the_barycentres_of_their_query_rows():
    queries = 2 * MEANS[Y] + RANDOM.standard_normal((60, 5))
    estimator = PrototypeTransport(reg=0.1, step=1.0).fit(X, Y, queries)
    prototypes = unit(np.stack([unit(X)[label == Y].mean(0) for label in range(3)]))
    cost = ((prototypes[:, None] - unit(queries)) ** 2).sum(-1)
    kernel = np.exp(-cost / cost.max() / 0.1)
    u, v = np.ones(3), np.ones(60)
    for _ in range(1000):
        u, v = 1 / 3 / (kernel @ v), 1 / 60 / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    moved = unit((plan @ unit(queries)) / plan.sum(1, keepdims=True))
    assert np.allclose(estimator.class_scores(X), 16 * unit(X) @ moved.T, atol=1e-5)


def test_a_step_of_zero_is_the_nearest_mean():
    estimator = PrototypeTransport(step=0.0).fit(X, Y)
    prototypes = unit(np.stack([unit(X)[label == Y].mean(0) for label in range(3)]))
    assert np.array_equal(estimator.predict(X), (unit(X) @ prototypes.T).argmax(1))


def test_without_pot_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot.bregman", None)
    with pytest.raises(ConfigError, match=r'pip install "peft-lab\[transport\]"'):
        PrototypeTransport().fit(X, Y)
