"""Entities in tags: counts by hand, and scores against those of seqeval."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import pytest

from peft_lab.errors import TaskError
from peft_lab.metrics.entities import ENTITY_SCORES, entities, entity_counts, entity_scores
from peft_lab.metrics.per_row import jackknife_values
from peft_lab.metrics.predictions import Predictions

pytest.importorskip("seqeval")


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-city I-city O B-time", [("city", 0, 1), ("time", 3, 3)]),
        ("B-city B-city", [("city", 0, 0), ("city", 1, 1)]),
        # an I- that follows no entity of its type begins one
        ("O I-city I-city I-time", [("city", 1, 2), ("time", 3, 3)]),
        ("B-city I-city E-city S-city", [("city", 0, 2), ("city", 3, 3)]),
        ("B-city L-city U-city U-city", [("city", 0, 1), ("city", 2, 2), ("city", 3, 3)]),
        # raw tags: neighbours with the same tag are one entity, and names that differ in their first letter differ
        ("PER PER LER O PER", [("PER", 0, 1), ("LER", 2, 2), ("PER", 4, 4)]),
        ("O O", []),
    ],
)
def test_entities_of_tags(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def test_counts_by_hand() -> None:
    true = ["B-city", "I-city", "O", "B-time", "O"]
    # one right, one of the right place and another type, one too many
    assert entity_counts(true, ["B-city", "I-city", "O", "B-year", "B-year"]) == (2, 3, 1)
    # an entity that is too short is wrong
    assert entity_counts(true, ["B-city", "O", "O", "B-time", "O"]) == (2, 2, 1)
    assert entity_scores(4, 5, 2) == {"seqeval_f1": 4 / 9, "seqeval_precision": 0.4, "seqeval_recall": 0.5}
    assert set(entity_scores(0, 0, 0).values()) == {0.0}


def random_rows() -> tuple[list[list[str]], list[list[str]]]:
    draw, names = np.random.default_rng(0), np.array(["O", "B-a", "I-a", "B-b", "I-b"])
    lengths = draw.integers(1, 9, 60)
    true = [names[draw.integers(0, 5, length)].tolist() for length in lengths]
    kept = [draw.random(length) < 0.7 for length in lengths]
    rows = zip(true, kept, strict=True)
    return true, [np.where(keep, tags, names[draw.integers(0, 5, len(tags))]).tolist() for tags, keep in rows]


def test_scores_are_those_of_seqeval_and_each_row_has_values() -> None:
    from seqeval.metrics import f1_score, precision_score, recall_score

    true, found = random_rows()
    counts = np.array([entity_counts(*pair) for pair in zip(true, found, strict=True)], dtype=float)
    scores = entity_scores(*counts.sum(0))
    expected = [metric(true, found) for metric in (f1_score, precision_score, recall_score)]
    assert [scores[name] for name in ENTITY_SCORES] == pytest.approx(expected)
    assert 0.1 < scores["seqeval_f1"] < 0.9

    columns = dict(zip(("true_entities", "predicted_entities", "correct_entities"), counts.T, strict=True))
    for name, metric in zip(ENTITY_SCORES, (f1_score, precision_score, recall_score), strict=True):
        value, rows = jackknife_values(name, Predictions("token_classification", columns)) or (None, None)
        assert value == pytest.approx(scores[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            without = metric(true[1:], found[1:])
        assert rows[0] == pytest.approx(60 * scores[name] - 59 * without)


def test_a_missing_package_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "seqeval" else find(name, *a))
    with pytest.raises(TaskError, match=r"need the package seqeval: pip install 'peft-lab\[text\]'"):
        entities(["O"])
