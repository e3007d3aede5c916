"""The closed schema of a task file: its keys, their types, whether the values fit together. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft_lab.data.prompt_template import Template, fields
from peft_lab.errors import TaskError, did_you_mean
from peft_lab.metrics import METRICS, metric_path
from peft_lab.registry import KindInfo, kind_info
from peft_lab.utils.data_root import DATA_PREFIX, DATA_VARIABLE

SPLITS = ("train", "validation", "test")

#: The column, of any kind of task, whose values choose a row's prompts; also the argument of a forward that does.
PROMPT_IDS = "prompt_ids"

#: Options of each `datasets` builder that a task may set. The list is closed, for a YAML file is never trusted.
BUILDERS: dict[str, dict[str, tuple[type, ...]]] = {
    "csv": {
        "delimiter": (str,),
        "column_names": (list,),
        "quoting": (str,),
        "quotechar": (str,),
        "encoding": (str,),
        "skiprows": (int,),
    },
    "json": {"field": (str,), "encoding": (str,)},
    "parquet": {},
    "imagefolder": {},
}

#: Names for the constants of Python's csv module.
QUOTING = {"minimal": 0, "all": 1, "nonnumeric": 2, "none": 3}

PROBLEM_TYPES = ("single_label_classification", "regression")


@dataclass(frozen=True)
class DataSource:
    """Where the rows come from: a data set of the Hub, or local files read by a builder of `datasets`.

    Attributes:
        path, name, revision: Hub id, configuration and commit, branch or tag ("" for local files).
        builder: `csv`, `json`, `parquet` or `imagefolder` ("" for the Hub).
        files: split -> file names as written: relative to the YAML file or to `${PEFT_LAB_DATA}`; `*` is a wildcard.
        options: options of the builder, a subset of `BUILDERS[builder]`.
    """

    path: str = ""
    name: str = ""
    revision: str = ""
    builder: str = ""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One task, as its YAML file says. Build it with `load_task` or `validate_task`, which check every value.

    Attributes:
        splits: our split names -> the source's; what is missing is carved from train by `load_splits`.
        columns: canonical column names of the kind (`text`, `label`, `image`, ...) -> the source's. With any kind,
            `prompt_ids` names a column of texts or whole numbers whose value chooses the prompts of a row (its domain,
            its source, ...); methods without such a choice do not see it.
        labels: label names in the order of the model's outputs; empty if they are read from the data.
        prompt_values: values of `prompt_ids` in the order of the sets of prompts; empty for the sorted values of train.
        metrics: names or paths, the first one chooses the best checkpoint.
        validation_fraction, test_fraction: share of train to carve where the source has no such split.
        split_seed: seed of that carving, the same for every run.
        shifted: another task (name, or path beside the YAML file) with the same labels, whose test rows are scored too.
        control: another task (likewise) on which a comparison measures what training made the model forget.
        image_size: size for backbones that take any; one with a fixed grid of patches keeps its own.
        origin: the YAML file, None for a task built from a mapping.
    """

    name: str
    kind: str
    data: DataSource
    title: str = ""
    description: str = ""
    splits: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    prompt_values: tuple[str, ...] = ()
    problem_type: str = "single_label_classification"
    metrics: tuple[str, ...] = ()
    template: Template | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.0
    split_seed: int = 0
    max_length: int | None = None
    max_new_tokens: int | None = None
    image_size: int | None = None
    version: str = "1"
    licence: str = ""
    citation: str = ""
    homepage: str = ""
    shifted: str = ""
    control: str = ""
    origin: Path | None = None

    @property
    def main_metric(self) -> str:
        """The metric that chooses the best checkpoint, under the name it has in the results."""
        return Path(self.metrics[0]).stem

    @property
    def inputs(self) -> tuple[str, ...]:
        """The canonical columns that hold what a model may look at: neither the answer nor `prompt_ids`."""
        known = self.template.inputs() if self.template else tuple(name for name in self.columns if name != "label")
        return tuple(name for name in known if name != PROMPT_IDS)

    @property
    def folder(self) -> Path:
        """The folder that relative file names start from."""
        return self.origin.parent if self.origin else Path.cwd()

    @property
    def where(self) -> str:
        """`hub`, `package` (the data ships with the package), `$PEFT_LAB_DATA` or `files`."""
        if self.data.path:
            return "hub"
        names = [name for group in self.data.files.values() for name in group]
        if any(name.startswith("${") for name in names):
            return f"${DATA_VARIABLE}"
        return "package" if self.origin and self.origin.parent in builtin_folders() else "files"


#: Keys that only some kinds read; a kind names its own in `Kind.settings`.
_SETTINGS = {
    "labels": (list,),
    "problem_type": (str,),
    "template": (dict,),
    "max_length": (int,),
    "max_new_tokens": (int,),
    "image_size": (int,),
}
_KEYS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "kind": (str,),
    "title": (str,),
    "description": (str,),
    "data": (dict,),
    "splits": (dict,),
    "columns": (dict,),
    "prompt_values": (list,),
    "metrics": (list, str),
    "validation_fraction": (float, int),
    "test_fraction": (float, int),
    "split_seed": (int,),
    "version": (str, int, float),
    "licence": (str,),
    "citation": (str,),
    "homepage": (str,),
    "shifted": (str,),
    "control": (str,),
    **_SETTINGS,
}
_TEMPLATE_KEYS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "answer": (str,),
    "reference": (str,),
    "extract": (str,),
    "required": (str,),
    "chat": (bool,),
}
_TYPE_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    type(None): "empty",
}


def check_classes(task: Task) -> None:
    """Raise `TaskError` if a task has no classes to draw `examples_per_class` of."""
    if "label" not in task.columns or task.problem_type == "regression":
        raise TaskError(f'examples_per_class needs a classification task; "{task.name}" has no classes.')


@lru_cache(maxsize=1)
def builtin_folders() -> tuple[Path, ...]:
    """The folders of `peft_lab.tasks`."""
    spec = importlib.util.find_spec("peft_lab.tasks")
    return tuple(Path(p) for p in (spec.submodule_search_locations if spec else None) or ())


def build(mapping: Mapping[str, Any], origin: Path | None) -> Task:
    """Build a checked task; raises `TaskError` with one sentence about the first thing that is wrong.

    `origin` is the YAML file, if there is one, and anchors relative paths.
    """
    if not isinstance(mapping, Mapping):
        raise TaskError(f"a task must be a mapping of keys to values, not {_describe(mapping)}.")
    values = _checked(mapping, _KEYS, "a task")
    for key in ("name", "kind", "data"):
        if key not in values:
            raise TaskError(f'the key "{key}" is missing.')
    _check_name(values["name"])
    rule = kind_info(values["kind"])
    for key in _SETTINGS:
        if key in values and key not in rule.settings:
            raise TaskError(f'"{key}" has no meaning for the kind "{rule.name}"; remove it.')
    values["data"] = _data(values["data"])
    values["splits"] = _splits(values.get("splits"), values["data"])
    _fractions(values)
    for key in ("max_length", "max_new_tokens", "image_size"):
        if values.get(key, 1) < 1:
            raise TaskError(f'"{key}" must be at least 1, not {values[key]}.')
    if "labels" in values:
        values["labels"] = _names(values["labels"], "label", least=2)
    problem_type = values.get("problem_type", PROBLEM_TYPES[0])
    _one_of(problem_type, PROBLEM_TYPES, "problem_type")
    if problem_type == "regression" and values.get("labels"):
        raise TaskError('a regression has no "labels"; remove them, or the problem_type.')
    if "template" in values:
        values["template"] = _template(values["template"])
    values["columns"] = _columns(values.get("columns", {}), rule, values.get("template"))
    allowed = rule.metrics_for(problem_type)
    values["metrics"] = _metrics(values.get("metrics", list(allowed[:1])), allowed, rule.name, origin)
    values["version"] = str(values.get("version", "1"))
    if "prompt_values" in values:
        values["prompt_values"] = _names(values["prompt_values"], "prompt_value", least=1)
    task = Task(**values, origin=origin)
    _check_prompt_column(task)
    return task


def _checked(mapping: Mapping[Any, Any], known: Mapping[str, tuple[type, ...]], what: str) -> dict[str, Any]:
    """The mapping as a dict after its keys and the types of its values were checked."""
    for key, value in mapping.items():
        if key not in known:
            raise TaskError(f'unknown key "{key}" in {what}.{did_you_mean(str(key), known)} Known: {", ".join(known)}.')
        types = known[key]
        # bool is an int to Python, but `max_length: yes` is a mistake
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(_TYPE_NAMES[t] for t in types)
            hint = f' Put it in quotes: "{value}".' if str in types and isinstance(value, (int, float)) else ""
            raise TaskError(f'"{key}" in {what} must be {wanted}, not {_describe(value)}.{hint}')
    return dict(mapping)


def _describe(value: Any) -> str:
    name = _TYPE_NAMES.get(type(value), f"a value of type {type(value).__name__}")
    return name if isinstance(value, (list, dict, type(None))) else f"{name} ({str(value)[:60]!r})"


def _one_of(value: str, known: Iterable[str], what: str) -> None:
    if value not in known:
        raise TaskError(f'{what} "{value}" is not one of {", ".join(known)}.{did_you_mean(value, known)}')


def _data(mapping: Mapping[str, Any]) -> DataSource:
    if "builder" not in mapping:
        values = _checked(mapping, {"path": (str,), "name": (str,), "revision": (str,)}, 'the "data" of a Hub data set')
        path = values.get("path", "")
        if not path:
            raise TaskError('"data" needs "path" (a Hub id) or "builder" and "files" (local files).')
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", path):
            raise TaskError(f'data path "{path}" is no Hub id; for local files give "builder" and "files" instead.')
        return DataSource(**values)
    known = {"builder": (str,), "files": (dict,), "options": (dict,)}
    values = _checked(mapping, known, 'the "data" of local files')
    _one_of(values["builder"], BUILDERS, "data builder")
    options = _checked(values.get("options", {}), BUILDERS[values["builder"]], f"the options of {values['builder']}")
    if "quoting" in options:
        _one_of(options["quoting"], QUOTING, "quoting")
    for column in options.get("column_names", ()):
        if not isinstance(column, str):
            raise TaskError(f"column_names must be text, not {_describe(column)}; put it in quotes.")
    return DataSource(builder=values["builder"], files=_files(values.get("files")), options=options)


def _files(mapping: Mapping[str, Any] | None) -> dict[str, tuple[str, ...]]:
    values = _checked(mapping or {}, dict.fromkeys(SPLITS, (str, list)), "the files")
    if "train" not in values:
        raise TaskError('"files" of "data" must name at least the file of "train".')
    files = {}
    for split, names in values.items():
        files[split] = tuple([names] if isinstance(names, str) else names)
        if not files[split]:
            raise TaskError(f'the list of {split} files is empty; name a file or leave "{split}" out.')
        for name in files[split]:
            _check_file(name)
    return files


def _check_file(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise TaskError(f"a file name must be text, not {_describe(name)}.")
    if "://" in name:
        raise TaskError(f'file "{name}" is an address; files are local, a Hub data set is named by "path".')
    if "$" in name.removeprefix(DATA_PREFIX) or name.startswith("~"):
        raise TaskError(f'file "{name}": only a leading {DATA_PREFIX} is replaced, no other variable and no "~".')


def _splits(mapping: Mapping[str, Any] | None, data: DataSource) -> dict[str, str]:
    if data.builder:
        if mapping is not None:
            raise TaskError('"splits" is for Hub data sets; for local files the keys of "files" are the splits.')
        return {split: split for split in data.files}
    values = _checked(mapping or {}, dict.fromkeys(SPLITS, (str,)), "the splits")
    if "train" not in values:
        raise TaskError(
            '"splits" must say which split of the data set is "train", for instance `splits: {train: train}`.'
        )
    return values


def _fractions(values: dict[str, Any]) -> None:
    for split in ("validation", "test"):
        key = f"{split}_fraction"
        if key not in values:
            continue
        if split in values["splits"]:
            raise TaskError(f'"{key}" has no effect, for the data has a {split} split; remove one of them.')
        if not 0 < values[key] <= 0.5:
            raise TaskError(f'"{key}" must be over 0 and at most 0.5, not {values[key]}.')
        values[key] = float(values[key])
    if values.get("split_seed", 0) < 0:
        raise TaskError(f'"split_seed" must not be negative, not {values["split_seed"]}.')


def _names(values: list[Any], what: str, least: int) -> tuple[str, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            # YAML 1.1 reads no, off and yes as booleans
            raise TaskError(f"a {what} must be text, not {_describe(value)}; put {what} names in quotes.")
    names = tuple(str(value) for value in values)
    if len(names) < least:
        raise TaskError(f'"{what}s" needs at least {"two names" if least == 2 else "one name"}, not {len(names)}.')
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise TaskError(f'the {what} "{double}" is given twice.')
    return names


def _template(mapping: Mapping[str, Any]) -> Template:
    values = _checked(mapping, _TEMPLATE_KEYS, "the template")
    for key in ("prompt", "answer"):
        if not fields(values.get(key, "")):
            raise TaskError(f'the template needs "{key}" with at least one column in braces, like "{{question}}".')
    fields(values.get("reference", ""))
    for key in ("extract", "required"):
        if key in values:
            _one_group(key, values[key])
    return Template(**values)


def _one_group(key: str, pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise TaskError(f'{key} "{pattern}" is no regular expression: {error}.') from error
    if groups != 1:
        raise TaskError(f'{key} "{pattern}" must have exactly one group, it has {groups}.')


def _columns(mapping: Mapping[str, Any], rule: KindInfo, template: Template | None) -> dict[str, str]:
    known = dict(rule.columns) if template is None else dict.fromkeys(template.columns(), False)
    if PROMPT_IDS in known:
        raise TaskError(f'"{PROMPT_IDS}" is the column that chooses prompts; call the one of the template otherwise.')
    values = _checked(mapping, dict.fromkeys((*known, PROMPT_IDS), (str,)), "the columns")
    for name, required in known.items():
        if required and name not in values:
            raise TaskError(f'the kind "{rule.name}" needs "columns" to name the column of "{name}".')
    chosen = {PROMPT_IDS: values.pop(PROMPT_IDS)} if PROMPT_IDS in values else {}
    columns = values if template is None else {name: values.get(name, name) for name in known}
    double = next((c for c in columns.values() if list(columns.values()).count(c) > 1), None)
    if double is not None:
        raise TaskError(f'the column "{double}" is named for two purposes.')
    return columns | chosen


def _metrics(names: Any, allowed: tuple[str, ...], kind_name: str, origin: Path | None) -> tuple[str, ...]:
    names = [names] if isinstance(names, str) else names
    if not names:
        raise TaskError('"metrics" is empty; leave it out for the usual ones, or name one.')
    found = []
    for name in names:
        if not isinstance(name, str):
            raise TaskError(f"a metric must be text, not {_describe(name)}.")
        if name in METRICS and name not in allowed:
            raise TaskError(f'metric "{name}" does not fit this kind of task; fitting: {", ".join(allowed)}.')
        path = metric_path(name, origin.parent if origin else Path.cwd(), extra=allowed)
        found.append(str(path) if path is not None else name)
    return tuple(found)


def _check_name(name: str) -> None:
    """Raise `TaskError` unless a task's name is safe as a folder name and as a word of a command line."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        raise TaskError(f'The name "{name}" must be lower case letters, digits, ".", "-" and "_", at most 64 of them.')


def _check_prompt_column(task: Task) -> None:
    """Raise `TaskError` if a task chooses prompts by what is not known before the answer, or by no column."""
    source = task.columns.get(PROMPT_IDS)
    if source is None:
        if task.prompt_values:
            raise TaskError(f'"prompt_values" needs "columns" to name the column of "{PROMPT_IDS}".')
        return
    answers = {name for name in task.columns if name not in task.inputs and name != PROMPT_IDS}
    if source in [task.columns[name] for name in answers]:
        raise TaskError(f'the column "{source}" holds the answer, so it cannot choose the prompts; name another one.')
