"""Start of `peft-lab train` in several processes: configs, commands, refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_lab.cli import main
from peft_lab.errors import ConfigError
from peft_lab.runs import command_line
from peft_lab.training import launch

GPUS = ("multi_gpu", "fsdp2", "zero2", "zero3")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], list[str]]]:
    """What would be started, on a machine with two GPUs and DeepSpeed."""
    found: list[tuple[dict[str, Any], list[str]]] = []

    def start(flags: dict[str, Any], command: list[str]) -> int:
        found.append((flags, command))
        return 7

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(launch, "launch", start)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return found


def test_accelerate_reads_each_shipped_config():
    from accelerate.commands.config.config_args import load_config_from_file

    assert {*launch.CONFIGS} == {"cpu", *GPUS}
    read = {name: load_config_from_file(str(path)) for name, path in launch.CONFIGS.items()}
    assert read["cpu"].use_cpu
    assert not any(read[name].use_cpu for name in GPUS)
    assert read["fsdp2"].fsdp_config["fsdp_version"] == 2
    # what `prepare_sharding` would refuse
    assert read["fsdp2"].fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
    assert {name: read[name].deepspeed_config["zero_stage"] for name in ("zero2", "zero3")} == {"zero2": 2, "zero3": 3}


def test_a_config_is_found_by_name_or_path(tmp_path: Path):
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: 'NO'\n")
    assert launch.find_config("fsdp2") == launch.CONFIGS["fsdp2"]
    assert launch.find_config(str(own)) == own
    with pytest.raises(ConfigError, match=r'"fsdp" is neither a file nor one of .*Did you mean "fsdp2"\?'):
        launch.find_config("fsdp")
    (tmp_path / "other.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match="no config of accelerate"):
        launch.read_config(tmp_path / "other.yaml")


def test_the_command_of_the_processes_gives_the_same_options(tmp_path: Path):
    words = ["run.yaml", "--bf16", "--method_args", "r=4", "b=-1", "--learning-rate=-1e-3", "--report_to", "a", "b"]
    file, options = command_line.parse_arguments(words)
    head, *rest = launch.train_command(file, options)
    assert head == "train"
    assert command_line.parse_arguments(rest) == (file, options)


@pytest.mark.parametrize("name", GPUS)
def test_a_config_of_gpus_starts_one_process_each(name, launched):
    assert launch.launch_train(name, None, None, {}) == 7
    assert launch.launch_train(name, 1, None, {}) == 7
    assert [flags["num_processes"] for flags, _ in launched] == [2, 1]
    assert all(flags["config_file"] == launch.CONFIGS[name] for flags, _ in launched)
    with pytest.raises(ConfigError, match="--num_processes 3 is more than the 2 GPUs"):
        launch.launch_train(name, 3, None, {})
    assert len(launched) == 2


@pytest.mark.parametrize("name", GPUS)
def test_a_config_of_gpus_is_refused_where_there_are_none(name, launched, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f'"{name}" needs GPUs, and this machine has none; use .* cpu'):
        launch.launch_train(name, None, None, {})
    assert not launched


def test_the_config_of_the_cpu_says_so_to_each_process(launched, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    launch.launch_train("cpu", 3, "run.yaml", {"max_steps": "2"})
    ((flags, command),) = launched
    assert flags["num_processes"] == 3
    assert command == ["train", "run.yaml", "--max_steps=2", "--use_cpu=true"]


def test_processes_are_not_started_twice(launched, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="leave one of them out"):
        launch.launch_train("cpu", None, None, {})
    assert not launched


def test_deepspeed_has_to_be_installed(launched, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install deepspeed"):
        launch.launch_train("zero2", None, None, {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_processes", "2"], "goes with --accelerate_config"),
        (["--accelerate_config", "cpu", "--num_processes", "0"], "must be a number from 1 on"),
        (["--accelerate_config", "zero4"], "Did you mean"),
    ],
)
def test_the_command_refuses_before_anything_is_written(words, message, tmp_path, monkeypatch, capsys):
    run = ["--task", "snips", "--model_name_or_path", "minilm", "--method", "ssf", "--output_dir", str(tmp_path / "o")]
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("sys.argv", ["peft-lab", "train", *run, *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "o").exists()


def test_the_exit_code_of_the_processes_is_that_of_the_command(tmp_path, launched, monkeypatch):
    run = ["--task", "snips", "--model_name_or_path", "minilm", "--method", "ssf", "--output_dir", str(tmp_path / "o")]
    monkeypatch.setattr("sys.argv", ["peft-lab", "train", *run, "--accelerate_config", "cpu"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 7
    assert not any("accelerate_config" in word for word in launched[0][1])
