"""Inputs of a prediction: what folders, patterns, files of rows and standard input stand for, and files of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from peft_lab.data.answer_files import answer_line, check_output, write_answers
from peft_lab.data.prediction_inputs import check_top_k, input_columns, read_inputs, read_standard_input
from peft_lab.data.read_files import read_rows
from peft_lab.data.task_registry import kind, list_tasks
from peft_lab.errors import ConfigError
from peft_lab.registry import list_kinds

PNG = (".png", ".jpg")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    for name in ("b.png", "a.PNG", "deep/c.jpg", "notes.txt", ".hidden.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def test_a_folder_is_its_files_by_name_and_what_is_left_out_is_counted(scans, caplog):
    found = read_inputs([str(scans)], PNG)
    assert [Path(name).name for name in found] == ["a.PNG", "b.png", "c.jpg"]
    assert "1 of 4 files" in caplog.text


def test_a_pattern_is_the_files_that_match(scans):
    assert [Path(name).name for name in read_inputs([f"{scans}/*.png"], PNG)] == ["b.png"]
    assert [Path(name).name for name in read_inputs([f"{scans}/**/*.jpg", str(scans / "b.png")], PNG)] == [
        "c.jpg",
        "b.png",
    ]
    with pytest.raises(ConfigError, match="No file matches"):
        read_inputs([f"{scans}/*.gif"], PNG)


def test_texts_stay_texts(scans, monkeypatch):
    monkeypatch.chdir(scans)
    texts = ["is it raining?", "deep", "[a] *b*", "gone/*.csv", "nothing*.txt"]
    assert read_inputs(texts) == texts
    for folder in (scans, f"{scans}"):
        with pytest.raises(ConfigError, match=r"is a folder, and this kind of task reads texts"):
            read_inputs([folder])


def test_files_of_rows_join_by_pattern(tmp_path):
    for number in range(3):
        (tmp_path / f"part{number}.csv").write_text(f"text\nrow {number}\n")
    found = read_inputs([f"{tmp_path}/part*.csv"])
    assert found == [{"text": f"row {number}"} for number in range(3)]
    with pytest.raises(ConfigError, match=r"part0\.csv\" is a file of inputs, which must be the only input"):
        read_inputs([str(tmp_path / "part0.csv"), "a text"])


def test_a_missing_file_is_named_with_the_nearest_one(scans):
    with pytest.raises(ConfigError, match=r'no file ".*bb\.png" to predict for\. Did you mean "b\.png"'):
        read_inputs([str(scans / "bb.png")], PNG)


def test_standard_input_is_lines_or_json_lines():
    assert read_standard_input(["the rain\n", "\n", '"a" song\n']) == ["the rain", '"a" song']
    assert read_standard_input(['{"text": "a\\nb", "id": 7}\n', '{"text": "c"}']) == [
        {"text": "a\nb", "id": "7"},
        {"text": "c"},
    ]
    with pytest.raises(ConfigError, match="Line 3 of standard input is no JSON object"):
        read_standard_input(['{"text": "a"}\n', "\n", "b\n"])
    with pytest.raises(ConfigError, match="holds no input"):
        read_standard_input(["\n"])
    with pytest.raises(ConfigError, match="no file"):
        read_standard_input(["gone.png"], PNG)


def test_every_kind_reads_texts_or_files_and_none_both():
    by_kind = {task.kind: task for task in list_tasks().values()}
    assert by_kind.keys() <= set(list_kinds())
    for name, task in by_kind.items():
        files = kind(name).input_files(task)
        assert not (files and kind(name).reads_texts(task)), name
        assert all(ending.startswith(".") and ending == ending.lower() for ending in files)


def test_top_k_is_for_kinds_that_rank_and_at_most_the_labels():
    for task in list_tasks().values():
        of_task = kind(task.kind)
        ranks = of_task.ranks_labels and task.problem_type != "regression"
        if not ranks:
            with pytest.raises(ConfigError, match="top_k"):
                check_top_k(2, of_task, task, None)
            continue
        check_top_k(2, of_task, task, ["a", "b"])
        for wrong in (0, 3):
            with pytest.raises(ConfigError, match=f"got {wrong}"):
                check_top_k(wrong, of_task, task, ["a", "b"])


def test_a_file_that_a_row_holds_by_its_bytes_is_opened(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    task = next(task for task in list_tasks().values() if kind(task.kind).input_files(task))
    (column,) = task.inputs
    row = {column: {"bytes": (tmp_path / "red.png").read_bytes(), "path": "red.png"}}
    assert Image.open(input_columns(row, task, 1)).getpixel((0, 0)) == (255, 0, 0)
    assert answer_line(row, {"label": "red"})["input"] == {column: "red.png"}


# Files of answers ---------------------------------------------------------------------------------------------------

ROWS = [{"text": "=1+1", "label": "x"}, {"text": "ä\n", "label": "y"}]
ANSWERS = [{"label": "a", "score": float("nan")}, {"label": "b", "score": 0.5}]


def test_lines_echo_the_input_and_have_no_number_that_json_lacks(tmp_path):
    write_answers(tmp_path / "out.jsonl", ROWS, ANSWERS)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"input": ROWS[0], "label": "a", "score": None},
        {"input": ROWS[1], "label": "b", "score": 0.5},
    ]
    assert answer_line("a prompt", "a text") == {"input": "a prompt", "prediction": "a text"}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_have_the_columns_of_the_input_and_lose_none(tmp_path, ending):
    path = tmp_path / f"out.{ending}"
    write_answers(path, ROWS, ANSWERS)
    table = pd.read_csv(path) if ending == "csv" else pd.read_parquet(path)
    assert list(table.columns) == ["text", "label", "predicted_label", "score"]
    assert table["text"].tolist() == ["=1+1", "ä\n"]
    assert table["label"].tolist() == ["x", "y"]
    assert table["predicted_label"].tolist() == ["a", "b"]
    assert pd.isna(table["score"][0])


def test_an_output_file_is_refused_before_it_is_lost(tmp_path):
    (tmp_path / "out.csv").write_text("mine")
    with pytest.raises(ConfigError, match="is there already; pass --overwrite"):
        check_output(tmp_path / "out.csv", overwrite=False)
    assert check_output(tmp_path / "out.csv", overwrite=True) == tmp_path / "out.csv"
    for name in ("out.xlsx", "out"):
        with pytest.raises(ConfigError, match=r"must end with \.jsonl"):
            check_output(tmp_path / name, overwrite=False)
    with pytest.raises(TypeError):
        write_answers(tmp_path / "out.jsonl", ROWS, [{"label": object()}, {}])
    assert (tmp_path / "out.csv").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_images_of_answers_are_files_beside_them(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"out{ending}"
    answers = [{"shares": {"sky": 1.0}, "mask": Image.new("L", (3, 2), number)} for number in range(11)]
    assert answer_line("a.png", answers[0]) == {"input": "a.png", "shares": {"sky": 1.0}}
    write_answers(path, [f"{number}.png" for number in range(11)], answers)
    names = [row["mask"] for row in read_rows({".jsonl": "json"}.get(ending, ending[1:]), [path])]
    assert names[0] == "out_mask/01.png"
    assert [Image.open(tmp_path / name).getpixel((0, 0)) for name in names] == list(range(11))
    path.unlink()
    with pytest.raises(ConfigError, match=r"out_mask.* is there already"):
        check_output(path, overwrite=False, images=("mask",))
    assert check_output(path, overwrite=True, images=("mask",)) == path
