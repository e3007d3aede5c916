"""Which arm is best, and which cannot be told from it: means, intervals and tests over seeds and test rows.

A score varies with the seed (one draw of many) and with the test rows (another draw); every seed sees the same rows, so
the two are crossed. The variance of a mean is the sum of two estimates: the variance of the seeds' scores over the
number of seeds, and the variance of the rows' values, averaged over seeds, over the number of rows. What seeds and rows
do together is in both, which errs to the safe side. The mean, divided by its standard error, is referred to a mixture
of t distributions: each part has its own degrees of freedom and a weight: its share of the variance. A percentile
bootstrap over 3 seeds would be too narrow by far; simulations in the tests show how often these intervals hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from scipy import optimize, special

from peft_lab.comparison.records.results import Record
from peft_lab.errors import ConfigError
from peft_lab.metrics import greater_is_better
from peft_lab.metrics.per_row import BOUNDS, SHARES, jackknife_values
from peft_lab.metrics.predictions import Predictions

Basis = Literal["seeds and rows", "seeds", "rows", "none"]

#: Error rate of a whole family of comparisons, and of one interval.
LEVEL = 0.05

#: Name of the cell that holds the means over tasks.
ALL_TASKS = "all tasks"


@dataclass(frozen=True)
class Part:
    """One source of the variance of a mean."""

    variance: float
    df: float
    source: Literal["seeds", "rows"]


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference of means.

    Attributes:
        value: the mean over seeds.
        low, high: the 95 % interval; None where there is nothing to take it from.
        basis: what the interval accounts for. "rows" (there is one seed) says nothing of another seed.
        parts: the variance by source.
    """

    value: float
    low: float | None
    high: float | None
    basis: Basis
    parts: tuple[Part, ...] = ()

    def negated(self) -> Estimate:
        """The same of the opposite sign."""
        low, high = (None if end is None else -end for end in (self.high, self.low))
        return replace(self, value=-self.value, low=low, high=high)


@dataclass(frozen=True)
class Comparison:
    """Two arms on the seeds and test rows that both have.

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
    def separated(self) -> bool:
        """Whether the arms differ at the 5 % level of the family."""
        return self.p_adjusted is not None and self.p_adjusted < LEVEL


@dataclass(frozen=True)
class Arm:
    """One arm in a cell.

    Attributes:
        label: the arm's label.
        score: its main metric on the test rows.
        by_seed: seed -> main metric.
        records: the runs behind it, in the order of their seeds.
        missing: seeds that other arms have and this one has not (or whose run failed).
        failed: the runs that failed or gave no finite score.
        versus_top: the arm of the best mean compared with this one; None for that arm itself.
        values: seed -> the rows' values; empty if they cannot be had for all its seeds.
    """

    label: str
    score: Estimate
    by_seed: Mapping[int, float]
    records: tuple[Record, ...]
    missing: tuple[int, ...] = ()
    failed: tuple[Record, ...] = ()
    versus_top: Comparison | None = None
    values: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Cell:
    """One task on one backbone.

    Attributes:
        task, backbone, metric: what was measured on what; `metric` is "" if no run gave a score.
        higher_is_better: the direction of the metric.
        arms: the arms with a score, best mean first.
        without_score: the arms without a score, with their final runs, which failed; none if no final run was made.
        comparisons: all pairs of `arms`.
        rows: number of test rows, 0 if unknown.
        indistinguishable: labels of the arms that are not separated from the first, itself left out.
    """

    task: str
    backbone: str
    metric: str
    higher_is_better: bool
    arms: tuple[Arm, ...]
    without_score: Mapping[str, tuple[Record, ...]]
    comparisons: tuple[Comparison, ...]
    rows: int
    indistinguishable: tuple[str, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds that gave a score in this cell."""
        return tuple(sorted({seed for arm in self.arms for seed in arm.by_seed}))

    def arm(self, label: str) -> Arm | None:
        """The arm of that label, None if it has no score here."""
        return next((arm for arm in self.arms if arm.label == label), None)

    def difference(self, first: str, second: str) -> Estimate:
        """The first arm's score less the second's."""
        found = next(c for c in self.comparisons if {c.first, c.second} == {first, second})
        return found.difference if found.first == first else found.difference.negated()


def rank_arms(records: Iterable[Record], items: Callable[[Record], Predictions] | None = None) -> list[Cell]:
    """Put the arms of every task and backbone in order and test them against one another.

    Args:
        records: of a comparison; only final runs give scores, on those tasks and backbones that have any.
        items: gives the items of a run's test rows; a `ConfigError` from it means that the run has none. Without items
            (or with a metric that rows cannot be resampled for), intervals are over seeds alone and say so.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.task, record.backbone), []).append(record)
    started = {key: runs for key, runs in groups.items() if any(run.stage == "final" for run in runs)}
    return [_cell(task, backbone, runs, items) for (task, backbone), runs in started.items()]


def _cell(task: str, backbone: str, records: list[Record], items: Callable[[Record], Predictions] | None) -> Cell:
    metric = next((record.main_metric for record in records if record.main_metric), "")
    groups: dict[str, list[Record]] = {record.arm: [] for record in records}  # an arm may have failed in the search
    final = [record for record in records if record.stage == "final"]
    seeds = sorted({record.seed for record in final})
    for record in final:
        groups[record.arm].append(record)
    found = [_arm(label, runs, seeds, metric, items) for label, runs in groups.items()]
    arms = [arm for arm in found if arm.by_seed]
    without = {arm.label: arm.failed for arm in found if not arm.by_seed}
    return assemble(task, backbone, metric, arms, compare_all(arms, metric), without)


def assemble(
    task: str,
    backbone: str,
    metric: str,
    arms: Sequence[Arm],
    comparisons: Sequence[Comparison],
    without_score: Mapping[str, tuple[Record, ...]] | None = None,
) -> Cell:
    """A cell of arms in any order and the unadjusted comparisons of all their pairs.

    Holm's correction is over all pairs, although only those with the best mean are reported: which arm that is, the
    same data decide.
    """
    higher = greater_is_better(metric)
    ranked = sorted(arms, key=lambda arm: arm.score.value, reverse=higher)
    adjusted = holm([comparison.p for comparison in comparisons])
    tested = [replace(comparison, p_adjusted=p) for comparison, p in zip(comparisons, adjusted, strict=True)]
    ranked = [ranked[0], *(_against(ranked[0], arm, tested) for arm in ranked[1:])] if ranked else []
    return Cell(
        task=task,
        backbone=backbone,
        metric=metric,
        higher_is_better=higher,
        arms=tuple(ranked),
        without_score=without_score or {},
        comparisons=tuple(tested),
        rows=max((_rows(arm) for arm in arms), default=0),
        indistinguishable=tuple(arm.label for arm in ranked[1:] if not _beaten(arm, higher)),
    )


def _against(top: Arm, arm: Arm, comparisons: Sequence[Comparison]) -> Arm:
    versus = next(c for c in comparisons if {c.first, c.second} == {top.label, arm.label})
    if versus.first != top.label:
        versus = replace(versus, first=top.label, second=arm.label, difference=versus.difference.negated())
    return replace(arm, versus_top=versus)


def _beaten(arm: Arm, higher: bool) -> bool:
    """Whether the top is better, on the shared seeds too: an arm may have others than the top has."""
    versus = arm.versus_top
    return versus is not None and versus.separated and (versus.difference.value > 0) == higher


def _arm(
    label: str, records: list[Record], seeds: Sequence[int], metric: str, items: Callable[[Record], Predictions] | None
) -> Arm:
    good, failed = {}, []
    for record in records:
        reached = record.score() if record.ok else None
        if reached is not None and np.isfinite(reached) and record.main_metric == metric:
            good[record.seed] = record
        else:
            failed.append(record)
    score, values = score_of(good := dict(sorted(good.items())), metric, items)
    return Arm(
        label=label,
        score=score,
        by_seed={seed: float(record.score() or 0.0) for seed, record in good.items()},
        records=tuple(good.values()),
        missing=tuple(seed for seed in seeds if seed not in good),
        failed=tuple(failed),
        values=values,
    )


def score_of(
    runs: Mapping[int, Record], metric: str, items: Callable[[Record], Predictions] | None
) -> tuple[Estimate, Mapping[int, np.ndarray]]:
    """The mean of any metric over runs by seed, and its rows' values, which are empty if not all seeds have them."""
    values = {seed: _row_values(record, metric, items) for seed, record in runs.items()}
    kept = {seed: rows for seed, rows in values.items() if rows is not None}
    if len(kept) < len(runs) or len({len(rows) for rows in kept.values()}) > 1:
        kept = {}
    scores = [record.score(metric=metric) or 0.0 for record in runs.values()]
    return estimate(scores, list(kept.values()), metric, BOUNDS.get(metric)), kept


def _row_values(record: Record, metric: str, items: Callable[[Record], Predictions] | None) -> np.ndarray | None:
    """The rows' values of a run, or None if its items are missing or do not give the score that the run reports."""
    if items is None:
        return None
    try:
        found = jackknife_values(metric, items(record), record.metrics.get("data", {}).get("labels"))
    except ConfigError:  # the estimate's basis will say that rows are not accounted for
        return None
    reported = record.score(metric=metric)
    if found is None or reported is None or not np.isclose(found[0], reported, rtol=0.01, atol=0.01):
        return None
    return found[1] if np.isfinite(found[1]).all() else None


def estimate(
    scores: Sequence[float],
    values: Sequence[np.ndarray] = (),
    metric: str = "",
    bounds: tuple[float, float] | None = None,
    pooled: Part | None = None,
) -> Estimate:
    """Mean over seeds with its interval.

    Args:
        scores: one for each seed, or differences of two arms' scores.
        values: the rows' values of each seed, arrays (rows,), or differences of them; empty if unknown.
        metric: its name; rows that are right or wrong get two rows more, one for and one against, so that an arm that
            is right on all of 20 rows does not count as perfect.
        bounds: the metric's range, at which the interval is cut.
        pooled: variance of one seed's score that other arms of the cell have in common, with its degrees of freedom.
    """
    if not len(scores):
        return Estimate(float("nan"), None, None, "none")
    parts = []
    if len(scores) > 1:
        parts += _seed_parts(float(np.var(scores, ddof=1)), len(scores), pooled)
    rows = len(values[0]) if len(values) else 0
    if rows > 1:
        variance = float(np.var(np.mean(values, axis=0), ddof=1)) / rows
        parts.append(Part(variance + (2 / rows**2 if metric in SHARES else 0.0), rows - 1, "rows"))
    return with_interval(float(np.mean(scores)), parts, bounds)


def _seed_parts(variance: float, seeds: int, pooled: Part | None) -> list[Part]:
    """The seeds' part: an arm's own variance, or the arms' common one and what its own has in excess of that."""
    if pooled is None:
        return [Part(variance / seeds, seeds - 1, "seeds")]
    excess = max(variance - pooled.variance, 0.0)
    return [Part(pooled.variance / seeds, pooled.df, "seeds"), Part(excess / seeds, seeds - 1, "seeds")]


def with_interval(mean: float, parts: Sequence[Part], bounds: tuple[float, float] | None = None) -> Estimate:
    """A mean with the 95 % interval that its parts of variance give, cut at the bounds of the metric."""
    sources = {part.source for part in parts}
    basis: Basis = "seeds and rows" if len(sources) == 2 else "none" if not sources else sources.pop()
    if not parts:
        return Estimate(mean, None, None, "none")
    half = half_width(parts)
    low, high = mean - half, mean + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(mean, low, high, basis, tuple(parts))


def p_value(difference: float, parts: Sequence[Part]) -> float:
    """Two-sided p of a difference; 1 if nothing is known to vary, for then nothing can be said."""
    total = sum(part.variance for part in parts)
    if total <= 0:
        return 1.0
    ratio = abs(difference) / np.sqrt(total)
    return min(float(sum(part.variance / total * 2 * special.stdtr(part.df, -ratio) for part in parts)), 1.0)


def half_width(parts: Sequence[Part], level: float = LEVEL) -> float:
    """Half the width of the interval: the difference whose p is `level`."""
    total = sum(part.variance for part in parts)
    if total <= 0:
        return 0.0
    # the mixture's quantile lies between those of its parts
    quantiles = [-special.stdtrit(part.df, level / 2) * np.sqrt(total) for part in parts if part.variance > 0]
    if max(quantiles) - min(quantiles) < 1e-12 * max(quantiles):
        return float(quantiles[0])
    return float(optimize.brentq(lambda x: p_value(x, parts) - level, min(quantiles), max(quantiles)))


def compare_all(arms: Sequence[Arm], metric: str = "") -> list[Comparison]:
    """Compare all pairs on their shared seeds and rows, without a correction for their number."""
    pairs = list(itertools.combinations(arms, 2))
    pooled = _pooled_variance(pairs)
    return [_compare(first, second, metric, pooled) for first, second in pairs]


def _pooled_variance(pairs: Sequence[tuple[Arm, Arm]]) -> Part | None:
    """The mean variance over seeds of the pairs' differences: twice the mean square of arm by seed.

    Two degrees of freedom, all that one pair has at 3 seeds, would separate hardly anything. What a pair varies in
    excess of this is charged with its own degrees of freedom, see `_seed_parts`: simulated with 3 seeds and 8 arms of
    which one varies five times as much as the others, the familywise error is 7 % with that charge, 15 % without.
    """
    most = max((len(arm.by_seed) for pair in pairs for arm in pair), default=0)
    complete = [pair for pair in pairs if len(_shared(*pair)) == most]
    if most < 2 or not complete:
        return None
    variances = [np.var(_seed_differences(*pair), ddof=1) for pair in complete]
    arms = len({arm.label for pair in complete for arm in pair})
    return Part(float(np.mean(variances)), (arms - 1) * (most - 1), "seeds")


def _shared(first: Arm, second: Arm) -> list[int]:
    return [seed for seed in first.by_seed if seed in second.by_seed]


def _seed_differences(first: Arm, second: Arm) -> list[float]:
    return [first.by_seed[seed] - second.by_seed[seed] for seed in _shared(first, second)]


def _compare(first: Arm, second: Arm, metric: str, pooled: Part | None) -> Comparison:
    shared, values = _shared(first, second), []
    if first.values and second.values and len(first.values[shared[0]] if shared else ()) == _rows(second):
        values = [first.values[seed] - second.values[seed] for seed in shared]
    difference = estimate(_seed_differences(first, second), values, metric, None, pooled)
    p = p_value(difference.value, difference.parts) if len(shared) > 1 else None
    return Comparison(first.label, second.label, difference, len(shared), p)


def _rows(arm: Arm) -> int:
    return len(next(iter(arm.values.values()), ()))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment; None stays None and does not count."""
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for position, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - position)))
        adjusted[index] = largest
    return adjusted
