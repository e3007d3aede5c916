"""Which figures a report has, and what each of them shows."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peft_lab.comparison.records.measure_table import MEASURES, mean_measure
from peft_lab.comparison.records.run import Record
from peft_lab.comparison.report import plots
from peft_lab.comparison.report.sentences import join, metric_title
from peft_lab.comparison.stats.over_tasks import arm_labels
from peft_lab.comparison.stats.pareto import pareto_front
from peft_lab.comparison.stats.statistics import Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure as the page embeds it.

    Attributes:
        file: name of the PNG in `plots/`.
        caption: what is seen.
        light, dark: PNGs in base64.
    """

    file: str
    caption: str
    light: str
    dark: str


@dataclass(frozen=True)
class Plan:
    """A figure to be drawn."""

    name: str
    caption: str
    draw: Callable[[plots.Scheme], Figure]


def of_cell(cell: Cell, records: Sequence[Record], order: Sequence[str], costs: Sequence[str]) -> Iterator[Plan]:
    """The figures of a cell that there are data for.

    Args:
        cell: one task and backbone.
        records: all runs of that task and backbone.
        order: all arms of the report.
        costs: the measures against which scores are drawn.
    """
    if cell.arms:
        yield Plan("intervals", f"{INTERVALS}; the short strokes are seeds.", partial(plots.forest, cell))
        yield from _pareto(cell, costs)
    good = [record for record in records if record.ok]
    if searched := [record for record in good if record.stage == "search"]:
        yield from _rates(cell, searched, records, order)
    yield from _curves(cell, [record for record in good if record.stage == "final"], order)


#: What a figure of means shows; also for the figure over all tasks.
INTERVALS = "Means with 95 % intervals; an arm in grey is separated from the best"


def _pareto(cell: Cell, costs: Sequence[str]) -> Iterator[Plan]:
    for name in costs:
        found = {arm.label: mean_measure(arm.records, name) for arm in cell.arms}
        cost = {label: MEASURES[name].scaled(value) for label, value in found.items() if value is not None}
        if len(cost) < 2:
            continue
        head = MEASURES[name].head
        arms = [arm for arm in cell.arms if arm.label in cost]
        on = pareto_front([(cost[arm.label], arm.score.value) for arm in arms], (False, cell.higher_is_better))
        front = join([arm.label for arm, there in zip(arms, on, strict=True) if there])
        caption = f"{capital(metric_title(cell.metric))} against {head}. On the front of the means: {front}."
        yield Plan(f"pareto-{name.replace('_', '-')}", caption, partial(plots.pareto, cell, cost, head))


def _rates(cell: Cell, searched: list[Record], records: Sequence[Record], order: Sequence[str]) -> Iterator[Plan]:
    lines = []
    for label in order:
        scores: dict[float, dict[tuple[int, int], list[float]]] = {}
        for record in searched:
            score = record.score("validation")
            if record.arm == label and score is not None and np.isfinite(score):
                length = (record.round, int(record.options.get("max_steps") or 0))
                scores.setdefault(record.learning_rate, {}).setdefault(length, []).append(score)
        # of a rate that was tried at several lengths (rounds, trials of time), the longest one counts
        best = {rate: float(np.mean(lengths[max(lengths)])) for rate, lengths in sorted(scores.items())}
        chosen = {record.learning_rate for record in records if record.arm == label and record.stage == "final"}
        ringed = next((index for index, rate in enumerate(best) if rate in chosen), None)
        if best:
            lines.append(plots.Line(label, list(best), list(best.values()), ringed))
    if lines:
        names = ("learning rate", f"{_metric(cell, searched)}, validation rows")
        caption = "Score on the validation rows by learning rate in the search; the chosen rate is ringed."
        yield Plan("learning-rates", caption, partial(plots.chart, lines, order, names, log_x=True))


def _curves(cell: Cell, final: list[Record], order: Sequence[str]) -> Iterator[Plan]:
    metric = f"eval_{cell.metric}"
    for name, words in (("loss", "training loss"), (metric, f"validation {metric_title(cell.metric)}")):
        lines = []
        for label in order:
            curves = [record.curves[name] for record in final if record.arm == label and record.curves.get(name)]
            if curves:
                lines.append(_mean_curve(label, curves))
        if any(len(line.x) > 1 for line in lines):
            caption = f"{capital(words)} by step, mean over seeds."
            draw = partial(plots.chart, lines, order, ("training step", words))
            yield Plan("training-loss" if name == "loss" else "validation", caption, draw)


def _mean_curve(label: str, curves: Sequence[plots.Curve]) -> plots.Line:
    """The mean over seeds at the steps that all curves have."""
    tables = [{float(step): float(value) for step, value in curve} for curve in curves]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    return plots.Line(label, steps, [float(np.mean([table[step] for table in tables])) for step in steps])


def capital(text: str) -> str:
    """The text with a capital at the start, the rest as it is."""
    return text[:1].upper() + text[1:]


def _metric(cell: Cell, records: Sequence[Record]) -> str:
    return metric_title(cell.metric or next((record.main_metric for record in records), ""))


def colour_order(cells: Sequence[Cell], records: Sequence[Record]) -> list[str]:
    """All arms of a report in the order that fixes their colours."""
    return list(dict.fromkeys([*arm_labels(cells), *(record.arm for record in records)]))


def draw(plan: Plan, folder: Path, prefix: str) -> Picture:
    """Draw a figure for light and dark pages and write the light one as PNG into `folder`."""
    light, dark = (plots.render(plan.draw, scheme) for scheme in (plots.LIGHT, plots.DARK))
    file = f"{prefix}-{plan.name}.png"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(light)
    return Picture(file, plan.caption, *(base64.b64encode(png).decode() for png in (light, dark)))
