"""Where runs are carried out: accelerate with two processes, a Ray cluster, and how an ended process is told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from support.compare_helpers import tiny_study

from peft_lab.comparison import compare
from peft_lab.comparison.run.backends import LocalBackend, ending, make_backend
from peft_lab.errors import ConfigError
from peft_lab.utils import accelerate_launch


def test_a_run_by_accelerate_launch_with_two_processes(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, methods=["lora"], seeds=1, launcher={"accelerate": {"config_file": "cpu"}})
    done = compare(study, tmp_path / "out", workers=1, report=False)
    (record,) = done.records
    assert record.ok, record.error
    assert record.metrics["processes"] == 2
    assert record.measures["ece"] > 0


def test_a_launch_that_fails_says_where_to_look(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, methods=["lora"], seeds=1, launcher={"accelerate": {"no_such_flag": 1}})
    (record,) = compare(study, tmp_path / "out", workers=1, report=False).records
    assert "exit code 2" in record.error
    assert "no_such_flag" in (tmp_path / "out" / "runs" / f"{record.id}.log").read_text()


def test_processes_that_outlived_their_run_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that is still under way holds its lock, and a second one of the same run starts after it."""
    waiting, order = threading.Event(), []

    class AnnouncedLock(FileLock):
        def acquire(self, *arguments: Any, **options: Any) -> Any:
            waiting.set()
            return super().acquire(*arguments, **options)

    monkeypatch.setattr(accelerate_launch, "FileLock", AnnouncedLock)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", lambda arguments: order.append("started"))
    lock = str(tmp_path / "run.launch")
    second = threading.Thread(target=accelerate_launch.main, args=(["--lock", lock, "--cpu", "-m", "this"],))
    with FileLock(lock):
        second.start()
        assert waiting.wait(timeout=120)
        order.append("first ended")
    second.join(timeout=120)
    assert order == ["first ended", "started"]


def test_runs_on_a_ray_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else Ray's workers wait for the tests beside this one
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluate.py").write_text("raise SystemExit('a script of the user')\n")
    study = tiny_study(tmp_path, methods=["lora"])
    done = compare(study, tmp_path / "out", workers=2, backend="ray", report=False)
    assert [record.ok for record in done.records] == [True, True]
    assert not done.failed


def test_a_ray_process_that_is_ended_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    import psutil

    study = tiny_study(tmp_path, methods=["lora"], seeds=1, limits={"max_steps": 100000})
    out, stop = tmp_path / "out", threading.Event()

    def kill() -> None:
        while not stop.wait(0.1):
            for process in psutil.process_iter():
                try:
                    if (
                        any(str(out) in file.path for file in process.open_files())
                        and process.pid != psutil.Process().pid
                    ):
                        process.kill()
                        return
                except psutil.Error:
                    continue

    killer = threading.Thread(target=kill)
    killer.start()
    (record,) = compare(study, out, workers=1, backend="ray", report=False).records
    stop.set()
    killer.join()
    assert not record.ok
    assert "died" in record.error
    assert not ray.is_initialized()


def test_backends_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ConfigError, match='Did you mean "ray"'):
        make_backend("rey")
    with pytest.raises(ConfigError, match="at least 1"):
        make_backend("local", 0)
    with pytest.raises(ConfigError, match="backend ray"):
        make_backend("local", 1, "auto")


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_lab.comparison.run import backends

    monkeypatch.setattr(backends, "usable_cores", lambda: 8)
    monkeypatch.setattr(backends, "gpus", lambda: [])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert (LocalBackend().workers, LocalBackend()._threads, LocalBackend(2)._threads) == (4, 2, 4)
    monkeypatch.setattr(backends, "gpus", lambda: ["0", "3"])
    three = LocalBackend(3)
    assert LocalBackend().workers == 2
    assert [three._slots.get() for _ in range(3)] == ["0", "3", "0"]


def test_how_an_ended_process_is_told() -> None:
    assert "SIGKILL" in ending(-9)
    assert "memory" in ending(-9)
    assert "SIGSEGV" in ending(-11)
    assert "memory" not in ending(-11)
    assert "exit code 3" in ending(3)
