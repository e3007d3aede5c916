"""Entities in tags of words, counted and scored as seqeval does.

An entity is a run of words with tags of one type. The prefixes B-, I-, E- and S- of a tag are read as in seqeval's
default mode: an I- that follows no entity of its type begins one. BILOU's L- and U- are read as E- and S-. A tag
without a prefix (raw or IO tags) is read as I-, so that neighbours with the same tag are one entity.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import lru_cache

from peft_lab.errors import TaskError

#: Tag of a word outside of all entities.
OUTSIDE = "O"
#: Names of the scores of entities.
ENTITY_SCORES = ("seqeval_f1", "seqeval_precision", "seqeval_recall")

_PREFIXED = re.compile(r"([BIES])-.+", re.DOTALL)
_BILOU = {"L-": "E-", "U-": "S-"}

#: Entity: its type, and its first and last word.
Entity = tuple[str, int, int]


def check_seqeval() -> None:
    """Raise `TaskError` if the package that finds entities is missing."""
    if importlib.util.find_spec("seqeval") is None:
        raise TaskError("Scores of entities need the package seqeval: pip install 'peft-lab[text]'")


def entities(tags: Sequence[str]) -> list[Entity]:
    """Entities in the tags of a row's words, in order.

    Raises:
        TaskError: seqeval is not installed.
    """
    check_seqeval()
    from seqeval.metrics.sequence_labeling import get_entities

    found = get_entities(list(map(_prefixed, tags)))
    return [(str(name), int(first), int(last)) for name, first, last in found]


@lru_cache(maxsize=4096)
def _prefixed(tag: str) -> str:
    """Tag with a prefix that seqeval knows; `O` as it is."""
    if tag == OUTSIDE or _PREFIXED.fullmatch(tag):
        return tag
    if tag[:2] in _BILOU and len(tag) > 2:
        return _BILOU[tag[:2]] + tag[2:]
    return f"I-{tag}"


def entity_counts(references: Sequence[str], predictions: Sequence[str]) -> tuple[int, int, int]:
    """Number of true, predicted and correct entities of a row.

    An entity is correct if type, first and last word are.
    """
    true, found = set(entities(references)), set(entities(predictions))
    return len(true), len(found), len(true & found)


def entity_scores(true: float, predicted: float, correct: float) -> dict[str, float]:
    """Precision, recall and F1 over all entities, from their sums over rows; 0 where there are none.

    They are seqeval's with the micro average.
    """
    return {
        "seqeval_f1": 2 * correct / (true + predicted) if true + predicted else 0.0,
        "seqeval_precision": correct / predicted if predicted else 0.0,
        "seqeval_recall": correct / true if true else 0.0,
    }
