"""Output of the commands, for terminals and for pipes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any, TextIO

import typer
from rich.table import Table

from peft_lab.runs.command_line import OUTPUT
from peft_lab.utils import strict_json
from peft_lab.utils.terminal import PlainTable, SafeConsole
from peft_lab.utils.text import json_line


def print_out(content: str | Table) -> None:
    """Print a line with rich's markup, or a table, to standard output."""
    console = SafeConsole(highlight=False)
    if not console.is_terminal:
        # A pipe has no width: 80 columns would break the tables that scripts read.
        console = SafeConsole(highlight=False, width=160, soft_wrap=True)
    console.print(content)


def new_table(*columns: str, title: str | None = None) -> PlainTable:
    """Make a table that folds long cells instead of cutting them."""
    return PlainTable(*columns, title=title)


def format_metric(value: object) -> str:
    """Format a metric with four decimals, a count as it is, None as undefined."""
    if value is None:
        return "undefined"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


#: Standard outputs that commands with `--json` keep for their documents.
_KEPT: list[TextIO] = []


@contextmanager
def json_alone() -> Iterator[None]:
    """Send all output but that of `print_json` to standard error until the end of the block."""
    _KEPT.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _KEPT.pop()


def _begin_json(context: typer.Context, wanted: bool) -> bool:
    if wanted and not context.resilient_parsing:
        context.with_resource(json_alone())
    return wanted


#: Option `--json` of a command.
Json = Annotated[bool, typer.Option("--json", callback=_begin_json, help=OUTPUT["json"])]


def print_json(document: Any) -> None:
    """Print a document as one line of JSON, the only output of a command with `--json`."""
    # a number that is not finite has no form in JSON, and neither has a dtype among metrics
    values = json.loads(strict_json.dumps(document))
    typer.echo(json_line(values), file=_KEPT[-1] if _KEPT else None)
