"""Results of the committed studies, read from the Markdown reports below benchmarks/results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: Largest adjusted p-value at which a report tells two arms apart.
LEVEL = 0.05
#: Heading of the table over all tasks of a study.
OVERALL = "All tasks"
#: What the names of the studies at default rates begin with.
DEFAULT_RATES = "default-rates"

Row = dict[str, str]


@dataclass(frozen=True)
class Score:
    """Score of an arm in one table of a study.

    Attributes:
        study: name of the study, and of its folder.
        arm: name of the arm.
        task: heading of the table, a task and its backbone, or "All tasks".
        metric: what is scored.
        value: mean over seeds with its 95 % interval, as the report prints it.
        rank: place by the mean, from 1 on, among `arms` arms; arms of the same mean, as it is printed, share one.
        best: arm with the highest mean (the lowest where less is better), or arms that tie for it.
        separated: True if the test separates the arm from the best, None if the table has no test.
    """

    study: str
    arm: str
    task: str
    metric: str
    value: str
    rank: int
    arms: int
    best: str
    separated: bool | None


@dataclass(frozen=True)
class SeedCount:
    """Seeds in which an arm at its default rate beats others on the test rows of a task; a failed run beats nothing.

    Attributes:
        study: name of the study, and of its folder.
        arm: name of the arm.
        task: the task.
        seeds: seeds that were run.
        head: those with a higher score than the head alone with the same seed.
        baseline: those with a higher score than the best baseline, such as the most frequent class.
    """

    study: str
    arm: str
    task: str
    seeds: int
    head: int
    baseline: int


def scores_of(method: str) -> list[Score]:
    """Every score of the arms of a method, study by study."""
    return [score for study in studies() for score in _scores(study) if _methods(study).get(score.arm) == method]


def studies() -> list[str]:
    """Names of the studies with a committed report."""
    return sorted(path.parent.name for path in RESULTS.glob("*/report.md"))


def seeds_of(study: str) -> int:
    """Number of seeds of a study's final runs."""
    listed = re.search(r"^- seeds of the final runs: (.*)$", _report(study), re.MULTILINE)
    return len(listed[1].split(",")) if listed else 0


def seed_counts(method: str) -> list[SeedCount]:
    """Seeds in which the arms of a method at its default rate beat the head alone and the baselines, task by task."""
    return [count for study in studies() if study.startswith(DEFAULT_RATES) for count in _counts(study, method)]


def _counts(study: str, method: str) -> Iterator[SeedCount]:
    lines = (RESULTS / study / "results.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [run for run in map(json.loads, lines) if run["stage"] == "final"]
    heads = {(run["task"], run["seed"]): _test_score(run) for run in runs if run["method"] == "head"}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        if run["method"] == method != "head":
            groups.setdefault((run["arm"], run["task"]), []).append(run)
    for (arm, task), made in groups.items():
        ok = [run for run in made if run["status"] == "ok"]
        head = sum(_test_score(run) > heads[task, run["seed"]] for run in ok)
        baseline = sum(bool(run["metrics"]["beats_baseline"]) for run in ok)
        yield SeedCount(study, arm, task, len(made), head, baseline)


def _test_score(run: dict[str, Any]) -> float:
    return float(run["metrics"]["metrics"]["test"][run["metrics"]["main_metric"]])


def overall_sentence(study: str) -> str:
    """The report's sentence on the arms over all tasks; "" for a study of one task."""
    section = re.search(rf"^## {OVERALL}\n+(.+)$", _report(study), re.MULTILINE)
    return section[1] if section else ""


def cost_rows(title: str) -> list[tuple[str, Row]]:
    """Rows of cost.md about a method, each with the heading of its table.

    Args:
        title: the method's title, of which a row's first cell begins with the part before any bracket.
    """
    name = title.split(" (")[0].lower()
    found = []
    for heading, rows in _tables((RESULTS / "cost.md").read_text(encoding="utf-8")):
        found += [(heading, row) for row in rows if re.match(rf"{re.escape(name)}\b", row.get("method", "").lower())]
    return found


@cache
def _report(study: str) -> str:
    return (RESULTS / study / "report.md").read_text(encoding="utf-8")


@cache
def _methods(study: str) -> dict[str, str]:
    """Arm -> method, from the study's own file."""
    values = yaml.safe_load((RESULTS / study / "study.yaml").read_text(encoding="utf-8"))
    return {entry.get("name", entry["method"]): entry["method"] for entry in values["methods"]}


@cache
def _scores(study: str) -> tuple[Score, ...]:
    found: list[Score] = []
    seen: set[str] = set()
    for heading, rows in _tables(_report(study)):
        # The first table of a section ranks the arms; those after it show further metrics.
        if heading in seen or "arm" not in rows[0]:
            continue
        seen.add(heading)
        found += _ranked(study, heading, rows)
    return tuple(found)


def _ranked(study: str, heading: str, rows: list[Row]) -> list[Score]:
    metric = list(rows[0])[1]
    # baselines stand below the arms
    scored = [row for row in rows if re.match(r"\d|-\d", row[metric]) and not row["arm"].startswith("baseline: ")]
    means = [row[metric].split()[0] for row in scored]
    best = " and ".join(row["arm"] for row, mean in zip(scored, means, strict=True) if mean == means[0])
    found = []
    for row, mean in zip(scored, means, strict=True):
        rank = means.index(mean) + 1
        separated = None if "p (Holm)" not in row or rank == 1 else _p_value(row["p (Holm)"]) < LEVEL
        found.append(Score(study, row["arm"], heading, metric, row[metric], rank, len(scored), best, separated))
    return found


def _p_value(text: str) -> float:
    """An adjusted p-value as reports print it; "< 0.001" counts as 0, a dash as not separated."""
    if text.startswith(("<", "&lt;")):
        return 0.0
    return float(text) if re.fullmatch(r"[\d.]+", text) else 1.0


def _tables(text: str) -> Iterator[tuple[str, list[Row]]]:
    """Each Markdown table below a heading of level two, as rows of header -> cell without markup."""
    heading, head, rows = "", [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("## "):
            heading = line.removeprefix("## ").strip()
        if line.startswith("|"):
            cells = [cell.strip().replace("\\", "").replace("**", "") for cell in line.strip().strip("|").split("|")]
            if not head:
                head = _unique(cells)
            elif not set(cells[0]) <= set("-: "):
                rows.append(dict(zip(head, cells, strict=False)))
        elif head:
            if rows:
                yield heading, rows
            head, rows = [], []


def _unique(cells: list[str]) -> list[str]:
    """Headers with the measure before each ratio: "GFLOPs", "/ floor" becomes "GFLOPs", "GFLOPs / floor"."""
    found, measure = [], ""
    for cell in cells:
        measure = measure if cell.startswith("/") else cell
        found.append(f"{measure} {cell}" if cell.startswith("/") else cell)
    return found
