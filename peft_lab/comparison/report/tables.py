"""Tables of a report as plain values, for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from peft_lab.comparison.records.measure_table import MEASURES, mean_measure
from peft_lab.comparison.records.run import Record
from peft_lab.comparison.records.run_frame import run_frame
from peft_lab.comparison.records.search_budget import overlapping, search_budgets
from peft_lab.comparison.report.sentences import interval_text, leaders, metric_title, number
from peft_lab.comparison.stats.bootstrap import bootstrap_interval
from peft_lab.comparison.stats.cell_baselines import cell_baselines
from peft_lab.comparison.stats.over_tasks import average_ranks
from peft_lab.comparison.stats.statistics import ArmResult, CellResult
from peft_lab.utils.mappings import pick
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
        shown: False if the page leaves it out until it is chosen, as other formats do.
    """

    title: str
    numeric: bool = True
    help: str = ""
    shown: bool = True


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
    """Table with a caption.

    Attributes:
        caption: its name, in words.
        columns: from left to right.
        rows: from top to bottom, each with a field for each column.
        footer: rows that are not sorted with the others, such as baselines.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]
    footer: tuple[tuple[Entry, ...], ...] = ()

    @property
    def meanings(self) -> list[tuple[str, str]]:
        """Titles of the columns that have longer words, with these."""
        return [(column.title, column.help) for column in self.columns if column.help not in ("", column.title)]


@dataclass(frozen=True)
class Subsection:
    """Part of a section: words and a table."""

    title: str
    words: str
    table: Table | None = None


MISSING = Entry("-")


def costs(records: Iterable[Record]) -> tuple[str, ...]:
    """Measures that scores are drawn against.

    FLOPs stand in place of times if runs shared the machine.
    """
    time = "step_flops" if overlapping(records) else "step_seconds"
    return ("trainable_parameters", "peak_memory_bytes", time, "adapter_bytes")


#: Measures whose columns are shown unless others are chosen.
_SHOWN = ("trainable_parameters", "peak_memory_bytes", "step_seconds", "shifted_score", "forgetting")


def headline(cell: CellResult) -> Table:
    """Table of the arms: scores, intervals, distance to the best, measures; at its foot the baselines."""
    # a measure that the task has as a metric too stands among those, with its interval
    metrics = {cell.metric, *further_names(cell)}
    measures = [name for name in MEASURES if name not in metrics and _is_measured(name, cell)]
    columns = [
        Column("arm", numeric=False, help="a method with its arguments"),
        Column(
            metric_title(cell.metric),
            help="mean over seeds on the test rows, and its 95 % interval: 95 of 100 intervals made like this, each "
            "from other seeds and test rows, hold the true mean",
        ),
        Column(
            "bootstrap",
            help="another interval, by resampling seeds and test rows; too narrow for few seeds",
            shown=False,
        ),
        Column(
            "less than the best",
            help="the best mean less this one on shared seeds, with the 95 % interval of this pair",
        ),
        Column(
            "p (Holm)",
            help="probability of a difference this large between equal arms, adjusted by Holm's method for all pairs; "
            "below 0.05 the arm is told apart from the best",
        ),
        Column("seeds", help="runs of the arm that gave a score, each with another seed"),
        *(Column(MEASURES[name].head, help=MEASURES[name].title, shown=name in _SHOWN) for name in measures),
        Column("learning rate", help="chosen on the validation rows", shown=False),
    ]
    rows = []
    for arm in cell.arms:
        group = (cell.task, cell.backbone, arm.label)
        first = Entry(arm.label, arm.label, group, strong=_is_best(arm.label, cell))
        fields = [_measure(arm, name, group) for name in measures]
        rates = sorted({record.learning_rate for record in arm.records})
        rows.append((first, *_score_entries(cell, arm, group), *fields, Entry(_listed(rates), rates[0], group)))
    for label, runs in cell.without_score.items():
        group = (cell.task, cell.backbone, label)
        failed = Entry(f"failed ({len(runs)} of {len(runs)} runs)" if runs else "no final run", None, group)
        rows.append((Entry(label, label, group), failed, *[MISSING] * (len(columns) - 2)))
    footer = []
    for known in cell_baselines(cell):
        score = Entry(number(known.score), known.score)
        footer.append((Entry(f"baseline: {known.predictor}"), score, *[MISSING] * (len(columns) - 2)))
    return Table(f"{cell.task}, {cell.backbone}", tuple(columns), tuple(rows), tuple(footer))


def _is_best(label: str, cell: CellResult) -> bool:
    """Test whether an arm alone has the best mean; arms that tie are not marked."""
    return leaders(cell) == (label,)


def further_names(cell: CellResult) -> list[str]:
    """Names of the test metrics besides the main one."""
    names: dict[str, None] = {}
    for arm in cell.arms:
        for record in arm.records:
            names |= dict.fromkeys(record.further_metrics)
    return list(names)


def _is_measured(name: str, cell: CellResult) -> bool:
    """Test whether a measure has a head and a value."""
    return bool(MEASURES[name].head) and any(mean_measure(arm.records, name) is not None for arm in cell.arms)


def _listed(rates: Iterable[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _score_entries(cell: CellResult, arm: ArmResult, group: Group) -> tuple[Entry, ...]:
    """Score, bootstrap interval, distance to the best, p-value and number of seeds."""
    score = Entry(interval_text(arm.score), arm.score.value, group, strong=_is_best(arm.label, cell))
    ends = bootstrap_interval(list(arm.values.values()))
    bootstrap = Entry(f"[{number(ends[0])}, {number(ends[1])}]", ends[0], group) if ends else MISSING
    count = len(arm.by_seed)
    seeds = Entry(f"{count} of {count + len(arm.missing)}" if arm.missing else str(count), count, group)
    if arm.label in leaders(cell):
        return score, bootstrap, Entry("best mean" if score.strong else "tie for the best", 0.0), Entry("-"), seeds
    assert arm.versus_best is not None, "only the first arm has no test against itself"
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
        Column("arm", numeric=False, help="a method with its arguments"),
        Column("mean over tasks", help=f"of {metric_title(mean.metric)}, with the 95 % interval"),
        Column(
            "average rank", help="mean of the arm's places on the tasks; 1 is best, and arms that tie share a place"
        ),
        *(Column(f"{cell.task}, {cell.backbone}", help=metric_title(cell.metric)) for cell in cells),
    ]
    rows = []
    for arm in mean.arms:
        strong = _is_best(arm.label, mean)
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
    columns.append(Column("candidates", help="learning rates, with other tuned arguments, that were tried"))
    if any_beyond:
        columns.append(Column("beyond an edge", help="those tried because the best one was the lowest or the highest"))
    columns += [Column("runs"), Column("training steps")]
    columns.append(Column("learning rate chosen", help='"edge" marks a rate at an end of those tried'))
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


def chosen(table: Table) -> Table:
    """Table without the columns that are left out unless they are chosen."""
    kept = [index for index, column in enumerate(table.columns) if column.shown]
    columns = tuple(table.columns[index] for index in kept)
    rows = tuple(pick(row, kept) for row in table.rows)
    footer = tuple(pick(row, kept) for row in table.footer)
    return replace(table, columns=columns, rows=rows, footer=footer)


def markdown(table: Table) -> str:
    """Table in Markdown."""
    head = "| " + " | ".join(markdown_text(column.title) for column in table.columns) + " |"
    rule = "|"
    for column in table.columns:
        rule += " -: |" if column.numeric else " - |"
    lines = [head, rule]
    for row in (*table.rows, *table.footer):
        texts = []
        for entry in row:
            text = markdown_text(entry.text)
            texts.append(f"**{text}**" if entry.strong else text)
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)
