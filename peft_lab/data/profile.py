"""Profiles of columns, by which the kinds of task propose themselves for somebody's data.

Imports nothing heavy: a profile is made of plain rows.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Whole or fractional number, as a cell of csv holds it; a leading zero is that of a code, such as 007.
_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")

#: First bytes of image and sound files, at a place in the file.
_IMAGE_MARKS = (
    *((0, mark) for mark in (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")),
    (8, b"WEBP"),
)
_SOUND_MARKS = (*((0, mark) for mark in (b"fLaC", b"OggS", b"ID3", b"\xff\xfb")), (8, b"WAVE"))
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SOUND_ENDINGS = (".wav", ".flac", ".ogg", ".mp3", ".opus")

#: Values of a column that a profile shows.
_SHOWN = 3
#: More classes than this are doubted.
_MANY_CLASSES = 100


@dataclass(frozen=True)
class ColumnProfile:
    """Profile of one column, or of the entries of a column of lists.

    Attributes:
        name: of the column in the source.
        type: `text`, `number`, `boolean`, `list`, `mapping`, `image`, `audio`, `bytes`, `mixed`, or `empty` without a
            value. A cell of csv is a number if all cells of its column are.
        count: rows that were looked at.
        blanks: rows without a value, blank texts included.
        distinct: different values among the others.
        most_frequent: rows that have the most frequent value.
        mean_length: characters of a text, or entries of a list or mapping; 0 for other types.
        whole: all values are whole numbers.
        examples: some first different values.
        class_names: names of the classes that the source declares for the column.
        entries: profile of the entries of all lists.
        keys: profile of each key of mappings.
    """

    name: str
    type: str
    count: int
    blanks: int
    distinct: int
    most_frequent: int = 0
    mean_length: float = 0.0
    whole: bool = False
    examples: tuple[Any, ...] = ()
    class_names: tuple[str, ...] = ()
    entries: ColumnProfile | None = None
    keys: Mapping[str, ColumnProfile] = field(default_factory=dict)

    @property
    def holds_classes(self) -> bool:
        """True for names or whole numbers that most rows share with other rows."""
        if self.class_names:
            return True
        named = self.type in ("text", "boolean") or (self.type == "number" and self.whole)
        return named and 2 <= self.distinct <= (self.count - self.blanks) / 2 and self.mean_length <= 80

    @property
    def holds_few_classes(self) -> bool:
        """True for classes so few that even a column without a telling name holds them."""
        given = self.count - self.blanks
        return self.holds_classes and self.distinct <= max(20, given / 20)

    @property
    def is_fractional(self) -> bool:
        """True for numbers of which some are not whole."""
        return self.type == "number" and not self.whole

    def class_doubts(self) -> list[str]:
        """Doubts about the column as one of classes: too many of them, numbers, or one that most rows have."""
        found = []
        given = self.count - self.blanks
        if not self.class_names and (self.distinct > _MANY_CLASSES or self.distinct > given / 5):
            found.append(f'"{self.name}" has {self.distinct} values in {given} rows: is this a classification?')
        elif self.type == "number" and self.distinct > 10:
            found.append(f'"{self.name}" has {self.distinct} whole numbers as values: classes, or a regression?')
        if given and self.most_frequent > 0.8 * given:
            found.append(
                f'{self.most_frequent / given:.0%} of the rows have one value of "{self.name}": look at f1 beside '
                "accuracy."
            )
        return found


@dataclass(frozen=True)
class DataProfile:
    """Profile of the training rows of somebody's data.

    Attributes:
        columns: name -> profile, in the order of the source.
        rows: the rows that were looked at, as plain mappings.
        given: canonical column of a kind -> column of the source, as the user named them.
    """

    columns: Mapping[str, ColumnProfile]
    rows: Sequence[Mapping[str, Any]] = ()
    given: Mapping[str, str] = field(default_factory=dict)

    def find(
        self,
        canonical: str,
        names: Sequence[str],
        fits: Callable[[ColumnProfile], bool],
        taken: Sequence[str | None] = (),
    ) -> ColumnProfile | None:
        """Column for a purpose.

        It is the one that the user named, if it fits; else the first that fits, in the order of `names`, which are
        usual ones in lower case, and then of the source.

        Args:
            canonical: the kind's name of the column.
            names: usual names for it.
            fits: test of its values.
            taken: columns of the source that have another purpose already.
        """
        if canonical in self.given:
            column = self.columns[self.given[canonical]]
            return column if fits(column) else None
        others = {*taken, *self.given.values()}
        fitting = [column for column in self.columns.values() if column.name not in others and fits(column)]
        place = {name: index for index, name in enumerate(names)}
        return min(fitting, key=lambda column: place.get(column.name.lower(), len(names)), default=None)

    def named(
        self, canonical: str, names: Sequence[str], fits: Callable[[ColumnProfile], bool]
    ) -> ColumnProfile | None:
        """Column that the user named, or that has one of the usual names, if it fits; None for any other."""
        found = self.find(canonical, names, fits)
        return found if found and (canonical in self.given or found.name.lower() in names) else None

    def classes(self, canonical: str, names: Sequence[str], taken: Sequence[str | None] = ()) -> ColumnProfile | None:
        """Column of classes: the named one, else one of the usual names, else that of the fewest classes."""
        found = self.find(canonical, names, lambda column: column.holds_classes, taken)
        if found is None or canonical in self.given or found.name.lower() in names:
            return found
        others = {*taken, *self.given.values()}
        fitting = [column for column in self.columns.values() if column.name not in others and column.holds_few_classes]
        # a mark that most rows lack is less of a class than one that all have
        return min(fitting, key=lambda column: (column.blanks, column.distinct), default=None)

    def longest_text(
        self, canonical: str, names: Sequence[str], taken: Sequence[str | None] = ()
    ) -> ColumnProfile | None:
        """Column of texts: the named one, else one of the usual names, else that of the longest texts."""
        found = self.find(canonical, names, lambda column: column.type == "text", taken)
        if found is None or canonical in self.given or found.name.lower() in names:
            return found
        others = {*taken, *self.given.values()}
        texts = [column for column in self.columns.values() if column.type == "text" and column.name not in others]
        return max(texts, key=lambda column: column.mean_length)


@dataclass(frozen=True)
class Proposal:
    """Proposal of a kind of task for some data.

    Attributes:
        kind: name of the kind.
        confidence: from 0 to 1. By agreement 0.9 where names and values of the columns are those that data sets of
            this kind have, 0.6 where the values alone fit, and 0.3 where the data may just as well mean something else.
        columns: canonical column -> column of the source.
        settings: further keys of the task file, such as `problem_type` or `template`.
        metrics: metrics, the one that chooses the best checkpoint first; empty for the kind's default.
        doubts: sentences about what the user should look at.
    """

    kind: str
    confidence: float
    columns: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def profile_rows(
    rows: Sequence[Mapping[str, Any]],
    given: Mapping[str, str] | None = None,
    class_names: Mapping[str, Sequence[str]] | None = None,
) -> DataProfile:
    """Profile of rows.

    Args:
        rows: plain rows; an image or a sound is a mapping of `bytes` and `path`.
        given: canonical column -> column of the source, as the user named them.
        class_names: names of the classes that the source declares for a column of numbers.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        declared = tuple((class_names or {}).get(name, ()))
        columns[name] = profile_column(name, [row.get(name) for row in rows], declared)
    return DataProfile(columns, rows, given or {})


def profile_column(name: str, values: Sequence[Any], class_names: Sequence[str] = ()) -> ColumnProfile:
    """Profile of the values of a column."""
    there = [value for value in values if not is_blank(value)]
    held = _type_of(there)
    counts = Counter(_key(value) for value in there)
    lengths = [len(value) for value in there] if held in ("text", "list", "mapping") else []
    first: dict[str, Any] = {}
    for value in there:
        first.setdefault(_key(value), value)
        if len(first) == _SHOWN:
            break
    return ColumnProfile(
        name=name,
        type=held,
        count=len(values),
        blanks=len(values) - len(there),
        distinct=len(counts),
        most_frequent=max(counts.values(), default=0),
        mean_length=sum(lengths) / len(lengths) if lengths else 0.0,
        whole=held == "number" and all(float(value).is_integer() for value in there),
        examples=tuple(first.values()),
        class_names=tuple(class_names),
        entries=_entries(name, there) if held == "list" else None,
        keys=_keys(name, there) if held == "mapping" else {},
    )


def is_blank(value: Any) -> bool:
    """Test whether a cell holds no value: null, not a number, or a blank text."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _entries(name: str, lists: Sequence[Sequence[Any]]) -> ColumnProfile:
    entries: list[Any] = []
    for values in lists:
        entries += values
    return profile_column(f"{name}[]", entries)


def _keys(name: str, mappings: Sequence[Mapping[str, Any]]) -> dict[str, ColumnProfile]:
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    found = {}
    for key in keys:
        found[key] = profile_column(f"{name}.{key}", [mapping.get(key) for mapping in mappings])
    return found


def _type_of(values: Sequence[Any]) -> str:
    """Type that all values have, `mixed` for several, `empty` without any."""
    if not values:
        return "empty"
    found = {_type(value) for value in values}
    if found == {"text"} and all(is_number(value) for value in values):
        return "number"
    return found.pop() if len(found) == 1 else "mixed"


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, (list, tuple)):
        return "list"
    if isinstance(value, bytes):
        return _type_of_file(value, "")
    if isinstance(value, Mapping):
        is_file = value.keys() == {"bytes", "path"}
        return _type_of_file(value["bytes"] or b"", value["path"] or "") if is_file else "mapping"
    return type(value).__name__


def is_number(text: str) -> bool:
    """Test whether a text is a finite number; 007 is a code."""
    return _NUMBER.fullmatch(text.strip()) is not None and math.isfinite(float(text))


def _type_of_file(data: bytes, path: str) -> str:
    """Type of a file by its first bytes, or by its ending where they are not at hand."""
    for held, marks, endings in (("image", _IMAGE_MARKS, IMAGE_ENDINGS), ("audio", _SOUND_MARKS, SOUND_ENDINGS)):
        marked = any(data[place : place + len(mark)] == mark for place, mark in marks)
        if marked or (not data and Path(path).suffix.lower() in endings):
            return held
    return "bytes"


def _key(value: Any) -> str:
    """Text that equal values have in common."""
    if isinstance(value, str):
        return value
    # bytes are compared by their text form, which is as different as they are
    return json.dumps(value, sort_keys=True, default=repr)
