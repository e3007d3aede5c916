"""Progress of a comparison: what was kept, what runs, the expected end, and seldom lines without a terminal."""

from __future__ import annotations

import time
from datetime import datetime, timedelta

import pytest
from support.compare_helpers import record

from peft_lab.comparison.run.progress import Progress


def timed(seed: int, seconds: float = 60.0, **changes):
    """A record of a run of so many seconds."""
    start = datetime(2026, 1, 1)
    times = {"started": start.isoformat(), "finished": (start + timedelta(seconds=seconds)).isoformat()}
    return record("lora", seed, **times, **changes)


def test_what_was_kept_is_said_once_and_gives_the_expected_end(capsys):
    with Progress("study", 30, 2) as progress:
        for seed in range(12):
            progress.done(timed(seed), fresh=False)
        progress.kept(12)
        end = datetime.now().astimezone() + timedelta(seconds=60 * 18 / 2)
        # a minute later on a slow machine is still right
        assert any(f"done at about {end + timedelta(minutes=more):%H:%M}" in progress._state() for more in (0, 1))
    assert capsys.readouterr().err.splitlines() == ["12 of 30 runs are there already."]


def test_lines_without_a_terminal_are_seldom_and_tell_of_each_failure(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress("study", 40, 1) as progress:
        progress.running(["lora seed 1"])
        for seed in range(40):
            clock[0] += 1.0
            progress.done(timed(seed, score=None if seed == 20 else 0.9), fresh=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[1/40] lora, words on tiny: seed 0")
    assert [line for line in lines if "it broke" in line] == [
        next(line for line in lines if line.startswith("[21/40]"))
    ]
    assert len(lines) == 4  # the first run, the failed one, one after 30 seconds, and the end
    assert "31 of 40 runs done, 1 running (lora seed 1), 1 failed, done at about" in lines[2]
    assert lines[-1].startswith("study: 40 of 40 runs done")


@pytest.mark.parametrize("names", [[], ["a seed 0"], [f"arm{index} seed 0" for index in range(9)]])
def test_runs_under_way_are_named_up_to_three(names):
    progress = Progress("study", 10, 9)
    progress.running(names)
    state = progress._state()
    assert state.startswith(f"{len(names)} running")
    assert sum(name in state for name in names) == min(3, len(names))
