"""Results over all tasks: mean scores and average ranks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.stats import rankdata

from peft_lab.comparison.stats.estimates import Estimate, VarianceComponent, p_value, with_interval
from peft_lab.comparison.stats.statistics import ALL_TASKS, ArmResult, CellResult, PairTest, cell_result
from peft_lab.metrics.per_row import BOUNDS


def over_tasks(cells: Sequence[CellResult]) -> CellResult | None:
    """Mean over cells of the arms with a score in each.

    The tasks are those that were run, not a draw from others: seeds and test rows vary, tasks do not. Cells with a
    metric that shares no scale with others (perplexity) are left out.

    Returns:
        None if fewer than two cells can be averaged, or fewer than two arms are in all of them.
    """
    # a perplexity would outweigh all shares
    cells = [cell for cell in cells if cell.arms and has_scale(cell)]
    by_label = _arms_in_all(cells)
    if len(cells) < 2 or len(by_label) < 2:
        return None
    tasks = [cell.task for cell in cells]
    # some metrics start at 0 and others at -1, so the bounds are averaged too
    least, greatest = np.mean([BOUNDS[cell.metric] for cell in cells], axis=0).tolist()
    arms = []
    for label, found in by_label.items():
        # seeds count as drawn anew for each task, so a mean over tasks has no scores by seed
        score = mean_of(tasks, [arm.score for arm in found], (least, greatest))
        records = itertools.chain.from_iterable(arm.records for arm in found)
        arms.append(ArmResult(label, score, {}, tuple(records)))
    pair_tests = [_test_pair(first, second, cells) for first, second in itertools.combinations(by_label, 2)]
    metrics = sorted({cell.metric for cell in cells})
    backbones = sorted({cell.backbone for cell in cells})
    return cell_result(ALL_TASKS, ", ".join(backbones), ", ".join(metrics), arms, pair_tests)


def has_scale(cell: CellResult) -> bool:
    """Test whether 1 is the best value of the cell's metric.

    Only then has a mean with other such metrics a meaning.
    """
    return cell.higher_is_better and BOUNDS.get(cell.metric, (0.0, np.inf))[1] == 1.0


def arm_labels(cells: Sequence[CellResult]) -> list[str]:
    """Labels of all arms, in the order of their first appearance."""
    labels: dict[str, None] = {}
    for cell in cells:
        labels |= dict.fromkeys(arm.label for arm in cell.arms)
        labels |= dict.fromkeys(cell.without_score)
    return list(labels)


def _arms_in_all(cells: Sequence[CellResult]) -> dict[str, list[ArmResult]]:
    """Results by label of the arms with a score in each cell."""
    common: dict[str, list[ArmResult]] = {}
    for label in arm_labels(cells):
        results = [cell.arm(label) for cell in cells]
        found = [arm for arm in results if arm is not None]
        if len(found) == len(cells):
            common[label] = found
    return common


def average_ranks(cells: Sequence[CellResult]) -> dict[str, float]:
    """Mean rank, 1 is best, of arms scored in each cell.

    The arms are ranked among themselves.
    """
    # ranks need no common scale, so metrics such as perplexity count here
    cells = [cell for cell in cells if cell.arms]
    # an arm that is missing in one cell would shift the ranks of the others in the rest
    by_label = _arms_in_all(cells)
    if not by_label:
        return {}
    ranks = []
    for position, cell in enumerate(cells):
        # rank 1 is the smallest value, so scores of which more is better are negated
        scores = np.array([found[position].score.value for found in by_label.values()])
        ranks.append(rankdata(-scores if cell.higher_is_better else scores))
    return dict(zip(by_label, np.mean(ranks, axis=0).tolist(), strict=True))


def mean_of(tasks: Sequence[str], scores: Sequence[Estimate], bounds: tuple[float, float] | None = None) -> Estimate:
    """Mean of estimates on several tasks, with its interval, cut at `bounds`.

    Seeds count as drawn anew for each task; the rows of one task, seen by several backbones, as the same ones. There is
    no interval if one of the estimates has none, and none over seeds if one of them has none over seeds.
    """
    count = len(scores)
    mean = float(np.mean([score.value for score in scores]))
    seeds: list[VarianceComponent] = []
    rows: list[tuple[str, VarianceComponent]] = []
    sources = {"seeds", "rows"}
    for task, score in zip(tasks, scores, strict=True):
        # a source that one task lacks cannot be accounted for in the mean
        sources &= {component.source for component in score.components}
        for component in score.components:
            if component.source == "seeds":
                seeds.append(component)
            else:
                rows.append((task, component))
    components = []
    if "seeds" in sources:
        variance = sum(component.variance for component in seeds)
        components.append(_mean_component(seeds, variance, count, "seeds"))
    if "rows" in sources:
        # backbones saw the same rows of a task: their errors are taken as fully correlated, so deviations add up
        deviations: dict[str, float] = {}
        for task, component in rows:
            deviations[task] = deviations.get(task, 0.0) + component.variance**0.5
        variance = sum(deviation**2 for deviation in deviations.values())
        components.append(_mean_component([component for _, component in rows], variance, count, "rows"))
    return with_interval(mean, components, bounds)


def _mean_component(
    components: Sequence[VarianceComponent], variance: float, count: int, source: Literal["seeds", "rows"]
) -> VarianceComponent:
    """Variance component of a mean over `count` tasks.

    The degrees of freedom are Satterthwaite's.
    """
    total = sum(component.variance for component in components)
    squares = sum(component.variance**2 / component.df for component in components)
    # without any variance Satterthwaite's formula would divide zero by zero
    df = total**2 / squares if squares > 0 else sum(component.df for component in components)
    return VarianceComponent(variance / count**2, df, source)


def _test_pair(first: str, second: str, cells: Sequence[CellResult]) -> PairTest:
    difference = mean_of([cell.task for cell in cells], [cell.difference(first, second) for cell in cells])
    # rows alone say nothing about another seed, so they make no test
    tested = any(component.source == "seeds" for component in difference.components)
    p = p_value(difference.value, difference.components) if tested else None
    return PairTest(first, second, difference, 0, p)
