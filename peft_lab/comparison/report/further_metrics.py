"""Test metrics besides the main one, by which arms are not ranked."""

from __future__ import annotations

import numpy as np

from peft_lab.comparison.report.sentences import interval_text, join, metric_title, number
from peft_lab.comparison.report.tables import MISSING, Column, Entry, Group, Subsection, Table, further_names
from peft_lab.comparison.stats.cell_baselines import cell_baselines
from peft_lab.comparison.stats.estimates import Estimate
from peft_lab.comparison.stats.statistics import ArmResult, CellResult, ReadPredictions, mean_score
from peft_lab.metrics import greater_is_better

TITLE = "Further metrics"


def further_metrics_table(cell: CellResult, predictions: ReadPredictions | None = None) -> Subsection | None:
    """Build the table of the further metrics.

    The arms are in the order of the headline.

    Args:
        cell: results on one task and backbone.
        predictions: as for `rank_arms`.

    Returns:
        None if the task has one metric only.
    """
    names = further_names(cell)
    if not names:
        return None
    columns = [Column("arm", numeric=False)]
    for name in names:
        better = "higher" if greater_is_better(name) else "lower"
        help_ = "mean over seeds on the test rows, with the 95 % interval"
        columns.append(Column(f"{metric_title(name)} ({better} is better)", help=help_))
    rows, over_seeds_alone = [], set()
    for arm in cell.arms:
        group = (cell.task, cell.backbone, arm.label)
        entries = [Entry(arm.label, arm.label, group)]
        for name in names:
            score, seeds = _score(arm, name, predictions)
            entries.append(_entry(arm, score, seeds, group))
            if score.basis == "seeds":
                over_seeds_alone.add(name)
        rows.append(tuple(entries))
    footer = _baseline_rows(cell, names)
    words = (
        f"Means over seeds of the same runs on the same test rows, with 95 % intervals. The arms are in the order of "
        f"their mean {metric_title(cell.metric)}; they are neither ranked by these metrics nor tested on them."
    )
    if over_seeds_alone:
        titles = join([metric_title(name) for name in names if name in over_seeds_alone])
        words += f" Intervals of {titles} are over seeds alone where the runs left no rows to resample."
    return Subsection(
        TITLE, words, Table(f"{TITLE}: {cell.task}, {cell.backbone}", tuple(columns), tuple(rows), footer)
    )


def _baseline_rows(cell: CellResult, names: list[str]) -> tuple[tuple[Entry, ...], ...]:
    """Row of each baseline, with its scores in the metrics of these names."""
    scores: dict[str, dict[str, float]] = {}
    for name in names:
        for known in cell_baselines(cell, name):
            scores.setdefault(known.predictor, {})[name] = known.score
    rows = []
    for predictor, by_name in scores.items():
        entries = [Entry(f"baseline: {predictor}")]
        for name in names:
            entries.append(Entry(number(by_name[name]), by_name[name]) if name in by_name else MISSING)
        rows.append(tuple(entries))
    return tuple(rows)


def _score(arm: ArmResult, metric: str, predictions: ReadPredictions | None) -> tuple[Estimate, int]:
    """Estimate and its number of seeds.

    A metric may be missing or infinite in some runs.
    """
    runs = {}
    for record in arm.records:
        score = record.score(metric=metric)
        if score is not None and np.isfinite(score):
            runs[record.seed] = record
    return mean_score(runs, metric, predictions)[0], len(runs)


def _entry(arm: ArmResult, score: Estimate, seeds: int, group: Group) -> Entry:
    if not seeds:
        return MISSING
    lacking = "" if seeds == len(arm.records) else f", {seeds} of {len(arm.records)} seeds"
    return Entry(interval_text(score) + lacking, score.value, group)
