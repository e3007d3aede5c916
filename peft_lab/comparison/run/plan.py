"""Runs of a comparison: searches, round by round, then final runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

from peft_lab import registry
from peft_lab.comparison.records.run import Record, Run
from peft_lab.comparison.study.study import FURTHER, Arm, Cell, Search, Study
from peft_lab.data.task_registry import load_task
from peft_lab.errors import ConfigError
from peft_lab.runs.run_config import RunConfig

#: Seeds of the search start here: the final runs must not have the seeds that their learning rate was chosen by.
SEARCH_SEED = 1000

#: Neighbouring learning rates of a default grid differ by this factor.
RATE_FACTOR = math.sqrt(10)


@dataclass(frozen=True)
class Candidate:
    """Learning rate and tuned arguments of one trial of a search."""

    learning_rate: float
    tuned: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """Result of an arm's search on a cell.

    Attributes:
        candidate: the best one; None if no candidate ended with a result.
        edge: "lowest" or "highest" if the chosen learning rate is the lowest or highest that was tried, because a
            better one may lie beyond; else "".
        tried: learning rate, tuned values and mean validation score of each candidate in its last round.
    """

    arm: str
    task: str
    backbone: str
    candidate: Candidate | None
    edge: str = ""
    tried: tuple[Mapping[str, Any], ...] = ()


def rate_grid(center: float, count: int) -> tuple[float, ...]:
    """`count` learning rates around `center`, a factor of 3.2 apart.

    Of an even number, one more lies above than below.
    """
    steps = range(-((count - 1) // 2), count // 2 + 1)
    return tuple(float(f"{center * RATE_FACTOR**step:.2g}") for step in steps)


def candidates(study: Study, arm: Arm, cell: Cell) -> list[Candidate]:
    """Trials of an arm's search, equally many for every arm.

    The default values are always among them. A method without gradient steps has no learning rate to try.
    """
    center, given = registry.method(arm.method).learning_rate, study.learning_rates(cell, arm)
    if center == 0:
        given = (0.0,)
    # without a search the first given rate is taken, else the method's default
    if study.search.strategy == "none":
        return [Candidate(next(iter(given), center))]
    rates = given or rate_grid(center, study.search.trials)
    tuned = [dict(zip(arm.tune, values, strict=True)) for values in itertools.product(*arm.tune.values())]
    every = [Candidate(rate, values) for rate, values in itertools.product(rates, tuned)]
    # rates differ by factors, so the one nearest to the method's own is found by logarithms
    nearest = min(rates, key=lambda rate: abs(math.log(rate / center))) if center else 0.0
    default = Candidate(nearest, tuned[0])
    if len(every) <= study.search.trials:
        return every
    # drawn by names, so that the same study always tries the same candidates
    others = [candidate for candidate in every if candidate != default]
    random.Random(f"{study.name}/{arm.label}").shuffle(others)
    chosen = [default, *others[: study.search.trials - 1]]
    return [candidate for candidate in every if candidate in chosen]


def rounds(search: Search) -> list[tuple[int, float]]:
    """Candidates and fraction of a full training, by round."""
    counts = [search.trials]
    # the last round trains in full, each one before it 1/factor of that
    while search.strategy == "halving" and counts[-1] // search.factor >= 2:
        counts.append(counts[-1] // search.factor)
    return [(count, search.factor ** (index + 1 - len(counts))) for index, count in enumerate(counts)]


def count_runs(study: Study) -> int:
    """Count the runs of a study, without those beyond an edge.

    It is the number if no run fails.
    """
    search = sum(count for count, _ in rounds(study.search)) * study.search.seeds if study.search.trials > 1 else 0
    searched = [arm for arm in study.arms if arm.tune or registry.method(arm.method).takes_steps]
    return len(study.cells) * (len(searched) * search + len(study.arms) * len(study.seeds))


def count_beyond(study: Study) -> int:
    """Count the runs that searches may add beyond an edge."""
    rated = [arm for arm in study.arms if registry.method(arm.method).takes_steps]
    return len(study.cells) * len(rated) * study.search.extend * study.search.seeds


def arm_runs(
    study: Study, cell: Cell, arm: Arm, sized: Mapping[str, Any] | None = None
) -> Generator[list[Run], Sequence[Record], Choice]:
    """Yield the runs of an arm on a cell, wave by wave.

    Args:
        study: the study.
        cell: one of its cells.
        arm: one of its arms.
        sized: arguments that give the arm the study's number of trainable parameters.

    Yields:
        The runs of a wave; send their records to get the next.

    Returns:
        The result of the search.
    """
    settings = _Settings(study, cell, arm, {**arm.args, **(sized or {})})
    trials = candidates(study, arm, cell)
    found: dict[int, list[Record]] = {}
    if len(trials) == 1:
        chosen, edge = trials[0], ""
    else:
        best, found = yield from _search(settings, trials)
        # nan ranks last, so if the best one is nan, no candidate has a result
        if math.isnan(mean_score(found[best])):
            return Choice(arm.label, cell.task, cell.backbone, None, tried=_tried(trials, found))
        chosen = trials[best]
        edge = _edge(chosen, trials)
    # the cost of a step does not depend on the seed, so one run counts it
    yield [settings.final_run(chosen, seed, cost=seed == study.seeds[0]) for seed in study.seeds]
    return Choice(arm.label, cell.task, cell.backbone, chosen, edge, _tried(trials, found) if found else ())


@dataclass(frozen=True)
class _Settings:
    """Arm on a cell, with the arguments of all its runs."""

    study: Study
    cell: Cell
    arm: Arm
    arguments: Mapping[str, Any]

    def search_run(self, trial: Candidate, index: int, number: int = 0, fraction: float = 1.0) -> Run:
        """Build a run of the search.

        Args:
            trial: the candidate.
            index: number of the run among those of the candidate.
            number: number of the round.
            fraction: fraction of a full training.
        """
        options = self._options(trial, SEARCH_SEED + index)
        # the test rows are for the final runs alone
        options = {**shortened(options, fraction, self.study.search_steps(self.cell)), "do_predict": False}
        return self._run("search", trial, options, round=number)

    def final_run(self, trial: Candidate, seed: int, cost: bool) -> Run:
        """Build a run that is scored on the test rows."""
        tasks = {name: getattr(self.cell, name) for name in FURTHER}
        return self._run("final", trial, self._options(trial, seed), cost=cost, **tasks)

    def size_run(self, trial: Candidate) -> Run:
        """Build the run whose options decide the size of the arm."""
        # any seed will do, because the number of parameters does not depend on it
        return self._run("size", trial, self._options(trial, 0))

    def _options(self, trial: Candidate, seed: int) -> dict[str, Any]:
        arguments = {**self.arguments, **trial.tuned}
        options = self.study.options(self.cell, self.arm)
        return {**options, "method_args": arguments, "learning_rate": trial.learning_rate, "seed": seed}

    def _run(self, stage: str, trial: Candidate, options: Mapping[str, Any], **further: Any) -> Run:
        # a record without these measures cannot stand for a run that asks for them
        measured_on = {name: further[name] for name in FURTHER if name in further}
        return Run(
            id=run_id(options, stage, self.study.launcher, **measured_on),
            study=self.study.name,
            stage=stage,
            arm=self.arm.label,
            method=self.arm.method,
            task=self.cell.task,
            backbone=self.cell.backbone,
            seed=options["seed"],
            learning_rate=trial.learning_rate,
            status="planned",
            method_args=options["method_args"],
            tuned=dict(trial.tuned),
            options=options,
            launcher=self.study.launcher,
            **further,
        )


def _search(
    settings: _Settings, trials: list[Candidate]
) -> Generator[list[Run], Sequence[Record], tuple[int, dict[int, list[Record]]]]:
    """Yield the waves of a search.

    Args:
        settings: what is searched.
        trials: the candidates; those tried beyond the learning rates are appended.

    Returns:
        Index of the best trial, and the records of each one's last round by its index.
    """
    search = settings.study.search
    order, found = list(range(len(trials))), dict[int, list[Record]]()
    for number, (count, fraction) in enumerate(rounds(search)):
        order = order[:count]
        wave = []
        for index in order:
            wave += [settings.search_run(trials[index], repeat, number, fraction) for repeat in range(search.seeds)]
        records = yield wave
        for index in order:
            found[index] = [record for record in records if _is_of(record, trials[index])]
        # the best go on to the next round
        order.sort(key=lambda index: _rank(found[index]))
    for _ in range(search.extend):
        further = _beyond(trials[order[0]], trials)
        # a best candidate that failed or diverged says nothing of what lies beyond it
        if further is None or math.isnan(mean_score(found[order[0]])):
            break
        trials.append(further)
        # trained in full like the candidates of the last round, with which they are compared
        runs = [settings.search_run(further, repeat, number) for repeat in range(search.seeds)]
        records = yield [replace(run, beyond=True) for run in runs]
        found[len(trials) - 1] = list(records)
        order = sorted([*order, len(trials) - 1], key=lambda index: _rank(found[index]))
    return order[0], found


def _is_of(record: Record, trial: Candidate) -> bool:
    return record.learning_rate == trial.learning_rate and record.tuned == dict(trial.tuned)


def mean_score(records: Iterable[Record]) -> float:
    """Mean of the main metric on the validation rows.

    It is nan if a run failed or diverged, or if there is none.
    """
    values = []
    for record in records:
        # a candidate that failed with one seed must not win by its other seeds
        score = record.score("validation") if record.ok else None
        values.append(math.nan if score is None else score)
    return sum(values) / len(values) if values else math.nan


def _rank(records: Sequence[Record]) -> tuple[float, float]:
    """Sort key: main metric, then loss, on the validation rows.

    The best comes first, nan last.
    """
    score = mean_score(records)
    # nan compares with nothing, so a sort by it would have no defined order
    if math.isnan(score):
        return math.inf, math.inf
    losses = [float(record.scores["validation"].get("loss", math.inf)) for record in records]
    loss = sum(losses) / len(losses)
    return -score if records[0].greater_is_better else score, math.inf if math.isnan(loss) else loss


def _tried(trials: Sequence[Candidate], found: Mapping[int, Sequence[Record]]) -> tuple[Mapping[str, Any], ...]:
    return tuple({**asdict(trial), "score": mean_score(found[index])} for index, trial in enumerate(trials))


def _edge(chosen: Candidate, trials: Sequence[Candidate]) -> str:
    rates = sorted({trial.learning_rate for trial in trials})
    if len(rates) < 2:
        return ""
    return {rates[0]: "lowest", rates[-1]: "highest"}.get(chosen.learning_rate, "")


def _beyond(best: Candidate, trials: Sequence[Candidate]) -> Candidate | None:
    """Best candidate with a learning rate one step beyond the edge.

    Returns None if its rate is not at an edge.
    """
    edge = _edge(best, trials)
    if not edge:
        return None
    rates = sorted({trial.learning_rate for trial in trials}, reverse=edge == "lowest")
    # the step is that between the last two rates, rounded as the grid is
    rate = float(f"{rates[-1] ** 2 / rates[-2]:.2g}")
    # rounding may lead back to a rate that was tried
    return None if rate in rates else replace(best, learning_rate=rate)


def search_run(study: Study, cell: Cell, arm: Arm, trial: Candidate) -> Run:
    """Build the first run of a trial in a full search."""
    return _Settings(study, cell, arm, arm.args).search_run(trial, 0)


def final_run(study: Study, cell: Cell, arm: Arm, rate: float) -> Run:
    """Build the final run of an arm with the first seed, its tuned arguments at their first values."""
    trial = Candidate(rate, {name: values[0] for name, values in arm.tune.items()})
    return _Settings(study, cell, arm, arm.args).final_run(trial, study.seeds[0], cost=False)


def size_run(study: Study, cell: Cell, arm: Arm, name: str, limit: int) -> Run:
    """Build the run from which an arm's size is found.

    Args:
        study: the study.
        cell: the cell with the backbone.
        arm: the arm.
        name: the argument that sets the size.
        limit: the number of trainable parameters.
    """
    trial = candidates(study, arm, cell)[0]
    run = _Settings(study, cell, arm, arm.args).size_run(trial)
    # a size that was found for another limit or argument must not be taken for this one
    return replace(run, id=_digest(f"{run.id} {name} {limit}"))


def shortened(options: Mapping[str, Any], fraction: float, max_steps: int | None = None) -> dict[str, Any]:
    """Options of a run with a fraction of the training.

    Args:
        options: options of a full run.
        fraction: fraction of its training.
        max_steps: steps of a full run, if they are not those of `options`.
    """
    found = dict(options)
    if max_steps is not None:
        found["max_steps"] = max_steps
        found.pop("max_seconds", None)
    if found.get("max_steps", -1) > 0:
        # Trainer ignores a number of steps that is not positive, and would train by epochs
        found["max_steps"] = max(1, round(found["max_steps"] * fraction))
    if "max_seconds" in found:
        found["max_seconds"] *= fraction
    elif found.get("max_steps", -1) <= 0:
        found["num_train_epochs"] = found.get("num_train_epochs", 3.0) * fraction
    return found


def run_id(options: Mapping[str, Any], stage: str, launcher: Mapping[str, Any], **further: str) -> str:
    """Hash of all that decides a run's result.

    Args:
        options: options of the run.
        stage: its stage.
        launcher: flags of `accelerate launch`.
        further: further tasks that are measured, by the names of `FURTHER`.
    """
    identity = RunConfig.from_mapping({**options, "output_dir": "-"}).identity()
    named = {key: _task_content(name) for key, name in further.items() if name}
    content = [identity, _task_content(str(options["task"])), stage, launcher, named]
    return _digest(json.dumps(content, sort_keys=True, default=str))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


#: Keys of a task file that do not change the result of a run.
_IGNORED_IN_ID = ("title", "description", "licence", "citation", "homepage", "shifted", "control")


@lru_cache(maxsize=256)
def _task_content(source: str) -> str:
    task = load_task(source)
    # without the values that are a field's default, so that a key that is new in tasks changes no id of an older run
    values = task.model_dump(exclude_defaults=True, exclude=set(_IGNORED_IN_ID))
    defaults = registry.kind_info(task.kind).options
    changed = {key: value for key, value in task.options.items() if value != defaults[key]}
    if changed:
        values["options"] = changed
    return json.dumps([values, str(task.folder) if task.where == "files" else ""], sort_keys=True, default=str)


def check_first_runs(study: Study) -> None:
    """Check before anything is run that no two arms begin with the same run.

    Arms whose size is still to be found, by `limits: {trainable_parameters: ...}`, are checked when they are run.

    Raises:
        ConfigError: two arms have the same run.
    """
    if study.limits.trainable_parameters is not None:
        return
    seen: dict[str, Run] = {}
    for cell in study.cells:
        for arm in study.arms:
            check_distinct(next(arm_runs(study, cell, arm)), seen)


def check_distinct(runs: Iterable[Run], seen: dict[str, Run]) -> None:
    """Check that no two arms have the same run.

    Args:
        runs: runs that are new.
        seen: id -> run of those before, to which the new ones are added.

    Raises:
        ConfigError: two arms have the same run.
    """
    for run in runs:
        # the same run of the same arm is no conflict
        other = seen.setdefault(run.id, run)
        if (other.arm, other.task) != (run.arm, run.task):
            raise ConfigError(
                f'Arm "{run.arm}" on task "{run.task}" is the same run as arm "{other.arm}" on task "{other.task}"; '
                "leave one of them out."
            )
