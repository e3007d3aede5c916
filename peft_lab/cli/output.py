"""Output of the commands, for terminals and for pipes."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def print_out(content: str | Table) -> None:
    """Print a line with rich's markup, or a table, to standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        # A pipe has no width: 80 columns would break the tables that scripts read.
        console = Console(highlight=False, width=160, soft_wrap=True)
    console.print(content)


def new_table(*columns: str, title: str | None = None) -> Table:
    """Make a table that folds long cells instead of cutting them."""
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns:
        column.overflow = "fold"
    return table


def format_metric(value: object) -> str:
    """Format a metric with four decimals, a count as it is, None as undefined."""
    if value is None:
        return "undefined"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
