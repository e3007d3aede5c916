"""Exact match and F1 of extracted answers, as the evaluation script of SQuAD 2.0 computes them.

Of SQuAD 1.1 it differs for an answer that holds articles and punctuation alone: that one counts as no answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """Text in lower case, without punctuation and English articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the normalised answer equals one of the references, else 0.0.

    Without a reference the right answer is the empty text.
    """
    return max(float(normalised(answer) == normalised(reference)) for reference in _known(references))


def f1(answer: str, references: Sequence[str]) -> float:
    """Best F1 of the answer's words over the references, repeated words counted.

    Without a reference the right answer is the empty text.
    """
    return max(_f1(normalised(answer).split(), normalised(reference).split()) for reference in _known(references))


def _known(references: Sequence[str]) -> list[str]:
    """References that have a word; the empty text if there are none."""
    return [reference for reference in references if normalised(reference)] or [""]


def _f1(answer: list[str], reference: list[str]) -> float:
    # with no word on one side, only the answer "none" to a question without one is right
    if not answer or not reference:
        return float(answer == reference)
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))
