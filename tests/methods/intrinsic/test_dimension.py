"""The command `intrinsic-dimension`: its search, what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from support.tiny_runs import make_backbone, make_task, without_torch
from typer.testing import CliRunner

from peft_lab.adapters.weight.intrinsic.dimension import COLUMNS, Dimension
from peft_lab.errors import ConfigError, TaskError

FULL, NONE = float("nan"), 0


def _runs(*lines: tuple[float, float, float]) -> pd.DataFrame:
    """Runs by d, learning rate and score."""
    return pd.DataFrame([("method", d, rate, score, 5, 1.0) for d, rate, score in lines], columns=list(COLUMNS))


@pytest.mark.parametrize(
    ("share", "found", "sentence"),
    [(0.9, 100, "d90 = 100, the smallest d"), (0.2, 0, "d20 = 0: the head alone"), (1.0, None, "No d up to 1000")],
)
def test_dimension_is_the_smallest_that_reaches_the_share(share, found, sentence):
    runs = _runs(
        (FULL, 1e-4, 0.6),
        (FULL, 1e-3, 0.8),
        (NONE, 1e-2, 0.2),
        (1000, 1e-2, 0.75),
        (100, 1e-2, 0.5),
        (100, 1e-1, 0.72),
        (10, 1e-2, 0.71),
    )
    result = Dimension.of(runs, "accuracy", share)
    assert result.found == found
    assert sentence in result.sentence()
    assert result.document()["full"] == {"learning_rate": 1e-3, "score": 0.8}
    assert [(row["d"], row["score"]) for row in result.document()["curve"]] == [
        (0, 0.2),
        (10, 0.71),
        (100, 0.72),
        (1000, 0.75),
    ]
    assert "| 100 | 0.7200 | 90.0% | 0.1 | 5 |" in result.page({"task": "t", "model_name_or_path": "m"})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dimension")
    return make_task(folder / "data"), make_backbone(folder / "bert")


def _command(place, folder, *arguments: str):
    from peft_lab.cli.app import app

    given = ["--task", place[0], "--model_name_or_path", place[1], "--output_dir", folder, "--max_steps", "2"]
    rates = ["--d", "4,8", "--learning_rates", "0.01", "--full_learning_rates", "0.001", *arguments]
    return CliRunner().invoke(app, ["intrinsic-dimension", *map(str, given), *rates])


@pytest.mark.full
def test_search_writes_its_files_and_goes_on(place, tmp_path, monkeypatch):
    done = _command(place, tmp_path, "--share", "1", "--json", "--whole_curve")
    assert done.exit_code == 0, done.exception
    document = json.loads(done.stdout.strip().splitlines()[-1])
    assert [row["d"] for row in document["curve"]] == [0, 4, 8]
    assert [row["adapter_parameters"] for row in document["curve"]] == [0, 4 + 2, 8 + 2]
    assert {path.name for path in tmp_path.iterdir()} == {
        "search.json",
        "runs.csv",
        "intrinsic_dimension.md",
        "intrinsic_dimension.png",
    }
    # a part of the runs is there already: only the others are made, and all is as before
    lines = (tmp_path / "runs.csv").read_text().splitlines(keepends=True)
    (tmp_path / "runs.csv").write_text("".join(lines[:-1]))
    trained = []
    from peft_lab.training import run

    train = run.train
    monkeypatch.setattr(run, "train", lambda **options: trained.append(options["method_args"]) or train(**options))
    again = _command(place, tmp_path, "--share", "0.5", "--json", "--whole_curve")
    assert [options["d"] for options in trained] == [8]
    curve = json.loads(again.stdout.strip().splitlines()[-1])["curve"]
    assert [row["score"] for row in curve] == [row["score"] for row in document["curve"]]


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--share", "1.5"], "--share 1.5 must be above 0 and at most 1"),
        (["--d", "4,x"], '--d "4,x" must be positive whole numbers'),
        (["--d", "0"], '--d "0" must be positive whole numbers'),
        (["--learning_rates", "inf"], '--learning_rates "inf" must be positive numbers'),
        (["--task", "snisp"], 'Did you mean "snips"'),
    ],
)
def test_command_says_what_is_wrong(place, arguments, answer, tmp_path):
    done = _command(place, tmp_path / "new", *arguments)
    assert isinstance(done.exception, ConfigError | TaskError)
    assert answer in str(done.exception)
    assert not (tmp_path / "new").exists()


def test_folder_of_another_search_or_of_anything_else_is_refused(place, tmp_path):
    settings = {"task": str(place[0]), "model_name_or_path": str(place[1]), "structure_aware": True, "max_steps": 3}
    (tmp_path / "search.json").write_text(json.dumps(settings))
    assert "holds a search with max_steps=3, not 2" in str(_command(place, tmp_path).exception)
    (tmp_path / "search.json").rename(tmp_path / "notes.json")
    assert "is not empty and holds no search" in str(_command(place, tmp_path).exception)


def test_checks_come_before_torch(place, tmp_path):
    arguments = ["--task", str(place[0]), "--model_name_or_path", str(place[1]), "--output_dir", str(tmp_path / "new")]
    loaded, _, output = without_torch(["intrinsic-dimension", *arguments, "--d", "none"], tmp_path)
    assert "must be positive whole numbers" in output
    assert loaded == []
