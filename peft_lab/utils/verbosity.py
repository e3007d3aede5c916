"""Log lines, warnings and progress bars of a process, by its level.

Imports nothing heavy. The level and the switches of the bars are environment variables, so that the processes of a run
have them too.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from peft_lab.errors import ConfigError, did_you_mean, one_line

#: Variable that holds the level.
VARIABLE = "PEFT_LAB_VERBOSITY"
#: Warnings, errors and results alone; progress as well; what peft-lab and transformers do, step by step.
LEVELS = ("quiet", "normal", "verbose")

#: Variables that switch off the bars of tqdm, datasets, huggingface_hub and, by the last, transformers.
_BARS_OFF = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
_LOG_LEVELS = {"quiet": logging.WARNING, "normal": logging.INFO, "verbose": logging.DEBUG}
#: Categories of warnings for those who write code, here that of the libraries.
_FOR_PROGRAMMERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def level() -> str:
    """Return the level of this process, one of `LEVELS`.

    Raises:
        ConfigError: the variable holds something else.
    """
    value = os.environ.get(VARIABLE) or "normal"
    if value not in LEVELS:
        raise ConfigError(f'{VARIABLE}="{value}" must be one of {", ".join(LEVELS)}.{did_you_mean(value, LEVELS)}')
    return value


def shows_bars() -> bool:
    """Test whether progress bars have a terminal to be drawn on, and are wanted."""
    return level() != "quiet" and sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def set_variables(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables until the end of the block; None removes one."""
    before = {name: os.environ.get(name) for name in values}
    _put(values)
    try:
        yield
    finally:
        _put(before)


def _put(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def at_level(chosen: str | None = None) -> Iterator[None]:
    """Speak at a level until the end of the block.

    It must begin before torch and transformers are imported, because they read the variables once.

    Args:
        chosen: one of `LEVELS`; None for that of the environment.

    Raises:
        ConfigError: the environment names another level.
    """
    values: dict[str, str | None] = {} if chosen is None else {VARIABLE: chosen}
    with set_variables(values):
        now = level()
        with set_variables(_of_libraries(now)), bars(shows_bars()), _log_lines(now), _plain_warnings(now):
            yield


def _of_libraries(now: str) -> dict[str, str | None]:
    """Variables by which libraries speak at a level."""
    if now == "verbose":
        return {"TRANSFORMERS_VERBOSITY": "info"}
    # what torch's C++ warns of, such as DistributedDataParallel's search for unused parameters, is about its own calls
    return {} if "TORCH_CPP_LOG_LEVEL" in os.environ else {"TORCH_CPP_LOG_LEVEL": "ERROR"}


@contextmanager
def bars(wanted: bool, always: bool = False) -> Iterator[None]:
    """Draw progress bars or none until the end of the block.

    Args:
        wanted: whether to draw them.
        always: overrule variables that the environment sets.
    """
    values: dict[str, str | None] = {}
    for name in _BARS_OFF:
        if always or name not in os.environ:
            values[name] = None if wanted else "1"
    with set_variables(values):
        yield


@contextmanager
def _log_lines(now: str) -> Iterator[None]:
    """Print the records of peft-lab from a level on to standard error."""
    logger, handler = logging.getLogger("peft_lab"), logging.StreamHandler()
    detailed = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(detailed if now == "verbose" else "%(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(_LOG_LEVELS[now])
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def _plain_warnings(now: str) -> Iterator[None]:
    """Print warnings as one line each, without those for the programmers of libraries unless verbose."""
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning
        # `-W` and PYTHONWARNINGS come first, as their user wants
        if now != "verbose" and not sys.warnoptions:
            for category in _FOR_PROGRAMMERS:
                warnings.simplefilter("ignore", category)
        yield


@contextmanager
def without_deprecations_of_peft() -> Iterator[None]:
    """Ignore the deprecations of transformers that peft meets, because its users cannot change them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    where = f" ({filename}:{lineno})" if level() == "verbose" else ""
    target: Any = file or sys.stderr
    if target is not None:
        target.write(f"Warning: {one_line(str(message))}{where}\n")
