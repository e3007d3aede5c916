"""`--json`: every command has it or says why not, and prints one document to standard output and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer.main
from support.compare_helpers import record, tiny_study
from support.tiny_runs import make_backbone, make_task, options

import peft_lab
from peft_lab.cli import demo, doctor
from peft_lab.cli.app import app

COMMANDS = typer.main.get_command(app).commands

#: Commands without `--json`, with the reason.
WITHOUT = {
    "attention-maps": "its result is a picture",
    "chat": "it is a conversation",
    "predict": "its answers are JSON already, one a line",
    "point-pictures": "its results are pictures",
}
#: Command -> its arguments; names in braces are filled by the fixture `place`.
CASES = {
    "methods": [],
    "tasks": [],
    "doctor": [],
    "train": ["{run_file}", "--overwrite_output_dir"],
    "evaluate": ["{run}"],
    "merge": ["{run}", "{new}"],
    "to-lora": ["{run}", "{new}"],
    "export": ["{run}", "{new}", "--torch-export"],
    "push": ["{run}", "someone/name"],
    "report": ["{comparison}"],
    "validate": ["{task}", "--data"],
    "init": ["{data}", "--output", "{new}.yaml"],
    "info": ["{run}"],
    "compare": ["{study}", "--output_dir", "{new}"],
    "recommend": [
        "--task",
        "{task}",
        "--model_name_or_path",
        "{backbone}",
        "--minutes",
        "0.01",
        "--output",
        "{new}.yaml",
    ],
    "intrinsic-dimension": [
        *("--task", "{task}", "--model_name_or_path", "{backbone}", "--output_dir", "{new}", "--max_steps", "2"),
        *("--d", "4", "--learning_rates", "0.01", "--full_learning_rates", "0.001"),
    ],
    "incremental": [
        *(
            "--task",
            "{task}",
            "--model_name_or_path",
            "{backbone}",
            "--output_dir",
            "{new}",
            "--method",
            "nearest_mean",
        ),
        *("--steps", "3", "--orders", "natural"),
    ],
    "demo": ["--task", "snips", "--method", "lora", "--output_dir", "{new}"],
}
#: Commands that trace a graph, draw, or train in processes.
SLOW = ("export", "intrinsic-dimension", "report", "compare", "recommend")


def has_json(command) -> bool:
    return any("--json" in getattr(parameter, "opts", ()) for parameter in command.params)


def test_every_command_has_json_or_a_reason():
    assert {name for name, command in COMMANDS.items() if not has_json(command)} == set(WITHOUT)
    assert {name for name, command in COMMANDS.items() if has_json(command)} == set(CASES)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Finished runs and a comparison, which the commands read."""
    folder = tmp_path_factory.mktemp("json")
    values = options(make_task(folder / "data"), make_backbone(folder / "bert"), folder / "run", method="svfit")
    peft_lab.train(values)
    (folder / "run.yaml").write_text(json.dumps({**values, "output_dir": str(folder / "again")}))
    study = tiny_study(folder, methods=["head"], seeds=1)
    (folder / "study.yaml").write_text(json.dumps(study))
    (folder / "comparison").mkdir()
    records = [record(arm, seed, score=0.5 + seed / 10) for arm in ("lora r=8", "head") for seed in (0, 1)]
    text = "".join(json.dumps(one.__dict__) + "\n" for one in records)
    (folder / "comparison" / "results.jsonl").write_text(text)
    names = {"run": "run", "run_file": "run.yaml", "comparison": "comparison", "study": "study.yaml"}
    names |= {"task": "data/topics.yaml", "data": "data/train.csv", "backbone": "bert"}
    return {name: str(folder / file) for name, file in names.items()}


@pytest.fixture
def outside(monkeypatch, tmp_path, place):
    """Stand-ins for what the commands reach outside of this process: the Hub, other processes, other interpreters."""
    monkeypatch.setattr("peft_lab.hub.push.push", lambda *_, **__: SimpleNamespace(commit_url="https://hub/commit/1"))
    monkeypatch.setattr(doctor, "_autoload", lambda: iter([doctor.Finding("ok", "autoload")]))
    metrics = json.loads(Path(place["run"], "metrics.json").read_text())
    monkeypatch.setattr(demo, "missing_packages", lambda names: [])
    monkeypatch.setattr(demo, "forkserver", lambda *_: None)
    monkeypatch.setattr(demo, "_in_process", lambda *_: metrics)
    monkeypatch.setattr(demo, "_lines", lambda folder: "lines")
    monkeypatch.chdir(tmp_path)


def run(arguments, monkeypatch) -> int:
    from peft_lab.cli import main

    monkeypatch.setattr(sys, "argv", ["peft-lab", *arguments])
    with pytest.raises(SystemExit) as leaving:
        main()
    return leaving.value.code or 0


def cases() -> list:
    return [pytest.param(name, marks=pytest.mark.full) if name in SLOW else name for name in CASES]


@pytest.mark.parametrize("name", cases())
def test_standard_output_is_one_document(name, place, outside, tmp_path, monkeypatch, capfd):
    given = {**place, "new": str(tmp_path / "new")}
    arguments = [argument.format(**given) for argument in CASES[name]]
    assert run([name, *arguments, "--json"], monkeypatch) == 0
    output = capfd.readouterr().out  # of the file descriptor, so that no library's print is missed
    assert output.endswith("\n")
    assert output.count("\n") == 1
    document = json.loads(output, parse_constant=pytest.fail)  # NaN is no JSON
    assert document


def test_documents_hold_the_results(place, outside, monkeypatch, capfd):
    def document(*arguments):
        assert run([*arguments, "--json"], monkeypatch) == 0
        return json.loads(capfd.readouterr().out)

    metrics = json.loads(Path(place["run"], "metrics.json").read_text())
    trained = document("train", place["run_file"], "--overwrite_output_dir")
    assert trained["metrics"] == metrics["metrics"]
    assert trained["output_dir"].endswith("again")
    assert document("evaluate", place["run"])["metrics"]["accuracy"] == metrics["metrics"]["test"]["accuracy"]
    assert {method["name"] for method in document("methods")} == set(peft_lab.list_methods())
    assert {task["name"] for task in document("tasks")} == set(peft_lab.list_tasks())
    svfit = document("methods", "svfit")
    assert "rank" in {argument["name"] for argument in svfit["method_args"]}
    found = document("demo", "--task", "snips", "--method", "lora", "--output_dir", "out")
    assert found == {"snips": {"lora": [metrics]}}


def test_an_error_leaves_standard_output_empty(monkeypatch, capfd):
    assert run(["evaluate", "./nowhere", "--json"], monkeypatch) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert "nowhere" in output.err


def test_a_failed_check_is_in_the_document_and_in_the_status(monkeypatch, capfd):
    monkeypatch.setattr(doctor, "findings", lambda: iter([doctor.Finding("failed", "a", "b")]))
    assert run(["doctor", "--json"], monkeypatch) == 1
    assert json.loads(capfd.readouterr().out) == [{"status": "failed", "what": "a", "mend": "b"}]
