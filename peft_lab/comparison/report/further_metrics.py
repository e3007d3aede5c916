"""A task's metrics on the test rows besides the one that arms are ranked by: shown, neither ranked nor tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from peft_lab.comparison.records.results import Record
from peft_lab.comparison.report.sentences import interval_text, join, metric_title
from peft_lab.comparison.report.tables import MISSING, Column, Entry, Table, further_names
from peft_lab.comparison.stats.statistics import Arm, Cell, Estimate, score_of
from peft_lab.metrics import greater_is_better
from peft_lab.metrics.predictions import Predictions

TITLE = "Further metrics"


@dataclass(frozen=True)
class Further:
    """The table of a cell, and what has to be said of it."""

    words: str
    table: Table
    title: str = TITLE


def further(cell: Cell, items: Callable[[Record], Predictions] | None = None) -> Further | None:
    """The further metrics of a cell, the arms in the order of its headline; None if the task has one metric.

    Args:
        cell: one task and backbone.
        items: gives the items of a run, as for `rank_arms`.
    """
    names = further_names(cell)
    if not names:
        return None
    scores = {(arm.label, name): _score(arm, name, items) for arm in cell.arms for name in names}
    columns = [Column("arm", numeric=False)]
    for name in names:
        better = "higher" if greater_is_better(name) else "lower"
        help_ = "mean over seeds on the test rows, with the 95 % interval"
        columns.append(Column(f"{metric_title(name)} ({better} is better)", help=help_))
    rows = []
    for arm in cell.arms:
        group = (cell.task, cell.backbone, arm.label)
        entries = [_entry(arm, *scores[arm.label, name], group) for name in names]
        rows.append((Entry(arm.label, arm.label, group), *entries))
    bases = {name: {scores[arm.label, name][0].basis for arm in cell.arms} for name in names}
    alone = [name for name, found in bases.items() if "seeds" in found]
    words = (
        f"Means over seeds of the same runs on the same test rows, with 95 % intervals. The arms are in the order of "
        f"their mean {metric_title(cell.metric)}; they are neither ranked by these metrics nor tested on them."
    )
    if alone:
        titles = join([metric_title(name) for name in alone])
        words += f" Intervals of {titles} are over seeds alone where the runs left no rows to resample."
    return Further(words, Table(f"{TITLE}: {cell.task}, {cell.backbone}", tuple(columns), tuple(rows)))


def _score(arm: Arm, metric: str, items: Callable[[Record], Predictions] | None) -> tuple[Estimate, int]:
    """The estimate and the number of seeds that it is over: a metric may be missing or infinite in some runs."""
    scores = [(record, record.score(metric=metric)) for record in arm.records]
    runs = {record.seed: record for record, score in scores if score is not None and np.isfinite(score)}
    return score_of(runs, metric, items)[0], len(runs)


def _entry(arm: Arm, score: Estimate, seeds: int, group: tuple[str, str, str]) -> Entry:
    if not seeds:
        return MISSING
    lacking = "" if seeds == len(arm.records) else f", {seeds} of {len(arm.records)} seeds"
    return Entry(interval_text(score) + lacking, score.value, group)
