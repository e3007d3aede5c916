"""Comparisons in real processes: killed at any point and started again, run twice at once, with runs that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import yaml
from support import tiny_runs
from support.compare_helpers import tiny_study

from peft_lab.comparison import compare, read_predictions, read_results
from peft_lab.comparison.records.results import RESULTS, Journal

SCRIPT = """
import sys
from peft_lab.comparison import compare

if __name__ == "__main__":
    done = compare(sys.argv[1], sys.argv[2], workers=1, report=False)
    sys.exit(len(done.failed))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


def start(study: dict[str, object], place: Path, out: Path) -> subprocess.Popen[str]:
    file, script = place / f"{out.name}.yaml", place / "script.py"
    file.write_text(yaml.safe_dump(study))
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(file), str(out)],
        env=tiny_runs.environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def lines(out: Path) -> int:
    return (out / RESULTS).read_bytes().count(b"\n") if (out / RESULTS).is_file() else 0


def until(condition: object, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def workers(pid: int, out: Path) -> list[psutil.Process]:
    """The processes of runs: those that have a log of the comparison open."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if any(str(out) in file.path for file in child.open_files()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def test_a_killed_comparison_goes_on_where_it_was(place: Path) -> None:
    out = place / "killed"
    study = tiny_study(place)
    process = start(study, place, out)
    until(lambda: lines(out) >= 1 and workers(process.pid, out), process)
    for victim in [*workers(process.pid, out), psutil.Process(process.pid)]:
        victim.send_signal(signal.SIGKILL)
    process.wait()
    before = Journal(out)
    before.read()
    assert 1 <= len(before.records) < 4
    with (out / RESULTS).open("ab") as file:
        file.write(b'{"id": "half a line')
    code, output = finish(start(study, place, out))
    assert code == 0, output
    text = (out / RESULTS).read_text()
    assert "half a line" not in text
    assert text.endswith("\n")
    records = read_results(out)
    assert len(records) == 4 == text.count("\n")
    assert all(record.ok for record in records)
    for record in before.records.values():  # not repeated
        assert next(r for r in records if r.id == record.id) == record
    assert all(len(read_predictions(out, record)) == 24 for record in records)


def test_workers_end_with_a_killed_driver_and_their_run_is_continued(place: Path) -> None:
    out = place / "orphans"
    saving = {"per_device_train_batch_size": 8, "use_cpu": True, "save_strategy": "steps", "save_steps": 40}
    study = tiny_study(place, methods=["lora"], seeds=1, limits={"max_steps": 400}, training=saving)
    process = start(study, place, out)
    until(lambda: [*(out / "runs").glob("*/checkpoint-*/rng_state.pth")], process)
    running = workers(process.pid, out)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(running, timeout=120)
    assert running
    assert not alive
    (record,) = compare(study, out, workers=1, report=False).records
    assert record.metrics["resumed_from"].startswith("checkpoint-")
    assert record.steps == 400
    assert [step for step, _ in record.curves["loss"]] == list(range(20, 401, 20))
    assert not [*(out / record.folder).glob("checkpoint-*")]


def test_a_failing_run_is_recorded_and_tried_again_on_demand(place: Path) -> None:
    out = place / "failing"
    methods = [{"method": "lora", "args": {"target_modules": [["nowhere"]]}, "name": "nowhere"}, "head"]
    study = tiny_study(place, methods=methods, seeds=1)
    done = compare(study, out, workers=1, report=False)
    failed, fine = done.records
    assert done.failed == [failed]
    assert failed.arm == "nowhere"
    assert "nowhere" in failed.error
    assert "\n" not in failed.error
    assert "Traceback" in (out / failed.folder / "error.txt").read_text()
    assert fine.ok
    assert fine.arm == "head"
    assert compare(study, out, workers=1, report=False).records == [failed, fine]
    assert lines(out) == 2
    again = compare(study, out, workers=1, retry_failed=True, report=False)
    assert lines(out) == 3
    assert [record.id for record in again.records] == [failed.id, fine.id]
    assert again.records[0].started > failed.finished


def test_an_arm_that_diverges_fails_with_its_reason_and_the_study_goes_on(place: Path) -> None:
    out = place / "diverged"
    methods = [{"method": "full", "learning_rates": [1e38], "name": "much too fast"}, "head"]
    done = compare(tiny_study(place, methods=methods, seeds=1, limits={"max_steps": 6}), out, workers=1)
    (failed,) = done.failed
    assert failed.arm == "much too fast"
    assert "is not finite: most likely the learning rate 1e+38 is too high" in failed.error
    assert not (out / failed.folder / "metrics.json").exists()
    assert [record.arm for record in done.records if record.ok] == ["head"]
    text = (out / "report.md").read_text()
    assert "is too high" in text
    assert "much too fast has no score" in text

    def refuse(name: str) -> None:
        raise AssertionError(name)

    for line in (out / RESULTS).read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_heads_that_are_fitted_are_compared_with_one_that_is_trained(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_LAB_CACHE", str(place / "cache"))
    out = place / "fitted"
    cached = {"training": {"features": "cached"}}
    methods = [{"method": "head", **cached}, {"method": "gda", **cached}, "linear_svm"]
    done = compare(tiny_study(place, methods=methods, seeds=1), out, workers=1)
    assert [record.arm for record in done.records if record.ok] == ["head", "gda", "linear_svm"]
    costs = {record.arm: record.measures.get("step_flops") for record in done.records}
    assert costs["head"]
    assert costs["gda"] is None
    assert "gda" in (out / "report.md").read_text()


def test_a_worker_ended_from_outside_is_a_failed_run(place: Path) -> None:
    out = place / "ended"
    study = tiny_study(place, methods=["lora"], seeds=1, limits={"max_steps": 100000})

    def kill() -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end and not (found := workers(os.getpid(), out)):
            time.sleep(0.02)
        found[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    (record,) = compare(study, out, workers=1, report=False).records
    killer.join()
    assert not record.ok
    assert "SIGKILL" in record.error
    assert "memory" in record.error


def test_two_comparisons_on_one_folder_share_the_runs(place: Path) -> None:
    out = place / "shared"
    study = tiny_study(place)
    ended = [finish(process) for process in [start(study, place, out) for _ in range(2)]]
    assert [code for code, _ in ended] == [0, 0], ended
    counts = Counter(line.split('"id": "')[1][:16] for line in (out / RESULTS).read_text().splitlines())
    assert len(counts) == 4
    assert set(counts.values()) == {1}
    assert os.listdir(out / "runs")


def test_arms_of_equal_size_within_a_time(place: Path) -> None:
    methods = [{"method": "lora", "size": "r"}, {"method": "soft_prompt", "size": "num_virtual_tokens"}]
    limits = {"seconds": 0.5, "trainable_parameters": 1500}
    done = compare(tiny_study(place, methods=methods, seeds=1, limits=limits), place / "sized", workers=1, report=False)
    assert done.failed == []
    found = {record.method: record for record in done.records}
    chosen = {name: record.method_args for name, record in found.items()}
    sizes = {name: record.measures["trainable_parameters"] for name, record in found.items()}
    assert all(750 <= size <= 1500 for size in sizes.values()), sizes
    for name, size in (("lora", "r"), ("soft_prompt", "num_virtual_tokens")):
        assert chosen[name][size] > 1, chosen
    assert all(record.steps and record.measures["train_seconds"] >= 0.5 for record in done.records)


def test_a_script_called_as_a_library_does_not_stand_in_for_it(place: Path, tmp_path: Path) -> None:
    (tmp_path / "evaluate.py").write_text("raise SystemExit('a script of the user')\n")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(tiny_study(place, methods=["head"], search={}, seeds=1)))
    done = subprocess.run(
        [sys.executable, "-m", "peft_lab", "compare", "study.yaml", "--workers", "1", "--output_dir", "out"],
        cwd=tmp_path,
        env=tiny_runs.environment(),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert "a script of the user" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
    assert all(record.ok for record in read_results(tmp_path / "out"))
