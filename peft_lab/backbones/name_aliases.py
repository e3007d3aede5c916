"""Module names that transformers changed between versions, in both directions. Strings only."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import count


class Renames:
    """Aliases of a family, applied to paths and to ends of paths.

    Each is a pair (older fragment, newer fragment).
    """

    def __init__(self, aliases: tuple[tuple[str, str], ...]) -> None:
        self._forward = [(_fragment(old, new), _groups(new)) for old, new in aliases]
        self._back = [(_fragment(new, old), _groups(old)) for old, new in aliases]
        self._aliases = aliases

    def new(self, path: str) -> str:
        """Return a path in the table's names."""
        return self._substitute(self._forward, path)

    def old(self, path: str) -> str:
        """Return a path in the older names."""
        return self._substitute(self._back, path)

    def short(self, name: str, back: bool = False) -> str:
        """Return the end of a path, e.g. a leaf name, renamed.

        It stays where several aliases end with it.
        """
        pairs = [(new, old) for old, new in self._aliases] if back else self._aliases
        length = name.count(".") + 1
        found = {_tail(to, length) for what, to in pairs if f".{what}".endswith(f".{name}")}
        if len(found) != 1:
            return name
        (target,) = found
        # `dense` of an old ViT stands for three layers, so none of their names may become `dense` alone.
        unique = sum(_tail(to, length) == target for _, to in pairs) == 1
        return target if unique else name

    @staticmethod
    def _substitute(rules: list[tuple[re.Pattern[str], str]], path: str) -> str:
        for pattern, replacement in rules:
            path = pattern.sub(replacement, path)
        return path


def _groups(path: str) -> str:
    """Return a path as a replacement; its indices are the groups of a match, in order."""
    numbers = count(1)
    return re.sub(r"\*", lambda _: rf"\{next(numbers)}", path)


def _tail(path: str, length: int) -> str:
    return ".".join(path.split(".")[-length:])


def _fragment(what: str, to: str) -> re.Pattern[str]:
    """Return a regex of a fragment between dots.

    It leaves out places where it already is the end of `to` (`layer.*` in `model.layer.*`).
    """
    before = to.removesuffix(f".{what}") if to.endswith(f".{what}") else ""
    guard = rf"(?<!{re.escape(before)}\.)" if before else ""
    return re.compile(rf"(?<![^.]){guard}{re.escape(what)}(?![^.])".replace(r"\*", r"(\d+|\*)"))


@lru_cache(maxsize=256)
def renames_of(aliases: tuple[tuple[str, str], ...]) -> Renames:
    """Return the `Renames` of a family's aliases, compiled once."""
    return Renames(aliases)
