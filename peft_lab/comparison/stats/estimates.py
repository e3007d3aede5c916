"""Means with their 95 % intervals, p-values of differences, and Holm's adjustment.

A score varies with the seed (one draw of many) and with the test rows (another draw); every seed sees the same rows, so
the two are crossed. The variance of a mean is the sum of two estimates: the variance of the seeds' scores over the
number of seeds, and the variance of the rows' values, averaged over seeds, over the number of rows. What seeds and rows
do together is in both, which errs to the safe side. The mean, divided by its standard error, is referred to a mixture
of t distributions: each component has its own degrees of freedom and a weight: its share of the variance. A percentile
bootstrap over 3 seeds would be too narrow by far; simulations in the tests show how often these intervals hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import optimize, special

from peft_lab.metrics.per_row import SHARES

Basis = Literal["seeds and rows", "seeds", "rows", "none"]

#: Error rate of a whole family of comparisons, and of one interval.
LEVEL = 0.05


@dataclass(frozen=True)
class VarianceComponent:
    """Variance of a mean from one source, with its degrees of freedom."""

    variance: float
    df: float
    source: Literal["seeds", "rows"]


@dataclass(frozen=True)
class Estimate:
    """Mean or difference of means, with its interval.

    Attributes:
        value: the mean over seeds.
        low, high: the 95 % interval; None if there is nothing to estimate it from.
        basis: sources of variance that the interval accounts for; "rows" alone if there is one seed.
        components: the variance by source.
    """

    value: float
    low: float | None
    high: float | None
    basis: Basis
    components: tuple[VarianceComponent, ...] = ()

    def negated(self) -> Estimate:
        """Estimate of the opposite sign."""
        low = None if self.high is None else -self.high
        high = None if self.low is None else -self.low
        return replace(self, value=-self.value, low=low, high=high)


def estimate(
    scores: Sequence[float],
    values: Sequence[np.ndarray] = (),
    metric: str = "",
    bounds: tuple[float, float] | None = None,
    pooled: VarianceComponent | None = None,
) -> Estimate:
    """Mean over seeds with its 95 % interval.

    Args:
        scores: one for each seed, or differences of two arms' scores.
        values: values per row of each seed, float arrays (rows,), or differences of them; empty if unknown.
        metric: its name; rows that are right or wrong get two rows more, one for and one against, so that an arm that
            is right on all of 20 rows does not count as perfect.
        bounds: the metric's range, at which the interval is cut.
        pooled: variance of one seed's score that other arms of the cell have in common, with its degrees of freedom.
    """
    if not len(scores):
        return Estimate(float("nan"), None, None, "none")
    components = []
    # one seed says nothing about another one
    if len(scores) > 1:
        components += _seed_components(float(np.var(scores, ddof=1)), len(scores), pooled)
    rows = len(values[0]) if len(values) else 0
    if rows > 1:
        # every seed sees the same rows, so more seeds do not make more rows
        variance = float(np.var(np.mean(values, axis=0), ddof=1)) / rows
        components.append(VarianceComponent(variance + (2 / rows**2 if metric in SHARES else 0.0), rows - 1, "rows"))
    return with_interval(float(np.mean(scores)), components, bounds)


def _seed_components(variance: float, seeds: int, pooled: VarianceComponent | None) -> list[VarianceComponent]:
    """Components from seeds: the variance, or pooled variance and excess."""
    if pooled is None:
        return [VarianceComponent(variance / seeds, seeds - 1, "seeds")]
    # pooling must not hide an arm that varies more than the others
    excess = max(variance - pooled.variance, 0.0)
    return [
        VarianceComponent(pooled.variance / seeds, pooled.df, "seeds"),
        VarianceComponent(excess / seeds, seeds - 1, "seeds"),
    ]


def with_interval(
    mean: float, components: Sequence[VarianceComponent], bounds: tuple[float, float] | None = None
) -> Estimate:
    """Mean with its 95 % interval, cut at the metric's bounds."""
    sources = {component.source for component in components}
    basis: Basis = "seeds and rows" if len(sources) == 2 else "none" if not sources else sources.pop()
    if not components:
        return Estimate(mean, None, None, "none")
    half = half_width(components)
    low, high = mean - half, mean + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(mean, low, high, basis, tuple(components))


def p_value(difference: float, components: Sequence[VarianceComponent]) -> float:
    """Two-sided p-value of a difference, 1 if no variance is known."""
    total = sum(component.variance for component in components)
    if total <= 0:
        return 1.0
    ratio = abs(difference) / np.sqrt(total)
    p = 0.0
    for component in components:
        weight = component.variance / total
        p += weight * 2 * float(special.stdtr(component.df, -ratio))
    return min(p, 1.0)


def half_width(components: Sequence[VarianceComponent], level: float = LEVEL) -> float:
    """Half width of the interval: the difference whose p-value is `level`."""
    total = sum(component.variance for component in components)
    if total <= 0:
        return 0.0
    # the quantile of the mixture lies between those of its components
    varying = [component for component in components if component.variance > 0]
    quantiles = [-special.stdtrit(component.df, level / 2) * np.sqrt(total) for component in varying]
    # with one component or equal ones there is no bracket to search in
    if max(quantiles) - min(quantiles) < 1e-12 * max(quantiles):
        return float(quantiles[0])
    # a little wider, because a component of next to no weight leaves the root at an end, on either side by rounding
    low, high = (1 - 1e-9) * min(quantiles), (1 + 1e-9) * max(quantiles)
    return float(optimize.brentq(lambda x: p_value(x, components) - level, low, high))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values by Holm's step-down method.

    None stays None and does not count.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for position, (p, index) in enumerate(order):
        # adjusted p-values must not fall where the p-values rise
        largest = max(largest, min(1.0, p * (len(order) - position)))
        adjusted[index] = largest
    return adjusted
