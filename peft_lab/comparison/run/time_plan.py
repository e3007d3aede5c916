"""Plans of a recommendation: what of a comparison fits into a time, predicted from short runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft_lab.comparison.records.run import Record
from peft_lab.comparison.report.sentences import join
from peft_lab.comparison.run.progress import seconds
from peft_lab.comparison.stats.statistics import CellResult, PairTest
from peft_lab.comparison.study.study import Arm, Limits, Search, Study
from peft_lab.registry import method

#: Steps of the runs that only show how long others will take.
PILOT_STEPS = 8
#: Part of the time that is planned for; the rest is for what takes longer than expected.
USED = 0.85
#: A final run loads and evaluates more than a run of the search: test rows, the cost of a step.
FINAL_OVERHEAD = 3.0
#: Part of the time that a short run of one more arm may cost where no plan for it fits.
_LOOK = 0.25
#: More seeds than this are not proposed: there are better uses of the time.
_MOST_SEEDS = 12


@dataclass(frozen=True)
class PlanSize:
    """Extent of a comparison.

    Attributes:
        seeds: seeds of the final runs.
        trials: learning rates of each search.
        extend: further ones beyond an edge.
        fraction: fraction of the steps.
    """

    seeds: int
    trials: int
    extend: int
    fraction: float


#: From the wanted extent to the least one that can tell arms apart, which takes two seeds.
PLANS = (
    PlanSize(3, 3, 2, 1.0),
    PlanSize(3, 3, 0, 1.0),
    PlanSize(2, 3, 0, 1.0),
    PlanSize(2, 2, 0, 1.0),
    PlanSize(2, 2, 0, 0.5),
    PlanSize(2, 2, 0, 0.25),
    PlanSize(2, 1, 0, 0.25),
)
#: What is left where the time suffices for no such plan.
ONE_SEED = PlanSize(1, 1, 0, 0.25)


@dataclass(frozen=True)
class TimePlan:
    """Plan for a time.

    Attributes:
        study: the study with the arms, seeds, trials and steps of the plan.
        size: its extent.
        dropped: sentences on what it leaves out of the wanted study.
    """

    study: Study
    size: PlanSize
    dropped: tuple[str, ...]


def default_arm(arms: Sequence[Arm]) -> Arm:
    """Arm to take without evidence: the first one that is no baseline."""
    return next((arm for arm in arms if method(arm.method).place != "baseline"), arms[0])


def further_arms(pilots: Sequence[Record], steps: int, available: float, workers: int) -> int:
    """Number of further arms to try: those whose short runs and smallest plan fit if they are like the known ones.

    Args:
        pilots: short runs that have ended well.
        steps: training steps of a full run.
        available: seconds that are left.
        workers: runs at once.
    """
    around = statistics.median_low([_times(pilot, 0)[0] for pilot in pilots])
    step = statistics.median_low([_times(pilot, 1)[1] for pilot in pilots])
    least = PLANS[-1]
    planned = least.seeds * (FINAL_OVERHEAD * around + step * _steps_of(least, steps))
    # those that are known need no short run any more
    left, short = USED * available * workers - len(pilots) * planned, around + PILOT_STEPS * step
    more = math.floor(left / (short + planned))
    # another arm may be faster than the known ones, where a look at it costs little
    return workers if more <= 0 and short <= _LOOK * available else max(0, more)


def fit_to_time(study: Study, pilots: Sequence[Record], available: float, workers: int) -> TimePlan:
    """Find the largest plan for the time, and what it leaves out.

    Args:
        study: the study with all arms and steps.
        pilots: short runs of arms, of which at least one ended well; from them times are predicted.
        available: seconds for the comparison.
        workers: runs at once.
    """
    # a method that does not fit the backbone fails in its pilot already
    timed = {pilot.arm: pilot for pilot in pilots if pilot.ok}
    dropped = [f"{pilot.arm} was left out because it failed: {pilot.error}" for pilot in pilots if not pilot.ok]
    arms = [arm for arm in study.arms if arm.label in timed]
    tried = {pilot.arm for pilot in pilots}
    untried = [arm.label for arm in study.arms if arm.label not in tried]
    if untried:
        dropped.append(f"{join(untried)} {'was' if len(untried) == 1 else 'were'} not tried because the time is short.")
    steps = _full_steps(study)

    def predicted(size: PlanSize) -> float:
        return predicted_seconds([timed[arm.label] for arm in arms], steps, size, workers)

    size = next((size for size in PLANS if predicted(size) <= available), PLANS[-1])
    # not even the smallest plan fits all arms: the slowest ones go, and at last the second seed
    while predicted(size) > available and len(arms) > 1:
        if len(arms) == 2 and size == PLANS[-1]:
            size = ONE_SEED
            continue
        kept = default_arm(arms)
        others = [arm for arm in arms if len(arms) > 2 or arm is not kept]
        slowest = max(others, key=lambda arm: sum(_times(timed[arm.label], steps)))
        arms = [arm for arm in arms if arm is not slowest]
        dropped.append(f"{slowest.label} was left out because the time is short.")
    if predicted(size) > available:
        size = ONE_SEED
        around, training = _times(timed[arms[0].label], steps)
        fitting = (available - FINAL_OVERHEAD * around) / max(training, 1e-9)
        # as many steps as there is time for, and a few at least: the deadline ends a run that takes too long
        size = replace(size, fraction=min(size.fraction, max(fitting, PILOT_STEPS / steps)))
    dropped += _dropped_of(size, steps)
    return TimePlan(_sized(study, arms, size), size, tuple(dropped))


def _sized(study: Study, arms: Sequence[Arm], size: PlanSize) -> Study:
    steps = _full_steps(study)
    search = Search(trials=size.trials, extend=size.extend) if size.trials > 1 else Search(strategy="none", trials=1)
    limits = Limits(max_steps=_steps_of(size, steps))
    return replace(study, arms=tuple(arms), seeds=study.seeds[: size.seeds], search=search, limits=limits)


def _full_steps(study: Study) -> int:
    assert study.limits.max_steps is not None, "the study to be fitted counts steps"
    return study.limits.max_steps


def _steps_of(size: PlanSize, steps: int) -> int:
    return max(1, round(steps * size.fraction))


def predicted_seconds(pilots: Sequence[Record], steps: int, size: PlanSize, workers: int) -> float:
    """Predict the seconds that a comparison of the pilots' arms takes."""
    searched = size.trials + size.extend if size.trials > 1 else 0
    total = longest = 0.0
    for pilot in pilots:
        around, training = _times(pilot, _steps_of(size, steps))
        total += searched * (around + training) + size.seeds * (FINAL_OVERHEAD * around + training)
        longest = max(longest, around + training)
    # a search and the final runs after it are one after another, however many workers there are
    waves = 2 + size.extend if searched else 1
    return max(total / workers, waves * longest)


def _dropped_of(size: PlanSize, steps: int) -> list[str]:
    """Sentences on what a plan leaves out of the wanted one."""
    wanted, dropped = PLANS[0], []
    if not size.extend and size.trials == wanted.trials:
        dropped.append("No search went on beyond the lowest or the highest rate because the time is short.")
    if size.seeds < wanted.seeds:
        verb = "was" if size.seeds == 1 else "were"
        dropped.append(f"{size.seeds} of {wanted.seeds} seeds {verb} used because the time is short.")
    if size.trials < wanted.trials:
        if size.trials == 1:
            dropped.append("No learning rate was searched because the time is short; each method has its default.")
        else:
            dropped.append(f"{size.trials} of {wanted.trials} learning rates were tried because the time is short.")
    if size.fraction < 1:
        dropped.append(f"{_steps_of(size, steps)} of {steps} steps were trained, and stand in the run file.")
    return dropped


def _times(pilot: Record, steps: int) -> tuple[float, float]:
    """Seconds of a run of an arm outside training, and in training."""
    training = float(pilot.measures["train_seconds"])
    # the first steps take longer, which a run of any length pays once
    first = max(0.0, training - pilot.steps * pilot.measures["step_seconds"])
    return max(0.0, seconds(pilot) - training) + first, steps * pilot.measures["step_seconds"]


# What more time would buy -------------------------------------------------------------------------------------------


def more_time(
    study: Study, plan: TimePlan | None, pilots: Sequence[Record], cell: CellResult | None, minutes: float, workers: int
) -> tuple[str, ...]:
    """Sentences on what more time would buy, by the times of the short runs.

    Args:
        study: the study with all arms and steps.
        plan: the plan that was carried out; None if it did not come to one.
        pilots: short runs that have ended.
        cell: what was found; None without a score.
        minutes: the time that there was.
        workers: runs at once.
    """
    timed = [pilot for pilot in pilots if pilot.ok]
    if not timed:
        longer = max(10, math.ceil(4 * minutes))
        return (f"No run ended, so how long one takes is not known; try --minutes {longer}.",)
    # arms that were not tried are taken to be like those that were
    failed = len({pilot.arm for pilot in pilots if not pilot.ok})
    count = len(study.arms) - failed
    share, found = count / len(timed), []
    steps = _full_steps(study)
    spent = sum(sum(_times(pilot, PILOT_STEPS)) for pilot in timed) / workers

    def needed(size: PlanSize) -> int:
        return math.ceil(share * (spent + predicted_seconds(timed, steps, size, workers) / USED) / 60)

    arms = len(plan.study.arms) if plan is not None else 0
    left_out = plan is None or bool(plan.dropped) or plan.size != PLANS[0]
    # a plan of today's extent for all arms, or the next larger one
    larger = [size for size in reversed(PLANS) if needed(size) > minutes or plan is None]
    if left_out and larger and larger[0] != PLANS[0] and (arms < count or plan is None or larger[0] != plan.size):
        found.append(f"With --minutes {needed(larger[0])}: {_extent(larger[0], steps)} for {_methods(count)}.")
    if left_out and needed(PLANS[0]) > minutes:
        found.append(f"With --minutes {needed(PLANS[0])}: {_extent(PLANS[0], steps)} for {_methods(count)}.")
    if cell is not None:
        found += _more_seeds(cell, {pilot.arm: sum(_times(pilot, steps)) for pilot in timed}, workers)
    return tuple(found)


def _methods(count: int) -> str:
    return f"all {count} methods" if count > 1 else "the one method"


def _extent(size: PlanSize, steps: int) -> str:
    seeds = f"{size.seeds} seeds" if size.seeds > 1 else "1 seed"
    rates = f"{size.trials} learning rates" if size.trials > 1 else "the default learning rate"
    return f"{seeds}, {rates} and {_steps_of(size, steps)} steps"


def _more_seeds(cell: CellResult, run_seconds: dict[str, float], workers: int) -> list[str]:
    """Sentence on the seeds that would tell the best two arms apart."""
    if len(cell.arms) < 2 or not cell.indistinguishable:
        return []
    best = cell.arms[0].label
    rival = next(arm for arm in cell.arms if arm.label == cell.indistinguishable[0])
    if cell.arms[0].score.value == rival.score.value:
        return [f"{best} and {rival.label} have the same mean, and no number of seeds is known that would part them."]
    test = rival.versus_best
    if test is None or test.p is None:
        return [f"{best} and {rival.label} have one seed each; a second one lets them be tested."]
    wanted = seeds_to_separate(test)
    if wanted is None:
        return [
            f"More seeds alone would hardly tell {best} from {rival.label}: their difference is too small for "
            f"{cell.rows} test rows."
        ]
    if wanted > _MOST_SEEDS:
        return [f"It would take more than {_MOST_SEEDS} seeds each to tell {best} from {rival.label}."]
    more = wanted - test.seeds
    if more <= 0:
        return []
    cost = more * sum(run_seconds.get(label, 0.0) for label in (best, rival.label)) / workers
    return [
        f"If the difference stays as it is, {wanted} seeds each may tell {best} from {rival.label}: about "
        f"{max(1, math.ceil(cost / 60))} minutes more."
    ]


def seeds_to_separate(test: PairTest) -> int | None:
    """Number of seeds at which a difference of this size would be twice its standard error; None if none is.

    Test rows are what they are, so their part of the variance stays however many seeds there are.
    """
    rows = sum(part.variance for part in test.difference.components if part.source == "rows")
    of_one_seed = test.seeds * sum(part.variance for part in test.difference.components if part.source == "seeds")
    room = (test.difference.value / 2) ** 2 - rows
    return None if room <= 0 else max(2, math.ceil(of_one_seed / room))
