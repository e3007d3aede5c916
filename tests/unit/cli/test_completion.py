"""Completion by the shell: names of commands, tasks, methods and backbones, and the flags of `train`."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.tiny_runs import HEAVY, environment

from peft_lab import registry
from peft_lab.backbones.pypi_weights import BACKBONES
from peft_lab.cli import completion
from peft_lab.data.task_registry import list_tasks
from peft_lab.runs.run_config import training_argument_fields


def complete(monkeypatch, capsys, line: str) -> list[str]:
    """Words that bash is offered at the end of a command line."""
    from peft_lab.cli import main

    words = line.split(" ")
    monkeypatch.setenv("_PEFT_LAB_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    monkeypatch.setattr(sys, "argv", ["peft-lab"])
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("peft-lab train --method ", lambda: registry.list_methods()),
        ("peft-lab train --bf16 --task ", lambda: list_tasks()),
        ("peft-lab train --model_name_or_path ", lambda: BACKBONES),
        ("peft-lab train --model-name-or-path ", lambda: BACKBONES),
        ("peft-lab methods ", lambda: registry.list_methods()),
        ("peft-lab evaluate run --task ", lambda: list_tasks()),
        ("peft-lab predict run --task ", lambda: list_tasks()),
        ("peft-lab chat run --task ", lambda: list_tasks()),
        ("peft-lab merge run out --model_name_or_path ", lambda: BACKBONES),
        ("peft-lab compare --task ", lambda: list_tasks()),
        ("peft-lab recommend --model_name_or_path ", lambda: BACKBONES),
    ],
)
def test_every_name_is_offered(line, names, monkeypatch, capsys):
    assert set(complete(monkeypatch, capsys, line)) == set(names())


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        ("peft-lab eval", ["evaluate"]),
        ("peft-lab train --method svf", ["svfit", "svft"]),
        ("peft-lab train --learning_r", ["--learning_rates", "--learning_rate"]),
        ("peft-lab train --js", ["--json"]),
        ("peft-lab incremental --ste", ["--steps"]),
        ("peft-lab incremental --layer_d", ["--layer_decay"]),
        ("peft-lab train --output_dir ", []),  # the shell offers files
        ("peft-lab train --task ./re", []),
        ("peft-lab demo --task s", ["snips", "sign-digits"]),
    ],
)
def test_a_beginning_is_completed(line, answers, monkeypatch, capsys):
    assert complete(monkeypatch, capsys, line) == answers


def test_every_flag_of_trainer_is_offered():
    offered = {name for name, _ in completion.complete_flag("--")}
    left_out = {name for name in training_argument_fields() if f"--{name}" not in offered}
    assert left_out <= set(completion_refused())


def completion_refused() -> list[str]:
    from peft_lab.runs.run_config import REFUSED

    return [name for name in REFUSED if name != "do_train"]


def test_completion_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['peft-lab']\n"
        "from peft_lab.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    variables = {"_PEFT_LAB_COMPLETE": "complete_bash", "COMP_WORDS": "peft-lab train --task sn", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(variables), check=True
    )
    assert done.stdout.split()[0] == "snips"
    assert done.stdout.split()[-2:] == ["LOADED", "[]"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_shown(shell, monkeypatch, capsys):
    from peft_lab.cli import main

    # typer asks for the shell that the tests run in, unless it is told not to
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    monkeypatch.setattr(sys, "argv", ["peft-lab", "--show-completion", shell])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert not leaving.value.code
    assert "_PEFT_LAB_COMPLETE" in capsys.readouterr().out
