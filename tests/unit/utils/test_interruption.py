"""SIGINT and SIGTERM end a command with one line, and restore what was there before."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from peft_lab.utils.interruption import Stopped, going_on, signals_as_stops, stopped_in_one_line

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_one_line_and_the_exit_code_of_shells(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as leaving, stopped_in_one_line(), going_on(lambda: "Stopped; go on."):
        os.kill(os.getpid(), number)
    assert leaving.value.code == 128 + number
    assert capfd.readouterr().err == "Stopped; go on.\n"
    assert signal.getsignal(number) is before


def test_one_process_of_a_distributed_run_speaks(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Stopped), stopped_in_one_line():
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""


def test_the_innermost_hint_counts_and_others_pass() -> None:
    with pytest.raises(Stopped) as stop, going_on(lambda: "outer"), going_on(lambda: "inner"):
        raise Stopped(signal.SIGINT)
    assert stop.value.hint == "inner"
    with pytest.raises(KeyError), going_on(lambda: "unused"):
        raise KeyError


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_at_once_and_an_ignored_one_change_nothing(number: int) -> None:
    stops = 0
    with signals_as_stops():
        for _ in range(2):
            with contextlib.suppress(Stopped):
                os.kill(os.getpid(), number)
                stops -= 1
            stops += 1
    assert stops == 1
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with signals_as_stops():
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)
