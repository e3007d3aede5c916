"""What the outcomes of peft's tests say: passed, refused with a reason, failed for LoRA too, or wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from peft_lab import registry
from peft_suite.cases import CONTROL

#: What differs between the messages of one error: texts, addresses, numbers.
_NUMBER = re.compile(r"\"[^\"]*\"|'[^']*'|0x[0-9a-f]+|\d+(\.\d+)?(e-?\d+)?")
EXPECTED = Path(__file__).with_name("expected.yaml")


@dataclass(frozen=True)
class Outcome:
    """Outcome of one case.

    Attributes:
        method: the method of the case.
        state: `passed`, `failed` or `skipped`.
        message: the error, or the reason of a skip.
    """

    method: str
    state: str
    message: str


@dataclass(frozen=True)
class Expected:
    """Cases that must fail, and why.

    Attributes:
        tests: patterns of `<file>::<test>[<case>]`, without the class.
        error: regex that the error must match.
        reason: a few words for the table.
        methods: names of methods; all by default.
        places: places where the methods act; all by default.
        lacks: a capability that none of the methods has; any by default.
        but: patterns of cases that are no such ones although all else fits.
        may_pass: a case may pass as well, because it is a matter of rounding.
    """

    tests: list[str]
    reason: str
    error: str
    methods: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    lacks: str = ""
    but: list[str] = field(default_factory=list)
    may_pass: bool = False

    def fits(self, case: str, method: str) -> bool:
        """Whether the entry is about a case."""
        named = not self.methods or method in self.methods
        info = registry.method(method)
        placed = (not self.places or info.place in self.places) and not (self.lacks and info.can(self.lacks))
        return named and placed and _matches(case, self.tests) and not _matches(case, self.but)


@dataclass
class Verdict:
    """Cases of our methods by what became of them, as (case, method, words)."""

    passed: list[tuple[str, str, str]] = field(default_factory=list)
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    environment: list[tuple[str, str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    unexpected_passes: list[tuple[str, str, str]] = field(default_factory=list)
    control: Counter[str] = field(default_factory=Counter)

    @property
    def wrong(self) -> bool:
        """Whether a case failed without a reason, or passed in spite of one."""
        return bool(self.failed or self.unexpected_passes)


def read_expected(path: Path = EXPECTED) -> list[Expected]:
    """Entries of expected.yaml."""
    return [Expected(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8")) or []]


def judge(outcomes: Mapping[str, Outcome], expected: list[Expected] | None = None) -> Verdict:
    """Sort the outcomes of all cases.

    Args:
        outcomes: node id -> outcome, the control's cases among them.
        expected: cases that must fail; those of expected.yaml by default.
    """
    entries = read_expected() if expected is None else expected
    verdict = Verdict()
    for node, outcome in outcomes.items():
        if outcome.method == CONTROL:
            verdict.control[outcome.state] += 1
            continue
        control = outcomes.get(node.replace(f"{outcome.method}:", f"{CONTROL}:", 1))
        case = short(node)
        fitting = [entry for entry in entries if entry.fits(case, outcome.method)]
        matching = [entry for entry in fitting if re.search(entry.error, outcome.message)]
        found = (case, outcome.method, outcome.message)
        if outcome.state == "skipped":
            verdict.skipped.append(found)
        elif outcome.state == "passed":
            listed = any(not entry.may_pass for entry in fitting)
            (verdict.unexpected_passes if listed else verdict.passed).append(found)
        elif control is not None and control.state == "failed":
            verdict.environment.append(found)
        elif matching:
            verdict.refused.append((case, outcome.method, matching[0].reason))
        else:
            verdict.failed.append(found)
    return verdict


def short(node: str) -> str:
    """`<file>::<test>[<case>]` of a node id."""
    path, _, rest = node.partition("::")
    head, bracket, case = rest.partition("[")
    return f"{Path(path).stem.removeprefix('test_')}::{head.rpartition('::')[2]}{bracket}{case}"


def summary(verdict: Verdict) -> dict[str, Any]:
    """Counts for the table in docs/compatibility.md."""
    groups = ("passed", "refused", "environment", "skipped")
    files: dict[str, Counter[str]] = {}
    for group in groups:
        for case, _, _ in getattr(verdict, group):
            files.setdefault(case.partition("::")[0], Counter())[group] += 1
    methods: dict[str, Counter[str]] = {}
    for group in groups:
        for _, method, _ in getattr(verdict, group):
            methods.setdefault(method, Counter())[group] += 1
    return {
        "versions": {name: version(name) for name in ("peft", "transformers", "torch")},
        "files": {name: dict(sorted(counts.items())) for name, counts in sorted(files.items())},
        "methods": {name: dict(sorted(counts.items())) for name, counts in sorted(methods.items())},
        "reasons": dict(Counter(words for _, _, words in verdict.refused).most_common()),
    }


def print_verdict(verdict: Verdict, write: Callable[[str], None]) -> None:
    """Print the counts, and each case that is wrong in groups of one error."""
    names = ("passed", "refused", "environment", "skipped", "failed", "unexpected_passes")
    write("ours: " + ", ".join(f"{len(getattr(verdict, name))} {name.replace('_', ' ')}" for name in names))
    write("lora: " + ", ".join(f"{count} {state}" for state, count in sorted(verdict.control.items())))
    groups: dict[str, list[str]] = {}
    for case, method, message in verdict.failed:
        first = _NUMBER.sub("N", message.strip().partition("\n")[0])[:120]
        groups.setdefault(f"{case.partition('[')[0]}: {first}", []).append(f"{method} {case}")
    for group, cases in sorted(groups.items(), key=lambda item: -len(item[1])):
        write(f"FAILED {len(cases)} x {group}\n    e.g. {cases[0]}")
    for case, method, _ in verdict.unexpected_passes:
        write(f"PASSED though listed: {method} {case}")


def _matches(case: str, patterns: list[str]) -> bool:
    # Brackets mean themselves here, and only * is special.
    return any(fnmatchcase(case, pattern.replace("[", "[[]")) for pattern in patterns)
