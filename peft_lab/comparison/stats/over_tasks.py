"""The arms over all tasks of a comparison: mean score with its interval, and average rank."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from peft_lab.comparison.stats.statistics import (
    ALL_TASKS,
    Arm,
    Cell,
    Comparison,
    Estimate,
    Part,
    assemble,
    p_value,
    with_interval,
)
from peft_lab.metrics.per_row import BOUNDS


def over_tasks(cells: Sequence[Cell]) -> Cell | None:
    """The mean over cells as a cell of its own, of the arms that have a score in each of them.

    The tasks are those that were run, not a draw from others: seeds and test rows vary, tasks do not. Cells with a
    metric that shares no scale with others (perplexity) are left out.

    Returns:
        None if fewer than two cells can be averaged, or fewer than two arms are in all of them.
    """
    cells = [cell for cell in cells if cell.arms and has_scale(cell)]
    labels = [label for label in arm_labels(cells) if all(cell.arm(label) for cell in cells)]
    if len(cells) < 2 or len(labels) < 2:
        return None
    arms = []
    least, greatest = np.mean([BOUNDS[cell.metric] for cell in cells], axis=0).tolist()
    for label in labels:
        found = [arm for cell in cells if (arm := cell.arm(label)) is not None]
        score = mean_of([cell.task for cell in cells], [arm.score for arm in found], (least, greatest))
        arms.append(Arm(label, score, {}, tuple(record for arm in found for record in arm.records)))
    comparisons = [_compare(first, second, cells) for first, second in itertools.combinations(labels, 2)]
    metrics = sorted({cell.metric for cell in cells})
    backbones = sorted({cell.backbone for cell in cells})
    return assemble(ALL_TASKS, ", ".join(backbones), ", ".join(metrics), arms, comparisons)


def has_scale(cell: Cell) -> bool:
    """Whether 1 is the best value of the cell's metric, so that a mean with other such metrics has a meaning."""
    return cell.higher_is_better and BOUNDS.get(cell.metric, (0.0, np.inf))[1] == 1.0


def arm_labels(cells: Sequence[Cell]) -> list[str]:
    """All arms of the cells, in order of their first appearance, those without a score included."""
    return list(
        dict.fromkeys(label for cell in cells for label in (*(a.label for a in cell.arms), *cell.without_score))
    )


def average_ranks(cells: Sequence[Cell]) -> dict[str, float]:
    """The mean rank over cells (1 is best) of the arms that have a score in each of them, ranked among themselves."""
    cells = [cell for cell in cells if cell.arms]
    labels = [label for label in arm_labels(cells) if all(cell.arm(label) for cell in cells)]
    if not labels:
        return {}
    ranks = []
    for cell in cells:
        scores = [arm.score.value for label in labels if (arm := cell.arm(label)) is not None]
        ranks.append(rankdata([-score if cell.higher_is_better else score for score in scores]))
    return dict(zip(labels, np.mean(ranks, axis=0).tolist(), strict=True))


def mean_of(tasks: Sequence[str], scores: Sequence[Estimate], bounds: tuple[float, float] | None = None) -> Estimate:
    """The mean of estimates on several tasks, with its interval, cut at `bounds`.

    Seeds count as drawn anew for each task; the rows of one task, seen by several backbones, as the same ones. There is
    no interval if one of the estimates has none, and none over seeds if one of them has none over seeds.
    """
    count = len(scores)
    mean = float(np.mean([score.value for score in scores]))
    sources = set.intersection(*({part.source for part in score.parts} for score in scores))
    parts = []
    if "seeds" in sources:
        seeds = [part for score in scores for part in score.parts if part.source == "seeds"]
        parts.append(_joined(seeds, sum(part.variance for part in seeds), count, "seeds"))
    if "rows" in sources:
        rows = [(task, part) for task, score in zip(tasks, scores, strict=True) for part in score.parts]
        rows = [(task, part) for task, part in rows if part.source == "rows"]
        by_task = [sum(part.variance**0.5 for name, part in rows if name == task) ** 2 for task in dict.fromkeys(tasks)]
        parts.append(_joined([part for _, part in rows], sum(by_task), count, "rows"))
    return with_interval(mean, parts, bounds)


def _joined(parts: Sequence[Part], variance: float, count: int, source: str) -> Part:
    """The part of a mean over `count` tasks; degrees of freedom after Satterthwaite."""
    total = sum(part.variance for part in parts)
    squares = sum(part.variance**2 / part.df for part in parts)
    df = total**2 / squares if squares > 0 else sum(part.df for part in parts)
    return Part(variance / count**2, df, "seeds" if source == "seeds" else "rows")


def _compare(first: str, second: str, cells: Sequence[Cell]) -> Comparison:
    difference = mean_of([cell.task for cell in cells], [cell.difference(first, second) for cell in cells])
    tested = any(part.source == "seeds" for part in difference.parts)
    p = p_value(difference.value, difference.parts) if tested else None
    return Comparison(first, second, difference, 0, p)
