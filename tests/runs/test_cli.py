"""The command line: quick answers without torch, typos answered in one sentence with status 2, nothing written."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from support.tiny_runs import command, environment, flags, make_backbone, make_task, options, without_torch

from peft_lab.errors import ConfigError
from peft_lab.runs import command_line, run_config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    return {"task": make_task(folder / "data"), "backbone": make_backbone(folder / "bert"), "folder": folder}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["methods"],
        ["methods", "svfit"],
        ["tasks"],
        ["train", "--help"],
        ["validate", "task"],
        ["validate", "run"],
    ],
    ids=" ".join,
)
def test_listing_and_validating_do_not_import_torch(arguments, place, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(options(place["task"], place["backbone"], tmp_path / "out")))
    files = {"task": str(place["task"]), "run": str(run)}
    arguments = [files.get(a, a) if arguments[0] == "validate" else a for a in arguments]
    loaded, times, output = without_torch(arguments, tmp_path)
    assert loaded == []
    assert times < 7
    assert output.strip()
    assert "Traceback" not in output


TYPOS = [
    (["--lerning_rate", "1e-3"], "--learning_rate"),
    (["--metod", "lora"], "--method"),
    (["--method", "lorra"], '"lora"'),
    (["--method_args", "rr=8"], '"rr"'),
    (["--method_args", "lora_alhpa=8"], '"lora_alpha"'),
    (["--method_args", "8"], "key=value"),
    (["--task", "snips_"], "snips"),
    (["--task", "missing.yaml"], "missing.yaml"),
    (["--max_steps", "many"], "a whole number"),
    (["--learning_rate", "fast"], "a number"),
    (["--max_train_samples", "0"], "at least 1"),
    (["--dtype", "float23"], "float32"),
    (["--do_train", "false"], "peft-lab evaluate"),
    (["no-such-run.yaml"], "no-such-run.yaml"),
]


@pytest.mark.parametrize(("arguments", "answer"), TYPOS, ids=[" ".join(a) for a, _ in TYPOS])
def test_a_typo_in_a_run_is_answered_before_torch_is_imported(arguments, answer, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = flags(options(place["task"], place["backbone"], "out"))
    code, error = run_main(["train", *good, *arguments], monkeypatch, capsys)
    assert code == 2
    assert answer in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def run_main(arguments, monkeypatch, capsys) -> tuple[int, str]:
    """Run the command line in this process, where importing the trainer would be a failure."""
    from peft_lab.cli import main

    monkeypatch.setattr(sys, "argv", ["peft-lab", *arguments])
    monkeypatch.setitem(sys.modules, "peft_lab.training.run", None)
    monkeypatch.setitem(sys.modules, "peft_lab.training.evaluate", None)
    with pytest.raises(SystemExit) as leaving:
        main()
    return leaving.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["trian"], "train"),
        (["methods", "svfitt"], "svfit"),
        (["evaluate", "x", "--splt", "test"], "--split"),
        (["evaluate", "x/y/z"], "x/y/z"),
        (["evaluate", ".", "--split", "tset"], '"test"'),
        (["predict", "./nowhere", "a text"], "nowhere"),
        (["predict", ".", "a text"], "adapter_config.json"),
        (["merge", "./nowhere", "out"], "nowhere"),
        (["validate", "nothing.yaml"], "nothing.yaml"),
    ],
    ids=" ".join,
)
def test_a_typo_in_a_command_ends_with_status_2(arguments, answer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, error = run_main(arguments, monkeypatch, capsys)
    assert code == 2
    assert answer in error
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_key_in_a_run_file_is_named_with_the_nearest_known_one(place, tmp_path, capsys, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(options(place["task"], place["backbone"], "out", lerning_rate=1)))
    for arguments in (["validate", str(file)], ["train", str(file)]):
        code, error = run_main(arguments, monkeypatch, capsys)
        assert code == 2
        assert '"learning_rate"' in error


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(text, tmp_path, capsys, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert run_main(["train", str(file)], monkeypatch, capsys)[0] == 2


def test_flags_override_the_file_and_method_args_are_merged_by_key(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "task: t\nmodel_name_or_path: m\nmethod: lora\noutput_dir: o\nlearning_rate: 1e-3\nmax_steps: 5\n"
        "method_args: {r: 8, lora_alpha: 2.5e+1}\n"
    )
    name, overrides = command_line.parse_arguments(
        [str(file), "--bf16", "--learning-rate=2e-3", "--method_args", "r=4", "use_dora=true", "--report_to", "a", "b"]
    )
    config = run_config.load_run(name, overrides)
    assert config.training_arguments == {"learning_rate": 2e-3, "max_steps": 5, "bf16": True, "report_to": ["a", "b"]}
    assert config.method_args == {"r": 4, "lora_alpha": 25.0, "use_dora": True}


@pytest.mark.parametrize(
    ("words", "value"),
    [(["--bf16"], True), (["--bf16", "true"], True), (["--bf16", "false"], False), (["--bf16=no"], False)],
    ids=str,
)
def test_a_boolean_flag_works_with_and_without_a_value(words, value, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("{}")
    name, overrides = command_line.parse_arguments([*words, str(file)])
    assert name == str(file)
    assert run_config.convert("bf16", "bool", overrides["bf16"]) is value


def test_a_run_survives_being_written_and_read(place, tmp_path):
    values = options(place["task"], place["backbone"], tmp_path / "out", method_args={"r": 4}, seed=3, bf16=True)
    config = run_config.RunConfig.from_mapping(values)
    file = tmp_path / "run.yaml"
    file.write_text(run_config.dump_yaml(config.to_dict()))
    assert run_config.load_run(file) == config


def test_every_flag_of_the_installed_training_arguments_is_known():
    from dataclasses import fields

    from transformers import TrainingArguments

    assert {f.name for f in fields(TrainingArguments) if f.init} == set(run_config.training_argument_fields())


@pytest.mark.parametrize("value", [None, True, "x", [1], {"a": 1}, 1.5, float("nan")], ids=str)
@pytest.mark.parametrize("annotation", ["int", "float", "bool", "int | None", "str", "list[str]", "bool | None"])
def test_a_value_is_converted_to_the_annotated_type_or_refused(annotation, value):
    types = {"int": int, "float": float, "bool": bool, "str": str, "list[str]": list}
    try:
        found = run_config.convert("name", annotation, value)
    except ConfigError:
        return
    wanted = types[annotation.split(" | ")[0]]
    assert isinstance(found, wanted) or (found is None and "None" in annotation)
    assert not (wanted is int and isinstance(found, bool))


@pytest.fixture
def peft_lab_command(monkeypatch, capsys):
    """Run the command line in this process, for importing torch once per command would take most of the time."""

    def run(*arguments: str) -> tuple[int, str, str]:
        from peft_lab.cli import main

        monkeypatch.setattr(sys, "argv", ["peft-lab", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main()
        output = capsys.readouterr()
        return leaving.value.code or 0, output.out, output.err

    return run


def test_the_whole_way_from_training_to_a_merged_model(place, tmp_path, peft_lab_command):
    """Train (a real process), then evaluate, predict for texts and a file, and merge."""
    out, merged = tmp_path / "out", tmp_path / "merged"
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(options(place["task"], place["backbone"], out, max_steps=30)))
    trained = command("train", str(run), "--method_args", "r=4", "lora_alpha=16")
    assert trained.returncode == 0, trained.stderr
    assert "trainable parameters" in trained.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["method_config"]["r"] == 4

    code, output, _ = peft_lab_command("evaluate", str(out))
    assert code == 0
    assert f"{metrics['metrics']['test']['accuracy']:.4f}" in output

    csv, lines = tmp_path / "inputs.csv", tmp_path / "inputs.txt"
    csv.write_text("id,sentence\n1,the rain\n2,some soup please\n")
    lines.write_text("the rain\nsome soup please\n")
    answers, inputs = [], []
    for given in (["the rain", "some soup please"], [str(csv)], [str(lines)]):
        code, output, _ = peft_lab_command("predict", str(out), *given)
        assert code == 0
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        inputs.append([line.pop("input") for line in lines])
        answers.append(lines)
    assert inputs[0] == inputs[2] == ["the rain", "some soup please"]
    assert [row["sentence"] for row in inputs[1]] == inputs[0]
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 2
    assert {answer["label"] for answer in answers[0]} <= {"weather", "music", "food"}
    (tmp_path / "wrong.csv").write_text("id,phrase\n1,the rain\n")
    code, _, error = peft_lab_command("predict", str(out), str(tmp_path / "wrong.csv"))
    assert code == 2
    assert "phrase" in error

    assert peft_lab_command("merge", str(out), str(merged))[0] == 0
    assert peft_lab_command("merge", str(out), str(merged))[0] == 2
    script = (
        "import sys; from transformers import pipeline\n"
        f"print(pipeline('text-classification', {str(merged)!r})('the rain')[0]['label'])\n"
        "assert 'peft_lab' not in sys.modules"
    )
    plain = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        # as where peft-lab is not installed: `import torch` loads it otherwise
        env=environment() | {"PEFT_LAB_AUTOLOAD": "0"},
        check=True,
    )
    assert plain.stdout.strip() == answers[0][0]["label"]


def test_a_missing_backbone_is_one_sentence(place, tmp_path, peft_lab_command):
    good = options(place["task"], place["backbone"], tmp_path / "out")
    for name, answer in (("minlm", '"minilm"'), ("./nowhere/model", "./nowhere/model")):
        code, _, error = peft_lab_command("train", *flags({**good, "model_name_or_path": name}))
        assert code == 2
        assert answer in error
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists()
