"""Text for terminals, plots, Markdown and CSV.

Names come from files of anybody, so each place gets them in a form that it cannot take for a command.
"""

from __future__ import annotations

import html
import json
import logging
import re
from typing import Any

from peft_lab.errors import CONTROL, one_line, visible

__all__ = [
    "VisibleRecords",
    "csv_cell",
    "json_line",
    "markdown_code",
    "markdown_text",
    "one_line",
    "plain",
    "visible",
]

#: First characters, full width ones included, of what a spreadsheet takes for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def json_line(value: Any) -> str:
    """Write a value as one line of JSON without control characters."""
    # JSON has its own escape for them, so the value that is read back is the same
    text = json.dumps(value, ensure_ascii=False)
    return CONTROL.sub(lambda found: json.dumps(found[0]).strip('"').replace("\x7f", "\\u007f"), text)


def csv_cell(value: Any) -> Any:
    """Mark a text that a spreadsheet would take for a formula.

    Numbers stay, negative ones included.
    """
    if not isinstance(value, str):
        return value
    text = visible(value)
    # a spreadsheet takes what follows an apostrophe as text
    return f"'{text}" if value.startswith(_FORMULA) else text


def plain(label: str, limit: int = 28) -> str:
    """Shorten a label to one line of `limit` characters for a plot.

    Its dollar signs are escaped, because matplotlib takes them for formulas.
    """
    text = one_line(label)
    if len(text) > limit:
        text = f"{text[: limit // 2]}…{text[-(limit - limit // 2 - 1) :]}"
    return text.replace("$", r"\$")


def markdown_text(text: str) -> str:
    """Escape text for Markdown: HTML, links, emphasis and table bars."""
    line = " ".join(visible(str(text)).split())
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(line, quote=False))


def markdown_code(text: object) -> str:
    """Put text between backticks, which it cannot leave, for a page or a table."""
    line = " ".join(visible(str(text)).split())
    return f"`{line.replace('`', chr(39))}`".replace("|", "\\|")


class VisibleRecords(logging.Filter):
    """Filter that lets no control character of a log message through."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Put the visible text in the place of message and arguments."""
        record.msg, record.args = visible(record.getMessage()), ()
        return True
