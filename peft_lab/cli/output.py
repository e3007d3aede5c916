"""Output of the commands, for terminals and for pipes."""

from __future__ import annotations

from typing import Any

import typer
from rich.table import Table

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


def print_json(document: Any) -> None:
    """Print a document as one line of JSON, the only output of a command with `--json`."""
    # a number that is not finite has no form in JSON
    typer.echo(json_line(strict_json.finite(document)))
