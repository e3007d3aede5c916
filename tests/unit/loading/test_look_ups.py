"""Names that could mean something in the working directory: each means what it says, or is refused."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.tiny_runs import command, environment, make_task

from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import load_task, parse_task
from peft_lab.errors import PeftLabError
from peft_lab.loading.adapter_folder import AdapterFolder
from peft_lab.metrics import HUB_METRICS, METRICS, load_metric, metric_path

EVIL = "raise SystemExit('run from the working directory')\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("name", HUB_METRICS)
def test_a_metric_of_evaluate_is_no_file_here(name: str, here: Path) -> None:
    (here / name).mkdir()
    (here / name / f"{name}.py").write_text(EVIL)
    assert metric_path(name, here) is None
    with pytest.raises(PeftLabError, match="working directory"):
        load_metric(name)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_of_ours_is_no_file_here(name: str, here: Path) -> None:
    (here / name).mkdir()
    (here / name / f"{name}.py").write_text(EVIL)
    if not METRICS[name].package:
        assert load_metric(name) is METRICS[name]


@pytest.mark.parametrize("name", ["=cmd.py", "a b.py", "-x.py", "@x.py"])
def test_a_metric_has_a_name_that_tables_can_hold(name: str, here: Path) -> None:
    (here / name).write_text("")
    with pytest.raises(PeftLabError, match="letters, digits"):
        metric_path(name, here)


@pytest.mark.parametrize("name", ["glue", "someone/data", "csv", "json", "pandas", "arrow"])
def test_a_data_set_of_the_hub_is_no_folder_or_builder_here(name: str, here: Path) -> None:
    if name not in ("json", "csv", "pandas", "arrow"):
        (here / name).mkdir(parents=True)
    (here / "train.csv").write_text("text,label\na,b\n")
    values = {"name": "x", "kind": "text_classification", "columns": {"text": "text", "label": "label"}}
    task = parse_task({**values, "data": {"path": name}, "splits": {"train": "train"}})
    with pytest.raises(PeftLabError, match="working directory"):
        load_splits(task)


@pytest.mark.parametrize("name", ["base", "./base", "org/base", "{folder}/base", "{folder}"])
@pytest.mark.parametrize("download", [False, True])
def test_a_base_in_the_folder_itself_is_refused(name: str, download: bool, here: Path) -> None:
    (here / "org" / "base").mkdir(parents=True)
    (here / "base").mkdir()
    (here / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name.format(folder=here)}))
    with pytest.raises(PeftLabError, match="model_name_or_path"):
        AdapterFolder(Path("."), download).base_name()


def test_a_base_beside_the_folder_is_the_users_own(here: Path) -> None:
    (here / "base").mkdir()
    (here / "run").mkdir()
    (here / "run" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    assert AdapterFolder(Path("run")).base_name() == "base"


def test_own_task_files_are_read_as_before(tmp_path: Path) -> None:
    """A compressed file, and one outside of the task's folder, are a user's own choice."""
    file = make_task(tmp_path / "data")
    values, files = yaml.safe_load(file.read_text()), {}
    for split in ("train", "validation", "test"):
        files[split] = f"../{split}.csv.gz"
        (tmp_path / f"{split}.csv.gz").write_bytes(gzip.compress((tmp_path / "data" / f"{split}.csv").read_bytes()))
    file.write_text(yaml.safe_dump({**values, "data": {"builder": "csv", "files": files}}))
    assert len(load_splits(load_task(file)).train) == 96


def test_modules_of_the_working_directory_are_not_imported(here: Path) -> None:
    """`python -m` puts it before the standard library, from which this package imports."""
    for name in ("difflib", "evaluate", "yaml", "typer", "torch", "pydantic", "rich"):
        (here / f"{name}.py").write_text(EVIL)
    done = command("methods", "lora", cwd=here)
    assert "working directory" not in done.stderr + done.stdout
    assert done.returncode == 0, done.stderr
    # a script of the user's own finds the modules beside it
    (here / "mine.py").write_text("import peft_lab, sys\nsys.path[0] == sys.argv[1] or sys.exit(3)\n")
    for each in here.glob("[!m]*.py"):
        each.unlink()
    run = subprocess.run([sys.executable, "-m", "mine", os.getcwd()], env=environment(), check=False)
    assert run.returncode == 0
