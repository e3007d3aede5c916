"""Tables of a report as plain values, for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from peft_lab.comparison.records.measure_table import MEASURES, mean_measure
from peft_lab.comparison.records.run import Record
from peft_lab.comparison.records.run_frame import run_frame
from peft_lab.comparison.records.search_budget import overlapping, search_budgets
from peft_lab.comparison.report.sentences import interval_text, metric_title, number
from peft_lab.comparison.stats.bootstrap import bootstrap_interval
from peft_lab.comparison.stats.over_tasks import average_ranks
from peft_lab.comparison.stats.statistics import ArmResult, CellResult
from peft_lab.utils.text import markdown_text

#: Runs behind a number: task, backbone, arm.
Group = tuple[str, str, str]


@dataclass(frozen=True)
class Column:
    """Column of a table.

    Attributes:
        title: its head.
        numeric: True if it is aligned and sorted as numbers.
        help: longer words for the head.
    """

    title: str
    numeric: bool = True
    help: str = ""


@dataclass(frozen=True)
class Entry:
    """Field of a table.

    Attributes:
        text: the displayed text.
        sort: sort key of the field; None sorts last.
        group: the runs behind it.
        strong: True if it is bold.
    """

    text: str
    sort: float | str | None = None
    group: Group | None = None
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Table with a caption."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]


MISSING = Entry("-")


def costs(records: Iterable[Record]) -> tuple[str, ...]:
    """Measures that scores are drawn against.

    FLOPs stand in place of times if runs shared the machine.
    """
    time = "step_flops" if overlapping(records) else "step_seconds"
    return ("trainable_parameters", "peak_memory_bytes", time, "adapter_bytes")


def headline(cell: CellResult) -> Table:
    """Table of the arms: scores, intervals, distance to the best, measures."""
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
        first = Entry(arm.label, arm.label, group, strong=arm.versus_best is None)
        measures = [_measure(arm, name, group) for name in shown]
        rates = sorted({record.learning_rate for record in arm.records})
        rows.append((first, *_score_entries(cell, arm, group), *measures, Entry(_listed(rates), rates[0], group)))
    for label, runs in cell.without_score.items():
        group = (cell.task, cell.backbone, label)
        failed = Entry(f"failed ({len(runs)} of {len(runs)} runs)" if runs else "no final run", None, group)
        rows.append((Entry(label, label, group), failed, *[MISSING] * (len(columns) - 2)))
    return Table(f"{cell.task}, {cell.backbone}", tuple(columns), tuple(rows))


def further_names(cell: CellResult) -> list[str]:
    """Names of the test metrics besides the main one."""
    names: dict[str, None] = {}
    for arm in cell.arms:
        for record in arm.records:
            names |= dict.fromkeys(record.further_metrics)
    return list(names)


def _is_shown(name: str, cell: CellResult) -> bool:
    """Test whether a measure has a head and a value."""
    return bool(MEASURES[name].head) and any(mean_measure(arm.records, name) is not None for arm in cell.arms)


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _score_entries(cell: CellResult, arm: ArmResult, group: Group) -> tuple[Entry, ...]:
    """Score, bootstrap interval, distance to the best, p-value and number of seeds."""
    score = Entry(interval_text(arm.score), arm.score.value, group, strong=arm.versus_best is None)
    ends = bootstrap_interval(list(arm.values.values()))
    bootstrap = Entry(f"[{number(ends[0])}, {number(ends[1])}]", ends[0], group) if ends else MISSING
    count = len(arm.by_seed)
    seeds = Entry(f"{count} of {count + len(arm.missing)}" if arm.missing else str(count), count, group)
    if arm.versus_best is None:
        return score, bootstrap, Entry("best mean", 0.0), Entry("-"), seeds
    difference, p = arm.versus_best.difference, arm.versus_best.p_adjusted
    # the distance is positive for a worse arm, whichever way the metric goes
    gap = difference if cell.higher_is_better else difference.negated()
    distance = Entry(interval_text(gap) if np.isfinite(gap.value) else "-", gap.value, group)
    return score, bootstrap, distance, Entry(_p_text(p), p, group), seeds


def _p_text(p: float | None) -> str:
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _measure(arm: ArmResult, name: str, group: Group) -> Entry:
    value = mean_measure(arm.records, name)
    return MISSING if value is None else Entry(MEASURES[name].text(value), value, group)


def overall(mean: CellResult, cells: Sequence[CellResult]) -> Table:
    """Table over all tasks: mean scores, average ranks, scores on each."""
    ranks = average_ranks(cells)
    columns = [
        Column("arm", numeric=False),
        Column("mean over tasks", help=f"of {metric_title(mean.metric)}, with the 95 % interval"),
        Column("average rank", help="1 is best"),
        *(Column(f"{cell.task}, {cell.backbone}", help=metric_title(cell.metric)) for cell in cells),
    ]
    rows = []
    for arm in mean.arms:
        strong = arm.versus_best is None
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
    """Table of the arms' searches; None if there was none."""
    budgets = search_budgets(records)
    if not budgets:
        return None
    # the column is left out where it would be all zeros
    any_beyond = any(budget.beyond for budget in budgets)
    columns = [Column(title, numeric=False) for title in ("task", "backbone", "arm")]
    columns += [Column("candidates"), *([Column("beyond an edge")] if any_beyond else [])]
    columns += [Column("runs"), Column("training steps"), Column("learning rate chosen")]
    columns.append(Column("learning rates tried", numeric=False))
    rates = run_frame(records).groupby(["task", "backbone", "arm", "stage"])["learning_rate"].unique()
    rows = []
    for budget in budgets:
        group = (budget.task, budget.backbone, budget.arm)
        tried = sorted(rates[(*group, "search")])
        chosen = sorted(rates.get((*group, "final"), ()))
        # of two rates each is an edge, so the mark would say nothing
        at_edge = len(tried) > 2 and not {tried[0], tried[-1]}.isdisjoint(chosen)
        picked = Entry(_listed(chosen) + (" (edge)" if at_edge else ""), chosen[0], group) if chosen else MISSING
        numbers = [budget.trials, *([budget.beyond] if any_beyond else []), budget.runs, budget.steps]
        entries = [Entry(budget.task, budget.task), Entry(budget.backbone, budget.backbone)]
        entries.append(Entry(budget.arm, budget.arm, group))
        entries += [Entry(f"{count:,}", count, group) for count in numbers]
        rows.append((*entries, picked, Entry(_listed(tried), tried[0], group)))
    return Table("What the search of each arm cost and chose", tuple(columns), tuple(rows))


def markdown(table: Table) -> str:
    """Table in Markdown."""
    head = "| " + " | ".join(markdown_text(column.title) for column in table.columns) + " |"
    rule = "|"
    for column in table.columns:
        rule += " -: |" if column.numeric else " - |"
    lines = [head, rule]
    for row in table.rows:
        texts = []
        for entry in row:
            text = markdown_text(entry.text)
            texts.append(f"**{text}**" if entry.strong else text)
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)
