"""Ranked means and pairwise tests on each task and backbone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from peft_lab.comparison.records.run import Record
from peft_lab.comparison.stats.estimates import (
    LEVEL,
    Estimate,
    VarianceComponent,
    estimate,
    holm,
    p_value,
)
from peft_lab.errors import ConfigError
from peft_lab.metrics import greater_is_better
from peft_lab.metrics.per_row import BOUNDS, jackknife_values
from peft_lab.metrics.predictions import Predictions

#: Name of the cell that holds the means over tasks.
ALL_TASKS = "all tasks"
#: Reads the predictions of a record's test rows; raises `ConfigError` if there are none.
ReadPredictions = Callable[[Record], Predictions]


@dataclass(frozen=True)
class PairTest:
    """Paired test of two arms on their shared seeds and rows.

    Attributes:
        first, second: labels of the arms.
        difference: first less second.
        seeds: number of shared seeds.
        p: probability of a difference this large between equal arms; None if there are fewer than two shared seeds.
        p_adjusted: `p` after Holm's correction over all pairs of the cell.
    """

    first: str
    second: str
    difference: Estimate
    seeds: int
    p: float | None = None
    p_adjusted: float | None = None

    @property
    def significant(self) -> bool:
        """True if the arms differ at the familywise level of 5 %."""
        return self.p_adjusted is not None and self.p_adjusted < LEVEL


@dataclass(frozen=True)
class ArmResult:
    """Results of one arm on one task and backbone.

    Attributes:
        label: the arm's label.
        score: its main metric on the test rows.
        by_seed: seed -> main metric.
        records: the runs behind it, in the order of their seeds.
        missing: seeds that other arms have and this one has not (or whose run failed).
        failed: the runs that failed or gave no finite score.
        versus_best: test of the arm of the best mean against this one; None for that arm itself.
        values: seed -> the rows' values; empty if they cannot be had for all its seeds.
    """

    label: str
    score: Estimate
    by_seed: Mapping[int, float]
    records: tuple[Record, ...]
    missing: tuple[int, ...] = ()
    failed: tuple[Record, ...] = ()
    versus_best: PairTest | None = None
    values: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class CellResult:
    """Results of all arms on one task and backbone.

    Attributes:
        task: label of the task.
        backbone: the backbone.
        metric: main metric of the task, "" if no run gave a score.
        higher_is_better: the direction of the metric.
        arms: the arms with a score, best mean first.
        without_score: label of each arm without a score -> its final runs, all failed; empty if none was made.
        pair_tests: tests of all pairs of `arms`.
        rows: number of test rows, 0 if unknown.
        indistinguishable: labels of the arms that are not separated from the first, itself left out.
    """

    task: str
    backbone: str
    metric: str
    higher_is_better: bool
    arms: tuple[ArmResult, ...]
    without_score: Mapping[str, tuple[Record, ...]]
    pair_tests: tuple[PairTest, ...]
    rows: int
    indistinguishable: tuple[str, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds that gave a score."""
        seeds: set[int] = set()
        return tuple(sorted(seeds.union(*(arm.by_seed for arm in self.arms))))

    @property
    def is_complete(self) -> bool:
        """True if every arm has a score for every seed."""
        return not self.without_score and not any(arm.missing for arm in self.arms)

    def arm(self, label: str) -> ArmResult | None:
        """Results of an arm by label, None if it has none."""
        return next((arm for arm in self.arms if arm.label == label), None)

    def difference(self, first: str, second: str) -> Estimate:
        """First arm's score less the second's."""
        found = _find_test(self.pair_tests, first, second)
        return found.difference if found.first == first else found.difference.negated()


def rank_arms(records: Iterable[Record], predictions: ReadPredictions | None = None) -> list[CellResult]:
    """Rank the arms of every task and backbone and test all pairs.

    Args:
        records: of a comparison; only final runs give scores, on those tasks and backbones that have any.
        predictions: record -> predictions of its test rows; a `ConfigError` means that the run has none. Without
            them, or with a metric that is not a function of rows, intervals are over seeds alone and say so.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.task, record.backbone), []).append(record)
    cells = []
    for (task, backbone), runs in groups.items():
        # a search alone says nothing about the test rows
        if any(run.stage == "final" for run in runs):
            cells.append(_cell(task, backbone, runs, predictions))
    return cells


def _cell(task: str, backbone: str, records: list[Record], predictions: ReadPredictions | None) -> CellResult:
    # failed runs have no metric
    metric = next((record.main_metric for record in records if record.main_metric), "")
    # arms of the search count too: one that failed there has no final run
    groups: dict[str, list[Record]] = {record.arm: [] for record in records}
    final = [record for record in records if record.stage == "final"]
    seeds = sorted({record.seed for record in final})
    for record in final:
        groups[record.arm].append(record)
    found = [_arm(label, runs, seeds, metric, predictions) for label, runs in groups.items()]
    arms = [arm for arm in found if arm.by_seed]
    without_score = {arm.label: arm.failed for arm in found if not arm.by_seed}
    return cell_result(task, backbone, metric, arms, pairwise_tests(arms, metric), without_score)


def cell_result(
    task: str,
    backbone: str,
    metric: str,
    arms: Sequence[ArmResult],
    pair_tests: Sequence[PairTest],
    without_score: Mapping[str, tuple[Record, ...]] | None = None,
) -> CellResult:
    """Rank arms and adjust the tests of their pairs.

    Holm's correction is over all pairs, although only those with the best mean are reported, because the same data
    decide which arm that is.
    """
    higher = greater_is_better(metric)
    # arms of the same mean stand in the order of their names, which says nothing of either
    by_name = sorted(arms, key=lambda arm: arm.label)
    ranked = sorted(by_name, key=lambda arm: arm.score.value, reverse=higher)
    adjusted = holm([test.p for test in pair_tests])
    tested = [replace(test, p_adjusted=p) for test, p in zip(pair_tests, adjusted, strict=True)]
    for position, arm in enumerate(ranked[1:], 1):
        ranked[position] = _with_test_against(ranked[0], arm, tested)
    return CellResult(
        task=task,
        backbone=backbone,
        metric=metric,
        higher_is_better=higher,
        arms=tuple(ranked),
        without_score=without_score or {},
        pair_tests=tuple(tested),
        # an arm whose predictions are gone reports no rows, although it was scored on them
        rows=max((_rows(arm) for arm in arms), default=0),
        indistinguishable=tuple(arm.label for arm in ranked[1:] if not _is_worse(arm, higher)),
    )


def _find_test(pair_tests: Sequence[PairTest], first: str, second: str) -> PairTest:
    """Test of two arms, in whichever order it names them."""
    return next(test for test in pair_tests if {test.first, test.second} == {first, second})


def _with_test_against(best: ArmResult, arm: ArmResult, pair_tests: Sequence[PairTest]) -> ArmResult:
    test = _find_test(pair_tests, best.label, arm.label)
    # the difference is always the best less the other
    if test.first != best.label:
        test = replace(test, first=best.label, second=arm.label, difference=test.difference.negated())
    return replace(arm, versus_best=test)


def _is_worse(arm: ArmResult, higher: bool) -> bool:
    """Test whether an arm is significantly worse than the best one.

    The sign of the difference is checked because it is over the shared seeds, the order of the means over all.
    """
    test = arm.versus_best
    return test is not None and test.significant and (test.difference.value > 0) == higher


def _arm(
    label: str,
    records: list[Record],
    seeds: Sequence[int],
    metric: str,
    predictions: ReadPredictions | None,
) -> ArmResult:
    good: dict[int, Record] = {}
    by_seed: dict[int, float] = {}
    failed = []
    for record in sorted(records, key=lambda record: record.seed):
        reached = record.score() if record.ok else None
        # a diverged run counts as a missing seed, not as a score
        if reached is not None and np.isfinite(reached) and record.main_metric == metric:
            good[record.seed], by_seed[record.seed] = record, reached
        else:
            failed.append(record)
    score, values = mean_score(good, metric, predictions)
    return ArmResult(
        label=label,
        score=score,
        by_seed=by_seed,
        records=tuple(good.values()),
        missing=tuple(seed for seed in seeds if seed not in good),
        failed=tuple(failed),
        values=values,
    )


def mean_score(
    runs: Mapping[int, Record], metric: str, predictions: ReadPredictions | None
) -> tuple[Estimate, Mapping[int, np.ndarray]]:
    """Mean of any metric over seeds, and its values per row.

    Args:
        runs: seed -> record.
        metric: a metric that all of them have on the test rows.
        predictions: as for `rank_arms`.

    Returns:
        The estimate, and seed -> values per row, empty if some seed has none.
    """
    values = {seed: _row_values(record, metric, predictions) for seed, record in runs.items()}
    # values of some seeds alone would give the seeds unequal weights
    kept = {seed: rows for seed, rows in values.items() if rows is not None}
    if len(kept) < len(runs) or len({len(rows) for rows in kept.values()}) > 1:
        kept = {}
    scores = [record.score(metric=metric) or 0.0 for record in runs.values()]
    return estimate(scores, list(kept.values()), metric, BOUNDS.get(metric)), kept


def _row_values(record: Record, metric: str, predictions: ReadPredictions | None) -> np.ndarray | None:
    """Values per row of a run.

    Returns None if its predictions are missing or contradict the reported score.
    """
    if predictions is None:
        return None
    try:
        found = jackknife_values(metric, predictions(record), record.metrics.get("data", {}).get("labels"))
    except ConfigError:  # the basis of the estimate will say that rows are not accounted for
        return None
    reported = record.score(metric=metric)
    # predictions of another run may lie in the folder; their score gives them away
    if found is None or reported is None or not np.isclose(found[0], reported, rtol=0.01, atol=0.01):
        return None
    return found[1] if np.isfinite(found[1]).all() else None


def pairwise_tests(arms: Sequence[ArmResult], metric: str = "") -> list[PairTest]:
    """Test all pairs on their shared seeds and rows.

    The p-values are not adjusted for the number of pairs.
    """
    pairs = list(itertools.combinations(arms, 2))
    pooled = _pooled_variance(pairs)
    return [_test_pair(first, second, metric, pooled) for first, second in pairs]


def _pooled_variance(pairs: Sequence[tuple[ArmResult, ArmResult]]) -> VarianceComponent | None:
    """Mean variance over seeds of the pairs' differences.

    It is twice the mean square of arm by seed.

    Two degrees of freedom, all that one pair has at 3 seeds, would separate hardly anything. What a pair varies in
    excess of this is charged with its own degrees of freedom, see `estimate`: simulated with 3 seeds and 8 arms of
    which one varies five times as much as the others, the familywise error is 7 % with that charge, 15 % without.
    """
    arms = {arm.label: arm for arm in itertools.chain(*pairs)}
    most = max((len(arm.by_seed) for arm in arms.values()), default=0)
    # pairs that lack seeds have variances of fewer degrees of freedom
    complete = [pair for pair in pairs if len(_shared(*pair)) == most]
    if most < 2 or not complete:
        return None
    variances = [np.var(_seed_differences(*pair), ddof=1) for pair in complete]
    pooled = {arm.label for arm in itertools.chain(*complete)}
    # these are the degrees of freedom of the interaction of arm and seed
    return VarianceComponent(float(np.mean(variances)), (len(pooled) - 1) * (most - 1), "seeds")


def _shared(first: ArmResult, second: ArmResult) -> list[int]:
    return [seed for seed in first.by_seed if seed in second.by_seed]


def _seed_differences(first: ArmResult, second: ArmResult) -> list[float]:
    return [first.by_seed[seed] - second.by_seed[seed] for seed in _shared(first, second)]


def _test_pair(first: ArmResult, second: ArmResult, metric: str, pooled: VarianceComponent | None) -> PairTest:
    shared, values = _shared(first, second), []
    # the rows are paired by position, so their numbers must agree
    if shared and first.values and _rows(first) == _rows(second):
        values = [first.values[seed] - second.values[seed] for seed in shared]
    # no bounds, because the metric's range is that of a score and not of a difference
    difference = estimate(_seed_differences(first, second), values, metric, None, pooled)
    p = p_value(difference.value, difference.components) if len(shared) > 1 else None
    return PairTest(first.label, second.label, difference, len(shared), p)


def _rows(arm: ArmResult) -> int:
    return len(next(iter(arm.values.values()), ()))
