"""Recommendation of a method, from a comparison within a time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_lab.comparison.records.results import read_predictions
from peft_lab.comparison.records.run import Record, Run
from peft_lab.comparison.report.sentences import describe, join, leaders
from peft_lab.comparison.run import plan
from peft_lab.comparison.run.backends import Backend, make_backend
from peft_lab.comparison.run.plan import Choice
from peft_lab.comparison.run.progress import seconds
from peft_lab.comparison.run.runner import Comparison, carry_out, compare
from peft_lab.comparison.stats.statistics import CellResult, rank_arms
from peft_lab.comparison.study.schema import default_study
from peft_lab.comparison.study.study import Arm, Limits, Search, Study
from peft_lab.errors import ConfigError
from peft_lab.runs.run_config import dump_yaml
from peft_lab.utils.atomic_files import check_can_be_made, write_text

#: Steps of the runs that only show how long others will take.
PILOT_STEPS = 8
#: Part of the time that is planned for; the rest is for what takes longer than expected.
USED = 0.85
#: A final run loads and evaluates more than a run of the search: test rows, the cost of a step.
FINAL_OVERHEAD = 3.0


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


#: From the wanted extent to the least one: with one seed no arm could be told from another.
PLANS = (
    PlanSize(3, 3, 2, 1.0),
    PlanSize(3, 3, 0, 1.0),
    PlanSize(2, 3, 0, 1.0),
    PlanSize(2, 2, 0, 1.0),
    PlanSize(2, 2, 0, 0.5),
    PlanSize(2, 2, 0, 0.25),
    PlanSize(2, 1, 0, 0.25),
)
#: Options of a comparison's runs that a run of its own does not need.
_OF_COMPARISONS = ("disable_tqdm", "save_strategy", "logging_steps")


@dataclass(frozen=True)
class Recommendation:
    """Result of `recommend`.

    Attributes:
        arm: label of the arm.
        learning_rate: the one that its search chose.
        reasons: sentences on what was found and why this arm was taken.
        dropped: sentences on what the time did not suffice for.
        options: options of `peft-lab train` for this arm.
        file: the YAML file that holds them.
        comparison: the comparison that it rests on.
    """

    arm: str
    learning_rate: float
    reasons: tuple[str, ...]
    dropped: tuple[str, ...]
    options: dict[str, Any]
    file: Path
    comparison: Comparison


def recommend(
    task: str,
    model_name_or_path: str,
    minutes: float,
    output: str | Path = "run.yaml",
    *,
    output_dir: str | Path | None = None,
    max_steps: int | None = None,
    workers: int | None = None,
    study: Study | None = None,
    backend: Backend | None = None,
) -> Recommendation:
    """Compare methods on a task within a time and recommend one.

    Short runs of every arm show how long the others will take; then trials beyond an edge, seeds, trials, steps and at
    last arms are dropped until what is left fits. Of arms that the results cannot tell apart the one with the fewest
    trainable parameters is taken.

    Args:
        task: name or file of the task.
        model_name_or_path: the backbone.
        minutes: time for everything.
        output: the run file to write.
        output_dir: folder of the comparison, "comparisons/TASK-advice" by default.
        max_steps: training steps of a run if the time suffices.
        workers: runs at once.
        study: arms and options to use instead of the usual ones; one task on one backbone.
        backend: where to run instead of local processes.

    Raises:
        ConfigError: the time does not suffice for two arms, no run ended with a result, or `output` is there already.
    """
    deadline = time.monotonic() + 60 * minutes
    output = Path(output).expanduser()
    if minutes <= 0:
        raise ConfigError(f"minutes must be positive, got {minutes}.")
    # checked first, so that no time is spent on a result that could not be written
    if output.exists():
        raise ConfigError(f'"{output}" is there already; name another --output.')
    check_can_be_made(output)
    study = study or _usual_study(task, model_name_or_path, max_steps)
    folder = Path(output_dir or Path("comparisons") / study.name).expanduser().absolute()
    carrier = backend or make_backend("local", workers)
    try:
        pilots = carry_out(study, folder, carrier, [_pilot(study, arm) for arm in study.arms], deadline=deadline)
        study, dropped = fit_to_time(study, pilots, USED * (deadline - time.monotonic()), carrier.workers)
        done = compare(study, folder, backend=carrier, deadline=deadline)
    finally:
        if backend is None:
            carrier.close()
    if done.unfinished:
        dropped = (*dropped, f"{done.unfinished} runs were not made or not ended when the time was over.")
    arm, reasons = choose(rank_arms(done.records, lambda record: read_predictions(folder, record)))
    # any final run of the arm will do, because they differ in nothing but the seed
    chosen = next(record for record in done.records if record.stage == "final" and record.ok and record.arm == arm)
    edge = next((choice.edge for choice in done.choices if choice.arm == arm), "")
    if edge:
        reasons = (*reasons, f"Its learning rate is the {edge} that was tried; a better one may lie beyond.")
    options = run_options(chosen)
    found = Recommendation(arm, chosen.learning_rate, reasons, dropped, options, output, done)
    _write_run_file(found)
    return found


def _usual_study(task: str, backbone: str, max_steps: int | None) -> Study:
    study = default_study(task, backbone, max_steps)
    # names are limited to 64 characters
    return replace(study, name=f"{study.name[:56]}-advice")


def _write_run_file(found: Recommendation) -> None:
    """Write the options as YAML, below the sentences as comments."""
    comment = "".join(f"# {sentence}\n" for sentence in (*found.reasons, *found.dropped))
    write_text(found.file, f"{comment}{dump_yaml(found.options)}")


def _pilot(study: Study, arm: Arm) -> Generator[list[Run], Sequence[Record], Choice]:
    """Yield one short run of an arm, without the test rows."""
    short = replace(study, search=study.search.model_copy(update={"max_steps": PILOT_STEPS}))
    # the learning rate does not change the time of a step, so one candidate will do
    yield [plan.search_run(short, study.cells[0], arm, plan.candidates(study, arm, study.cells[0])[0])]
    return Choice(arm.label, study.cells[0].task, study.cells[0].backbone, None)


def fit_to_time(
    study: Study, pilots: Sequence[Record], available: float, workers: int
) -> tuple[Study, tuple[str, ...]]:
    """Find the largest plan for the time, and what it leaves out.

    Args:
        study: the study with all arms and steps.
        pilots: short runs of the arms, from which times are predicted.
        available: seconds for the comparison.
        workers: runs at once.

    Returns:
        The study with the seeds, trials, steps and arms of the plan, and sentences on what was dropped.

    Raises:
        ConfigError: the time does not suffice for the smallest plan with two arms.
    """
    # a method that does not fit the backbone fails in its pilot already
    timed = {pilot.arm: pilot for pilot in pilots if pilot.ok}
    dropped = [f"{pilot.arm} was left out because it failed: {pilot.error}" for pilot in pilots if not pilot.ok]
    arms = [arm for arm in study.arms if arm.label in timed]
    if len(arms) < 2:
        raise ConfigError(f"Fewer than two methods could be tried. {' '.join(dropped)}".strip())
    steps = study.limits.max_steps
    assert steps is not None, "the study to be fitted counts steps"

    def predicted(size: PlanSize) -> float:
        return _predicted_seconds([timed[arm.label] for arm in arms], steps, size, workers)

    size = next((size for size in PLANS if predicted(size) <= available), PLANS[-1])
    # not even the smallest plan fits all arms: the slowest ones go
    while predicted(size) > available:
        if len(arms) == 2:
            raise ConfigError(
                f"The time is too short: after a short run of each method "
                f"{max(available, 0) / 60:.1f} minutes were left, but two methods with two seeds each take about "
                f"{math.ceil(predicted(size) / 6) / 10} more."
            )
        slowest = max(arms, key=lambda arm: sum(_times(timed[arm.label], steps)))
        arms = [arm for arm in arms if arm is not slowest]
        dropped.append(f"{slowest.label} was left out because its runs take longest and the time is short.")
    dropped += _dropped_of(size, steps)
    search = Search(trials=size.trials, extend=size.extend) if size.trials > 1 else Search(strategy="none", trials=1)
    limits = Limits(max_steps=_steps_of(size, steps))
    return replace(study, arms=tuple(arms), seeds=study.seeds[: size.seeds], search=search, limits=limits), tuple(
        dropped
    )


def _steps_of(size: PlanSize, steps: int) -> int:
    return max(1, round(steps * size.fraction))


def _predicted_seconds(pilots: Sequence[Record], steps: int, size: PlanSize, workers: int) -> float:
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
        dropped.append(f"{size.seeds} of {wanted.seeds} seeds were used because the time is short.")
    if size.trials < wanted.trials:
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


def choose(cells: Sequence[CellResult]) -> tuple[str, tuple[str, ...]]:
    """Choose the arm to recommend, with reasons.

    Raises:
        ConfigError: no final run ended with a score.
    """
    if not cells or not cells[0].arms:
        raise ConfigError("No method ended with a score on the test rows, so none can be recommended.")
    # the study has one task on one backbone
    cell = cells[0]
    best = cell.arms[0]
    # among arms that no test separates, the mean is no reason
    alike = [best, *(arm for arm in cell.arms if arm.label in cell.indistinguishable)]
    sizes = {arm.label: int(arm.records[0].measures["trainable_parameters"]) for arm in alike}
    chosen = min(alike, key=lambda arm: sizes[arm.label])
    reasons = [describe(cell)]
    if len(alike) == 1:
        reasons.append(f"{chosen.label} is taken because it is the best and every other method is told apart from it.")
    else:
        listing = ", ".join(f"{label} ({count:,})" for label, count in sorted(sizes.items(), key=lambda item: item[1]))
        alike_text = f"These cannot be told apart, here with their trainable parameters: {listing}. "
        fewest = [label for label, count in sizes.items() if count == sizes[chosen.label]]
        first = leaders(cell)
        if len(fewest) > 1:
            # the first of the ranking among them; of arms that tie there too, the first by name
            why = "the one with the best mean" if first == (chosen.label,) else "the first in the table"
            taken = f"{join(fewest)} have the fewest; of these {chosen.label} is taken, {why}."
        elif first == (chosen.label,):
            taken = f"{chosen.label} is taken because it has the fewest of them; its mean is also the best."
        elif chosen.label in first:
            taken = f"{chosen.label} is taken because it has the fewest of them; its mean ties for the best."
        else:
            taken = f"{chosen.label} is taken because it has the fewest, not because it scored best."
        reasons.append(alike_text + taken)
    return chosen.label, tuple(reasons)


def run_options(record: Record) -> dict[str, Any]:
    """Options of a final run for a run of its own."""
    kept = {name: value for name, value in record.options.items() if name not in _OF_COMPARISONS and value != {}}
    # labels of arms may hold spaces and signs such as =
    folder = re.sub(r"[^\w.-]", "-", f"{record.task}-{record.arm}")
    return {**kept, "output_dir": folder}
