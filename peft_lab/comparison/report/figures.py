"""Figures of a report: their data, captions and files."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from peft_lab.comparison.records.measure_table import MEASURES, mean_measure
from peft_lab.comparison.records.run import Record
from peft_lab.comparison.report import plots
from peft_lab.comparison.report.sentences import join, metric_title
from peft_lab.comparison.stats.over_tasks import arm_labels
from peft_lab.comparison.stats.pareto import pareto_front
from peft_lab.comparison.stats.statistics import CellResult
from peft_lab.utils.atomic_files import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: Folder of the plots beside a page.
PLOTS = "plots"


@dataclass(frozen=True)
class EmbeddedFigure:
    """Figure as the page embeds it.

    Attributes:
        file: name of the PNG in `plots/`.
        caption: the text below it.
        light: PNG for light pages, in base64.
        dark: PNG for dark pages, in base64.
        group: title of the figures of which the page shows one at a time, "" for one by itself.
        option: name of this one among them.
    """

    file: str
    caption: str
    light: str
    dark: str
    group: str = ""
    option: str = ""


@dataclass(frozen=True)
class FigureSpec:
    """Figure to be drawn; `group` and `option` as in `EmbeddedFigure`."""

    name: str
    caption: str
    draw: Callable[[plots.ColourScheme], Figure]
    group: str = ""
    option: str = ""


def cell_figures(
    cell: CellResult, records: Sequence[Record], order: Sequence[str], costs: Sequence[str]
) -> Iterator[FigureSpec]:
    """Yield the figures of a cell that there are data for.

    Args:
        cell: results on one task and backbone.
        records: all runs of that task and backbone.
        order: all arms of the report.
        costs: the measures against which scores are drawn.
    """
    if cell.arms:
        yield FigureSpec("intervals", f"{INTERVALS}; the short strokes are seeds.", partial(plots.forest, cell))
        yield from _pareto(cell, costs)
    good = [record for record in records if record.ok]
    searched = [record for record in good if record.stage == "search"]
    if searched:
        yield from _rates(cell, searched, records, order)
    yield from _curves(cell, [record for record in good if record.stage == "final"], order)


#: Caption of a figure of means, over one task or all.
INTERVALS = "Means with 95 % intervals; an arm in grey is separated from the best"


def _pareto(cell: CellResult, costs: Sequence[str]) -> Iterator[FigureSpec]:
    for name in costs:
        measure, cost = MEASURES[name], {}
        for arm in cell.arms:
            mean = mean_measure(arm.records, name)
            if mean is not None:
                cost[arm.label] = measure.scaled(mean)
        if len(cost) < 2:
            continue
        # the front is of the means, as in the words of the section
        arms = [arm for arm in cell.arms if arm.label in cost]
        on = pareto_front([(cost[arm.label], arm.score.value) for arm in arms], (False, cell.higher_is_better))
        front = join([arm.label for arm, there in zip(arms, on, strict=True) if there])
        caption = f"{capital(metric_title(cell.metric))} against {measure.head}. On the front of the means: {front}."
        draw = partial(plots.pareto, cell, cost, measure.head)
        yield FigureSpec(f"pareto-{name.replace('_', '-')}", caption, draw, "Score against", measure.head)


def confusion_figures(counts: Mapping[str, np.ndarray], labels: Sequence[str]) -> Iterator[FigureSpec]:
    """Yield a heat map of each arm's confusion matrix; none for more classes than can be drawn.

    Args:
        counts: label of an arm -> numbers of rows, (true classes, predicted classes).
        labels: names of the classes.
    """
    if len(labels) > plots.DRAWN_CLASSES:
        return
    for number, (arm, matrix) in enumerate(counts.items()):
        caption = f"{arm}: rows of each true class by predicted class, summed over seeds; the colour is their share."
        if len(labels) > plots.NAMED_CLASSES:
            caption += " Classes have their numbers in labels.json."
        draw = partial(plots.heat_map, matrix, labels)
        yield FigureSpec(f"confusion-{number}", caption, draw, "Confusion matrix of", arm)


def _rates(
    cell: CellResult, searched: list[Record], records: Sequence[Record], order: Sequence[str]
) -> Iterator[FigureSpec]:
    trials = pd.DataFrame([_trial(record) for record in searched])
    # runs that failed or diverged have no point
    trials = trials[np.isfinite(trials["score"])]
    means = trials.groupby(["arm", "learning_rate", "round", "max_steps"])["score"].mean()
    # of a rate that was tried at several lengths (rounds, trials of time), the longest one counts
    longest = means.groupby(["arm", "learning_rate"]).last()
    lines = []
    for label in order:
        if label not in longest.index.get_level_values("arm"):
            continue
        scores = longest[label]
        chosen = {record.learning_rate for record in records if record.arm == label and record.stage == "final"}
        ringed = next((index for index, rate in enumerate(scores.index) if rate in chosen), None)
        lines.append(plots.Line(label, scores.index.tolist(), scores.tolist(), ringed))
    if lines:
        names = ("learning rate", f"{_metric(cell, searched)}, validation rows")
        caption = "Score on the validation rows by learning rate in the search; the chosen rate is ringed."
        yield FigureSpec("learning-rates", caption, partial(plots.chart, lines, order, names, log_x=True))


def _trial(record: Record) -> dict[str, Any]:
    score = record.score("validation")
    return {
        "arm": record.arm,
        "learning_rate": record.learning_rate,
        "round": record.round,
        "max_steps": int(record.options.get("max_steps") or 0),
        "score": float("nan") if score is None else score,
    }


def _curves(cell: CellResult, final: list[Record], order: Sequence[str]) -> Iterator[FigureSpec]:
    metric = f"eval_{cell.metric}"
    for name, words in (("loss", "training loss"), (metric, f"validation {metric_title(cell.metric)}")):
        lines = []
        for label in order:
            curves = [record.curves[name] for record in final if record.arm == label and record.curves.get(name)]
            if curves:
                lines.append(_mean_curve(label, curves))
        # a curve of one point shows nothing
        if any(len(line.x) > 1 for line in lines):
            caption = f"{capital(words)} by step, mean over seeds."
            draw = partial(plots.chart, lines, order, ("training step", words))
            yield FigureSpec("training-loss" if name == "loss" else "validation", caption, draw)


def _mean_curve(label: str, curves: Sequence[plots.Curve]) -> plots.Line:
    """Mean over seeds at the steps that all curves have."""
    by_step = []
    for curve in curves:
        steps, values = np.asarray(curve, dtype=float).T
        by_step.append(pd.Series(dict(zip(steps, values, strict=True))))
    # a mean over the other seeds would hide that one diverged
    mean = pd.concat(by_step, axis="columns", join="inner").mean(axis="columns", skipna=False).sort_index()
    return plots.Line(label, mean.index.tolist(), mean.tolist())


def capital(text: str) -> str:
    """Text with a capital at the start, the rest as it is."""
    return text[:1].upper() + text[1:]


def _metric(cell: CellResult, records: Sequence[Record]) -> str:
    return metric_title(cell.metric or next((record.main_metric for record in records), ""))


def colour_order(cells: Sequence[CellResult], records: Sequence[Record]) -> list[str]:
    """Labels of all arms, in the order that fixes their colours."""
    return list(dict.fromkeys([*arm_labels(cells), *(record.arm for record in records)]))


def draw(spec: FigureSpec, folder: Path, prefix: str) -> EmbeddedFigure:
    """Draw a figure for light and dark pages.

    The light one is also written into `folder`.
    """
    # both, because the page follows the reader's colour scheme
    light, dark = (plots.render(spec.draw, scheme) for scheme in (plots.LIGHT, plots.DARK))
    file = f"{prefix}-{spec.name}.png"
    with new_file(folder / file) as partial:
        partial.write_bytes(light)
    pictures = {"light": base64.b64encode(light).decode(), "dark": base64.b64encode(dark).decode()}
    return EmbeddedFigure(file, spec.caption, **pictures, group=spec.group, option=spec.option)
