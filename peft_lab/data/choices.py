"""Choices of a row, and the right one: lists or several columns, and answers as positions, letters or texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.row_checks import RowFault, numbered, source_rows
from peft_lab.data.row_maps import map_rows
from peft_lab.data.text_inputs import cast_texts
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

    from peft_lab.data.task_schema import Task

#: Canonical columns: the choices of a row, the names that its source gives them, if it does, and the right one.
CHOICES, NAMES, ANSWER = "choices", "choice_names", "answer"

#: Keys of a mapping that holds texts and their names in one cell, as in data sets with answers from A to D.
_TEXTS, _LETTERS = "text", "label"
_WHOLE = re.compile(r"[0-9]+")
#: Counts up when the same cells are read otherwise, because `datasets` keeps what was read.
_VERSION = 1


def cast(dataset: Dataset, task: Task) -> Dataset:
    """Cast the choices of a row to one list of texts; a missing one stays None.

    Several columns of choices are joined; blank ones behind the last text are no choices. A mapping of `text` and
    `label` gives its texts, and `label` the names that answers may have.

    Raises:
        TaskError: the columns hold something else.
    """
    from datasets import Sequence as ListOf
    from datasets import Value

    columns = [name for name in dataset.column_names if name.startswith(f"{CHOICES}[")]
    features = dataset.features.copy()
    if columns:
        dataset = cast_texts(dataset, task, columns)
        columns = sorted(columns, key=lambda name: int(name[len(CHOICES) + 1 : -1]))

        def joined(*cells: list[str | None]) -> dict[str, list[Any]]:
            return {CHOICES: [filled(row) for row in zip(*cells, strict=True)]}

        for name in columns:
            del features[name]
        function: Callable[..., dict[str, list[Any]]] = joined
        inputs = columns
    else:
        _check_type(task, features[CHOICES])

        def listed(cells: list[Any]) -> dict[str, list[Any]]:
            found = {CHOICES: [_texts(cell, _TEXTS) for cell in cells]}
            return found | ({NAMES: [_texts(cell, _LETTERS) for cell in cells]} if named else {})

        named = isinstance(features[CHOICES], Mapping) and _LETTERS in features[CHOICES]
        function, inputs = listed, [CHOICES]
        if named:
            features[NAMES] = ListOf(Value("string"))
    features[CHOICES] = ListOf(Value("string"))
    options = {"input_columns": inputs, "batched": True, "remove_columns": inputs, "features": features}
    reads = [_VERSION, inputs, str(dataset.features)]
    return map_rows(dataset, function, reads, **options, desc="Choices")


def _check_type(task: Task, feature: Any) -> None:
    """Raise `TaskError` for a column that holds no lists of texts."""
    entries = feature.get(_TEXTS) if isinstance(feature, Mapping) else feature
    held = str(getattr(getattr(entries, "feature", None), "dtype", None) or type(feature).__name__)
    if not held.startswith(("string", "large_string", "int", "uint")):
        raise TaskError(
            f'Task "{task.name}": the column "{task.columns[CHOICES]}" holds {getattr(feature, "dtype", held)}; the '
            "choices of a row are a list of texts, or stand in several columns, named in a list."
        )


def _texts(cell: Any, key: str) -> list[str | None] | None:
    """Texts of a list, or of the list in a mapping."""
    values = cell.get(key) if isinstance(cell, Mapping) else cell
    return None if values is None else [None if value is None else str(value) for value in values]


def filled(cells: Sequence[str | None]) -> list[str | None]:
    """Cells without blank ones behind the last text."""
    found = list(cells)
    while found and (found[-1] is None or not found[-1].strip()):
        found.pop()
    return found


def faults(dataset: Dataset, task: Task) -> list[RowFault]:
    """Rows with fewer than two choices, a blank one or none marked as right; one that is there twice is a remark."""
    few, blank, twice = [], [], []
    for row, choices in enumerate(dataset[CHOICES][:]):
        if choices is None:
            continue
        if len(choices) < 2:
            few.append(row)
        elif any(choice is None or not choice.strip() for choice in choices):
            blank.append(row)
        elif len(set(choices)) < len(choices):
            twice.append(row)
    answers = dataset[ANSWER][:]
    missing = [row for row, value in enumerate(answers) if isinstance(value, str) and not value.strip()]
    return [
        RowFault("have fewer than two choices", few),
        RowFault("have a blank choice", blank),
        RowFault("have one choice twice", twice, "remark"),
        RowFault(f'have no answer in column "{task.columns[ANSWER]}"', missing),
    ]


def encode(task: Task, split: str, dataset: Dataset, skip: Collection[int], first: int) -> Dataset:
    """Data set with the position of the right choice in the answer's column, int64.

    All answers of a split have one form: the names that the source gives the choices, the text of a choice, a letter
    from A, or a whole number from `first`.

    Rows in `skip` are going to be dropped, and get 0.

    Raises:
        TaskError: no form fits all answers, or two forms do and mean different choices.
    """
    from datasets import Value

    answers = [str(value).strip() for value in dataset[ANSWER][:]]
    choices = dataset[CHOICES][:]
    names = dataset[NAMES][:] if NAMES in dataset.column_names else None
    kept = [row for row in range(len(answers)) if row not in skip]
    found: dict[str, list[int | None]] = {}
    for form, find in _FORMS.items():
        own = choices if names is None or form != "names of its choices" else names
        if form != "names of its choices" or names is not None:
            found[form] = [find(answers[row], own[row], first) for row in kept]
    fitting = {form: positions for form, positions in found.items() if None not in positions}
    if not fitting:
        _refuse(task, split, dataset, [answers[row] for row in kept], found, kept, first)
    form, positions = next(iter(fitting.items()))
    # names that the source gives are what it means
    for other, others in fitting.items() if form != "names of its choices" else ():
        if others != positions:
            row = next(row for row, pair in enumerate(zip(positions, others, strict=True)) if len(set(pair)) > 1)
            raise TaskError(
                f'Task "{task.name}": the answers of the {split} rows may be the {form} or the {other}, which are '
                f'different choices ({numbered(source_rows(dataset, [kept[row]]))}: "{answers[kept[row]]}"); write '
                "them as letters."
            )
    place = dict(zip(kept, positions, strict=True))
    gone = [ANSWER, *([NAMES] if names is not None else [])]
    values = [place.get(row, 0) for row in range(len(dataset))]
    return dataset.remove_columns(gone).add_column(ANSWER, values, feature=Value("int64"))


def _by_name(answer: str, names: Sequence[str], first: int) -> int | None:
    return list(names).index(answer) if answer in names else None


def _by_text(answer: str, choices: Sequence[str], first: int) -> int | None:
    texts = [choice.strip() for choice in choices]
    return texts.index(answer) if answer in texts else None


def _by_letter(answer: str, choices: Sequence[str], first: int) -> int | None:
    position = ord(answer.upper()) - ord("A") if len(answer) == 1 and answer.isascii() and answer.isalpha() else -1
    return position if 0 <= position < len(choices) else None


def _by_number(answer: str, choices: Sequence[str], first: int) -> int | None:
    position = int(answer) - first if _WHOLE.fullmatch(answer) else -1
    return position if 0 <= position < len(choices) else None


_FORMS = {
    "names of its choices": _by_name,
    "texts of choices": _by_text,
    "letters of choices": _by_letter,
    "numbers of choices": _by_number,
}


def _refuse(
    task: Task,
    split: str,
    dataset: Dataset,
    answers: Sequence[str],
    found: Mapping[str, Sequence[int | None]],
    kept: Sequence[int],
    first: int,
) -> None:
    """Raise `TaskError` for the rows that the form misses which fits most of them."""
    positions = min(found.values(), key=lambda each: sum(position is None for position in each))
    wrong = [row for row, position in enumerate(positions) if position is None]
    mend = ""
    if first == 0 and all(_WHOLE.fullmatch(answer) for answer in answers) and "0" not in answers:
        mend = ' If they count from 1, set "first_choice: 1".'
    raise TaskError(
        f'Task "{task.name}": the answer "{answers[wrong[0]]}" of the {split} rows is none of its choices '
        f"({len(wrong)} of {len(answers)} rows: {numbered(source_rows(dataset, [kept[row] for row in wrong]))}); all "
        f"answers are numbers from {first}, letters from A, or texts of choices.{mend}"
    )
