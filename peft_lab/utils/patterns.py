"""Regular expressions of anybody that would take for ever. Imports nothing heavy."""

from __future__ import annotations

import re

#: Characters of a pattern, and repeats without an end in one alternative of it.
_MAX_PATTERN, _MAX_REPEATS = 4_000, 6
#: What is escaped or stands in a class is no operator.
_LITERAL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_REPEAT = re.compile(r"[*+]|\{\d*,")
#: Content of a group without groups, and its repeat without an end.
_INNERMOST_GROUP = re.compile(r"\((?:\?(?:[a-z-]*:|<?[=!]|>|P?<\w+>))?([^()]*)\)([*+]|\{\d*,\d*\})?")


def may_take_for_ever(pattern: str) -> bool:
    """Test whether a pattern can match a text in too many ways.

    Those are a repeated group that holds a repeat or a choice, whose ways grow exponentially, and many repeats beside
    one another. Some patterns that are fast are among them.
    """
    bare = _LITERAL.sub("c", pattern) if len(pattern) <= _MAX_PATTERN else ""
    if not bare:
        return len(pattern) > _MAX_PATTERN
    while True:
        if max(len(_REPEAT.findall(part)) for part in re.split(r"[|()]", bare)) > _MAX_REPEATS:
            return True
        group = _INNERMOST_GROUP.search(bare)
        if group is None:
            return False
        several = re.search(r"[*+?|]|\{\d*,", group[1]) is not None
        if several and group[2]:
            return True
        # a group that may match in several ways counts as a repeat of what is around it
        bare = f"{bare[: group.start()]}c{'+' if several or group[2] else ''}{bare[group.end() :]}"
