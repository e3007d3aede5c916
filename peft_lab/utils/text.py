"""Text for plots and for Markdown."""

from __future__ import annotations

import html
import re


def plain(label: str, limit: int = 28) -> str:
    """Shorten a label to one line of `limit` characters for a plot.

    Its dollar signs are escaped, because matplotlib takes them for formulas.
    """
    text = " ".join(label.split())
    if len(text) > limit:
        text = f"{text[: limit // 2]}…{text[-(limit - limit // 2 - 1) :]}"
    return text.replace("$", r"\$")


def markdown_text(text: str) -> str:
    """Escape text for Markdown: HTML, links, emphasis and table bars."""
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
