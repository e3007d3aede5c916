"""Columns of somebody's data that hold the inputs of a model, by usual names and by their values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from peft_lab.data.profile import DataProfile

#: Usual names of columns of texts, of pairs of them, and of images.
_TEXTS = ("text", "sentence", "review", "content", "utterance", "comment", "tweet", "question", "body", "description")
_PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2")),
    *(("text_a", "text_b"), ("text", "text_pair"), ("question", "sentence"), ("query", "passage")),
)
_IMAGES = ("image", "img", "picture", "photo", "file_name")
#: Usual names of labels.
LABELS = ("label", "labels", "class", "category", "intent", "topic", "sentiment", "type", "target", "gold", "y")


def text_columns(profile: DataProfile, taken: Sequence[str]) -> dict[str, str]:
    """Columns `text`, and `text_pair` where there is one; empty without a text.

    `taken` are columns that have another purpose.
    """
    first, second = _pair(profile)
    text = profile.longest_text("text", (first, *_TEXTS) if first else _TEXTS, taken)
    if text is None:
        return {}
    paired = second is not None and second not in (text.name, *taken)
    return {"text": text.name, "text_pair": second} if paired and second else {"text": text.name}


def image_column(profile: DataProfile, taken: Sequence[str] = ()) -> dict[str, str]:
    """Column `image`; empty without one."""
    image = profile.find("image", _IMAGES, lambda column: column.type == "image", taken)
    return {"image": image.name} if image else {}


def text_or_image_columns(profile: DataProfile, taken: Sequence[str]) -> dict[str, str]:
    """Column of images, or columns of texts; of both, images, unless the user named a text."""
    of_texts = {"text", "text_pair"} & profile.given.keys()
    return (not of_texts and image_column(profile, taken)) or text_columns(profile, taken)


def has_files(profile: DataProfile) -> bool:
    """Test whether there are images or sounds, beside which a text is most often a caption or a source."""
    return any(column.type in ("image", "audio") for column in profile.columns.values())


def _pair(profile: DataProfile) -> tuple[str | None, str | None]:
    """Columns of two texts: those that the user named, or with usual names of a pair."""
    if "text_pair" in profile.given:
        return profile.given.get("text"), profile.given["text_pair"]
    texts = [name for name, column in profile.columns.items() if column.type == "text"]
    known = {name.lower(): name for name in texts}
    pair = next((pair for pair in _PAIRS if known.keys() >= set(pair)), None)
    if pair is None:
        pair = next((pair for pair in combinations(known, 2) if _numbered(*pair)), None)
    if pair is None or known[pair[0]] != profile.given.get("text", known[pair[0]]):
        return None, None
    return pair[0], known[pair[1]]


def _numbered(first: str, second: str) -> bool:
    """Test whether two names differ in one character alone, 1 and 2 or a and b."""
    differing = [pair for pair in zip(first, second, strict=False) if pair[0] != pair[1]]
    return len(first) == len(second) and differing in ([("1", "2")], [("a", "b")])
