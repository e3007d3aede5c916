"""Counts of peft's own tests, which `make test-peft` writes to docs/peft_suite.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().with_name("peft_suite.json")
HEAD = ("method", "pass", "fail, for a reason below", "left out by the test", "fail for LoRA too")
REASONS = ("cases", "reason")
_GROUPS = ("passed", "refused", "skipped", "environment")


def results() -> dict[str, Any]:
    """What the last run wrote; empty before the first one."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def total(found: dict[str, Any], group: str) -> int:
    """Number of cases of all methods in a group."""
    return sum(counts.get(group, 0) for counts in found["methods"].values())


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table, one for each method."""
    return [
        (f"`{name}`", *(str(counts.get(group, "")) for group in _GROUPS))
        for name, counts in sorted(found["methods"].items())
    ]


def reasons(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of reasons, the most frequent first."""
    return [(str(count), reason) for reason, count in found["reasons"].items()]
