"""Words of a text, and tags of words from spans of its characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from peft_lab.metrics.entities import OUTSIDE

#: Words and marks of a text in ASCII, whose punctuation and symbols are the same ones.
_ASCII = re.compile(r"[^\s!-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]")


class Word(NamedTuple):
    """Word of a text, with its first character and the one behind its last."""

    text: str
    start: int
    end: int


def words_at_spaces(text: str) -> list[Word]:
    """Words between white space."""
    return _runs(text, lambda character: False)


def words_and_marks(text: str) -> list[Word]:
    """Words between white space, with each punctuation mark or symbol as a word of its own."""
    if text.isascii():  # many times as fast
        return [Word(found.group(), *found.span()) for found in _ASCII.finditer(text)]
    return _runs(text, lambda character: unicodedata.category(character)[0] in "PS")


def words_of_list(tokens: Sequence[str]) -> list[Word]:
    """Words that are given, with their places in the text that single spaces make of them."""
    found, start = [], 0
    for token in tokens:
        found.append(Word(token, start, start + len(token)))
        start += len(token) + 1
    return found


def tags_of_spans(words: Sequence[Word], spans: Iterable[Mapping[str, Any]]) -> list[str]:
    """BIO tags of words; a word that a span touches belongs to it."""
    tags = [OUTSIDE] * len(words)
    for span in spans:
        prefix = "B"
        for place, word in enumerate(words):
            if word.start < span["end"] and span["start"] < word.end:
                tags[place], prefix = f"{prefix}-{span['label']}", "I"
    return tags


def _runs(text: str, stands_alone: Callable[[str], bool]) -> list[Word]:
    found: list[Word] = []
    begin: int | None = None
    # a space at the end closes the last word
    for place, character in enumerate(f"{text} "):
        alone = not character.isspace() and stands_alone(character)
        if (character.isspace() or alone) and begin is not None:
            found.append(Word(text[begin:place], begin, place))
            begin = None
        if alone:
            found.append(Word(character, place, place + 1))
        elif not character.isspace() and begin is None:
            begin = place
    return found
