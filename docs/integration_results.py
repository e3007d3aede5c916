"""Results of the tests with other libraries, which `make test-integrations` writes to docs/integrations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "integrations"
HEAD = ("library", "use", "works", "refused or not tested")


def rows(methods: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows of the table, one for each use; a list of all `methods` is shortened to "all methods"."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        for entry in json.loads(path.read_text(encoding="utf-8")):
            library = f"{entry['library']} {entry['version']}".strip()
            found.append((library, entry["use"], _works(entry["works"], methods), _others(entry)))
    return sorted(found)


def _works(names: Sequence[str], methods: Sequence[str]) -> str:
    # A use that does not depend on the method is tested under no method's name.
    if names == [""]:
        return "yes"
    named = [name for name in names if name]
    return "all methods" if {*methods} <= {*named} else ", ".join(f"`{name}`" for name in named)


def _others(entry: dict[str, Any]) -> str:
    """Methods that were refused, failed or were left out, those of one reason together."""
    reasons: dict[str, list[str]] = {}
    for title in ("refused", "skipped"):
        for name, reason in entry[title].items():
            reasons.setdefault(f"{'not tested: ' if title == 'skipped' else ''}{reason}", []).append(name)
    for name in entry["failed"]:
        reasons.setdefault("fails", []).append(name)
    parts = []
    for reason, names in reasons.items():
        named = ", ".join(f"`{name}`" for name in names if name)
        parts.append(f"{named}: {reason}" if named else reason)
    return "; ".join(parts)
