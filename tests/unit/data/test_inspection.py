"""Task files proposed for files, folders and named columns."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from peft_lab.cli.app import app
from peft_lab.data.inspection.layout import find_layout, named_files
from peft_lab.data.inspection.propose import draft_task
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import load_task
from peft_lab.errors import ConfigError, TaskError
from peft_lab.runs.data_flags import task_path
from peft_lab.runs.run_config import load_run

NAMES = ("review", "verdict")


def reviews(count: int = 40) -> list[tuple[str, str]]:
    return [(f"the film number {n}, with some words", ("bad", "good")[n % 2]) for n in range(count)]


def write_csv(path: Path, rows: Any = None, delimiter: str = ",", header: bool = True, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([NAMES] * header + list(reviews() if rows is None else rows))
    return path


def write_images(folder: Path) -> Path:
    for name, colour in (("cat", "red"), ("dog", "blue")):
        for number in range(4):
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8 + number, 8), colour).save(path)
    return folder


def draft(data: Path, **options: Any) -> Any:
    return draft_task(str(data), data.parent / "task.yaml", **options)


def loaded(data: Path, **options: Any) -> Any:
    """Rows of the task that is proposed, read as a run reads them."""
    target = data.parent / "proposed.yaml"
    target.write_text(draft_task(str(data), target, **options).text())
    task = load_task(target)
    return load_splits(task, test=True)


def as_json_lines(path: Path) -> Path:
    path.write_text("\n".join(json.dumps(dict(zip(NAMES, row, strict=True))) for row in reviews()))
    return path


def as_json_list(path: Path) -> Path:
    path.write_text(json.dumps([dict(zip(NAMES, row, strict=True)) for row in reviews()], indent=1))
    return path


def as_parquet(path: Path) -> Path:
    pq.write_table(pa.table(dict(zip(NAMES, zip(*reviews(), strict=True), strict=True))), path)
    return path


def as_packed(path: Path) -> Path:
    path.write_bytes(gzip.compress(write_csv(path.with_name("plain")).read_bytes()))
    return path


FORMS = {
    "a.csv": write_csv,
    "a.tsv": lambda path: write_csv(path, delimiter="\t"),
    "semicolons.csv": lambda path: write_csv(path, delimiter=";"),
    "a.jsonl": as_json_lines,
    "a.json": as_json_list,
    "a.parquet": as_parquet,
    "a.csv.gz": as_packed,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    found = loaded(FORMS[name](tmp_path / name))
    texts = [row["text"] for part in (found.train, found.validation, found.test) for row in part]
    assert sorted(texts) == sorted(text for text, _ in reviews())
    assert found.labels == ("bad", "good")
    assert len(found.test) == 8  # a fifth is carved


@pytest.mark.parametrize(
    "names",
    [
        ("train.csv", "valid.csv", "test.csv"),
        ("reviews-train.csv", "reviews_dev.csv", "reviews_testset.csv"),
        ("train/0.csv", "val/0.csv", "test/0.csv"),
    ],
)
def test_splits_by_names(names: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name, count in zip(names, (40, 10, 20), strict=True):
        write_csv(folder / name, reviews(count))
    (folder / "README.md").write_text("where the data are from")
    found = draft(folder)
    assert dict(found.rows) == {"train": 40, "validation": 10, "test": 20}
    assert "test_fraction" not in found.values
    assert any("20 of 20 test rows are training rows too" in doubt for doubt in found.doubts)


def test_folders_of_images(tmp_path: Path) -> None:
    found = draft(write_images(tmp_path / "pets"))
    assert found.values["kind"] == "image_classification"
    assert found.values["data"] == {"builder": "imagefolder", "files": {"train": "pets"}}
    write_images(tmp_path / "split" / "train")
    write_images(tmp_path / "split" / "test")
    found = draft(tmp_path / "split")
    assert found.values["data"]["files"] == {"train": "split/train", "test": "split/test"}


def test_folders_of_sounds_and_of_masks(tmp_path: Path) -> None:
    for name in ("yes", "no"):
        for number in range(4):
            path = tmp_path / "words" / name / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"RIFF\x00\x00\x00\x00WAVE")
    found = draft(tmp_path / "words")
    assert (found.values["kind"], found.values["data"]["builder"]) == ("audio_classification", "audiofolder")
    for split in ("train", "test"):
        for part in ("images", "masks"):
            folder = tmp_path / "cells" / split / part
            folder.mkdir(parents=True)
            Image.new("L", (8, 8)).save(folder / "0.png")
    found = draft(tmp_path / "cells")
    assert found.values["kind"] == "image_segmentation"
    assert found.values["data"] == {"builder": "maskfolder", "files": {"train": "cells/train", "test": "cells/test"}}


def test_doubts(tmp_path: Path) -> None:
    rows = [*reviews(38), ("the film number 0, with some words", "bad"), ("a film without a verdict", "")]
    doubts = " ".join(draft(write_csv(tmp_path / "a.csv", rows)).doubts)
    assert "1 of 40 training rows are duplicates" in doubts
    assert '1 of 40 training rows have no "verdict"' in doubts
    assert "no test split: 20% of the training rows are carved" in doubts


def test_many_classes_are_doubted(tmp_path: Path) -> None:
    rows = [(f"film {n}", f"topic {n % 212}") for n in range(636)]
    found = draft(write_csv(tmp_path / "a.csv", rows), given={"label": "verdict"})
    assert '"verdict" has 212 values in 636 rows: is this a classification?' in found.doubts


def test_latin_1_is_named(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [(f"café {text}", label) for text, label in reviews()], encoding="latin-1")
    found = draft(path)
    assert found.values["data"]["options"] == {"encoding": "latin-1"}
    assert any("not UTF-8" in doubt for doubt in found.doubts)
    assert loaded(path).train[0]["text"].startswith("café")


def test_file_without_header(tmp_path: Path) -> None:
    found = draft(write_csv(tmp_path / "a.csv", header=False))
    assert found.values["data"]["options"]["column_names"] == ["column_1", "column_2"]
    assert found.values["columns"] == {"text": "column_1", "label": "column_2"}


def test_test_rows_without_labels_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_csv(folder / "train.csv")
    (folder / "test.csv").write_text("review\na film\nanother film\n")
    found = draft(folder)
    assert set(found.rows) == {"train"}
    assert any("the test rows have no" in doubt for doubt in found.doubts)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("./missing", 'There is no file or folder "./missing"'),
        ("reviws.csv", 'Did you mean "reviews.csv"?'),
        ("empty.csv", "is empty"),
        ("header.csv", "has no rows"),
        ("picture.xyz", "no data file by its ending"),
        ("alone.csv", "No kind of task fits"),
    ],
)
def test_refusals(data: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "reviews.csv")
    write_csv(tmp_path / "header.csv", [])
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "picture.xyz").write_text("x")
    (tmp_path / "alone.csv").write_text("amount\n1.5\n2.5\n")
    with pytest.raises(TaskError) as error:
        draft_task(data, Path("task.yaml"))
    assert message in str(error.value)


def test_ids_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_layout("stanfordnlp/imdb").hub == {"path": "stanfordnlp/imdb"}
    for name in ("data/reviews.csv", "./a/b", "imdb"):
        with pytest.raises(TaskError, match="There is no file"):
            find_layout(name)


def test_files_of_two_forms_are_refused(tmp_path: Path) -> None:
    files = {"train": str(write_csv(tmp_path / "a.csv")), "test": str(as_json_lines(tmp_path / "b.jsonl"))}
    with pytest.raises(TaskError, match="give all splits in one form"):
        named_files(files)


def run_init(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["init", *arguments])


def test_command_writes_and_never_overwrites(tmp_path: Path) -> None:
    data, target = write_csv(tmp_path / "a.csv"), tmp_path / "task.yaml"
    done = run_init(str(data), "--output", str(target))
    assert done.exit_code == 0, done.output
    written = target.read_text()
    assert yaml.safe_load(written)["columns"] == {"text": "review", "label": "verdict"}
    assert "# - no test split" in written
    target.write_text("mine")
    again = run_init(str(data), "--output", str(target))
    assert isinstance(again.exception, ConfigError)
    assert "--overwrite" in str(again.exception)
    assert target.read_text() == "mine"
    assert run_init(str(data), "--output", str(target), "--overwrite").exit_code == 0
    assert target.read_text() == written


def test_command_prints_one_document(tmp_path: Path) -> None:
    done = run_init(str(write_csv(tmp_path / "a.csv")), "--output", str(tmp_path / "t.yaml"), "--json")
    document = json.loads(done.stdout)
    assert document["task"] == yaml.safe_load((tmp_path / "t.yaml").read_text())
    assert document["columns"]["verdict"] == {"type": "text", "blanks": 0, "distinct": 2, "mean_length": 3.5}
    assert document["doubts"]


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    values = {"train_file": str(folder / "a.csv"), "model_name_or_path": "minilm", "method": "lora"}
    return {**values, "output_dir": str(folder / "out"), **changes}


def test_data_options_write_a_task(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv")
    write_csv(tmp_path / "b.csv", reviews(6))
    given = {"validation_file": str(tmp_path / "b.csv"), "text_column_name": "review", "label_column": "verdict"}
    config = load_run(None, options(tmp_path, **given))
    assert config.task == str(task_path(str(tmp_path / "out"))) == str(tmp_path / "out.task.yaml")
    task = load_task(config.task)
    assert task.columns == {"text": "review", "label": "verdict"}
    assert set(task.data.files) == {"train", "validation"}
    # the same command finds its file, and another one does not replace it
    assert load_run(None, options(tmp_path, **given)) == config
    with pytest.raises(ConfigError, match="overwrite_output_dir"):
        load_run(None, options(tmp_path))
    assert load_task(load_run(None, options(tmp_path, overwrite_output_dir="true")).task).data.files.keys() == {"train"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "snips"}, "give one of them"),
        ({"train_file": None, "label_column": "verdict"}, "train_file or train_dir"),
        ({"train_dir": "x"}, "both name the train rows"),
        ({"text_column": "revue"}, 'Did you mean "review"?'),
        ({"kind": "text_clasification"}, 'Did you mean "text_classification"?'),
    ],
)
def test_data_options_that_do_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv")
    values = {name: value for name, value in options(tmp_path, **changes).items() if value is not None}
    with pytest.raises((ConfigError, TaskError)) as error:
        load_run(None, values)
    assert message in str(error.value)
    assert not (tmp_path / "out.task.yaml").exists()
