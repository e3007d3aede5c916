"""Text for plots and for Markdown."""

from __future__ import annotations

import html
import re


def plain(label: str, limit: int = 28) -> str:
    """A label on one line, shortened in its middle to `limit`, in which matplotlib finds no formula."""
    text = " ".join(label.split())
    if len(text) > limit:
        text = f"{text[: limit // 2]}…{text[-(limit - limit // 2 - 1) :]}"
    return text.replace("$", r"\$")


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, links, emphasis or table bars of its own."""
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
