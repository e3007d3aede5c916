"""Closed schema of a study file. Imports nothing heavy.

name: coffee
tasks:                # a name or a YAML path, or a mapping with its backbone(s) and run options of its own
  - {task: snips, model_name_or_path: minilm, max_steps: 60}
  - {task: snips, name: snips-10-shot, model_name_or_path: minilm, examples_per_class: 10}
  - {task: sign-digits, model_name_or_path: efficientnet-lite0, learning_rates: {dora: [1e-4, 3e-4, 1e-3]}}
model_name_or_path: minilm          # backbone(s) of the tasks that name none
methods:              # a name, or a mapping; a list of values in `args` makes one arm of each value
  - lora
  - {method: svfit, args: {rank: [8, 64, full]}}
  - {method: lora, args: {use_dora: true}, name: dora, learning_rates: [1e-3, 3e-3, 1e-2]}
  - {method: ssf, tune: {init_std: [0.0, 0.02]}}   # searched along with the learning rate, in the same budget
  - {method: iapt, training: {alternating_every: 1}}   # options of the method's recipe, such as bi-level training
  - {method: head, training: {features: cached}}       # or the features of the backbone computed once
  - {method: lora, training: {prune: {by: magnitude, share: [0.5, 0.9]}}}   # pruning; a list of shares makes arms
seeds: 3              # a number or a list
search: {strategy: grid, trials: 3, seeds: 1}      # or halving, or none
limits: {max_steps: 60}             # or seconds; and trainable_parameters (set by the argument an arm names as `size`)
training: {per_device_train_batch_size: 32}        # options of every run
measures: {shifted: other-task, control: third-task}   # also keys of an entry of `tasks`, or of a task file
launcher: accelerate  # or {accelerate: {num_processes: 2}}; left out: each run is one process
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from peft_lab import registry
from peft_lab.comparison.study.further_tasks import check_further
from peft_lab.comparison.study.parameter_budget import size_field
from peft_lab.comparison.study.study import FURTHER, Arm, Cell, Limits, Search, Study, is_grid
from peft_lab.data.task_registry import load_task, validate_task
from peft_lab.data.task_schema import check_classes
from peft_lab.errors import ConfigError, check_keys, did_you_mean
from peft_lab.runs.optimization import OF_A_RECIPE
from peft_lab.runs.run_config import RunConfig, method_args, read_run_file
from peft_lab.training.launch import find_config
from peft_lab.utils.schema import S, Schema, check

#: Options of runs that the study itself sets, and where.
_SET_ELSEWHERE = {
    "task": 'name it under "tasks"',
    "model_name_or_path": 'name it beside the task, or as "model_name_or_path" of the study',
    "method": 'name it under "methods"',
    "method_args": 'give them as "args" of the method',
    "learning_rate": 'give "learning_rates" with the method',
    "seed": 'give "seeds" of the study',
    "output_dir": "it is that of the comparison",
    "overwrite_output_dir": "a finished run is never repeated",
    "resume_from_checkpoint": "an interrupted run is continued by itself",
    "do_predict": "the test rows are for the final runs alone",
    "do_eval": "the learning rate is chosen on the validation rows",
    "push_to_hub": "push the adapter that you choose",
    "max_seconds": 'give "seconds" under "limits"',
}

#: Options of runs that an arm may have alone: all others must be the same, or the comparison would not be fair.
_OF_ARM = (*OF_A_RECIPE, "prune")

#: The arms of a comparison that names no methods: a baseline, two methods of this package, three tuners of peft.
DEFAULT_METHODS: tuple[Any, ...] = (
    "head",
    "lora",
    "svfit",
    "ssf",
    "ia3",
    {"method": "lora", "args": {"use_dora": True}, "name": "dora"},
)
DEFAULT_MAX_STEPS = 200


def load_study(source: Study | Mapping[str, Any] | str | Path) -> Study:
    """Load a checked study from a mapping or a YAML file.

    Relative task paths start from the file's folder.

    Raises:
        ConfigError, TaskError: an unknown key, a wrong value, or a combination that makes no sense.
    """
    if isinstance(source, Study):
        return source
    if isinstance(source, Mapping):
        return from_mapping(source, "the study", Path.cwd())
    path = Path(source).expanduser()
    return from_mapping(read_run_file(path), f'"{path}"', path.absolute().parent)


def is_study(values: Mapping[str, Any]) -> bool:
    """Test whether the mapping of a YAML file is a study."""
    return "methods" in values or "tasks" in values


def default_study(task: str, backbone: str, max_steps: int | None = None, name: str | None = None) -> Study:
    """Study for a task and a backbone alone.

    It has six methods, three seeds, and three learning rates each.

    Where the best one is the lowest or the highest, up to two more are tried beyond it.
    """
    values = {
        "name": name or load_task(task).name,
        "tasks": [{"task": task, "model_name_or_path": backbone}],
        "methods": list(DEFAULT_METHODS),
        "search": {"extend": 2},
        "limits": {"max_steps": max_steps or DEFAULT_MAX_STEPS},
    }
    return from_mapping(values, "the default study", Path.cwd())


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} must be a mapping of names to values, not {value!r}.")
    return value


def _seeds(value: Any) -> list[int]:
    # YAML's true would pass as the number 1
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ConfigError(f'"seeds" must be at least 1, got {value}.')
        return list(range(value))
    seeds = _list(value)
    if not seeds or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in seeds):
        raise ConfigError(f'"seeds" must be a number of seeds or a list of whole numbers, got {value!r}.')
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f'"seeds" names a seed twice: {value!r}.')
    return seeds


def _file_name(value: str) -> str:
    # It becomes part of folder names.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise ConfigError(f'The name "{value}" of the study must be letters, digits, ".", "-" and "_", at most 64.')
    return value


#: Field types: one value stands for a list of one, and an empty key for no value or no options; tasks must be named.
_Values = Annotated[list[Any], BeforeValidator(_list), Field(default_factory=list)]
_Options = Annotated[
    dict[str, Any], BeforeValidator(lambda value: {} if value is None else value), Field(default_factory=dict)
]
_Named = Annotated[list[Any], BeforeValidator(_list), Field(min_length=1)]


class _StudyFile(Schema):
    """Keys of a study file, whose shorthand is written out afterwards."""

    name: Annotated[str, AfterValidator(_file_name)]
    tasks: _Named
    model_name_or_path: _Values
    methods: _Named
    seeds: Annotated[list[int], BeforeValidator(_seeds), Field(default_factory=lambda: [0, 1, 2])]
    search: _Options
    limits: _Options
    training: _Options
    measures: _Options
    ood: str | None = None
    launcher: Any = None


class _Measures(Schema):
    """Further tasks of all cells."""

    shifted: str | None = None
    control: str | None = None
    ood: str | None = None


class _ArmEntry(Schema):
    """Entry of `methods`."""

    method: str
    name: str | None = None
    args: _Options
    tune: _Options
    learning_rates: _Values
    size: str | None = None
    training: _Options


def from_mapping(values: Mapping[str, Any], where: str, folder: Path) -> Study:
    """Build a study and check it without torch.

    `folder` anchors relative task paths.
    """
    given = _checked(_StudyFile, values, where)
    measures = _checked(_Measures, given.measures, '"measures"').model_dump(exclude_none=True)
    if given.ood is not None:
        if "ood" in measures:
            raise ConfigError('"ood" stands in the study and in its "measures"; give it once.')
        measures["ood"] = given.ood
    cells: list[Cell] = []
    for entry in given.tasks:
        cells += _cells(entry, given.model_name_or_path, measures, folder)
    arms: list[Arm] = []
    for entry in given.methods:
        arms += _arms(entry)
    study = Study(
        name=given.name,
        cells=tuple(cells),
        arms=tuple(arms),
        seeds=tuple(given.seeds),
        search=_search(given.search),
        limits=_checked(Limits, _set_values(given.limits), '"limits"'),
        training=_run_options(given.training, '"training"'),
        launcher=_launcher(given.launcher),
    )
    _check(study)
    return study


def _checked(schema: type[S], values: Any, what: str) -> S:
    """Check part of a study; the message is a sentence of its own."""
    try:
        return check(schema, values, what, ConfigError)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text[0].upper() + text[1:]) from error


def _set_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _cells(entry: Any, backbones: list[Any], measures: Mapping[str, Any], folder: Path) -> Iterable[Cell]:
    values = dict(entry) if isinstance(entry, Mapping) else {"task": entry}
    if not isinstance(values.get("task"), str):
        raise ConfigError(f'Each of "tasks" must name a task, as in {{task: snips}}, not {entry!r}.')
    source = _task_source(values.pop("task"), folder)
    task = validate_task(source)
    label = str(values.pop("name", task.name))
    if not task.has_test:
        raise ConfigError(f'Task "{label}" has no test rows to compare on: name a "test" split or set "test_fraction".')
    models = _list(values.pop("model_name_or_path", backbones))
    if not models:
        raise ConfigError(f'Task "{label}" names no backbone: give it, or the study, a "model_name_or_path".')
    further = {}
    for key in FURTHER:
        own, beside = values.pop(key, measures.get(key, "")), folder
        # a task file names other tasks relative to its own folder, a study relative to the study's
        if not own and getattr(task, key, None):
            own, beside = getattr(task, key), task.folder
        further[key] = _task_source(str(own), beside) if own else ""
    check_further(label, task, **further)
    given = _mapping(values.pop("learning_rates", None), f'"learning_rates" of task "{label}"')
    rates = {str(arm): _rates(value, f'task "{label}" for arm "{arm}"') for arm, value in given.items()}
    options = _run_options(values, f'task "{label}"')
    if options.get("examples_per_class") is not None:
        check_classes(task)
    return [Cell(label, source, str(model), options, **further, learning_rates=rates) for model in models]


def _task_source(name: str, folder: Path) -> str:
    """Name of a task, or the absolute path of its file."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return str((folder / Path(name).expanduser()).absolute())
    return name


def _arms(entry: Any) -> list[Arm]:
    values = dict(entry) if isinstance(entry, Mapping) else {"method": entry}
    if not isinstance(values.get("method"), str):
        raise ConfigError(f'Each of "methods" must name a method, as in {{method: lora}}, not {entry!r}.')
    info = registry.method(values["method"])
    what = f'the arm of method "{info.name}"'
    given = _checked(_ArmEntry, values, what)
    check_keys(given.training, _OF_ARM, f"training of {what}")
    args = method_args(given.args)
    tune = {name: tuple(_list(value)) for name, value in method_args(given.tune).items()}
    for arguments, key in ((args, "args"), (tune, "tune")):
        if arguments and not info.config:
            raise ConfigError(f'Method "{info.name}" is a baseline and takes no {key}.')
        registry.check_method_args(info.name, arguments)
    both = sorted(args.keys() & tune.keys())
    if both:
        raise ConfigError(f'"{both[0]}" of {what} is both fixed in "args" and searched by "tune"; remove one.')
    rates = _rates(given.learning_rates, what)
    size = given.size or ""
    if size:
        registry.check_method_args(info.name, {size: None})
    grids = {name: value for name, value in args.items() if is_grid(info.name, name, value)}
    arms = []
    for combination in itertools.product(*grids.values()):
        chosen = dict(zip(grids, combination, strict=True))
        # a study that was written back may hold lists of one value, whose arms are named already
        parts = [given.name or info.name, *(f"{k}={v}" for k, v in chosen.items() if len(grids[k]) > 1)]
        for share, options in _by_share(given.training):
            training = _run_options(options, f"training of {what}")
            arms.append(Arm(" ".join([*parts, *share]), info.name, {**args, **chosen}, tune, rates, size, training))
    return arms


def _by_share(training: Mapping[str, Any]) -> Iterable[tuple[list[str], dict[str, Any]]]:
    """Options of an arm for each share of its `prune`, with what the arm's label says of it."""
    prune = training.get("prune")
    shares = prune.get("share") if isinstance(prune, Mapping) else None
    if not isinstance(shares, list) or not shares:
        return [([], dict(training))]
    found = []
    for share in shares:
        label = [f"share={share}"] if len(shares) > 1 else []
        found.append((label, {**training, "prune": {**dict(prune or {}), "share": share}}))
    return found


def _rates(value: Any, what: str) -> tuple[float, ...]:
    return tuple(_positive(rate, f"learning_rates of {what}") for rate in _list(value))


def _search(values: Mapping[str, Any]) -> Search:
    given = _set_values(values)
    # YAML reads an empty value as None, and the word no as False
    if values.get("strategy", "grid") in (None, False, "none"):
        further = next((key for key in given if key != "strategy"), None)
        if further is not None:
            raise ConfigError(f'"{further}" of "search" has no effect with the strategy none; remove it.')
        given = {"strategy": "none", "trials": 1}
    return _checked(Search, given, '"search"')


def _launcher(value: Any) -> dict[str, Any]:
    """`accelerate`, or a mapping of it to flags of `accelerate launch`."""
    if value in (None, ""):
        return {}
    values = {value: {}} if isinstance(value, str) else _mapping(value, "launcher")
    check_keys(values, ("accelerate",), '"launcher"')
    flags = dict(_mapping(values.get("accelerate"), "launcher"))
    if "config_file" in flags:
        find_config(str(flags["config_file"]))
    return {"accelerate": flags}


def _check(study: Study) -> None:
    """Check the parts of a study against each other."""
    if not study.cells or not study.arms:
        raise ConfigError("A study needs at least one task and one method.")
    _unique([f"{cell.task} on {cell.backbone}" for cell in study.cells], "task", 'a "name"')
    _unique([arm.label for arm in study.arms], "arm", 'a "name"')
    labels = [arm.label for arm in study.arms]
    for cell in study.cells:
        for label in cell.learning_rates.keys() - set(labels):
            raise ConfigError(
                f'"learning_rates" of task "{cell.task}" names the arm "{label}", which the study has not.'
                f"{did_you_mean(label, labels)}"
            )
    for arm in study.arms:
        _check_trials(study, arm, arm.learning_rates, f'Arm "{arm.label}"')
        for cell in study.cells:
            if arm.label in cell.learning_rates:
                _check_trials(study, arm, cell.learning_rates[arm.label], f'Arm "{arm.label}" on task "{cell.task}"')
        if study.limits.trainable_parameters is not None:
            size_field(arm.method, arm.args, arm.size)
        for cell in study.cells:
            # the learning rate is not known yet, and any positive number passes the checks
            run = {**study.options(cell, arm), "output_dir": "-", "learning_rate": 1.0}
            RunConfig.from_mapping(run, f'the study for arm "{arm.label}" on task "{cell.task}"').check()


def _check_trials(study: Study, arm: Arm, learning_rates: Sequence[float], what: str) -> None:
    """Check that an arm has exactly the trials of the search; one without gradient steps has no rates to try."""
    trials = study.search.trials
    if not registry.method(arm.method).takes_steps:
        if learning_rates:
            raise ConfigError(f"{what} takes no gradient steps, and so no learning_rates; leave them out.")
        return
    if study.search.strategy == "none":
        if arm.tune or len(learning_rates) > 1:
            raise ConfigError(f"{what} has several values to try, but the search strategy is none.")
        return
    rates = len(learning_rates) or trials
    candidates = rates * _product(arm.tune.values())
    # with `tune`, the trials are drawn from all combinations, so there may be more of these
    if not arm.tune and rates > trials:
        raise ConfigError(
            f"{what} gives {rates} learning rates, but every arm has {trials} trials; "
            f'set "trials: {rates}" under "search", or give fewer.'
        )
    if candidates < trials:
        raise ConfigError(
            f"{what} gives {candidates} candidates, but every arm has {trials} trials; "
            "give more learning_rates, or fewer trials."
        )


def _product(values: Iterable[Sequence[Any]]) -> int:
    count = 1
    for options in values:
        count *= len(options)
    return count


def _unique(labels: list[str], what: str, mend: str) -> None:
    double = next((label for label in labels if labels.count(label) > 1), None)
    if double is not None:
        raise ConfigError(f'The {what} "{double}" is in the study twice; give one of them {mend}.')


def _run_options(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in values:
        if key in _SET_ELSEWHERE:
            raise ConfigError(f'"{key}" cannot be set in {where}: {_SET_ELSEWHERE[key]}.')
    # a run cannot be checked without these options, which the study sets elsewhere
    needed = {"task": "-", "model_name_or_path": "-", "method": "-", "output_dir": "-"}
    plain = RunConfig.from_mapping({**values, **needed}, where).to_dict()
    return {key: value for key, value in plain.items() if key not in needed}


def _positive(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if isinstance(value, bool) or not 0 < number < float("inf"):
        raise ConfigError(f"{what} must be a positive number, got {value!r}.")
    return number
