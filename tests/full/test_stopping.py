"""Real signals to every command: one line, the exit code of shells, no process left, and a way to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from support.compare_helpers import tiny_study
from support.tiny_runs import environment, flags, make_backbone, make_task, options

from peft_lab import train

pytestmark = pytest.mark.full
SIGNALS = [signal.SIGINT, signal.SIGTERM]
LONG = {"max_steps": 100_000, "save_strategy": "steps", "save_steps": 20}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopping")
    make_backbone(folder / "backbone")
    make_task(folder / "task")
    train(options(folder / "task" / "topics.yaml", folder / "backbone", folder / "run"))
    return folder


def _start(*arguments: object) -> subprocess.Popen[str]:
    # a group of its own, so that a signal to all of it spares this process
    return subprocess.Popen(
        [sys.executable, "-m", "peft_lab", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(fast=True),
        start_new_session=True,
    )


def _stop(process: subprocess.Popen[str], number: int, group: bool) -> str:
    """Send a signal as a terminal (to the group) or a system does; return the last line on standard error."""
    children = psutil.Process(process.pid).children(recursive=True)
    (os.killpg if group else os.kill)(process.pid, number)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors + out, errors
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    return errors.splitlines()[-1]


def _until(condition: object, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", SIGNALS)
def test_training_goes_on_from_the_checkpoint_that_is_named(place: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    values = options(place / "task" / "topics.yaml", place / "backbone", out, **LONG)
    process = _start("train", *flags(values))
    _until(lambda: len([*out.glob("checkpoint-*/rng_state.pth")]) > 1, process)
    line = _stop(process, number, group=number == signal.SIGINT)
    assert line.startswith("Stopped at step ")
    named = line.rpartition(" ")[2].rstrip(".")
    assert (out / named).is_dir()
    # the same command would take hours, so another folder goes on for a few steps
    steps = int(named.rpartition("-")[2]) + 5
    values |= {"max_steps": steps, "resume_from_checkpoint": str(out / named), "output_dir": str(tmp_path / "short")}
    assert train(values).metrics["resumed_from"] == named


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("launched", [False, True])
def test_a_comparison_ends_its_runs_and_goes_on(place: Path, tmp_path: Path, number: int, launched: bool) -> None:
    study = tiny_study(place, methods=["lora"], seeds=1, limits={"max_steps": 100_000})
    if launched:
        study["launcher"] = {"accelerate": {"num_processes": 1, "cpu": True}}
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(study))
    process = _start("compare", file, "--output_dir", out, "--workers", 1)
    _until(lambda: [*out.glob("runs/*/run.yaml")], process)
    assert _stop(process, number, group=number == signal.SIGINT).endswith("; the same command goes on.")
    assert not (out / "results.jsonl").is_file(), "a run that was stopped is not a failed one"


def test_the_demo_does_not_wait_for_its_run(tmp_path: Path) -> None:
    process = _start("demo", "--output_dir", tmp_path / "demo", "--task", "snips")
    _until(lambda: [*tmp_path.glob("demo/*/*/run.yaml")], process)
    assert "the same command starts again" in _stop(process, signal.SIGINT, group=True)
    assert not [*tmp_path.glob("demo/*/*/metrics.json")]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("seconds", [0.8, 1.5, 3.0])
def test_a_signal_while_loading(place: Path, tmp_path: Path, number: int, seconds: float) -> None:
    process = _start("merge", place / "run", tmp_path / "merged")
    time.sleep(seconds)
    if process.poll() is None:
        assert _stop(process, number, group=False).startswith("Stopped")
        assert not [*tmp_path.iterdir()]


def test_a_full_standard_output_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "peft_lab", "methods"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1
