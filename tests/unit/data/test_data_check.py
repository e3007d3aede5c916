"""`validate --data`: what is said of the rows of a task, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from support.tiny_runs import make_backbone, make_decoder, make_task
from typer.testing import CliRunner

from peft_lab.cli.app import app
from peft_lab.data.inspection.check import DataReport, check_data
from peft_lab.data.inspection.model_view import ModelView
from peft_lab.data.task_registry import load_task
from peft_lab.errors import ConfigError

WORDS = ("rain", "sun", "snow", "cloud", "song", "band", "tune", "drum", "soup", "rice", "the", "a", "please", "now")


def texts(count: int, start: int = 0) -> list[tuple[str, str]]:
    """Different texts of words that the tiny tokenizer knows, with a label each."""
    found = []
    for number in range(start, start + count):
        words = [WORDS[number % 14], WORDS[number // 14 % 14], WORDS[number * 5 % 14]]
        found.append((" ".join(words), ("bad", "good")[number % 2]))
    return found


def write_task(folder: Path, train: Any, test: Any = (), **changes: Any) -> Path:
    files = {"train": "train.csv"} | ({"test": "test.csv"} if test else {})
    for name, rows in (("train", train), ("test", test)):
        lines = "".join(f'"{text}",{label}\n' for text, label in rows)
        (folder / f"{name}.csv").write_text(f"text,label\n{lines}")
    values: dict[str, Any] = {"name": "t", "kind": "text_classification", "data": {"builder": "csv", "files": files}}
    values |= {"columns": {"text": "text", "label": "label"}, "metrics": ["accuracy"], **changes}
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def report_of(path: Path, view: ModelView | None = None) -> DataReport:
    return check_data(load_task(path), view)


def one(sentences: list[str], *words: str) -> str:
    """The only sentence that has all of these words."""
    found = [sentence for sentence in sentences if all(word in sentence for word in words)]
    assert len(found) == 1, sentences
    return found[0]


def test_clean_rows_have_no_doubts(tmp_path: Path) -> None:
    report = report_of(write_task(tmp_path, texts(40), texts(10, start=40)))
    assert not report.errors
    assert not report.doubts
    assert report.rows == {"train": 36, "validation": 4, "test": 10}
    assert report.classes["test"] == {"bad": 5, "good": 5}
    assert report.columns["train"]["text"].distinct == 40
    assert report.lengths["train"].unit == "words"
    assert report.lengths["train"].most == 3
    assert len(report.examples) == 3
    assert set(report.examples[0]) == {"text", "label"}
    assert report.examples[0]["label"] in ("bad", "good")


def test_equal_rows_are_named(tmp_path: Path) -> None:
    train, test = texts(40), texts(10, start=40)
    test += [test[0], train[7], (train[8][0], "good")]  # a double, a leak, and a leak with another answer
    doubts = report_of(write_task(tmp_path, train, test)).doubts
    assert "1 of 13 test rows are duplicates of others (row 11)" in one(doubts, "duplicates")
    leaks = [doubt for doubt in doubts if "13 test rows have the inputs of" in doubt]
    assert sum(int(doubt.split()[0]) for doubt in leaks) == 2  # some may be validation rows
    assert "(row 13)" in one(doubts, "test rows have inputs that have another answer")


def test_classes_are_counted(tmp_path: Path) -> None:
    train = [(text, "good" if number < 57 else "bad") for number, (text, _) in enumerate(texts(60))]
    doubts = report_of(write_task(tmp_path, train, [(texts(1, 70)[0][0], "good")])).doubts
    assert one(doubts, "the test rows have none of 1 of the 2 classes (bad)")
    assert one(doubts, "the classes are unequal", '"good"', '"bad"')


def test_all_faults_are_found_at_once(tmp_path: Path) -> None:
    train, test = texts(40), texts(10, start=40)
    train[3], test[4] = ("", "good"), (test[4][0], "")
    report = report_of(write_task(tmp_path, train, test))
    assert len(report.errors) == 2
    one(report.errors, "1 train rows have an empty text", "row 4 of 40")
    one(report.errors, "1 test rows have no label", "row 5 of 10")
    assert report.columns["test"]["label"].blanks == 1
    kept = report_of(write_task(tmp_path, train, test, empty_rows="drop"))
    assert not kept.errors
    assert len([doubt for doubt in kept.doubts if "are left out" in doubt]) == 2


def test_label_that_train_lacks_is_an_error(tmp_path: Path) -> None:
    report = report_of(write_task(tmp_path, texts(40), [("a song", "godo")]))
    assert one(report.errors, 'label "godo" of the test rows', 'Did you mean "good"?')


def test_damaged_images_are_named(tmp_path: Path) -> None:
    for name, colour in (("cat", "red"), ("dog", "blue")):
        for number in range(8):
            path = tmp_path / "pets" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8 + number), colour).save(path)
    for number in (2, 5):
        (tmp_path / "pets" / "dog" / f"{number}.png").write_bytes(b"\x89PNG and no more")
    values = {"name": "pets", "kind": "image_classification", "columns": {"image": "image", "label": "label"}}
    values |= {"data": {"builder": "imagefolder", "files": {"train": "pets"}}, "metrics": ["accuracy"]}
    path = tmp_path / "pets.yaml"
    path.write_text(yaml.safe_dump(values))
    report = report_of(path)
    assert one(report.doubts, "damaged files").endswith("2.png, 5.png")
    one(report.errors, "2 train rows", "cannot be read as an image")


def test_tokens_and_rows_as_the_model_sees_them(tmp_path: Path) -> None:
    base = make_backbone(tmp_path / "bert")
    task = load_task(write_task(tmp_path, texts(40), max_length=4))
    report = check_data(task, ModelView(task, str(base), "bert"))
    assert report.lengths["train"].unit == "tokens"
    assert report.lengths["train"].most == 4
    first = report.examples[0]
    assert first["model reads"].startswith("[CLS] ")
    assert first["model reads"].endswith(" [SEP]")
    assert first["model learns"] in ("bad", "good")
    one(report.doubts, "36 of 36 rows are longer than the limit and lose their end", 'raise "max_length"')


def test_answers_that_are_written(tmp_path: Path) -> None:
    make_task(tmp_path / "texts")
    base = make_decoder(tmp_path / "llama")
    values = yaml.safe_load((tmp_path / "texts" / "topics.yaml").read_text())
    values |= {"kind": "causal_lm", "metrics": ["perplexity"]}
    values["template"] = {"prompt": "{topic} :", "answer": "{sentence}"}
    del values["columns"]
    path = tmp_path / "texts" / "writing.yaml"
    path.write_text(yaml.safe_dump(values))
    task = load_task(path)
    plain = check_data(task).examples[0]
    assert plain["prompt"].endswith(" :")
    seen = check_data(task, ModelView(task, str(base), "llama")).examples[0]
    assert seen["model learns"] == f"{plain['answer']} [SEP]"
    assert seen["model reads"].endswith(seen["model learns"])


def test_a_stream_is_looked_at(tmp_path: Path) -> None:
    stream = {"streaming": True, "validation_rows": 8, "labels": ["bad", "good"]}
    report = report_of(write_task(tmp_path, texts(40), **stream))
    assert not report.errors
    assert report.rows["validation"] == 8


def test_backbone_of_another_kind_is_refused(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path, texts(8)))
    with pytest.raises(ConfigError, match='Backbone "empty" cannot be loaded'):
        ModelView(task, str(tmp_path), "empty")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["validate", *arguments])


def test_command(tmp_path: Path) -> None:
    path = write_task(tmp_path, [*texts(40), texts(1)[0]])
    done = run("--data", str(path))
    assert done.exit_code == 0
    assert "look at" in done.stdout
    document = json.loads(run("--data", str(path), "--json").stdout)
    assert document["rows"] == {"train": 37, "validation": 4}
    assert document["columns"]["train"]["label"]["distinct"] == 2
    assert document["doubts"]
    assert not document["errors"]


def test_command_ends_with_2_where_a_run_would(tmp_path: Path) -> None:
    path = write_task(tmp_path, [*texts(40), ("", "good")])
    done = run("--data", str(path))
    assert done.exit_code == 2
    assert "an empty text" in done.stdout
    done = run("--data", str(path), "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["errors"]


def test_command_without_data_prints_one_document(tmp_path: Path) -> None:
    document = json.loads(run(str(write_task(tmp_path, texts(8))), "--json").stdout)
    assert document["is"] == "task"
    assert document["metrics"] == ["accuracy"]
    assert isinstance(run(str(tmp_path / "task.yaml"), "--model_name_or_path", "x").exception, ConfigError)
