"""Which runs a comparison consists of: the search of each arm on each cell, round by round, then its final runs."""

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
from peft_lab.comparison.records.results import Record
from peft_lab.comparison.records.run import Run
from peft_lab.comparison.study.study import Arm, Cell, Search, Study
from peft_lab.data.task_registry import load_task
from peft_lab.errors import ConfigError
from peft_lab.runs.run_config import RunConfig

#: Seeds of the search start here: the final runs must not have the seeds that their learning rate was chosen by.
SEARCH_SEED = 1000

#: Neighbouring learning rates of a default grid differ by this factor.
RATE_FACTOR = math.sqrt(10)


@dataclass(frozen=True)
class Candidate:
    """What one trial of a search tries."""

    learning_rate: float
    tuned: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """What an arm's search came to on a cell.

    Attributes:
        candidate: the best one; None if no candidate ended with a result.
        edge: "lowest" or "highest" if the chosen learning rate is that of all that were tried, so that a better one
            may lie beyond; else "".
        tried: learning rate, tuned values and mean validation score of each candidate in its last round.
    """

    arm: str
    task: str
    backbone: str
    candidate: Candidate | None
    edge: str = ""
    tried: tuple[Mapping[str, Any], ...] = ()


def rate_grid(center: float, count: int) -> tuple[float, ...]:
    """`count` learning rates around `center`, a factor of 3.2 apart; of an even number one more lies above."""
    return tuple(float(f"{center * RATE_FACTOR**step:.2g}") for step in range(-((count - 1) // 2), count // 2 + 1))


def candidates(study: Study, arm: Arm, cell: Cell) -> list[Candidate]:
    """The trials of an arm's search, equally many for every arm; the default values are always among them."""
    center, given = registry.method(arm.method).learning_rate, study.learning_rates(cell, arm)
    if study.search.strategy == "none":
        return [Candidate(next(iter(given), center))]
    rates = given or rate_grid(center, study.search.trials)
    tuned = [dict(zip(arm.tune, values, strict=True)) for values in itertools.product(*arm.tune.values())]
    every = [Candidate(rate, values) for rate in rates for values in tuned]
    default = Candidate(min(rates, key=lambda rate: abs(math.log(rate / center))), tuned[0])
    if len(every) <= study.search.trials:
        return every
    others = [candidate for candidate in every if candidate != default]
    random.Random(f"{study.name}/{arm.label}").shuffle(others)
    chosen = [default, *others[: study.search.trials - 1]]
    return [candidate for candidate in every if candidate in chosen]


def rounds(search: Search) -> list[tuple[int, float]]:
    """For each round of a search the number of candidates in it, and the part of a full training that each gets."""
    counts = [search.trials]
    while search.strategy == "halving" and counts[-1] // search.factor >= 2:
        counts.append(counts[-1] // search.factor)
    return [(count, search.factor ** (index + 1 - len(counts))) for index, count in enumerate(counts)]


def count_runs(study: Study) -> int:
    """How many runs a study takes if none of them fails and no search goes on beyond its candidates."""
    search = sum(count for count, _ in rounds(study.search)) * study.search.seeds if study.search.trials > 1 else 0
    return len(study.cells) * len(study.arms) * (search + len(study.seeds))


def count_beyond(study: Study) -> int:
    """How many runs a study takes at most beyond those of `count_runs`."""
    return len(study.cells) * len(study.arms) * study.search.extend * study.search.seeds


def arm_runs(
    study: Study, cell: Cell, arm: Arm, sized: Mapping[str, Any] | None = None
) -> Generator[list[Run], Sequence[Record], Choice]:
    """The runs of an arm on a cell, wave by wave; send the records of each wave to get the next.

    Args:
        study, cell, arm: what is compared.
        sized: the arguments that make the arm as large as the study wants it.
    """
    arguments = {**arm.args, **(sized or {})}
    trials = candidates(study, arm, cell)
    found: dict[int, list[Record]] = {}
    if len(trials) == 1:
        chosen, edge = trials[0], ""
    else:
        best, found = yield from _search(study, cell, arm, arguments, trials)
        if math.isnan(mean_score(found[best])):
            return Choice(arm.label, cell.task, cell.backbone, None, tried=_tried(trials, found))
        chosen = trials[best]
        edge = _edge(chosen, trials)
    yield [
        _run(study, cell, arm, arguments, chosen, seed, "final", 0, 1.0, cost=index == 0)
        for index, seed in enumerate(study.seeds)
    ]
    return Choice(arm.label, cell.task, cell.backbone, chosen, edge, _tried(trials, found) if found else ())


def _search(
    study: Study, cell: Cell, arm: Arm, arguments: Mapping[str, Any], trials: list[Candidate]
) -> Generator[list[Run], Sequence[Record], tuple[int, dict[int, list[Record]]]]:
    """The waves of a search; returns the best trial and the records of each one's last round.

    `trials` gets what was tried beyond its learning rates.
    """
    order, found = list(range(len(trials))), dict[int, list[Record]]()
    for number, (count, part) in enumerate(rounds(study.search)):
        order = order[:count]
        records = yield [
            _run(study, cell, arm, arguments, trials[i], SEARCH_SEED + s, "search", number, part)
            for i in order
            for s in range(study.search.seeds)
        ]
        found |= {i: [r for r in records if _is_of(r, trials[i])] for i in order}
        order.sort(key=lambda i: _rank(found[i]))
    for _ in range(study.search.extend):
        further = _beyond(trials[order[0]], trials)
        if further is None or math.isnan(mean_score(found[order[0]])):
            break
        trials.append(further)
        records = yield [
            replace(_run(study, cell, arm, arguments, further, SEARCH_SEED + s, "search", number, 1.0), beyond=True)
            for s in range(study.search.seeds)
        ]
        found[len(trials) - 1] = list(records)
        order = sorted([*order, len(trials) - 1], key=lambda i: _rank(found[i]))
    return order[0], found


def _is_of(record: Record, trial: Candidate) -> bool:
    return record.learning_rate == trial.learning_rate and record.tuned == dict(trial.tuned)


def mean_score(records: Iterable[Record]) -> float:
    """Mean of the main metric on the validation rows; nan if a run failed or diverged, or there is none."""
    found = [record.score("validation") if record.ok else None for record in records]
    values = [math.nan if value is None else value for value in found]
    return sum(values) / len(values) if values else math.nan


def _rank(records: Sequence[Record]) -> tuple[float, float]:
    """Sorts the best first: by the main metric, then by the loss, both on the validation rows; nan comes last."""
    score = mean_score(records)
    if math.isnan(score):
        return math.inf, math.inf
    losses = [float(r.metrics["metrics"]["validation"].get("loss", math.inf)) for r in records]
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
    """The best candidate with a learning rate one step further out; None if its own does not lie at an edge."""
    if not (edge := _edge(best, trials)):
        return None
    rates = sorted({trial.learning_rate for trial in trials}, reverse=edge == "lowest")
    rate = float(f"{rates[-1] ** 2 / rates[-2]:.2g}")
    return None if rate in rates else replace(best, learning_rate=rate)


def _run(
    study: Study,
    cell: Cell,
    arm: Arm,
    arguments: Mapping[str, Any],
    trial: Candidate,
    seed: int,
    stage: str,
    number: int,
    part: float,
    cost: bool = False,
) -> Run:
    args = {**arguments, **trial.tuned}
    options = {**study.options(cell, arm), "method_args": args, "learning_rate": trial.learning_rate, "seed": seed}
    if stage == "search":
        options = {**shortened(options, part, study.search_steps(cell)), "do_predict": False}
    further: dict[str, Any] = {"shifted": cell.shifted, "control": cell.control} if stage == "final" else {}
    return Run(
        id=run_id(options, stage, study.launcher, **further),
        study=study.name,
        stage=stage,
        arm=arm.label,
        method=arm.method,
        task=cell.task,
        backbone=cell.backbone,
        seed=seed,
        learning_rate=trial.learning_rate,
        method_args=args,
        tuned=dict(trial.tuned),
        round=number,
        options=options,
        cost=cost,
        launcher=study.launcher,
        **further,
    )


def search_run(study: Study, cell: Cell, arm: Arm, trial: Candidate) -> Run:
    """The first run of a trial in a full search."""
    return _run(study, cell, arm, arm.args, trial, SEARCH_SEED, "search", 0, 1.0)


def size_run(study: Study, cell: Cell, arm: Arm, name: str, limit: int) -> Run:
    """The run that stands for the question how large an arm's argument `name` may be on a cell's backbone."""
    run = _run(study, cell, arm, arm.args, candidates(study, arm, cell)[0], 0, "size", 0, 1.0)
    return replace(run, id=hashlib.blake2b(f"{run.id} {name} {limit}".encode(), digest_size=8).hexdigest())


def shortened(options: Mapping[str, Any], part: float, max_steps: int | None = None) -> dict[str, Any]:
    """The options of a run with a part of the training, counted in whatever its length is given in.

    Args:
        options: options of a full run.
        part: the part of it.
        max_steps: steps of a full run, if they are not those of `options`.
    """
    found = dict(options)
    if max_steps is not None:
        found["max_steps"] = max_steps
        found.pop("max_seconds", None)
    if found.get("max_steps", -1) > 0:
        found["max_steps"] = max(1, round(found["max_steps"] * part))
    if "max_seconds" in found:
        found["max_seconds"] *= part
    elif found.get("max_steps", -1) <= 0:
        found["num_train_epochs"] = found.get("num_train_epochs", 3.0) * part
    return found


def run_id(options: Mapping[str, Any], stage: str, launcher: Mapping[str, Any], **further: str) -> str:
    """Hash of all that decides a run's result: its options, the content of its task, what is measured of it."""
    identity = RunConfig.from_mapping({**options, "output_dir": "-"}).identity()
    named = {key: _task_content(name) for key, name in further.items() if name}
    content = [identity, _task_content(str(options["task"])), stage, launcher, named]
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


#: What a task file says to people, and what does not reach its runs by itself.
_TELLS_ONLY = ("title", "description", "licence", "citation", "homepage", "shifted", "control")


@lru_cache(maxsize=256)
def _task_content(source: str) -> str:
    task = load_task(source)
    # without the values that are a field's default, so that a key that is new in tasks changes no old run
    values = task.model_dump(exclude_defaults=True, exclude=set(_TELLS_ONLY))
    return json.dumps([values, str(task.folder) if task.where == "files" else ""], sort_keys=True, default=str)


def check_distinct(runs: Iterable[Run], seen: dict[str, Run]) -> None:
    """Raise `ConfigError` if two arms come to the same run, which would be counted twice; `seen` is added to."""
    for run in runs:
        other = seen.setdefault(run.id, run)
        if (other.arm, other.task) != (run.arm, run.task):
            raise ConfigError(
                f'Arm "{run.arm}" on task "{run.task}" is the same run as arm "{other.arm}" on task "{other.task}"; '
                "leave one of them out."
            )
