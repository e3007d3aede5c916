"""Exact match and F1 of answers, against the algorithm of SQuAD's evaluation script."""

from __future__ import annotations

import collections
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_lab.metrics import squad

WORDS = ("the", "a", "An", "cat", "Cat's", "sat.", "on", "(mat)", "7", "7%", "-", "é", " ")


def official_normalisation(text: str) -> str:
    """Steps of the script, in its order: lower case, punctuation, articles, white space."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    text = re.compile(r"\b(a|an|the)\b", re.UNICODE).sub(" ", text)
    return " ".join(text.split())


def official_scores(answer: str, golds: list[str]) -> tuple[float, float]:
    """Exact match and F1 of SQuAD 2.0's script, for one question."""
    golds = [gold for gold in golds if official_normalisation(gold)] or [""]
    exact, f1 = [], []
    for gold in golds:
        gold_tokens, tokens = official_normalisation(gold).split(), official_normalisation(answer).split()
        exact.append(float(official_normalisation(gold) == official_normalisation(answer)))
        common = collections.Counter(gold_tokens) & collections.Counter(tokens)
        same = sum(common.values())
        if not gold_tokens or not tokens:
            f1.append(float(gold_tokens == tokens))
        elif same == 0:
            f1.append(0.0)
        else:
            precision, recall = same / len(tokens), same / len(gold_tokens)
            f1.append(2 * precision * recall / (precision + recall))
    return max(exact), max(f1)


TEXTS = st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(answer=TEXTS, golds=st.lists(TEXTS, max_size=3))
def test_scores_are_those_of_the_script(answer: str, golds: list[str]) -> None:
    assert (squad.exact_match(answer, golds), squad.f1(answer, golds)) == pytest.approx(official_scores(answer, golds))


@pytest.mark.parametrize(
    ("answer", "golds", "exact", "f1"),
    [
        ("The Cat!", ["cat"], 1.0, 1.0),
        ("the black cat", ["cat", "black dog"], 0.0, 2 / 3),
        ("cat cat", ["cat"], 0.0, 2 / 3),
        ("", [], 1.0, 1.0),
        ("cat", [], 0.0, 0.0),
        ("", ["cat"], 0.0, 0.0),
        ("athens", ["thens"], 0.0, 0.0),
    ],
)
def test_scores_by_hand(answer: str, golds: list[str], exact: float, f1: float) -> None:
    assert (squad.exact_match(answer, golds), squad.f1(answer, golds)) == pytest.approx((exact, f1))
