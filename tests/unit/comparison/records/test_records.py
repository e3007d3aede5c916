"""Records: lines of committed results are read and written unchanged; a run becomes a record without loss."""

from __future__ import annotations

import json
import pickle
import subprocess
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from peft_lab.comparison import read_results
from peft_lab.comparison.records.results import RESULTS, append_record, repair
from peft_lab.comparison.records.run import Record, Run, RunInfo
from peft_lab.comparison.records.search_budget import search_budgets
from peft_lab.comparison.run.worker import Job, Start, commit, record_of
from peft_lab.errors import ConfigError

ROOT = Path(__file__).resolve().parents[4]
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob(f"*/{RESULTS}"))

#: Keys of a line, in their order.
KEYS = (
    *("id", "study", "stage", "arm", "method", "task", "backbone", "seed", "learning_rate", "status", "method_args"),
    *("tuned", "round", "beyond", "error", "started", "finished", "folder", "options", "metrics", "measures"),
    *("curves", "environment"),
)


def planned(**changes: object) -> Run:
    values = {
        "id": "0123",
        "study": "study",
        "stage": "final",
        "arm": "lora",
        "method": "lora",
        "task": "words",
        "backbone": "tiny",
        "seed": 1,
        "learning_rate": 1e-3,
        "status": "planned",
        "tuned": {"r": 8},
        "options": {"max_steps": 3, "hub_token": "secret"},
        "cost": True,
    }
    return Run(**{**values, **changes})


@pytest.mark.full
@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.parent.name)
def test_committed_results_are_read_and_written_unchanged(file: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    records = read_results(file.parent)
    assert [record.id for record in records] == [line["id"] for line in lines]
    for record, line in zip(records, lines, strict=True):
        append_record(tmp_path, record)
        assert {name: value for name, value in asdict(record).items() if name in line} == line
    written = [json.loads(line) for line in (tmp_path / RESULTS).read_text().splitlines()]
    assert read_results(tmp_path) == records
    assert {tuple(line) for line in written} == {KEYS}
    # a study without a search has none
    assert bool(search_budgets(records)) == any(record.stage == "search" for record in records)


def test_a_record_holds_all_of_its_run(tmp_path: Path) -> None:
    run = planned()
    record = record_of(run, Start.now(), status="ok", metrics={"main_metric": "accuracy"})
    own = {"status", "started", "finished", "folder", "options"}
    for name in {each.name for each in fields(RunInfo)} - own:
        assert getattr(record, name) == getattr(run, name)
    assert record.options == {"max_steps": 3}  # no token reaches the file
    assert (record.folder, record.ok, record.main_metric) == ("runs/0123", True, "accuracy")
    append_record(tmp_path, record)
    assert read_results(tmp_path) == [record]
    assert tuple(json.loads((tmp_path / RESULTS).read_text())) == KEYS


def test_a_job_travels_to_another_process() -> None:
    job = Job("run", "/folder", planned(), threads=2)
    assert pickle.loads(pickle.dumps(job)) == job


def test_keys_of_a_later_version_are_ignored_and_other_lines_refused(tmp_path: Path) -> None:
    record = record_of(planned(), Start.now(), status="ok")
    (tmp_path / RESULTS).write_text(json.dumps({**asdict(record), "later": 1}) + "\n")
    assert read_results(tmp_path) == [record]
    for line in ("{}", "[]", "no json", '{"id": "0123"}'):
        (tmp_path / RESULTS).write_text(f"{line}\n")
        with pytest.raises(
            ConfigError, match=r'line 1 of ".*results.jsonl" (is not a record|is not readable JSON|must hold)'
        ):
            read_results(tmp_path)


def test_an_incomplete_line_is_cut_off(tmp_path: Path) -> None:
    append_record(tmp_path, record_of(planned(), Start.now(), status="ok"))
    whole = (tmp_path / RESULTS).read_bytes()
    (tmp_path / RESULTS).write_bytes(whole + b'{"id": "half')
    assert len(read_results(tmp_path)) == 1
    assert repair(tmp_path)
    assert (tmp_path / RESULTS).read_bytes() == whole
    assert not repair(tmp_path)


def test_the_commit_of_a_checkout() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert commit().removesuffix("+changes") == head.stdout.strip()


def test_a_record_is_no_run() -> None:
    assert {each.name for each in fields(Record)} & {"shifted", "control", "cost", "launcher"} == set()
