"""Errors about the user's input, each one sentence. Imports nothing heavy.

The sentence names the value, what was expected, and the mend.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

#: More or longer names than this are not searched for the nearest one: it takes a time quadratic in their length.
_MOST_NAMES, _LONGEST_NAME = 2_000, 100

#: Control characters that a terminal or an editor obeys: C0 without tab and line feed, DEL, C1, line and paragraph
#: separators, marks and overrides of the direction of writing, invisible operators, tags, and lone surrogates.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


class PeftLabError(ValueError):
    """Base of every error about the user's input.

    The command line prints it and exits with 2. The sentence may quote a file of anybody, so it is one line of visible
    characters, and not a very long one.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(one_line(part) if isinstance(part, str) else part for part in args))


class ConfigError(PeftLabError):
    """Error in a method, a config field, a flag or a file."""


class TaskError(PeftLabError):
    """Error in a task, its YAML file, its data or its metrics."""


class WriteError(PeftLabError):
    """Error of a disk that is full, or of a file or folder that cannot be made."""


class DivergedError(PeftLabError):
    """Error of a training whose loss, gradient or weights are not finite."""


class AdapterMismatchError(PeftLabError):
    """Error of an adapter that was trained on other base weights."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `' Did you mean "lora"?'` for the nearest name, or ""."""
    known = {str(k).lower(): str(k) for k in known}
    if len(known) > _MOST_NAMES or len(str(name)) > _LONGEST_NAME:
        return ""
    near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.6)
    return f' Did you mean "{known[near[0]]}"?' if near else ""


def check_keys(keys: Iterable[str], known: Iterable[str], what: str, lists: str = "") -> None:
    """Raise `ConfigError` for the first key that is not known.

    `what` names the owner, for instance `method "svfit"`, and `lists` the command that lists many known ones.
    """
    known = dict.fromkeys(known)
    for key in keys:
        if key not in known:
            # A very long list would bury the message.
            listing = f" Known: {', '.join(sorted(known))}."
            if len(known) > 30:
                listing = f" `{lists}` lists the known ones." if lists else ""
            raise ConfigError(f'Unknown key "{key}" for {what}.{did_you_mean(key, known)}{listing}')


def visible(text: str) -> str:
    r"""Replace control characters by their code, such as `\x1b`.

    Tabs and line ends stay.
    """
    return CONTROL.sub(lambda found: _escaped(found[0]), text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(text: str, limit: int = 2_000) -> str:
    """Make one line of visible characters, cut in the middle at `limit`."""
    line = " ".join(visible(text).split())
    return line if len(line) <= limit else f"{line[: limit // 2]} ... {line[-limit // 2 :]}"
