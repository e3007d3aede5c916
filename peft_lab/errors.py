"""Errors that speak: one sentence that names the value, what was expected and the mend. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftLabError(ValueError):
    """Base of every error that peft-lab raises about its user's input. The command line prints it and exits with 2."""


class ConfigError(PeftLabError):
    """A method, a configuration field, a flag or a run file is not what it should be."""


class TaskError(PeftLabError):
    """A task, its YAML file, its data or one of its metrics is not what it should be."""


class AdapterMismatchError(PeftLabError):
    """An adapter was trained on other base weights than the ones it is being put on."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `' Did you mean "lora"?'` for the nearest known name, or an empty string if none is near."""
    known = {str(k).lower(): str(k) for k in known}
    near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.6)
    return f' Did you mean "{known[near[0]]}"?' if near else ""


def check_keys(keys: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `ConfigError` for the first key that is not known; `what` names the owner, e.g. `method "svfit"`."""
    known = list(known)
    for key in keys:
        if key not in known:
            listing = "" if len(known) > 30 else f" Known: {', '.join(sorted(known))}."
            raise ConfigError(f'Unknown key "{key}" for {what}.{did_you_mean(key, known)}{listing}')
