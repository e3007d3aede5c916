"""Recommendation of a method, from a comparison within a time."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_lab import registry
from peft_lab.comparison.records.results import read_predictions
from peft_lab.comparison.records.run import Record, Run, RunInfo
from peft_lab.comparison.report.sentences import describe, interval_text, join, leaders, metric_title
from peft_lab.comparison.run import plan
from peft_lab.comparison.run.backends import Backend, make_backend
from peft_lab.comparison.run.plan import Choice
from peft_lab.comparison.run.runner import Comparison, carry_out, compare
from peft_lab.comparison.run.time_plan import (
    PILOT_STEPS,
    USED,
    TimePlan,
    default_arm,
    fit_to_time,
    further_arms,
    more_time,
)
from peft_lab.comparison.stats.estimates import Estimate
from peft_lab.comparison.stats.statistics import CellResult, rank_arms
from peft_lab.comparison.study.schema import default_study
from peft_lab.comparison.study.study import Arm, Study
from peft_lab.errors import ConfigError
from peft_lab.runs.run_config import dump_yaml
from peft_lab.utils.atomic_files import check_can_be_made, write_text
from peft_lab.utils.interruption import Stopped
from peft_lab.utils.text import one_line

#: Options of a comparison's runs that a run of its own does not need.
_OF_COMPARISONS = ("disable_tqdm", "save_strategy", "logging_steps")
#: Bytes of a run file at most, of which a longer one is no answer.
_MOST_BYTES = 2**20


#: Line of a run file that a later call may replace, because its answer rests on less than was planned.
UNFINISHED = "# This answer is not finished: the same command goes on, and replaces this file."


@dataclass(frozen=True)
class Recommendation:
    """Result of `recommend`.

    Attributes:
        arm: label of the arm.
        learning_rate: the one that its search chose; the default of its method if it was not searched.
        reasons: sentences on what was found and why this arm was taken.
        dropped: sentences on what the time did not suffice for.
        options: options of `peft-lab train` for this arm.
        file: the YAML file that holds them.
        comparison: the comparison that it rests on.
        more: sentences on what more time would buy.
        cell: the ranked arms; None if no run ended with a score, and the arm is the default.
        finished: False if runs that were planned are missing; the same call goes on with them.
    """

    arm: str
    learning_rate: float
    reasons: tuple[str, ...]
    dropped: tuple[str, ...]
    options: dict[str, Any]
    file: Path
    comparison: Comparison
    more: tuple[str, ...] = ()
    cell: CellResult | None = None
    finished: bool = True

    @property
    def score(self) -> Estimate | None:
        """Main metric of the arm on the test rows with its interval; None without evidence."""
        result = self.cell.arm(self.arm) if self.cell is not None else None
        return None if result is None else result.score

    @property
    def answer(self) -> str:
        """The answer in one sentence."""
        named = f"{self.arm}, learning rate {self.learning_rate:g}"
        if self.cell is None or self.score is None:
            return f"No evidence yet; the default is {named}."
        of_what = {
            "seeds and rows": "over seeds and test rows",
            "seeds": "over seeds alone",
            "rows": "over the test rows alone, with one seed",
            "none": "with one seed and no interval",
        }[self.score.basis]
        return f"{named}: {metric_title(self.cell.metric)} {interval_text(self.score)}, {of_what}."


class _State:
    """Progress of a recommendation, from which it can answer wherever it is stopped."""

    def __init__(self, study: Study) -> None:
        self.wanted = study
        self.pilots: list[Record] = []
        self.plan: TimePlan | None = None
        self.done: Comparison | None = None

    def study(self) -> Study:
        """The study that is carried out: the plan's, or the wanted one before there is a plan."""
        return self.wanted if self.plan is None else self.plan.study


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

    Short runs show how long others will take, of as many arms as the time suffices for; then trials beyond an edge,
    seeds, trials, steps and at last arms are dropped until what is left fits. Of arms that the results cannot tell
    apart the one with the fewest trainable parameters is taken. It always ends in an answer: without a score on the
    test rows that is the default method, named as such, and a signal ends it with the answer from what is there.

    Args:
        task: name or file of the task.
        model_name_or_path: the backbone.
        minutes: time for everything.
        output: the run file to write; one with an answer that is not finished is replaced.
        output_dir: folder of the comparison, "comparisons/TASK-advice" by default.
        max_steps: training steps of a run if the time suffices.
        workers: runs at once.
        study: arms and options to use instead of the usual ones; one task on one backbone.
        backend: where to run instead of local processes.

    Raises:
        ConfigError: `minutes` is not positive, or `output` is there already; before any run is made.
        Stopped: a signal came; its `result` is the recommendation from what was there.
    """
    deadline = time.monotonic() + 60 * minutes
    output = Path(output).expanduser()
    if minutes <= 0:
        raise ConfigError(f"minutes must be positive, got {minutes}.")
    # checked first, so that no time is spent on a result that could not be written
    if output.exists() and not _may_be_replaced(output):
        raise ConfigError(f'"{output}" is there already; name another --output.')
    check_can_be_made(output)
    state = _State(study or _usual_study(task, model_name_or_path, max_steps))
    folder = Path(output_dir or Path("comparisons") / state.wanted.name).expanduser().absolute()
    carrier = backend or make_backend("local", workers)
    try:
        try:
            _compare_within(state, folder, carrier, deadline)
        finally:
            if backend is None:
                carrier.close()
    except Stopped as stop:
        # closed backends make no run: this only reads what there is
        state.done = compare(state.study(), folder, backend=carrier, deadline=time.monotonic(), report=False)
        stop.result = _answer(state, folder, output, minutes, carrier.workers, stopped=True)
        raise
    return _answer(state, folder, output, minutes, carrier.workers)


def _usual_study(task: str, backbone: str, max_steps: int | None) -> Study:
    study = default_study(task, backbone, max_steps)
    # names are limited to 64 characters
    return replace(study, name=f"{study.name[:56]}-advice")


def _compare_within(state: _State, folder: Path, carrier: Backend, deadline: float) -> None:
    """Make short runs of as many arms as the time suffices for, and then what fits of the comparison."""
    study, timed = state.wanted, list[Record]()
    steps = study.limits.max_steps
    assert steps is not None, "the study to be fitted counts steps"
    # the arm that is taken without evidence comes first, because the time may suffice for one alone
    first = default_arm(study.arms)
    waiting, count = [first, *(arm for arm in study.arms if arm is not first)], carrier.workers
    while waiting and count > 0 and time.monotonic() < deadline:
        batch, waiting = waiting[:count], waiting[count:]
        waves = [_pilot(study, arm) for arm in batch]
        state.pilots += carry_out(study, folder, carrier, waves, deadline=deadline)
        timed = [pilot for pilot in state.pilots if pilot.ok]
        if timed:
            count = further_arms(timed, steps, deadline - time.monotonic(), carrier.workers)
    available = USED * (deadline - time.monotonic())
    if timed and available > 0:
        state.plan = fit_to_time(study, state.pilots, available, carrier.workers)
        state.done = compare(state.plan.study, folder, backend=carrier, deadline=deadline)


def _pilot(study: Study, arm: Arm) -> Generator[list[Run], Sequence[Record], Choice]:
    """Yield one short run of an arm, without the test rows."""
    short = replace(study, search=study.search.model_copy(update={"max_steps": PILOT_STEPS}))
    # the learning rate does not change the time of a step, so one candidate will do
    yield [plan.search_run(short, study.cells[0], arm, plan.candidates(study, arm, study.cells[0])[0])]
    return Choice(arm.label, study.cells[0].task, study.cells[0].backbone, None)


def _answer(
    state: _State, folder: Path, output: Path, minutes: float, workers: int, stopped: bool = False
) -> Recommendation:
    """Recommend by what there is, and write the run file."""
    done = state.done or Comparison(folder, state.wanted, state.pilots, [])
    cells = rank_arms(done.records, lambda record: read_predictions(folder, record))
    # the study has one task on one backbone
    cell = cells[0] if cells and cells[0].arms else None
    arm, rate, reasons, options = _without_evidence(state, done) if cell is None else _by_evidence(cell, done)
    found = Recommendation(
        arm=arm,
        learning_rate=rate,
        reasons=reasons,
        dropped=_dropped(state, done, cell, stopped),
        options=options,
        file=output,
        comparison=done,
        more=more_time(state.wanted, state.plan, state.pilots, cell, minutes, workers),
        cell=cell,
        finished=cell is not None and not stopped and not done.unfinished,
    )
    _write_run_file(found)
    return found


def _by_evidence(cell: CellResult, done: Comparison) -> tuple[str, float, tuple[str, ...], dict[str, Any]]:
    """Arm, learning rate, reasons and options by the ranked arms."""
    arm, reasons = choose(cell)
    # any final run of the arm will do, because they differ in nothing but the seed
    chosen = next(record for record in done.records if record.stage == "final" and record.ok and record.arm == arm)
    edge = next((choice.edge for choice in done.choices if choice.arm == arm), "")
    if edge:
        reasons = (*reasons, f"Its learning rate is the {edge} that was tried; a better one may lie beyond.")
    return arm, chosen.learning_rate, reasons, run_options(chosen)


def _without_evidence(state: _State, done: Comparison) -> tuple[str, float, tuple[str, ...], dict[str, Any]]:
    """Default arm, its learning rate, reasons and options."""
    records = {record.id: record for record in (*state.pilots, *done.records)}.values()
    failures = [record for record in records if not record.ok]
    failed = {record.arm for record in failures}
    arm = default_arm([arm for arm in state.wanted.arms if arm.label not in failed] or state.wanted.arms)
    if failures and len(failures) == len(records):
        why = f"Every run failed, as that of {failures[0].arm}: {failures[0].error}"
    else:
        why = "No run ended with a score on the test rows."
    searched = next((each for each in done.choices if each.arm == arm.label and each.candidate is not None), None)
    rate = registry.method(arm.method).learning_rate
    reasons = [why, f"{arm.label} is named because it is the default, and not because it was found to be better."]
    if searched is not None and searched.candidate is not None and searched.tried:
        rate = searched.candidate.learning_rate
        reasons.append(f"Its learning rate is the best of {len(searched.tried)} on the validation rows.")
    else:
        reasons.append("Its learning rate is the method's default, which was measured on other tasks than this one.")
    run = plan.final_run(state.wanted, state.wanted.cells[0], arm, rate)
    return arm.label, rate, tuple(reasons), run_options(run)


def _dropped(state: _State, done: Comparison, cell: CellResult | None, stopped: bool) -> tuple[str, ...]:
    """Sentences on what was left out."""
    # what a plan leaves out says nothing where it came to no score
    if state.plan is None or cell is None:
        failed = [pilot for pilot in state.pilots if not pilot.ok]
        found = [f"{pilot.arm} was left out because it failed: {pilot.error}" for pilot in failed]
        ended = len(state.pilots) - len(failed)
        found.append(f"{ended} of {len(state.wanted.arms)} methods ended a first short run of {PILOT_STEPS} steps.")
    else:
        found = list(state.plan.dropped)
    if done.unfinished:
        when = "it was stopped" if stopped else "the time was over"
        runs = "1 run was" if done.unfinished == 1 else f"{done.unfinished} runs were"
        found.append(f"{runs} not made or not ended when {when}.")
    return tuple(found)


def _may_be_replaced(output: Path) -> bool:
    """Test whether a run file is an answer that is not finished."""
    # a folder, or a file of anything else, stays
    if not output.is_file() or output.stat().st_size > _MOST_BYTES:
        return False
    return UNFINISHED in output.read_text(encoding="utf-8", errors="replace").splitlines()


def _write_run_file(found: Recommendation) -> None:
    """Write the options as YAML, below the sentences as comments."""
    sentences = (found.answer, *found.reasons, *found.dropped, *found.more)
    # an error that is quoted may have more lines than one
    comment = "".join(f"# {one_line(sentence)}\n" for sentence in sentences)
    mark = "" if found.finished else f"{UNFINISHED}\n"
    write_text(found.file, f"{comment}{mark}{dump_yaml(found.options)}")


def choose(cell: CellResult) -> tuple[str, tuple[str, ...]]:
    """Choose the arm to recommend, with reasons.

    Among arms that the tests cannot tell apart that is the one with the fewest trainable parameters. With one seed
    there is no test, and the best mean decides.
    """
    best, reasons = cell.arms[0], [describe(cell)]
    if len(cell.arms) == 1:
        return best.label, (*reasons, f"{best.label} is taken because no other method has a score.")
    tested = best.score.basis not in ("rows", "none")
    # among arms that no test separates, the mean is no reason
    alike = [best]
    for arm in cell.arms[1:]:
        if arm.label in cell.indistinguishable and (tested or arm.score.value == best.score.value):
            alike.append(arm)
    sizes = {arm.label: int(arm.records[0].measures["trainable_parameters"]) for arm in alike}
    chosen = min(alike, key=lambda arm: sizes[arm.label])
    if len(alike) == 1 and tested:
        reasons.append(f"{chosen.label} is taken because it is the best and every other method is told apart from it.")
    elif len(alike) == 1:
        reasons.append(f"{chosen.label} is taken for its mean, which another seed may turn.")
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


def run_options(record: RunInfo) -> dict[str, Any]:
    """Options of a final run for a run of its own."""
    kept = {name: value for name, value in record.options.items() if name not in _OF_COMPARISONS and value != {}}
    # labels of arms may hold spaces and signs such as =
    folder = re.sub(r"[^\w.-]", "-", f"{record.task}-{record.arm}")
    return {**kept, "output_dir": folder}
