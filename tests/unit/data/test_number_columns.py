"""A column of numbers reaches the method that reads it, in training and prediction; other methods do not see it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from support.tiny_runs import make_backbone, make_image_backbone, make_image_task, options

import peft_lab
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import load_task, parse_task
from peft_lab.errors import ConfigError, TaskError
from peft_lab.loading.load_run import load
from peft_lab.training.evaluate import evaluate, predict
from peft_lab.training.run import prepare, train

READS = {"method": "petalface", "method_args": {"quality": "column", "r": 4}}


def make_rated(folder: Path, columns: dict[str, str] | None = None, grades: list[Any] | None = None) -> Path:
    """A task whose label is a function of the column `grade` alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 48), ("validation", 12), ("test", 12)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "grade", "verdict"])
            for index in range(count):
                grade = (grades or [-0.5, 1.5])[index % 2]
                writer.writerow([["the song", "a soup", "some rain"][index // 2 % 3], grade, ["no", "yes"][index % 2]])
    named = columns or {"text": "sentence", "label": "verdict", "quality": "grade"}
    files = {split: f"{split}.csv" for split in ("train", "validation", "test")}
    values = {"name": "rated", "kind": "text_classification", "data": {"builder": "csv", "files": files}}
    (folder / "rated.yaml").write_text(yaml.safe_dump({**values, "columns": named}))
    return folder / "rated.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rated")
    return {"task": make_rated(folder / "data"), "bert": make_backbone(folder / "bert"), "folder": folder}


def test_the_number_decides_where_nothing_else_does(place: dict[str, Path]) -> None:
    run = options(place["task"], place["bert"], place["folder"] / "out", **READS)
    done = train({**run, "max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 3e-2})
    assert done.metrics["metrics"]["validation"]["accuracy"] == 1.0
    assert evaluate(done.output_dir, split="test")["accuracy"] == 1.0
    rows = [{"sentence": "the song", "grade": grade} for grade in (1.5, -0.5, 1.5)]
    assert [answer["label"] for answer in predict(done.output_dir, rows, batch_size=2)] == ["yes", "no", "yes"]
    named = [{"text": "a soup", "quality": "-0.5"}]
    assert predict(done.output_dir, named)[0]["label"] == "no"
    with pytest.raises(ConfigError, match='Input 1 has no number "quality"'):
        predict(done.output_dir, ["the song"])
    # in a script the number is an argument of the forward
    loaded = load(done.output_dir)
    tokens = loaded.processor(["the song"] * 2, return_tensors="pt")
    with torch.no_grad():
        answers = loaded.model(**tokens, quality=torch.tensor([-0.5, 1.5])).logits.argmax(-1)
        with peft_lab.row_inputs(quality=torch.tensor([-0.5, 1.5])):
            assert torch.equal(loaded.model(**tokens).logits.argmax(-1), answers)
    assert [loaded.labels[label] for label in answers.tolist()] == ["no", "yes"]


@pytest.mark.parametrize("method", ["lora", "head"])
def test_other_methods_do_not_see_the_column(place: dict[str, Path], tmp_path: Path, method: str) -> None:
    with prepare(options(place["task"], place["bert"], tmp_path, method=method, max_steps=100)) as trainer:
        assert "quality" not in trainer.train_dataset.column_names
        trainer.model(**trainer.data_collator(list(trainer.train_dataset.select(range(2)))))


def test_a_task_without_the_column_is_refused(place: dict[str, Path], tmp_path: Path) -> None:
    task = make_rated(tmp_path, {"text": "sentence", "label": "verdict"})
    run = options(task, place["bert"], tmp_path / "out", **READS)
    with pytest.raises(ConfigError, match='reads the column "quality", which task "rated" does not name'):
        train(run)


@pytest.mark.parametrize(
    ("columns", "grades", "words"),
    [
        ({"quality": "verdict"}, None, "holds the answer"),
        ({"qualty": "grade"}, None, 'Did you mean "quality"'),
        ({"quality": "sentence"}, None, r"48 train rows have no number in column \"sentence\".*rows 1, 2"),
        ({"quality": "grade"}, [0.5, ""], "24 train rows have no number in column"),
        ({"quality": "nothing"}, None, 'no column "nothing"'),
    ],
)
def test_columns_without_numbers_are_refused(
    columns: dict[str, str], grades: list[Any] | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match=words):
        load_splits(load_task(str(_rated(tmp_path, columns, grades))))


GATED = {"method": "gated_spectra", "method_args": {"gate": "column", "components": 4, "groups": 2}}


@pytest.mark.full
def test_whole_numbers_reach_a_method_that_reads_integers(place: dict[str, Path], tmp_path: Path) -> None:
    columns = {"text": "sentence", "label": "verdict", "component_group": "grade"}
    task = make_rated(tmp_path / "data", columns, [0, 1.0])
    done = train(options(task, place["bert"], tmp_path / "out", **GATED, max_steps=60))
    batch = done.trainer.data_collator([done.trainer.train_dataset[i] for i in range(4)])
    assert (batch["component_group"].dtype, batch["component_group"].tolist()) == (torch.int64, [0, 1, 0, 1])
    assert evaluate(done.output_dir, split="test")["accuracy"] == done.metrics["metrics"]["test"]["accuracy"]
    scores = []
    for grade in ("0", 1):
        (answer,) = predict(done.output_dir, [{"sentence": "the song", "grade": grade}], top_k=2)
        scores.append(next(each["score"] for each in answer["top_k"] if each["label"] == "yes"))
    assert scores[0] < scores[1]
    with pytest.raises(ConfigError, match='Input 1 has no whole number "component_group"'):
        predict(done.output_dir, [{"sentence": "the song", "grade": 0.5}])
    broken = make_rated(tmp_path / "broken", columns, [0, 0.5])
    with pytest.raises(ConfigError, match=r'24 rows have a fraction in column "grade".*rows 2, 4'):
        train(options(broken, place["bert"], tmp_path / "broken_out", **GATED))


def _rated(folder: Path, columns: dict[str, str], grades: list[Any] | None) -> Path:
    return make_rated(folder, {"text": "sentence", "label": "verdict", **columns}, grades)


def test_images(tmp_path: Path) -> None:
    path = make_image_task(tmp_path)
    for split in ("train", "validation", "test"):
        file = tmp_path / f"{split}.parquet"
        rows = Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
        rows.add_column("lens", [index % 2 for index in range(len(rows))]).to_parquet(file)
    values = yaml.safe_load(path.read_text())
    values["columns"]["quality"] = "lens"
    path.write_text(yaml.safe_dump(values))
    assert parse_task(values, path).inputs == ("image",)
    done = train(options(path, make_image_backbone(tmp_path / "vit"), tmp_path / "out", **READS, max_steps=2))
    batch = done.trainer.data_collator([done.trainer.train_dataset[i] for i in range(4)])
    assert batch["quality"].tolist() == [0, 1, 0, 1]
    images = [{"image": str(tmp_path / "test.png"), "lens": lens} for lens in (0, 1)]
    scores = [answer["score"] for answer in predict(done.output_dir, images)]
    apart = [predict(done.output_dir, [image])[0]["score"] for image in images]
    assert scores == pytest.approx(apart, abs=1e-5)
    assert scores[0] != scores[1]
