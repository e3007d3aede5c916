"""Reading of files: cells as they stand there, and sentences for what is no table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from peft_lab.data.prediction_inputs import read_inputs
from peft_lab.data.read_files import as_dataset, read_rows
from peft_lab.errors import ConfigError, TaskError

REFUSED = [
    ("x.csv", "text,label\nhello, world,a\nb,c\n", r"1 of 2 rows do not have the 2 cells .*\(row 1; the first has 3\)"),
    ("x.csv", "text,label\na\n", "1 of 1 rows do not have the 2 cells"),
    ("x.csv", 'text,label\n"a"b,c\n', "cannot be read as csv"),
    ("x.csv", 'text,label\n"a,b\n', "cannot be read as csv"),
    ("x.csv", "a,b,a\n1,2,3\n", 'the column "a" is there twice'),
    ("x.jsonl", '{"a": 1}\n{"a": }\n', "line 2 is not JSON"),
    ("x.jsonl", '{"a": 1, "a": 2}\n', 'the key "a" is there twice'),
    ("x.json", "[" * 100_000, "cannot be read as json"),
    ("x.jsonl", '{"a": 1}\ntrue\n', r"1 of 2 rows are no objects \(row 2\)"),
    ("x.json", '{\n"a": ["x"],\n"b": []}', "different numbers of rows"),
    ("x.json", '{\n"a": "x"}', "must hold a list of rows"),
]


@pytest.mark.parametrize(("name", "text", "message"), REFUSED)
def test_a_file_that_is_no_table_is_refused_in_one_sentence(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    builder = "csv" if name.endswith("csv") else "json"
    with pytest.raises(TaskError, match=message) as raised:
        read_rows(builder, [tmp_path / name])
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_column_of_several_types_is_refused() -> None:
    with pytest.raises(TaskError, match='the column "a" holds values of the types bool, str'):
        as_dataset([{"a": True}, {"a": "yes"}], ["a"])


@pytest.mark.parametrize("form", ["lines", "list", "columns", "field", "packed"])
def test_json_comes_in_several_forms(form: str, tmp_path: Path) -> None:
    rows = [{"a": "007", "b": {"c": ["x", None]}}, {"a": "2024-01-01", "b": {"c": []}}]
    path, options = tmp_path / "x.json", {}
    if form == "lines":
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif form == "list":
        path.write_text(json.dumps(rows, indent=1))
    elif form == "columns":
        path.write_text(json.dumps({name: [row[name] for row in rows] for name in "ab"}, indent=1))
    elif form == "field":
        path.write_text(json.dumps({"data": rows}))
        options = {"field": "data"}
    else:
        path = tmp_path / "x.json.gz"
        with gzip.open(path, "wt") as file:
            file.write(json.dumps(rows))
    assert read_rows("json", [path], options) == rows
    assert as_dataset(rows, ["a", "b"]).to_list() == rows


def test_numbers_of_json_are_the_text_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1.50, "b": 12345678901234567890123, "c": NaN, "d": true, "e": Infinity}\n')
    (row,) = read_rows("json", [path])
    assert row == {"a": "1.50", "b": "12345678901234567890123", "c": None, "d": True, "e": "Infinity"}


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    for text in ("one", "two", "one"):
        path.write_text(f"a\n{text}\n")
        assert as_dataset(read_rows("csv", [path]), ["a"])["a"][:] == [text]


def test_options_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("note\n'é;x';7\n\n;\"8\"\n".encode("latin-1"))
    options = {"delimiter": ";", "quotechar": "'", "encoding": "latin-1", "skiprows": 1, "column_names": ["a", "b"]}
    assert read_rows("csv", [path], options) == [{"a": "é;x", "b": "7"}, {"a": "", "b": '"8"'}]
    assert read_rows("csv", [path], options | {"quoting": "nonnumeric"})[0] == {"a": "é;x", "b": "7"}
    with pytest.raises(TaskError, match="cannot be read as csv"):
        read_rows("csv", [path], {"encoding": "no-such"})


@pytest.mark.parametrize("name", ["x.txt", "x.csv", "x.tsv"])
def test_a_blank_line_between_texts_is_an_empty_text(name: str, tmp_path: Path) -> None:
    """Else the answers that follow would belong to other lines than they stand at."""
    head = "" if name.endswith("txt") else "text\n"
    (tmp_path / name).write_text(f"{head}one\n\ntwo\n\n\n", encoding="utf-8-sig")
    found = read_inputs([str(tmp_path / name)])
    assert [row if isinstance(row, str) else row["text"] for row in found] == ["one", "", "two"]


def test_files_of_inputs_stand_alone(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('"one"\n["two", "three"]\n')
    assert read_inputs([str(tmp_path / "x.jsonl")]) == ["one", ["two", "three"]]
    with pytest.raises(ConfigError, match="must be the only input"):
        read_inputs([str(tmp_path / "x.jsonl"), "another"])
    assert read_inputs(["see notes.txt", "another"]) == ["see notes.txt", "another"]
    with pytest.raises(ConfigError, match="There is no input file"):
        read_inputs(["gone.parquet"])
