"""Options of every command: the level of what is said, progress bars, the version, exit statuses."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import typer
import typer.main
from support.compare_helpers import record

from peft_lab import __version__
from peft_lab.cli import doctor, lookup
from peft_lab.cli.app import STATUSES, app
from peft_lab.cli.options import with_level
from peft_lab.errors import ConfigError
from peft_lab.utils import verbosity

COMMANDS = typer.main.get_command(app).commands
BARS = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in (verbosity.VARIABLE, "TRANSFORMERS_VERBOSITY", "TORCH_CPP_LOG_LEVEL", *BARS):
        monkeypatch.delenv(name, raising=False)


def run(monkeypatch, *arguments: str) -> int:
    from peft_lab.cli import main

    monkeypatch.setattr(sys, "argv", ["peft-lab", *arguments])
    with pytest.raises(SystemExit) as leaving:
        main()
    return leaving.value.code or 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_level_options(name):
    options = [option for parameter in COMMANDS[name].params for option in parameter.opts]
    assert {"--quiet", "--verbose"} <= set(options)
    assert len(options) == len(set(options))


@pytest.mark.parametrize(
    ("arguments", "level"),
    [
        (["tasks"], "normal"),
        (["--quiet", "tasks"], "quiet"),
        (["tasks", "--quiet"], "quiet"),
        (["tasks", "--verbose"], "verbose"),
        (["--quiet", "tasks", "--verbose"], "verbose"),
    ],
    ids=str,
)
def test_a_level_is_taken_before_and_after_the_command(arguments, level, monkeypatch):
    seen = []
    monkeypatch.setattr("peft_lab.data.task_registry.list_tasks", lambda: seen.append(verbosity.level()) or {})
    assert run(monkeypatch, *arguments) == 0
    assert seen == [level]
    assert verbosity.VARIABLE not in os.environ  # the level ends with the command


def test_both_levels_at_once_are_refused(monkeypatch, capsys):
    assert run(monkeypatch, "tasks", "--quiet", "--verbose") == 2
    assert "leave one out" in capsys.readouterr().err


def test_a_wrong_level_in_the_environment_is_refused(monkeypatch, capsys):
    monkeypatch.setenv(verbosity.VARIABLE, "quite")
    assert run(monkeypatch, "tasks") == 2
    assert '"quiet"' in capsys.readouterr().err


def test_the_wrapper_keeps_name_help_and_options():
    wrapped = with_level(lookup.methods)
    assert wrapped.__name__ == "methods"
    assert wrapped.__doc__ == lookup.methods.__doc__


@pytest.mark.parametrize(
    ("level", "levels_said"), [("quiet", ["WARNING"]), ("normal", ["INFO", "WARNING"]), ("verbose", None)]
)
def test_log_records_are_said_from_the_level_on(level, levels_said, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    logger = logging.getLogger("peft_lab")
    before = (logger.level, list(logger.handlers))
    with verbosity.at_level(level):
        for number in (logging.DEBUG, logging.INFO, logging.WARNING):
            logger.log(number, logging.getLevelName(number))
        assert os.environ.get("TRANSFORMERS_VERBOSITY") == ("info" if level == "verbose" else None)
    assert (logger.level, logger.handlers) == before
    said = screen.getvalue().splitlines()
    if levels_said is None:
        assert [line.rsplit(" ", 1)[-1] for line in said] == ["DEBUG", "INFO", "WARNING"]
        assert all("peft_lab" in line for line in said)
    else:
        assert said == levels_said


def test_warnings_are_one_line_and_those_for_programmers_are_left_out(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "warnoptions", [])
    for level, expected in (("normal", ["Warning: your input"]), ("quiet", ["Warning: your input"]), ("verbose", None)):
        screen.truncate(0)
        screen.seek(0)
        with verbosity.at_level(level):
            if level == "verbose":
                warnings.simplefilter("always")
            for category in (UserWarning, DeprecationWarning, FutureWarning):
                warnings.warn("your\ninput" if category is UserWarning else "old name", category, stacklevel=1)
        said = screen.getvalue().splitlines()
        assert len(said) == 3 if expected is None else said == expected


@pytest.mark.parametrize(
    ("screen", "level", "drawn"),
    [
        (Terminal(), "normal", True),
        (Terminal(), "quiet", False),
        (io.StringIO(), "normal", False),
        (io.StringIO(), "verbose", False),
        (None, "normal", False),  # as under pythonw
    ],
)
def test_bars_are_drawn_on_a_terminal_alone(screen, level, drawn, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen)
    with verbosity.at_level(level):
        assert [name in os.environ for name in BARS] == [not drawn] * 3
    assert not any(name in os.environ for name in BARS)


def test_a_user_who_sets_the_bars_is_obeyed(monkeypatch):
    monkeypatch.setenv(BARS[1], "0")
    with verbosity.at_level("quiet"):
        assert os.environ[BARS[1]] == "0"
        with verbosity.bars(False, always=True):
            assert os.environ[BARS[1]] == "1"
        with verbosity.bars(True, always=True):
            assert not any(name in os.environ for name in BARS)


def test_trainer_draws_bars_as_the_process_does(monkeypatch):
    from peft_lab.training import arguments

    def disabled(**flags):
        values = {"task": "snips", "model_name_or_path": "m", "method": "lora", "output_dir": "o", "use_cpu": True}
        config = arguments.as_run_config(None, {**values, **flags})
        return arguments.training_arguments(config, config.check()).disable_tqdm

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert disabled() is True
    assert disabled(disable_tqdm=False) is False
    monkeypatch.setattr(arguments, "is_in_notebook", lambda: True)  # whose standard error is no terminal
    assert disabled() is False
    monkeypatch.setenv(verbosity.VARIABLE, "quiet")
    assert disabled() is True
    monkeypatch.delenv(verbosity.VARIABLE)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(arguments, "is_in_notebook", lambda: False)
    assert disabled() is False


def test_a_flag_that_is_to_go_is_told_to_its_user():
    from peft_lab.training import arguments

    values = {"task": "snips", "model_name_or_path": "m", "method": "lora", "output_dir": "o", "use_cpu": True}
    config = arguments.as_run_config(None, {**values, "gradient_checkpointing": True})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore", FutureWarning)
        arguments.training_arguments(config, config.check())
    assert ["activation_checkpointing" in str(each.message) for each in said] == [True]


@pytest.mark.parametrize("level", ["quiet", "normal"])
def test_a_comparison_says_how_far_it_is_unless_quiet(level, monkeypatch, capsys):
    from peft_lab.comparison.run.progress import Progress

    monkeypatch.setenv(verbosity.VARIABLE, level)
    with Progress("study", 2, 1) as progress:
        progress.done(record("lora", 0), fresh=True)
    assert bool(capsys.readouterr().err) == (level == "normal")


def test_the_version_is_printed(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"peft-lab {__version__}\n"


def fail(error: BaseException):
    def command(*_: object) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["methods"], 0), (["doctor"], 1), (["methods", "svfitt"], 2), (["tasks", "--no-such-option"], 2)],
    ids=str,
)
def test_exit_statuses_are_those_that_are_told(arguments, status, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "findings", lambda: iter([doctor.Finding("failed", "a thing")]))
    assert run(monkeypatch, *arguments) == status
    assert "Traceback" not in capsys.readouterr().err


def test_an_error_that_was_not_foreseen_is_raised(monkeypatch):
    """Python ends with status 1 then, and prints where it happened."""
    from peft_lab.cli import main

    monkeypatch.setattr(sys, "argv", ["peft-lab", "tasks"])
    monkeypatch.setattr("peft_lab.data.task_registry.list_tasks", fail(RuntimeError("a fault of peft-lab")))
    with pytest.raises(RuntimeError):
        main()


def test_help_and_page_tell_every_exit_status(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    help_text = " ".join(capsys.readouterr().out.split())
    page = (Path(__file__).parents[3] / "docs" / "command_line.md").read_text(encoding="utf-8")
    for number, meaning in STATUSES.items():
        assert f"{number} {meaning}" in help_text
        assert re.search(rf"^\| {number} \| {re.escape(meaning)} \|$", page, re.MULTILINE)


def test_a_level_that_cannot_be_is_one_sentence():
    with pytest.raises(ConfigError, match="one of quiet, normal, verbose"), verbosity.at_level("loud"):
        pass
