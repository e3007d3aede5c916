"""Consoles and tables of rich that show names of anybody as plain text."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_lab.utils.text import visible


class SafeConsole(Console):
    """Console that prints no control character of its texts.

    Markup in a text is still read: names within it go through `shown`.
    """

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts by their visible characters, and anything else as rich does."""
        super().print(*(visible(each) if isinstance(each, str) else each for each in objects), **options)


class PlainTable(Table):
    """Table whose titles and cells are plain text, folded where they are long."""

    def __init__(self, *columns: str, title: str | None = None) -> None:
        super().__init__(title=None if title is None else shown(title), title_justify="left")
        for column in columns:
            self.add_column(shown(column), overflow="fold")

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; rich would take brackets in a cell for its own markup."""
        super().add_row(*(shown(cell) for cell in cells), **options)


def shown(text: object) -> str:
    """Escape a text for a line with rich's markup."""
    return escape(visible(str(text)))
