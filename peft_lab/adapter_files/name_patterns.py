"""Regexes of module names in an adapter_config.json.

None of a file is run. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft_lab.adapter_files.names import is_head_alone
from peft_lab.backbones.names import PEFT_PREFIX
from peft_lab.errors import ConfigError

#: Most repeats in a key of `rank_pattern` or `alpha_pattern`: a match takes at most a power of the name's length.
_MAX_REPEATS = 3
#: Constructs after which a repeat may match in several ways, and references to groups.
_AMBIGUOUS = re.compile(r"\)[*+?{]|\(\?(?!:)|\\[1-9]")
_REPEAT = re.compile(r"(?<!\\)[*+{]")


def check_pattern(name: str, pattern: str) -> None:
    """Check that a regex of module names compiles.

    Raises:
        ConfigError: naming the field.
    """
    try:
        re.compile(pattern)
    # Deep nesting and huge counts fail with errors other than those of `re`.
    except (re.error, RecursionError, OverflowError) as error:
        shown = pattern if len(pattern) <= 80 else f"{pattern[:80]}..."
        raise ConfigError(f"{name}={shown!r} is not a valid regular expression: {error}.") from error


def check_key_pattern(name: str, key: str) -> None:
    """Check a key of `rank_pattern` or `alpha_pattern`.

    peft matches it against module names as a regex.

    Unlike `target_modules` it cannot be read off the weights, so only patterns that match fast on any name are taken.

    Raises:
        ConfigError: naming the field.
    """
    check_pattern(name, key)
    if _AMBIGUOUS.search(key) or len(_REPEAT.findall(key)) > _MAX_REPEATS or len(key) > 1000:
        shown = key if len(key) <= 80 else f"{key[:80]}..."
        raise ConfigError(
            f"{name} holds {shown!r}, which may take for ever as a regular expression; write module names, or a "
            f"pattern with at most {_MAX_REPEATS} repeats, none of them behind a group."
        )


def pattern_fields(values: Mapping[str, Any]) -> list[str]:
    """Return the keys whose value is a regex of module names."""
    # The mark of a head saved alone is a string, but no regex.
    if is_head_alone(values):
        return []
    return [name for name, value in values.items() if name.endswith("_modules") and isinstance(value, str)]


def without_patterns(
    values: Mapping[str, Any], header: Mapping[str, tuple[str, list[int]]], prefix: str, what: str
) -> dict[str, Any]:
    """Return config values with module names instead of regexes.

    Args:
        values: the content of the file.
        header: dtype and shape of each entry of the adapter's weights, as `safe_files.read_header` returns them.
        prefix: prefix of the parameters of the adapter's method, such as "lora_".
        what: name of the file, for errors.

    Raises:
        ConfigError: the modules behind a regex cannot be read off the weights.
    """
    fields = pattern_fields(values)
    if not fields:
        return dict(values)
    entries = _entries(header, prefix)
    modules = {*entries, *_recorded(values)}
    # With exact names, none is left to exclude.
    replaced: dict[str, Any] = {**values, "target_modules": sorted(modules)}
    for name in fields:
        if name == "exclude_modules":
            replaced[name] = None
        elif name == "feedforward_modules":
            # (IA)3 scales the input there: one row with a value for each input channel.
            replaced[name] = sorted(module for module, shape in entries.items() if shape[:1] == [1])
        elif name != "target_modules":
            raise ConfigError(f"{what} sets {name} to a regular expression, which is not run; write module names.")
    if not modules:
        raise ConfigError(
            f"{what} has a regular expression for modules, and its weights name none; write module names."
        )
    return replaced


def _recorded(values: Mapping[str, Any]) -> Iterable[str]:
    """Return the modules whose base weights an adapter of ours records."""
    recorded = values.get("fingerprints")
    return [str(name) for name in recorded] if isinstance(recorded, dict) else []


def _entries(header: Mapping[str, tuple[str, list[int]]], prefix: str) -> dict[str, list[int]]:
    """Return the shape of the first parameter of each adapted module."""
    found: dict[str, list[int]] = {}
    for key, (_, shape) in header.items():
        # The last mark counts because the path of a module may contain the prefix too.
        module, mark, _ = key.removeprefix(PEFT_PREFIX).rpartition(f".{prefix}")
        if mark:
            found.setdefault(module, shape)
    return found
