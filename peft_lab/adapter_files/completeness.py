"""Check that an adapter file holds exactly the entries of its adapter."""

from __future__ import annotations

from collections.abc import Iterable

from peft_lab.errors import ConfigError


def check_complete(wanted: Iterable[str], given: Iterable[str]) -> None:
    """Compare the entries of a file with those of its adapter.

    Raises:
        ConfigError: naming the first entry that is missing or unknown.
    """
    missing, extra = sorted({*wanted} - {*given}), sorted({*given} - {*wanted})
    if missing or extra:
        what = f'lacks "{missing[0]}"' if missing else f'has an unknown entry "{extra[0]}"'
        raise ConfigError(
            f"The adapter file {what} ({len(missing)} missing, {len(extra)} unknown entries); it was cut short or "
            "belongs to another model."
        )
