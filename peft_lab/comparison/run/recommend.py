"""Which method for my task: the usual comparison cut to the time there is, and a run file for what it points to."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_lab.comparison.records.results import read_predictions
from peft_lab.comparison.records.run import Record, Run
from peft_lab.comparison.report.sentences import describe
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

#: Steps of the runs that only show how long others will take.
PILOT_STEPS = 8
#: Part of the time that is planned for; the rest is for what takes longer than expected.
USED = 0.85
#: A final run loads and evaluates more than a run of the search: test rows, the cost of a step.
FINAL_OVERHEAD = 3.0
#: Seeds, trials, trials beyond an edge and part of the steps of the plans, from the wanted one to the least that
#: says something: with one seed no arm could be told from another.
PLANS = (
    (3, 3, 2, 1.0),
    (3, 3, 0, 1.0),
    (2, 3, 0, 1.0),
    (2, 2, 0, 1.0),
    (2, 2, 0, 0.5),
    (2, 2, 0, 0.25),
    (2, 1, 0, 0.25),
)
#: Options of a comparison's runs that a run of its own does not need.
_OF_COMPARISONS = ("disable_tqdm", "save_strategy", "logging_steps")


@dataclass(frozen=True)
class Recommendation:
    """What `recommend` came to.

    Attributes:
        arm: label of the arm.
        learning_rate: the one that its search chose.
        reasons: sentences: what was found, and why this arm.
        dropped: sentences: what the time did not suffice for.
        options: a run of `peft-lab train`.
        file: the YAML file that holds them.
        comparison: everything that it rests on.
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
    """Compare methods on a task within a time, and write a run file for the one to take.

    Short runs of every arm show how long the others will take; then trials beyond an edge, seeds, trials, steps and at
    last arms are dropped until what is left fits. Of arms that the results cannot tell apart the one with the fewest
    trainable parameters is taken.

    Args:
        task, model_name_or_path: what to train on what.
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
    if output.exists():
        raise ConfigError(f'"{output}" is there already; name another --output.')
    if study is None:
        study = default_study(task, model_name_or_path, max_steps)
        study = replace(study, name=f"{study.name[:56]}-advice")
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
    chosen = next(r for r in done.records if r.stage == "final" and r.ok and r.arm == arm)
    if edge := next((choice.edge for choice in done.choices if choice.arm == arm), ""):
        reasons = (*reasons, f"Its learning rate is the {edge} that was tried; a better one may lie beyond.")
    options = run_options(chosen)
    found = Recommendation(arm, chosen.learning_rate, reasons, dropped, options, output, done)
    output.parent.mkdir(parents=True, exist_ok=True)
    comment = "".join(f"# {sentence}\n" for sentence in (*reasons, *dropped))
    output.write_text(f"{comment}{dump_yaml(options)}", encoding="utf-8")
    return found


def _pilot(study: Study, arm: Arm) -> Generator[list[Run], Sequence[Record], Choice]:
    """One short run of an arm, which sees the train and validation rows only."""
    short = replace(study, search=replace(study.search, max_steps=PILOT_STEPS))
    yield [plan.search_run(short, study.cells[0], arm, plan.candidates(study, arm, study.cells[0])[0])]
    return Choice(arm.label, study.cells[0].task, study.cells[0].backbone, None)


def fit_to_time(
    study: Study, pilots: Sequence[Record], available: float, workers: int
) -> tuple[Study, tuple[str, ...]]:
    """The largest plan whose predicted time is within `available` seconds, and in words what it leaves out.

    Raises:
        ConfigError: the time does not suffice for the smallest plan with two arms.
    """
    timed = {r.arm: r for r in pilots if r.ok}
    dropped = [f"{r.arm} was left out, for it failed: {r.error}" for r in pilots if not r.ok]
    arms = [arm for arm in study.arms if arm.label in timed]
    if len(arms) < 2:
        raise ConfigError(f"Fewer than two methods could be tried. {' '.join(dropped)}".strip())
    steps = study.limits.max_steps
    assert steps is not None, "the study to be fitted counts steps"

    def predicted(some: Sequence[Arm], size: tuple[int, int, int, float]) -> float:
        seeds, trials, extend, part = size
        runs_ = [_times(timed[arm.label], max(1, round(steps * part))) for arm in some]
        searched = trials + extend if trials > 1 else 0
        total = sum(searched * (before + train) + seeds * (FINAL_OVERHEAD * before + train) for before, train in runs_)
        longest = max(before + train for before, train in runs_)
        return max(total / workers, (2 + extend if searched else 1) * longest)

    size = next((size for size in PLANS if predicted(arms, size) <= available), PLANS[-1])
    while predicted(arms, size) > available:
        slowest = max(arms, key=lambda arm: sum(_times(timed[arm.label], steps)))
        arms = [arm for arm in arms if arm is not slowest]
        dropped.append(f"{slowest.label} was left out, for its runs take longest and the time is short.")
        if len(arms) < 2:
            least = predicted([*arms, slowest], size)
            raise ConfigError(
                f"The time is too short: after a short run of each method "
                f"{max(available, 0) / 60:.1f} minutes were left, but two methods with two seeds each take about "
                f"{math.ceil(least / 6) / 10} more."
            )
    seeds, trials, extend, part = size
    if not extend and trials == PLANS[0][1]:
        dropped.append("No search went on beyond the lowest or the highest rate, for the time is short.")
    if seeds < PLANS[0][0]:
        dropped.append(f"{seeds} of {PLANS[0][0]} seeds were used, for the time is short.")
    if trials < PLANS[0][1]:
        dropped.append(f"{trials} of {PLANS[0][1]} learning rates were tried, for the time is short.")
    if part < 1:
        dropped.append(f"{max(1, round(steps * part))} of {steps} steps were trained, and stand in the run file.")
    search = Search(trials=trials, extend=extend) if trials > 1 else Search("none", trials=1)
    limits = Limits(max_steps=max(1, round(steps * part)))
    return replace(study, arms=tuple(arms), seeds=study.seeds[:seeds], search=search, limits=limits), tuple(dropped)


def _times(pilot: Record, steps: int) -> tuple[float, float]:
    """Seconds that a run of an arm takes before and after training, and in training."""
    training = float(pilot.measures["train_seconds"])
    first = max(0.0, training - pilot.steps * pilot.measures["step_seconds"])
    return max(0.0, seconds(pilot) - training) + first, steps * pilot.measures["step_seconds"]


def choose(cells: Sequence[CellResult]) -> tuple[str, tuple[str, ...]]:
    """The arm to take, and why.

    Raises:
        ConfigError: no final run ended with a score.
    """
    if not cells or not cells[0].arms:
        raise ConfigError("No method ended with a score on the test rows, so none can be recommended.")
    cell = cells[0]
    best = cell.arms[0]
    alike = [best, *(arm for arm in cell.arms if arm.label in cell.indistinguishable)]
    sizes = {arm.label: int(arm.records[0].measures["trainable_parameters"]) for arm in alike}
    chosen = min(alike, key=lambda arm: sizes[arm.label])
    reasons = [describe(cell)]
    if len(alike) == 1:
        reasons.append(f"{chosen.label} is taken, for it is the best and every other method is told apart from it.")
    else:
        listing = ", ".join(f"{label} ({count:,})" for label, count in sorted(sizes.items(), key=lambda item: item[1]))
        reasons.append(
            f"These cannot be told apart, here with their trainable parameters: {listing}. "
            f"{chosen.label} is taken because it has the fewest, not because it scored best."
            if chosen is not best
            else f"These cannot be told apart, here with their trainable parameters: {listing}. "
            f"{chosen.label} is taken because it has the fewest of them; its mean is also the best."
        )
    return chosen.label, tuple(reasons)


def run_options(record: Record) -> dict[str, Any]:
    """The options of a final run as one of its own."""
    kept: Mapping[str, Any] = {k: v for k, v in record.options.items() if k not in _OF_COMPARISONS and v != {}}
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in f"{record.task}-{record.arm}")
    return {**kept, "output_dir": name}
