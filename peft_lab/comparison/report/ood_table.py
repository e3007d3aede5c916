"""Table of the out-of-distribution scores of the arms."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peft_lab.comparison.records.measure_table import MEASURES
from peft_lab.comparison.records.results import read_ood_scores
from peft_lab.comparison.report.sentences import interval_text, number
from peft_lab.comparison.report.tables import MISSING, Column, Entry, Subsection, Table
from peft_lab.comparison.stats.estimates import estimate
from peft_lab.comparison.stats.ood_intervals import (
    Array,
    ood_interval,
    weighted_auroc,
    weighted_false_positive_rate,
)
from peft_lab.comparison.stats.statistics import ArmResult, CellResult
from peft_lab.metrics.out_of_distribution import SCORES

TITLE = "Out-of-distribution rows"

_VALUES = {"auroc": weighted_auroc, "fpr95": weighted_false_positive_rate}
_HEADS = {"auroc": "AUROC (higher is better)", "fpr95": "FPR at 95 % TPR (lower is better)"}


def ood_table(cell: CellResult, folder: Path) -> Subsection | None:
    """Build the table of the out-of-distribution scores; None if no run has any.

    Args:
        cell: results on one task and backbone.
        folder: the comparison's folder, with the scores of each row beside its runs.
    """
    names = [name for name in MEASURES if name.startswith("ood_")]
    arms = [arm for arm in cell.arms if any(names[0] in record.measures for record in arm.records)]
    if not arms:
        return None
    columns = [Column("arm", numeric=False)]
    for score, title in SCORES.items():
        columns += [Column(f"{title}: {_HEADS[kind]}", help=MEASURES[f"ood_{score}_{kind}"].title) for kind in _VALUES]
    rows, resampled = [], True
    for arm in arms:
        group = (cell.task, cell.backbone, arm.label)
        scores = _scores(arm, folder)
        resampled &= scores is not None
        entries = [Entry(arm.label, arm.label, group)]
        for name in names:
            text, value = _text(arm, name, scores)
            entries.append(MISSING if value is None else Entry(text, value, group))
        rows.append(tuple(entries))
    basis = (
        "bootstrap intervals over seeds, test rows and rows of the other task, which are too narrow for few seeds"
        if resampled
        else "intervals over seeds alone where the runs left no rows to resample"
    )
    words = (
        "How well test rows of the task are told from rows of another one by scores of the adapted model: means over "
        f"seeds, with 95 % {basis}. Distances are those of the features that enter the task head."
    )
    return Subsection(TITLE, words, Table(f"{TITLE}: {cell.task}, {cell.backbone}", tuple(columns), tuple(rows)))


def _scores(arm: ArmResult, folder: Path) -> list[dict[str, Array]] | None:
    """Scores of the rows of each run; None if one of them has left none."""
    found = [read_ood_scores(folder, record) for record in arm.records]
    kept = [scores for scores in found if scores is not None]
    return kept if len(kept) == len(found) else None


def _text(arm: ArmResult, name: str, scores: list[dict[str, Array]] | None) -> tuple[str, float | None]:
    """Mean of a measure with its interval, and the mean; None without one."""
    values = [record.measures[name] for record in arm.records if record.measures.get(name) is not None]
    if not values:
        return "", None
    score, kind = name.removeprefix("ood_").rsplit("_", 1)
    if scores is not None:
        own, other = [each[f"{score}.own"] for each in scores], [each[f"{score}.other"] for each in scores]
        ends = ood_interval(own, other, _VALUES[kind])
        if ends is not None:
            return f"{number(float(np.mean(values)))} [{number(ends[0])}, {number(ends[1])}]", float(np.mean(values))
    found = estimate(values, bounds=(0.0, 1.0))
    return interval_text(found), found.value
