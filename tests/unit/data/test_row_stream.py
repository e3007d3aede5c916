"""Streamed rows: those of a whole data set, each once a pass, with the same refusals at the row where they occur."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support.task_rows import make_rows, write_task

from peft_lab.data.row_stream import RowStream
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import parse_task
from peft_lab.errors import ConfigError, TaskError
from peft_lab.runs.run_config import RunConfig
from peft_lab.training.model_rows import check_streaming

LABELS = ["00", "01"]


def streamed(folder: Path, rows: list[dict[str, Any]], builder: str = "csv", files: int = 1, **changes: Any) -> Any:
    """Task whose rows are streamed from several files."""
    values = {"streaming": True, "validation_rows": 4, "labels": LABELS} | changes
    size = -(-len(rows) // files)
    for index in range(files):
        part = rows[index * size : (index + 1) * size]
        task, path = write_task(folder, "text_classification", builder, part, **values)
        path.rename(path.with_name(f"part{index}{path.suffix}"))
    names = (f"part*{path.suffix}",)
    return task.model_copy(update={"data": task.data.model_copy(update={"files": {"train": names}})})


def passes(stream: RowStream, rows: int, count: int = 1) -> list[list[dict[str, Any]]]:
    drawn = iter(stream)
    return [list(islice(drawn, rows)) for _ in range(count)]


@pytest.mark.parametrize("builder", ["csv", pytest.param("tsv", marks=pytest.mark.full), "jsonl", "parquet"])
def test_streamed_rows_are_those_of_a_whole_data_set(builder: str, tmp_path: Path) -> None:
    rows = make_rows("text_classification")
    rows[7] |= {"sentence": "0100.50", "other": "NA"}
    whole, _ = write_task(tmp_path, "text_classification", builder, rows, labels=LABELS)
    task = whole.model_copy(update={"streaming": True, "validation_rows": 5, "test_rows": 3})
    splits, expected = load_splits(task, test=True), load_splits(whole)
    assert splits.labels == expected.labels
    assert splits.test is not None
    everything = sorted([*expected.train, *expected.validation], key=lambda row: str(row["text"]))
    parts = [*splits.test, *splits.validation, *passes(splits.train, 32)[0]]
    assert [len(splits.test), len(splits.validation)] == [3, 5]
    assert parts[0]["text"] == rows[0]["sentence"]  # the first rows, in order
    assert sorted(parts, key=lambda row: str(row["text"])) == everything
    assert load_splits(task).fingerprint == splits.fingerprint  # with and without test rows


def test_lines_of_text_and_json_lists(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\ntwo\n\nthree\n\n\n")
    template = {"prompt": "{text}", "answer": "{text}"}
    data = {"builder": "text", "files": {"train": "lines.txt"}}
    values = {"name": "t", "kind": "causal_lm", "data": data, "template": template, "empty_rows": "keep"}
    task = parse_task(values | {"streaming": True, "validation_rows": 1}, tmp_path / "t.yaml")
    assert [row["text"] for row in passes(load_splits(task).train, 3)[0]] == ["two", "", "three"]
    whole = load_splits(parse_task(values | {"validation_fraction": 0.25}, tmp_path / "t.yaml"))
    assert sorted([*whole.train["text"], *whole.validation["text"]]) == ["", "one", "three", "two"]
    listed = streamed(tmp_path, make_rows("text_classification"), "json")
    with pytest.raises(TaskError, match=r"line 1 is no object, and a stream needs one row a line"):
        load_splits(listed)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_and_workers_share_the_rows(processes: int, tmp_path: Path) -> None:
    rows = make_rows("text_classification", 44)
    stream = load_splits(streamed(tmp_path, rows, files=11)).train.shuffled(0)
    found = []
    for index in range(processes):
        part = stream.of_process(index, processes)
        found += passes(part, len(range(index, 40, processes)) if processes == 3 else 40 // processes)[0]
    assert sorted(row["text"] for row in found) == sorted(row["sentence"] for row in rows[4:])


def test_each_pass_has_an_order_of_its_own(tmp_path: Path) -> None:
    rows = make_rows("text_classification", 44)
    stream = load_splits(streamed(tmp_path, rows, files=2)).train
    in_order, again = passes(stream, 40, 2)
    assert in_order == again
    first, second = passes(stream.shuffled(0), 40, 2)
    assert first != second != in_order != first
    assert passes(stream.shuffled(0), 40, 2) == [first, second]
    assert passes(stream.shuffled(1), 40)[0] != first
    assert sorted(map(str, first)) == sorted(map(str, second)) == sorted(map(str, in_order))


FAULTS = [
    ({"sentence": ""}, r'1 train rows have an empty text in column "sentence" \(row 11 of part1\.csv\)'),
    ({"topic": ""}, r'have no label in column "topic" \(row 11 of part1\.csv\)'),
    ({"topic": "02"}, r'label "02" of the train rows is not one of 00, 01 \(1 of 40 train rows: row 11 of part1\.csv'),
]


@pytest.mark.parametrize(("change", "said"), FAULTS)
def test_a_fault_names_file_and_row(change: dict[str, str], said: str, tmp_path: Path) -> None:
    rows = make_rows("text_classification", 44)
    rows[32] |= change
    splits = load_splits(streamed(tmp_path, rows, files=2))
    with pytest.raises(TaskError, match=said):
        passes(splits.train.shuffled(0), 40)
    if change != {"topic": "02"}:
        kept = load_splits(streamed(tmp_path, rows, files=2, empty_rows="drop")).train
        assert len({row["text"] for row in passes(kept, 60)[0]}) == 39


def test_a_row_with_too_few_cells_is_named(tmp_path: Path) -> None:
    task = streamed(tmp_path, make_rows("text_classification", 44))
    path = tmp_path / "part0.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:30], "alone", *lines[30:]]))
    with pytest.raises(TaskError, match=r'part0.csv": row 30 does not have the 3 cells of the header, but 1'):
        passes(load_splits(task).train, 40)


def test_a_label_means_the_same_in_every_part_of_a_stream(tmp_path: Path) -> None:
    """In a whole data set, numbers are names only if all of them are: a stream may not change its mind."""
    rows = make_rows("text_classification", 44)
    for index, row in enumerate(rows):
        row["topic"] = str(1 + index % 2)
    named = load_splits(streamed(tmp_path / "names", rows, labels=["1", "2"])).train
    assert [row["label"] for row in passes(named, 4)[0]] == [0, 1, 0, 1]
    for row in rows:
        row["topic"] = str(int(row["topic"]) - 1)
    placed = load_splits(streamed(tmp_path / "places", rows, labels=["bad", "good"])).train
    assert [row["label"] for row in passes(placed, 4)[0]] == [0, 1, 0, 1]
    with pytest.raises(TaskError, match='label "0" of the validation rows is not one of 1, 2'):
        load_splits(streamed(tmp_path / "neither", rows, labels=["1", "2"]))


REFUSED = [
    ({"validation_rows": None}, 'needs "validation_rows"'),
    ({"labels": None}, 'does not know all labels of its rows; list them in "labels"'),
    ({"validation_fraction": 0.2}, 'a stream does not know; give "validation_rows"'),
    ({"streaming": False}, '"validation_rows" has no effect without "streaming: true"'),
    ({"validation_rows": 44}, "has no rows beside those of validation and test"),
    (
        {"columns": {"text": "sentence", "label": "topic", "prompt_ids": "other"}},
        'does not know all values of its rows; list "prompt_values"',
    ),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_what_a_stream_cannot_know_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    values = {"streaming": True, "validation_rows": 4, "labels": LABELS} | change
    given = {key: value for key, value in values.items() if value is not None}
    rows = make_rows("text_classification", 44)
    with pytest.raises(TaskError, match=said):
        load_splits(write_task(tmp_path, "text_classification", "csv", rows, **given)[0])


OPTIONS = [
    ({}, "give max_steps"),
    ({"num_train_epochs": 2}, "give max_steps, not num_train_epochs"),
    ({"max_steps": 5, "max_train_samples": 5}, "max_train_samples draws from all training rows"),
    ({"max_steps": 5, "eval_strategy": "epoch"}, "has no epochs; give eval_strategy=steps"),
    ({"max_steps": 5, "early_stopping_patience": 2}, "has no epochs; give eval_strategy=steps"),
]


@pytest.mark.parametrize(("options", "said"), OPTIONS)
def test_options_that_need_the_number_of_rows_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    task = streamed(tmp_path, make_rows("text_classification", 44))
    needed = {"task": "t", "model_name_or_path": "m", "method": "lora", "output_dir": "o"}
    with pytest.raises(ConfigError, match=said):
        check_streaming(RunConfig.from_mapping(needed | options), task)
    check_streaming(RunConfig.from_mapping(needed | {"max_steps": 5}), task)
