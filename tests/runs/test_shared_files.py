"""Files of a run that people share: no absolute path of the machine in them, and all that reads them still works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from support.tiny_runs import make_backbone, make_task, options

import peft_lab
from peft_lab.hub.public_copy import stage
from peft_lab.runs import run_folder

#: Files that hold paths on purpose: the options as they were typed, and the base by which peft finds its weights.
WITH_PATHS = {run_folder.RUN, "adapter_config.json"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished run whose task, backbone, output and starting checkpoint are absolute paths."""
    folder = tmp_path_factory.mktemp("somebody")
    task, backbone = make_task(folder / "data"), make_backbone(folder / "bert")
    values = options(task, backbone, folder / "runs" / "first", save_strategy="steps", save_steps=3)
    values |= {
        "method": "svfit",
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "run_name": str(folder),
    }
    return {"folder": folder, "values": values, "result": peft_lab.train(values)}


def paths_in(run: Path, private: Path) -> dict[str, str]:
    """Files of a run that hold a path of the machine -> the line."""
    found = {}
    for file in sorted(path for path in run.iterdir() if path.is_file() and path.name not in WITH_PATHS):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if str(private) in line or str(Path.home()) + "/" in line:
                found[file.name] = line[:200]
    return found


@pytest.mark.parametrize("method", ["svfit", "full"])
def test_no_file_of_a_run_holds_a_path_of_the_machine(method, place, tmp_path):
    run, private = Path(place["result"].output_dir), place["folder"]
    if method == "full":
        run, private = tmp_path / "out", tmp_path.parent
        peft_lab.train({**place["values"], "method": method, "output_dir": str(run), "max_steps": 3})
    assert str(private) in (run / run_folder.RUN).read_text()  # a path was there to be given away
    assert paths_in(run, private) == {}
    assert paths_in(run, place["folder"]) == {}
    assert json.loads((run / "metrics.json").read_text())["run"]["model_name_or_path"] == "./bert"


def test_all_that_reads_the_run_finds_task_and_base(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no relative name could be found by chance
    run, scored = place["result"].output_dir, place["result"].metrics["metrics"]["test"]
    assert peft_lab.evaluate(run)["accuracy"] == scored["accuracy"]
    assert peft_lab.predict(run, ["the rain"])[0]["label"]
    again = peft_lab.train(place["values"])
    assert again.trainer is None  # it was found finished
    assert again.metrics == json.loads((run / "metrics.json").read_text())
    peft_lab.merge(run, tmp_path / "merged")
    # without run.yaml the task is found by its content and the base by adapter_config.json
    peft_lab.to_lora(run, tmp_path / "converted")
    assert not (tmp_path / "converted" / run_folder.RUN).exists()
    assert peft_lab.evaluate(tmp_path / "converted")["accuracy"] == scored["accuracy"]
    assert paths_in(tmp_path / "converted", place["folder"]) == {}


def test_a_run_without_its_last_file_goes_on_from_its_checkpoint(place, tmp_path):
    run = tmp_path / "unfinished"
    shutil.copytree(place["result"].output_dir, run)
    (run / run_folder.METRICS).unlink()
    again = peft_lab.train({**place["values"], "output_dir": str(run)})
    assert again.metrics["resumed_from"] == "checkpoint-6"
    assert again.metrics["metrics"] == place["result"].metrics["metrics"]


def test_the_copy_for_the_hub_names_the_base_that_is_given(place, tmp_path):
    stage(place["result"].output_dir, "someone/shared", tmp_path, base_model="org/base")
    assert json.loads((tmp_path / "metrics.json").read_text())["run"]["model_name_or_path"] == "org/base"
    with pytest.raises(peft_lab.ConfigError, match=r"bert.*--base_model"):
        stage(place["result"].output_dir, "someone/shared", tmp_path / "other")


def test_a_changed_run_file_does_not_lead_to_another_base(place, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(place["result"].output_dir, run)
    typed = yaml.safe_load((run / run_folder.RUN).read_text())
    (run / run_folder.RUN).write_text(
        yaml.safe_dump(typed | {"model_name_or_path": "/elsewhere/gpt2", "task": "snips"})
    )
    assert run_folder.read_origin(run)["model_name_or_path"] == "./bert"
    assert run_folder.read_origin(run)["task"] == "topics.yaml"
    assert peft_lab.evaluate(run)["accuracy"] == place["result"].metrics["metrics"]["test"]["accuracy"]


@pytest.mark.parametrize(
    ("typed", "shared"),
    [
        ("/home/me/models/bert", "./bert"),
        ("~/models/bert", "./bert"),
        (r"C:\models\bert", "./bert"),
        ("/home/me/hub/models--org--name/snapshots/0a1b", "org/name"),
        ("org/name", "org/name"),
        ("minilm", "minilm"),
        ("models/bert", "models/bert"),
        ("${PEFT_LAB_DATA}/bert", "${PEFT_LAB_DATA}/bert"),
    ],
)
def test_a_base_is_named_so_that_nobody_loads_another_one(typed, shared):
    assert run_folder.shared_options({"model_name_or_path": typed})["model_name_or_path"] == shared
