"""Comparisons under clocks that are set back and locks that cannot be opened."""

from __future__ import annotations

import socket
from collections import Counter
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from support.compare_helpers import PretendBackend, tiny_study

from peft_lab import WriteError, compare
from peft_lab.comparison.records.results import RESULTS, Journal
from peft_lab.comparison.run import worker
from peft_lab.comparison.run.progress import seconds


class SetBack(datetime):
    """A clock that goes back by an hour at every look."""

    looks = 0

    @classmethod
    def now(cls, tz: timezone | None = None) -> datetime:  # type: ignore[override]
        cls.looks += 1
        return datetime(2026, 1, 1, tzinfo=tz) - timedelta(hours=cls.looks)


class Failing(PretendBackend):
    """Fails every run, and the test itself once a run is made far too often."""

    def __init__(self) -> None:
        super().__init__(self.fail)

    def fail(self, run: object) -> float:
        assert len(self.runs) < 20, "runs that fail are repeated without end"
        raise RuntimeError("it broke")


def test_failed_runs_are_tried_again_once_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(tmp_path, methods=["lora"])
    monkeypatch.setattr(worker, "datetime", SetBack)
    for again in (False, True, True):
        backend = Failing()
        done = compare(study, tmp_path / "out", backend=backend, retry_failed=again, report=False)
        assert len(backend.runs) == 2
        assert len(done.failed) == 2
        assert all(seconds(record) >= 0 for record in done.records)
    assert len((tmp_path / "out" / RESULTS).read_text().splitlines()) == 6
    backend = PretendBackend(lambda run: 0.5)
    assert not compare(study, tmp_path / "out", backend=backend, retry_failed=True, report=False).failed
    assert len(backend.runs) == 2
    journal = Journal(tmp_path / "out")
    journal.read()
    assert Counter(journal.line_of.values()) == {7: 1, 8: 1}


@pytest.mark.parametrize("kind", ["comparison.json", "results.jsonl", "run"])
def test_a_lock_that_is_a_link_is_named(tmp_path: Path, kind: str) -> None:
    study, out = tiny_study(tmp_path, methods=["lora"]), tmp_path / "out"
    # made once, so that the names of the runs are known
    backend = Failing()
    compare(study, out, backend=backend, report=False)
    lock = out / f"{kind}.lock" if kind != "run" else worker.lock_file(out, backend.runs[0].id)
    lock.unlink(missing_ok=True)
    lock.symlink_to(tmp_path / "nowhere")
    with pytest.raises(WriteError, match=r"symbolic link; remove it") as refusal:
        compare(study, out, backend=PretendBackend(lambda run: 0.5), retry_failed=True, report=False)
    assert str(lock) in str(refusal.value)
    assert not (tmp_path / "nowhere").exists()
    lock.unlink()
    # left by a process that is gone, here or on another machine: the system holds no lock on it
    lock.write_text(f"1\n{socket.gethostname()}\n")
    assert not compare(study, out, backend=PretendBackend(lambda run: 0.5), retry_failed=True, report=False).failed
