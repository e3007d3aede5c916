"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from peft_lab.cli.completion import complete_backbone
from peft_lab.errors import ConfigError
from peft_lab.runs.command_line import OUTPUT
from peft_lab.utils.verbosity import at_level

Adapter = Annotated[str, typer.Argument(help="Folder that `peft-lab train` wrote, or a Hub id.", show_default=False)]
Base = Annotated[
    str | None,
    typer.Option(
        "--model_name_or_path",
        autocompletion=complete_backbone,
        help="Load this base instead of the one the adapter names.",
    ),
]
OtherBase = Annotated[
    bool, typer.Option("--allow_other_base", help="Warn instead of refusing if the base has other weights.")
]
BatchSize = Annotated[int, typer.Option("--per_device_eval_batch_size", help="Rows in one batch.")]
Quiet = Annotated[bool, typer.Option("--quiet", help=OUTPUT["quiet"])]
Verbose = Annotated[bool, typer.Option("--verbose", help=OUTPUT["verbose"])]


def chosen_level(quiet: bool, verbose: bool) -> str | None:
    """Level of the two flags; None without either.

    Raises:
        ConfigError: both are given.
    """
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose exclude each other; leave one out.")
    return "quiet" if quiet else "verbose" if verbose else None


def with_level(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options `--quiet` and `--verbose`, and run it at their level."""
    signature = inspect.signature(command, eval_str=True)
    added = {"quiet": Quiet, "verbose": Verbose}

    @functools.wraps(command)
    def run(*args: Any, quiet: bool = False, verbose: bool = False, **options: Any) -> Any:
        with at_level(chosen_level(quiet, verbose)):
            return command(*args, **options)

    parameters = list(signature.parameters.values())
    for name, annotation in added.items():
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation))
    # typer reads both
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run
