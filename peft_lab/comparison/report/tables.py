"""The tables of a report, as plain values that the HTML page, the Markdown file and the CSV file write out."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peft_lab.comparison.records.measure_table import MEASURES, mean_measure
from peft_lab.comparison.records.run import Record
from peft_lab.comparison.records.search_budget import overlapping, search_budgets
from peft_lab.comparison.report.sentences import interval_text, metric_title, number
from peft_lab.comparison.stats.bootstrap import bootstrap_interval
from peft_lab.comparison.stats.over_tasks import average_ranks
from peft_lab.comparison.stats.statistics import Arm, Cell
from peft_lab.utils.text import markdown_text


@dataclass(frozen=True)
class Column:
    """A column: its head, whether it holds numbers, and a longer word for what it holds."""

    title: str
    numeric: bool = True
    help: str = ""


@dataclass(frozen=True)
class Entry:
    """One field of a table.

    Attributes:
        text: what is shown.
        sort: what rows are sorted by; None sorts last.
        group: the runs behind it, (task, backbone, arm).
        strong: shown in bold.
    """

    text: str
    sort: float | str | None = None
    group: tuple[str, str, str] | None = None
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table with a caption."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]


MISSING = Entry("-")


def costs(records: Iterable[Record]) -> tuple[str, ...]:
    """The measures against which scores are drawn: FLOPs in place of times where runs shared the machine."""
    time = "step_flops" if overlapping(records) else "step_seconds"
    return ("trainable_parameters", "peak_memory_bytes", time, "adapter_bytes")


def headline(cell: Cell) -> Table:
    """The arms of a cell: score with interval, distance to the best, costs, and what else was measured."""
    # a measure that the task has as a metric too stands among those, with its interval
    metrics = {cell.metric, *further_names(cell)}
    shown = [name for name in MEASURES if name not in metrics and _is_shown(name, cell)]
    columns = [
        Column("arm", numeric=False),
        Column(metric_title(cell.metric), help="mean over seeds on the test rows, with the 95 % interval"),
        Column("bootstrap", help="plain percentile bootstrap over seeds and test rows; too narrow for few seeds"),
        Column(
            "less than the best",
            help="the best mean less this one on shared seeds, with the 95 % interval of this pair",
        ),
        Column("p (Holm)", help="probability of such a difference between equal arms, adjusted for all pairs"),
        Column("seeds"),
        *(Column(MEASURES[name].head, help=MEASURES[name].title) for name in shown),
        Column("learning rate", help="chosen on the validation rows"),
    ]
    rows = []
    for arm in cell.arms:
        group = (cell.task, cell.backbone, arm.label)
        first = Entry(arm.label, arm.label, group, strong=arm.versus_top is None)
        rates = sorted({record.learning_rate for record in arm.records})
        rate = Entry(", ".join(f"{rate:g}" for rate in rates), rates[0], group)
        measures = [_measure(arm, name, group) for name in shown]
        rows.append((first, *_score_entries(cell, arm, group), *measures, rate))
    for label, runs in cell.without_score.items():
        group = (cell.task, cell.backbone, label)
        failed = Entry(f"failed ({len(runs)} of {len(runs)} runs)" if runs else "no final run", None, group)
        rows.append((Entry(label, label, group), failed, *[MISSING] * (len(columns) - 2)))
    return Table(f"{cell.task}, {cell.backbone}", tuple(columns), tuple(rows))


def further_names(cell: Cell) -> list[str]:
    """The task's metrics on the test rows besides the one that arms are ranked by."""
    return list(dict.fromkeys(name for arm in cell.arms for record in arm.records for name in record.further_metrics))


def _score_entries(cell: Cell, arm: Arm, group: tuple[str, str, str]) -> tuple[Entry, ...]:
    score = Entry(interval_text(arm.score), arm.score.value, group, strong=arm.versus_top is None)
    ends = bootstrap_interval(list(arm.values.values()))
    plain = Entry(f"[{number(ends[0])}, {number(ends[1])}]", ends[0], group) if ends else MISSING
    if arm.versus_top is None:
        versus = (Entry("best mean", 0.0), Entry("-"))
    else:
        difference, p = arm.versus_top.difference, arm.versus_top.p_adjusted
        sign = 1 if cell.higher_is_better else -1
        gap = difference if sign > 0 else difference.negated()
        shown = interval_text(gap) if np.isfinite(gap.value) else "-"
        p_text = "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
        versus = (Entry(shown, gap.value, group), Entry(p_text, p, group))
    count = len(arm.by_seed)
    seeds = f"{count} of {count + len(arm.missing)}" if arm.missing else str(count)
    return score, plain, *versus, Entry(seeds, count, group)


def _measure(arm: Arm, name: str, group: tuple[str, str, str]) -> Entry:
    value = mean_measure(arm.records, name)
    return MISSING if value is None else Entry(MEASURES[name].text(value), value, group)


def _is_shown(name: str, cell: Cell) -> bool:
    """Test whether a measure belongs in a cell's table: it has a head, and a run that was measured."""
    return bool(MEASURES[name].head) and any(mean_measure(arm.records, name) is not None for arm in cell.arms)


def overall(mean: Cell, cells: Sequence[Cell]) -> Table:
    """The arms over all tasks: mean score with interval, average rank, and the score on each task."""
    ranks = average_ranks(cells)
    columns = [
        Column("arm", numeric=False),
        Column("mean over tasks", help=f"of {metric_title(mean.metric)}, with the 95 % interval"),
        Column("average rank", help="1 is best"),
        *(Column(f"{cell.task}, {cell.backbone}", help=metric_title(cell.metric)) for cell in cells),
    ]
    rows = []
    for arm in mean.arms:
        strong = arm.versus_top is None
        entries = [Entry(arm.label, arm.label, strong=strong)]
        entries.append(Entry(interval_text(arm.score), arm.score.value, strong=strong))
        rank = ranks.get(arm.label)
        entries.append(MISSING if rank is None else Entry(f"{rank:.2f}", rank))
        for cell in cells:
            found = cell.arm(arm.label)
            group = (cell.task, cell.backbone, arm.label)
            entries.append(Entry(number(found.score.value), found.score.value, group) if found else MISSING)
        rows.append(tuple(entries))
    return Table("All tasks", tuple(columns), tuple(rows))


def tuning(records: Sequence[Record]) -> Table | None:
    """What the search of each arm cost and chose; None if nothing was searched."""
    spent = search_budgets(records)
    beyond = any(one.beyond for one in spent)
    columns = (
        *(Column(title, numeric=False) for title in ("task", "backbone", "arm")),
        *(Column("candidates"), *([Column("beyond an edge")] if beyond else [])),
        *(Column("runs"), Column("training steps")),
        Column("learning rate chosen"),
        Column("learning rates tried", numeric=False),
    )
    rows = []
    for one in spent:
        group = (one.task, one.backbone, one.arm)
        mine = [record for record in records if (record.task, record.backbone, record.arm) == group]
        tried = sorted({record.learning_rate for record in mine if record.stage == "search"})
        chosen = sorted({record.learning_rate for record in mine if record.stage == "final"})
        edge = " (edge)" if len(tried) > 2 and any(rate in (tried[0], tried[-1]) for rate in chosen) else ""
        picked = Entry(", ".join(f"{rate:g}" for rate in chosen) + edge, chosen[0], group) if chosen else MISSING
        counts = (one.trials, *([one.beyond] if beyond else []), one.runs, one.steps)
        rows.append(
            (
                *(Entry(name, name) for name in (one.task, one.backbone)),
                Entry(one.arm, one.arm, group),
                *(Entry(f"{count:,}", count, group) for count in counts),
                picked,
                Entry(", ".join(f"{rate:g}" for rate in tried), tried[0] if tried else None, group),
            )
        )
    return Table("What the search of each arm cost and chose", columns, tuple(rows)) if rows else None


def markdown(table: Table) -> str:
    """A table in Markdown."""
    head = "| " + " | ".join(markdown_text(column.title) for column in table.columns) + " |"
    rule = "|" + "|".join(" -: " if column.numeric else " - " for column in table.columns) + "|"
    lines = []
    for row in table.rows:
        texts = [markdown_text(entry.text) for entry in row]
        bold = [f"**{text}**" if entry.strong else text for entry, text in zip(row, texts, strict=True)]
        lines.append("| " + " | ".join(bold) + " |")
    return "\n".join([head, rule, *lines])


def results_csv(records: Sequence[Record]) -> str:
    """All runs with their scores and measures, one line each."""
    scores = _columns({f"{split}_{name}" for split, name, _ in _scores(record)} for record in records)
    measures = _columns(record.measures for record in records)
    tuned = _columns(record.tuned for record in records)
    fixed = ("id", "study", "stage", "arm", "method", "task", "backbone", "seed", "learning_rate", "round", "status")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*fixed, *(f"tuned_{name}" for name in tuned), *scores, *measures, "folder", "error"])
    for record in records:
        found = {f"{split}_{name}": value for split, name, value in _scores(record)}
        values = [getattr(record, name) for name in fixed]
        values += [record.tuned.get(name, "") for name in tuned] + [found.get(name, "") for name in scores]
        values += [record.measures.get(name, "") for name in measures] + [record.folder, record.error]
        writer.writerow([_csv_text(value) for value in values])
    return buffer.getvalue()


def _scores(record: Record) -> list[tuple[str, str, Any]]:
    splits: Mapping[str, Mapping[str, Any]] = record.metrics.get("metrics", {})
    return [(split, name, value) for split, values in splits.items() for name, value in values.items()]


def _columns(names: Iterable[Iterable[str]]) -> list[str]:
    return sorted({name for group in names for name in group})


def _csv_text(value: Any) -> Any:
    """A value that a spreadsheet does not take for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
