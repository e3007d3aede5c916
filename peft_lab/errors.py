"""Errors about the user's input, each one sentence. Imports nothing heavy.

The sentence names the value, what was expected, and the mend.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftLabError(ValueError):
    """Base of every error about the user's input.

    The command line prints it and exits with 2.
    """


class ConfigError(PeftLabError):
    """Error in a method, a config field, a flag or a file."""


class TaskError(PeftLabError):
    """Error in a task, its YAML file, its data or its metrics."""


class DivergedError(PeftLabError):
    """Error of a training whose loss, gradient or weights are not finite."""


class AdapterMismatchError(PeftLabError):
    """Error of an adapter that was trained on other base weights."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `' Did you mean "lora"?'` for the nearest name, or ""."""
    known = {str(k).lower(): str(k) for k in known}
    near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.6)
    return f' Did you mean "{known[near[0]]}"?' if near else ""


def check_keys(keys: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `ConfigError` for the first key that is not known.

    `what` names the owner, for instance `method "svfit"`.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            # A very long list would bury the message.
            listing = "" if len(known) > 30 else f" Known: {', '.join(sorted(known))}."
            raise ConfigError(f'Unknown key "{key}" for {what}.{did_you_mean(key, known)}{listing}')
