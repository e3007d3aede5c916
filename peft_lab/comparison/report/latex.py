"""Tables for LaTeX, with the rules of booktabs, made by pandas."""

from __future__ import annotations

import pandas as pd

from peft_lab.comparison.report.tables import Table
from peft_lab.utils.text import visible

#: Characters that mean something to LaTeX, and how they are printed.
_COMMANDS = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "\\": "\\textbackslash{}",
        "<": "\\textless{}",
        ">": "\\textgreater{}",
        "|": "\\textbar{}",
    }
)


def latex_table(table: Table, caption: str, label: str) -> str:
    """Floating table for LaTeX; what is bold on the page is bold in it.

    Args:
        table: the table.
        caption: words below it.
        label: name for references.
    """
    texts, weights = [], []
    for line in (*table.rows, *table.footer):
        texts.append([_escaped(entry.text) for entry in line])
        weights.append(["font-weight: bold" if entry.strong else "" for entry in line])
    # numbers for heads, because two columns may have the same title
    frame, bold = pd.DataFrame(texts), pd.DataFrame(weights)
    heads = [_escaped(column.title) for column in table.columns]
    style = frame.style.hide(axis="index").apply(lambda _: bold, axis=None)
    style = style.format_index(lambda index: heads[index], axis="columns")
    text = str(
        style.to_latex(
            hrules=True,
            position="htbp",
            position_float="centering",
            column_format="".join("r" if column.numeric else "l" for column in table.columns),
            caption=_escaped(caption),
            label=label,
            convert_css=True,
        )
    )
    if not table.footer:
        return text.strip()
    written = text.strip().split("\n")
    end = written.index("\\bottomrule")
    written.insert(end - len(table.footer), "\\midrule")
    return "\n".join(written)


def _escaped(text: str) -> str:
    """Text in which LaTeX finds no command."""
    return " ".join(visible(text).split()).translate(_COMMANDS)
