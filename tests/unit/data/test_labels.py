"""Labels: what names classes get, and which columns are no labels."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset, Features, Value

from peft_lab.data import labels as label_column
from peft_lab.data.task_registry import parse_task
from peft_lab.errors import TaskError

VALUES: dict[str, Any] = {
    "name": "t",
    "kind": "text_classification",
    "data": {"builder": "csv", "files": {"train": "train.csv"}},
    "columns": {"text": "text", "label": "topic"},
}
IMAGES = {"kind": "image_classification", "columns": {"image": "image", "label": "topic"}}


def column(values: list[Any], dtype: str = "string") -> Dataset:
    return Dataset.from_dict({"label": values}, features=Features(label=Value(dtype)))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["10", "9", "9"], ("9", "10")),
        (["00", "01"], ("00", "01")),
        (["-1", "0", "1"], ("-1", "0", "1")),
        (["b", "a", "A"], ("A", "a", "b")),
        (["True", "False"], ("False", "True")),
        (["1.5", "none of these"], ("1.5", "none of these")),
        (["New York, NY", "Boston, MA", "Albany, NY"], ("Albany, NY", "Boston, MA", "New York, NY")),
    ],
)
def test_names_are_the_sorted_values(values: list[str], names: tuple[str, ...]) -> None:
    task = parse_task(VALUES)
    rows = column(values)
    assert label_column.names_of(task, rows) == names
    encoded = label_column.encode(task, "train", rows, names, ())
    assert encoded.features["label"].int2str(encoded["label"][:]) == values


REFUSED = [
    (column(["0.1", "0.7", "1"]), r"2 of 3 .* fractional number \(rows 1, 2; .*set \"problem_type: regression\""),
    (column(["1e5", "2"]), "fractional number"),
    (column([0.5, 1.0], "float64"), r"holds fractional numbers \(float64\).*problem_type: regression"),
    (column(["a", "a,b", "b", "a, b"]), r"2 of 4 .* joins other labels \(rows 2, 4; the first is \"a,b\"\)"),
    (column(["a;b", "b;c", "c;a"]), r"3 of 3 .* joins other labels"),
    (column(["a|b", "b", "a"]), "joins other labels"),
    (column(["a", "b", "a "]), r"1 of 3 .* space at its edge \(row 3; the first is \"a \"\); remove the spaces"),
    (column(["a", "a"]), "1 different values"),
]


@pytest.mark.parametrize(("rows", "message"), REFUSED)
def test_values_that_are_no_classes_are_refused_unless_they_are_listed(rows: Dataset, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        label_column.names_of(parse_task(VALUES), rows)
    names = sorted({str(value) for value in rows["label"]})
    if len(names) > 1:
        task = parse_task({**VALUES, "labels": names})
        encoded = label_column.encode(task, "train", rows, label_column.names_of(task, rows), ())
        assert encoded.features["label"].int2str(encoded["label"][:]) == [str(value) for value in rows["label"]]


def test_the_mend_names_what_the_kind_can_do() -> None:
    with pytest.raises(TaskError, match="fractional number") as raised:
        label_column.names_of(parse_task({**VALUES, **IMAGES}), column(["0.1", "0.7"]))
    assert "regression" not in str(raised.value)


def test_lists_are_no_labels() -> None:
    with pytest.raises(TaskError, match="the label column holds List, and a label is one text or whole number"):
        label_column.names_of(parse_task(VALUES), Dataset.from_dict({"label": [["a"], ["a", "b"]]}))


@pytest.mark.parametrize("wrong", ["high", "1_000", "1,5", "nan", "inf", "1e39", "0x10", "True"])
def test_a_regression_takes_finite_numbers_alone(wrong: str) -> None:
    task = parse_task({**VALUES, "problem_type": "regression"})
    rows = column(["2.5", "-1e-3", " 7 ", ".5", wrong])
    assert label_column.names_of(task, rows) is None
    with pytest.raises(
        TaskError, match=rf'1 of 5 train rows have .* no finite number \(row 5; the first is "{wrong}"\)'
    ):
        label_column.encode(task, "train", rows, None, ())
    encoded = label_column.encode(task, "train", rows.select(range(4)), None, ())
    assert encoded["label"][:] == [2.5, pytest.approx(-1e-3), 7, 0.5]


@pytest.mark.parametrize(("dtype", "value"), [("float64", float("nan")), ("string", " "), ("int64", None)])
def test_rows_without_a_label_are_counted(dtype: str, value: Any) -> None:
    given = {"float64": 1.0, "string": "a", "int64": 1}[dtype]
    (fault,) = label_column.faults(column([given, value, given, value], dtype), parse_task(VALUES))
    assert (fault.rows, fault.what) == ([1, 3], 'have no label in column "topic"')


def test_an_unknown_label_is_counted_with_its_rows() -> None:
    with pytest.raises(
        TaskError, match=r'label "c" of the test rows is not one of a, b \(2 of 4 test rows: rows 2, 4\)'
    ):
        label_column.encode(parse_task(VALUES), "test", column(["a", "c", "b", "c"]), ("a", "b"), ())
