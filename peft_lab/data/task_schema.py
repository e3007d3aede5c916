"""Closed schema of a task file. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, create_model

from peft_lab.data.data_source import FOLDER_BUILDERS, DataSource, as_list, data_source
from peft_lab.data.prompt_template import Template
from peft_lab.errors import TaskError
from peft_lab.metrics import METRICS, metric_path
from peft_lab.registry import KindInfo, kind_info, list_kinds, list_methods
from peft_lab.utils.data_root import DATA_VARIABLE
from peft_lab.utils.schema import Schema, check, describe, unknown_key

SPLITS = ("train", "validation", "test")

#: The column, of any kind of task, whose values choose a row's prompts; also the argument of a forward that does.
PROMPT_IDS = "prompt_ids"

#: Labels of one task; no data set of classes has more.
MAX_LABELS = 100_000

#: Keys that only some kinds read; a kind names its own in `KindInfo.settings`.
_SETTINGS = ("labels", "problem_type", "template", "max_length", "max_new_tokens", "image_size")


#: Keys that a stream of rows alone reads.
_OF_STREAMS = ("validation_rows", "test_rows", "shuffle_buffer_size")


class _SplitNames(Schema):
    train: str = ""
    validation: str = ""
    test: str = ""


def _check_name(name: str) -> str:
    """Refuse a task's name that is unsafe in paths and command lines."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        raise TaskError(f'The name "{name}" must be lower case letters, digits, ".", "-" and "_", at most 64 of them.')
    return name


def _names(values: Any, what: str, least: int) -> tuple[str, ...]:
    """Different names as a tuple of texts; whole numbers become texts."""
    if not isinstance(values, list):
        raise TaskError(f'"{what}s" in a task must be a list, not {describe(values)}.')
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            # YAML 1.1 reads no, off and yes as booleans
            raise TaskError(f"a {what} must be text, not {describe(value)}; put {what} names in quotes.")
    names = tuple(str(value) for value in values)
    if len(names) < least:
        raise TaskError(f'"{what}s" needs at least {"two names" if least == 2 else "one name"}, not {len(names)}.')
    double = _double(names)
    if double is not None:
        raise TaskError(f'the {what} "{double}" is given twice.')
    return names


def _double(names: Iterable[str]) -> str | None:
    """First name that is there twice; None if all differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _each_column(values: Any) -> Any:
    """Columns, in which a list of columns for one purpose becomes `name[0]`, `name[1]`, ..."""
    if not isinstance(values, Mapping):
        return values
    found: dict[Any, Any] = {}
    for name, source in values.items():
        if not isinstance(source, list):
            found[name] = source
            continue
        if not source:
            raise TaskError(f'the list of columns for "{name}" is empty; name one column or several.')
        for number, one in enumerate(source):
            found[f"{name}[{number}]"] = one
    return found


def _split_names(values: Any) -> dict[str, str]:
    return check(_SplitNames, values, "the splits", TaskError).model_dump(exclude_unset=True)


def _template(values: Any) -> Template:
    return check(Template, values, "the template", TaskError)


def _version(value: Any) -> Any:
    # YAML reads 1.0 as a number
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


_Count = Annotated[int, Field(ge=1)]
_Fraction = Annotated[float, Field(gt=0, le=0.5)]


class Task(Schema):
    """Task, as its YAML file says.

    `load_task` and `validate_task` build it; its constructor does not check all values against each other.

    Attributes:
        splits: our split names -> the source's; what is missing is carved from train by `load_splits`.
        columns: canonical column names of the kind (`text`, `label`, `image`, ...) -> the source's. With any kind,
            `prompt_ids` names a column of texts or whole numbers whose value chooses the prompts of a row (its domain,
            its source, ...); methods without such a choice do not see it. Names that a method's card lists as
            `row_columns` (`quality`, ...) likewise name columns of numbers.
        labels: label names in the order of the model's outputs; empty if they are read from the data.
        prompt_values: values of `prompt_ids` in the order of the sets of prompts; empty for the sorted values of train.
        metrics: names or paths, the first one chooses the best checkpoint.
        empty_rows: what to do about rows without a value, a text, a label or an answer: refuse the data, drop these
            rows, or keep those that are empty and not missing; both with their count.
        validation_fraction, test_fraction: share of train to carve where the source has no such split.
        split_seed: seed of that carving, the same for every run.
        streaming: read the training rows while they are trained on, instead of all of them before.
        validation_rows, test_rows: number of rows of these splits with streaming: the first of the source's split, or
            of train where it has none.
        shuffle_buffer_size: rows of a stream that are drawn from at random; 1 keeps their order.
        shifted: another task (name, or path beside the YAML file) with the same labels, whose test rows are scored too.
        control: another task (likewise) on which a comparison measures what training made the model forget.
        image_size: size for backbones that take any; one with a fixed grid of patches keeps its own.
        origin: the YAML file, None for a task built from a mapping.
    """

    name: Annotated[str, AfterValidator(_check_name)]
    kind: str
    data: Annotated[DataSource, BeforeValidator(data_source)]
    title: str = ""
    description: str = ""
    splits: Annotated[Mapping[str, str], BeforeValidator(_split_names)] = {}
    columns: Annotated[Mapping[str, str], BeforeValidator(_each_column)] = {}
    labels: Annotated[tuple[str, ...], BeforeValidator(partial(_names, what="label", least=2))] = ()
    prompt_values: Annotated[tuple[str, ...], BeforeValidator(partial(_names, what="prompt_value", least=1))] = ()
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] = (
        "single_label_classification"
    )
    metrics: Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(as_list)] = ()
    empty_rows: Literal["refuse", "drop", "keep"] = "refuse"
    template: Annotated[Template, BeforeValidator(_template)] | None = None
    validation_fraction: _Fraction = 0.1
    test_fraction: _Fraction = 0.0
    split_seed: Annotated[int, Field(ge=0)] = 0
    streaming: bool = False
    validation_rows: _Count | None = None
    test_rows: _Count | None = None
    shuffle_buffer_size: _Count = 1000
    max_length: _Count | None = None
    max_new_tokens: _Count | None = None
    image_size: _Count | None = None
    version: Annotated[str, BeforeValidator(_version)] = "1"
    licence: str = ""
    citation: str = ""
    homepage: str = ""
    shifted: str = ""
    control: str = ""
    _origin: Path | None = None
    _foreign: bool = False
    _options: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def options(self) -> Mapping[str, Any]:
        """Values of the keys that the task's kind alone reads, defaults included."""
        return self._options

    @property
    def origin(self) -> Path | None:
        """The YAML file, None for a task built from a mapping."""
        return self._origin

    @property
    def foreign(self) -> bool:
        """True for a task that came in an adapter's folder: it reads plain files of that folder alone."""
        return self._foreign

    def as_foreign(self) -> Task:
        """Copy of the task as one that came in an adapter's folder."""
        found = self.model_copy()
        found._foreign = True
        return found

    def with_options(self, options: Mapping[str, Any]) -> Task:
        """Copy of the task with other values of keys that its kind alone reads."""
        found = self.model_copy()
        found._options = {**self._options, **options}
        return found

    @property
    def has_test(self) -> bool:
        """True if there are test rows, of a split or taken from train."""
        return "test" in self.splits or self.test_fraction > 0 or self.test_rows is not None

    @property
    def main_metric(self) -> str:
        """Metric that chooses the best checkpoint, by its name in the results."""
        return Path(self.metrics[0]).stem

    @property
    def inputs(self) -> tuple[str, ...]:
        """Canonical columns that a model may look at: neither answer nor `prompt_ids`."""
        known = self.template.inputs() if self.template else tuple(self.columns)
        hidden = (PROMPT_IDS, *self.number_columns, *kind_info(self.kind).answers)
        return tuple(name for name in known if name not in hidden)

    @property
    def number_columns(self) -> tuple[str, ...]:
        """Columns with a number for each row that methods read, and no model sees."""
        of_kind = self.template.columns() if self.template else kind_info(self.kind).columns
        known = (PROMPT_IDS, *of_kind)
        return tuple(name for name in self.columns if name.partition("[")[0] not in known)

    @property
    def has_classes(self) -> bool:
        """True if each row has one class, in the column `label`."""
        return "label" in self.columns and self.problem_type == "single_label_classification"

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


def check_classes(task: Task) -> None:
    """Raise `TaskError` if a task has no classes to draw `examples_per_class` of."""
    if not task.has_classes:
        raise TaskError(f'examples_per_class needs a classification task; "{task.name}" has no classes.')


@lru_cache(maxsize=1)
def builtin_folders() -> tuple[Path, ...]:
    """The folders of `peft_lab.tasks`."""
    spec = importlib.util.find_spec("peft_lab.tasks")
    folders = spec.submodule_search_locations if spec else None
    return tuple(Path(folder) for folder in folders or ())


def build(mapping: Mapping[str, Any], origin: Path | None) -> Task:
    """Build a checked task.

    `origin` is the YAML file, if there is one, and anchors relative paths.
    """
    of_kinds, own = _kind_options(mapping)
    # no mapping at all is refused by the check of the rest
    rest = {key: mapping[key] for key in mapping if key not in of_kinds} if isinstance(mapping, Mapping) else mapping
    given = check(Task, rest, "a task", TaskError)
    # private attributes, so that no key of a file can set them
    given._origin = origin
    given._options = own.model_dump()
    rule = kind_info(given.kind)
    for key in mapping:
        # YAML reads a key without a value as null
        if mapping[key] is None:
            raise TaskError(f'"{key}" in a task is empty; give it a value or remove it.')
        if (key in _SETTINGS and key not in rule.settings) or (key in of_kinds and key not in rule.options):
            raise TaskError(f'"{key}" has no meaning for the kind "{rule.name}"; remove it.')
    if "problem_type" not in given.model_fields_set:
        given = given.model_copy(update={"problem_type": rule.problem_type})
    if given.problem_type == "regression" and given.labels:
        raise TaskError('a regression has no "labels"; remove them, or the problem_type.')
    # what the file leaves open is filled in from the kind and from the data
    splits, columns, metrics = _splits(given), _columns(given, rule), _metrics(given, rule)
    task = given.model_copy(update={"splits": splits, "columns": columns, "metrics": metrics})
    _check_fractions(task)
    _check_streaming(task)
    _check_prompt_column(task)
    _check_number_columns(task)
    return task


def _kind_options(mapping: Mapping[str, Any]) -> tuple[set[str], Schema]:
    """Keys of a task file that single kinds read, and the checked values of those of its own kind."""
    kinds = list_kinds()
    rule = kinds.get(str(mapping.get("kind"))) if isinstance(mapping, Mapping) else None
    known = {key for card in kinds.values() for key in card.options}
    defaults = dict(rule.options) if rule else {}
    # the kind itself checks a value whose default is None
    types = {key: Any if default is None else type(default) for key, default in defaults.items()}
    fields: dict[str, Any] = {key: (types[key], default) for key, default in defaults.items()}
    given = {key: mapping[key] for key in defaults if key in mapping}
    return known, check(create_model("KindOptions", __base__=Schema, **fields), given, "a task", TaskError)


def _splits(task: Task) -> dict[str, str]:
    if task.data.builder:
        if "splits" in task.model_fields_set:
            raise TaskError('"splits" is for Hub data sets; for local files the keys of "files" are the splits.')
        return {split: split for split in task.data.files}
    if "train" not in task.splits:
        raise TaskError(
            '"splits" must say which split of the data set is "train", for instance `splits: {train: train}`.'
        )
    return dict(task.splits)


def _check_fractions(task: Task) -> None:
    for split in ("validation", "test"):
        key = f"{split}_fraction"
        if key in task.model_fields_set and split in task.splits:
            raise TaskError(f'"{key}" has no effect, because the data has a {split} split; remove one of them.')


def _check_streaming(task: Task) -> None:
    """Refuse keys that a stream of rows cannot follow, and those that only a stream reads."""
    given = task.model_fields_set
    if not task.streaming:
        key = next((key for key in _OF_STREAMS if key in given), None)
        if key is not None:
            raise TaskError(f'"{key}" has no effect without "streaming: true"; remove it.')
        return
    for split in ("validation", "test"):
        if f"{split}_fraction" in given:
            raise TaskError(
                f'"{split}_fraction" needs the number of all rows, which a stream does not know; give "{split}_rows".'
            )
    if task.data.builder in FOLDER_BUILDERS:
        raise TaskError('files of a folder are opened when they are used anyway; remove "streaming".')
    if task.data.options.get("field"):
        raise TaskError('"field" is for a file that is read whole; stream JSON lines, or remove "streaming".')
    if "validation" not in task.splits and task.validation_rows is None:
        raise TaskError('a stream without a validation split needs "validation_rows", the number of its first rows.')


def _columns(task: Task, rule: KindInfo) -> dict[str, str]:
    """Canonical column -> column of the source.

    Columns of a template that the task does not name keep their names.
    """
    known = dict(rule.columns) if task.template is None else dict.fromkeys(task.template.columns(), False)
    if rule.forms:
        _check_form(task, rule)
    if PROMPT_IDS in known:
        raise TaskError(f'"{PROMPT_IDS}" is the column that chooses prompts; call the one of the template otherwise.')
    listed = {name: name.partition("[")[0] for name in task.columns if "[" in name}
    wrong = next((name for name in listed.values() if name in known and name not in rule.several), None)
    if wrong is not None:
        raise TaskError(f'the kind "{rule.name}" reads one column for "{wrong}", not a list of them.')
    given = {listed.get(name, name) for name in task.columns}
    further = given.difference(known)
    allowed = (PROMPT_IDS, *(sorted(row_columns()) if further - {PROMPT_IDS} else ()))
    unknown = next((name for name in sorted(further) if name not in allowed), None)
    if unknown is not None:
        raise TaskError(unknown_key(unknown, (*known, *allowed), "the columns"))
    for name, required in known.items():
        if required and name not in given:
            raise TaskError(f'the kind "{rule.name}" needs "columns" to name the column of "{name}".')
    if rule.one_of and len([name for name in rule.one_of if name in task.columns]) != 1:
        choices = " or ".join(f'"{name}"' for name in rule.one_of)
        raise TaskError(f'the kind "{rule.name}" needs "columns" to name the column of either {choices}.')
    chosen = {name: source for name, source in task.columns.items() if name in further}
    columns = {name: source for name, source in task.columns.items() if name not in further}
    if task.template is not None:
        columns = {name: columns.get(name, name) for name in known}
    # a source column is renamed to its purpose, so it can have one only; those for methods are copied
    double = _double(columns.values())
    if double is not None:
        raise TaskError(f'the column "{double}" is named for two purposes.')
    return columns | chosen


def _check_form(task: Task, rule: KindInfo) -> None:
    """Raise `TaskError` unless a task has a template, or the columns of exactly one form."""
    named = {name for name in task.columns if name in rule.columns}
    said = "; or ".join(" and ".join(map('"{}"'.format, form)) for form in rule.forms)
    if task.template is not None:
        held = next((name for form in rule.forms for name in form if name in named), None)
        if held is not None and held not in task.template.columns():
            raise TaskError(f'a task has a "template" or the column "{held}", not both; remove one of them.')
        return
    of_forms = {name for form in rule.forms for name in form}
    if named & of_forms not in [set(form) for form in rule.forms]:
        given = f", not {', '.join(sorted(named & of_forms))}" if named & of_forms else ""
        raise TaskError(
            f'the kind "{rule.name}" needs a "template" with "prompt" and "answer", or "columns" that name the columns '
            f"of {said}{given}."
        )


def _metrics(task: Task, rule: KindInfo) -> tuple[str, ...]:
    """Names of the metrics, and absolute paths of the user's own.

    By default the first metric of the kind.
    """
    allowed = rule.metrics_for(task.problem_type)
    if "metrics" not in task.model_fields_set:
        return allowed[:1]
    if not task.metrics:
        raise TaskError('"metrics" is empty; leave it out for the usual ones, or name one.')
    found = []
    for name in task.metrics:
        if name in METRICS and name not in allowed:
            raise TaskError(f'metric "{name}" does not fit this kind of task; fitting: {", ".join(allowed)}.')
        path = metric_path(name, task.folder, extra=allowed)
        found.append(str(path) if path is not None else name)
    return tuple(found)


def _check_prompt_column(task: Task) -> None:
    """Raise `TaskError` if no column, or the answer, would choose the prompts."""
    source = task.columns.get(PROMPT_IDS)
    if source is None:
        if task.prompt_values:
            raise TaskError(f'"prompt_values" needs "columns" to name the column of "{PROMPT_IDS}".')
        return
    if source in _answer_columns(task):
        raise TaskError(f'the column "{source}" holds the answer, so it cannot choose the prompts; name another one.')


def _check_number_columns(task: Task) -> None:
    """Raise `TaskError` if the answer would be given to the method."""
    for name in task.number_columns:
        if task.columns[name] in _answer_columns(task):
            raise TaskError(
                f'the column "{task.columns[name]}" holds the answer, so it cannot be the {name}; name another one.'
            )


def _answer_columns(task: Task) -> set[str]:
    """Columns of the source that hold the answer."""
    shown = (*task.inputs, *task.number_columns, PROMPT_IDS)
    return {source for name, source in task.columns.items() if name not in shown}


@lru_cache(maxsize=1)
def row_columns() -> frozenset[str]:
    """Names of the columns of numbers that methods can read."""
    return frozenset().union(*(info.row_columns for info in list_methods().values()))
