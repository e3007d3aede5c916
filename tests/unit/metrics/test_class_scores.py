"""Scores of classes, confusion, agreement: against counts made by hand; numbers of a stranger's file give none."""

from __future__ import annotations

import numpy as np
import pytest

from peft_lab.metrics.class_scores import agreement, class_scores, confusion, wrong_in_all
from peft_lab.metrics.predictions import Predictions, read_predictions, write_predictions

LABELS = ("a", "b", "c")


def classified(reference, prediction, **more):
    columns = {"reference": np.asarray(reference, dtype=float), "prediction": np.asarray(prediction, dtype=float)}
    return Predictions("classification", columns | {name: np.asarray(values) for name, values in more.items()})


def test_scores_of_each_class_are_those_of_its_counts(tmp_path):
    draw = np.random.default_rng(0)
    reference, prediction = draw.integers(0, 3, 60), draw.integers(0, 2, 60)  # the last class is never predicted
    write_predictions(tmp_path, classified(reference, prediction))
    items = read_predictions(tmp_path / "items.csv")
    counts = np.zeros((3, 3), int)
    for true, found in zip(reference, prediction, strict=True):
        counts[true, found] += 1
    assert (confusion(items, LABELS) == counts).all()
    for index, score in enumerate(class_scores(items, LABELS)):
        hits, called, true = counts[index, index], counts[:, index].sum(), counts[index].sum()
        assert (score.label, score.support) == (LABELS[index], true)
        assert score.precision == pytest.approx(hits / called if called else 0)
        assert score.recall == pytest.approx(hits / true)
        assert score.f1 == pytest.approx(2 * hits / (called + true))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0, 0.5, 3.0, 1e12])
def test_numbers_that_are_no_class_give_no_scores(wrong):
    items = classified([0, 1, wrong], [0, 1, 1])
    assert class_scores(items, LABELS) is None
    assert confusion(items, LABELS) is None


def test_other_predictions_and_classes_without_names_give_none():
    values = Predictions("regression", {"reference": np.ones(2), "prediction": np.ones(2)})
    assert values.classes is None
    assert class_scores(values, LABELS) is None
    assert class_scores(classified([0], [0]), ()) is None
    assert classified([], []).classes is None


def test_agreement_is_the_share_and_cohens_kappa():
    first, second = classified([0] * 5, [0, 0, 1, 1, 2]), classified([0] * 5, [0, 1, 1, 1, 0])
    by_chance = (2 * 2 + 2 * 3 + 1 * 0) / 25
    found = agreement(first, second)
    assert found.share == pytest.approx(3 / 5)
    assert found.kappa == pytest.approx((3 / 5 - by_chance) / (1 - by_chance))
    assert agreement(classified([1], [1]), classified([1], [1])).kappa is None
    assert agreement(first, classified([0], [0])) is None
    # without classes, by the rows that both get right
    written = [
        Predictions("causal_lm", {"loss": np.ones(3), "exact_match": np.asarray(right)})
        for right in ([1.0, 0.0, 1.0], [1.0, 1.0, 1.0])
    ]
    assert agreement(*written).share == pytest.approx(2 / 3)
    assert agreement(first, written[0]) is None
    silent = Predictions("causal_lm", {"loss": np.ones(3)})
    assert agreement(silent, silent) is None


def test_rows_that_no_model_gets_right_come_by_confidence():
    models = [
        classified([0, 0, 0, 0], [0, 1, 1, 1], confidence=[0.9, 0.6, 0.9, 0.9]),
        classified([0, 0, 0, 0], [0, 1, 2, 0], confidence=[0.9, 0.6, 0.8, 0.9]),
    ]
    assert wrong_in_all(models).tolist() == [2, 1]
    assert wrong_in_all(models[:1]).tolist() == [2, 3, 1]
    assert wrong_in_all([models[0], classified([0], [1])]) is None
    assert wrong_in_all([Predictions("causal_lm", {"loss": np.ones(3)})]) is None
