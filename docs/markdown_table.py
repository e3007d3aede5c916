"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Table of cells, of which each is put on one line."""
    lines = [f"| {' | '.join(head)} |", f"|{' - |' * len(head)}"]
    lines += [f"| {' | '.join(' '.join(cell.split()).replace('|', 'or') for cell in row)} |" for row in rows]
    return "\n".join(lines)
