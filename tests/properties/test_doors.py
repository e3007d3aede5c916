"""Hostile files at every door that reads them: each is read or refused in a sentence, quickly and in little memory.

Each case runs in a child, because some of these files have ended the interpreter.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.bounded import Outcome, outcome
from support.cover import cover
from support.hostile import BASE, COMPARISON, FOLDER, TEXTS
from support.processor_time import keeps_limit
from support.properties import EVERY
from support.tiny_runs import make_backbone, make_task, options
from transformers import AutoModelForSequenceClassification

import peft_lab
from peft_lab.comparison.records.results import read_results
from peft_lab.comparison.report.report import write_report
from peft_lab.comparison.study.schema import load_study
from peft_lab.data.task_registry import load_task, validate_task
from peft_lab.export.merge import merge
from peft_lab.export.to_lora import to_lora
from peft_lab.hub.public_copy import stage
from peft_lab.hub.push import local_adapter
from peft_lab.loading.load_adapter import load_adapter
from peft_lab.loading.load_run import load
from peft_lab.runs.run_config import load_run
from peft_lab.serve.tenants import load_many
from peft_lab.training.evaluate import evaluate, predict
from peft_lab.training.run import train

#: Of a refusal: processor time, and growth of memory.
SECONDS, MEGABYTES = 2.0, 300.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doors")
    make_task(folder / "data")
    make_backbone(folder / "base")
    return folder


@pytest.fixture(scope="module")
def run_of(place: Path) -> Callable[[str], Path]:
    """Trained run of a method, with the data of its task beside the copy of the task; made once."""

    def made(method: str) -> Path:
        folder = place / "runs" / method
        if not folder.is_dir():
            changes = {"method": method, "max_steps": 1, "save_strategy": "no"}
            train(options(place / "data" / "topics.yaml", place / "base", folder, **changes))
            for file in (place / "data").glob("*.csv"):
                shutil.copy(file, folder)
        return folder

    return made


def _model(place: Path) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(place / "base", num_labels=3)


Door = Callable[[Path, Path, Path], Any]
#: What reads a run's folder: called with the folder, the place of base and data, and a folder to write to.
DOORS: dict[str, Door] = {
    "load_adapter": lambda folder, place, out: load_adapter(_model(place), folder),
    "PeftModel": lambda folder, place, out: PeftModel.from_pretrained(_model(place), folder),
    "load_many": lambda folder, place, out: load_many(_model(place).eval(), {"a": folder}),
    "load": lambda folder, place, out: load(folder),
    "evaluate": lambda folder, place, out: evaluate(folder),
    "predict": lambda folder, place, out: predict(folder, ["rain now"]),
    "merge": lambda folder, place, out: merge(folder, out),
    "to_lora": lambda folder, place, out: to_lora(folder, out),
    "push": lambda folder, place, out: _push(folder, out),
}


def _push(folder: Path, out: Path) -> None:
    out.mkdir()
    stage(local_adapter(folder), "someone/name", out, "someone/base")


#: What reads one file of YAML.
YAML_DOORS: dict[str, Callable[[Path], Any]] = {
    "task": load_task,
    "validate": validate_task,
    "study": load_study,
    "run": load_run,
}


def assert_bounded(found: Outcome) -> None:
    assert found.how in ("done", "refused"), found.words
    if found.how == "refused":
        assert found.words
        assert "\n" not in found.words
        assert keeps_limit(found.seconds, SECONDS), found
        assert found.megabytes < MEGABYTES, found


#: Files in which peft finds no type of adapter, and so nothing of ours to ask: its own errors name them.
WITHOUT_TYPE = ("config deep", "config of aliases", "config as a pipe")


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def _each(case: tuple[Any, ...]) -> set[Any]:
    """Every file at one door, and every door with one file."""
    return {("file", case[0]), ("door", case[1])}


#: Door that must refuse a file, by the first word of its name; others may have no use for it.
READER = {"config": "load_adapter", "header": "load_adapter", "pickle": "load_adapter", "link": "load_adapter"}
READER |= {"metrics": "push", "standing": "push", "items": "push", "labels": "load", "task": "evaluate"}
READER |= {"data": "evaluate"}


def _each_at_its_reader(case: tuple[Any, ...]) -> set[Any]:
    hostile, door = case
    return {("door", door)} | ({("file", hostile)} if READER[hostile.split()[0]] == door else set())


AT_DOORS = [(h, d) for h, d in itertools.product(FOLDER, DOORS) if d != "PeftModel" or h not in WITHOUT_TYPE]


@pytest.mark.full
@pytest.mark.parametrize(("hostile", "door"), cover(AT_DOORS, _each_at_its_reader))
def test_a_folder_is_read_or_refused(
    hostile: str, door: str, place: Path, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    # peft's own reader opens the config of its own tuners
    folder = _copy(run_of("svfit" if door == "PeftModel" else "lora"), tmp_path / "run")
    FOLDER[hostile](folder)
    found = outcome(lambda: DOORS[door](folder, place, tmp_path / "out"))
    assert_bounded(found)
    assert found.how == "refused" or READER[hostile.split()[0]] != door, "the file is not read"


@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m == "svfit" else pytest.mark.full) for m in EVERY])
def test_a_link_in_a_sub_folder_is_refused_for_every_method(
    method: str, place: Path, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    if method not in peft_lab.list_methods() or peft_lab.list_methods()[method].can("images"):
        pytest.skip("the method is for images")
    folder = _copy(run_of(method), tmp_path / "run")
    FOLDER["link in a sub-folder"](folder)
    for name, door in DOORS.items():
        if name != "PeftModel" or not peft_lab.list_methods()[method].module.startswith("peft."):
            found = outcome(lambda door=door, name=name: door(folder, place, tmp_path / name))
            assert found.how == "refused", (name, found)


def test_no_code_of_a_folder_is_run(place: Path, run_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Neither a metric's file, nor a folder called like a metric, nor a base or data set called like a folder."""
    for hostile in ("task with a metric of a name", "task beside, with a metric to run"):
        folder = _copy(run_of("lora"), tmp_path / hostile.replace(" ", "-").replace(",", ""))
        (folder / "precision").mkdir()
        (folder / "precision" / "precision.py").write_text("raise SystemExit(7)\n")
        FOLDER[hostile](folder)
        found = outcome(lambda folder=folder: (__import__("os").chdir(folder), evaluate(".")))
        assert (found.how, "metric" in found.words) == ("refused", True), found


@pytest.mark.parametrize("hostile", BASE)
@pytest.mark.parametrize("door", ["of an adapter", pytest.param("whole model", marks=pytest.mark.full)])
def test_a_base_is_read_or_refused(
    hostile: str, door: str, place: Path, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    if door == "whole model":
        folder = _copy(run_of("full"), tmp_path / "run")
        BASE[hostile](folder)
        found = outcome(lambda: predict(folder, ["rain now"]))
    else:
        base = _copy(place / "base", tmp_path / "base")
        BASE[hostile](base)
        found = outcome(lambda: load(run_of("lora"), None, str(base)))
    assert_bounded(found)
    assert found.how == "refused", "the file is not read"


@pytest.mark.parametrize(("text", "door"), cover(itertools.product(TEXTS, YAML_DOORS), _each))
def test_a_yaml_file_is_refused(text: str, door: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(TEXTS[text])
    found = outcome(lambda: YAML_DOORS[door](file))
    assert_bounded(found)
    # a value that is no YAML is a text
    assert found.how == "refused" or (door, text) == ("run", "texts within texts"), found


@pytest.mark.parametrize("hostile", COMPARISON)
@pytest.mark.parametrize(
    "door",
    [
        pytest.param(lambda folder, out: write_report(folder, out), id="copy"),
        pytest.param(lambda folder, out: write_report(folder), id="report", marks=pytest.mark.full),
    ],
)
def test_a_comparison_is_read_or_refused(
    hostile: str, door: Callable[[Path, Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    # drawing takes seconds, and reads nothing
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    source, folder = ROOT / "benchmarks" / "results" / "reprogram", tmp_path / "a" / "b" / "comparison"
    folder.mkdir(parents=True)
    lines = (source / "results.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["stage"] == "final"][:4]
    (folder / "results.jsonl").write_text("".join(f"{line}\n" for line in kept))
    shutil.copy(source / "study.yaml", folder)
    assert read_results(folder)
    (tmp_path / "a" / "outside").mkdir()
    COMPARISON[hostile](folder)
    assert_bounded(outcome(lambda: door(folder, tmp_path / "out")))
    # nothing is written beside the comparison
    assert list((tmp_path / "a" / "outside").iterdir()) == []
    assert not list((tmp_path / "a" / "b").glob("*-outside/standing.json"))
