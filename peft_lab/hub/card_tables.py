"""Tables of a model card: scores beside their baselines, scores of the classes, confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_lab.metrics.baselines import baselines_of
from peft_lab.metrics.class_scores import class_scores, confusion
from peft_lab.metrics.predictions import Predictions
from peft_lab.utils.text import markdown_text

#: Most classes in the table of classes, the worst ones where there are more, and in the confusion matrix.
MAX_CLASSES, MAX_CONFUSION = 30, 12


@dataclass(frozen=True)
class CardTable:
    """Table in Markdown, with the words before it."""

    words: str
    lines: str


def score_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table of scores: split, metric, value, and the best baseline of that metric.

    Args:
        metrics: content of metrics.json.
    """
    rows = []
    for split, values in metrics["metrics"].items():
        for name, value in values.items():
            known = baselines_of(metrics, split, name)
            beside = f"{known[0][1]:.4f} ({known[0][0]})" if known else "-"
            rows.append([markdown_text(cell) for cell in (split, name, _value(value), beside)])
    return rows


def class_tables(items: Predictions | None, labels: Sequence[str] | None) -> list[CardTable]:
    """Scores of the classes, and the confusion matrix of few classes.

    Args:
        items: predictions for each test row.
        labels: names of the classes, by index.

    Returns:
        Empty where a row has no single class.
    """
    scores = class_scores(items, labels) if items is not None and labels else None
    if items is None or not labels or scores is None:
        return []
    words = f"Classes on the {len(items):,} test rows:"
    if len(scores) > MAX_CLASSES:
        scores = sorted(scores, key=lambda each: each.f1)[:MAX_CLASSES]
        words = f"The {MAX_CLASSES} of {len(labels)} classes with the lowest F1 on the {len(items):,} test rows:"
    rows = [[each.label, *_decimals(each.precision, each.recall, each.f1), f"{each.support:,}"] for each in scores]
    found = [CardTable(words, _lines(["class", "precision", "recall", "F1", "rows"], rows))]
    counts = confusion(items, labels)
    if counts is not None and len(labels) <= MAX_CONFUSION:
        rows = [[label, *map(str, line)] for label, line in zip(labels, counts.tolist(), strict=True)]
        words = "Confusion matrix, a line for each true class and a column for each predicted one:"
        found.append(CardTable(words, _lines(["true class", *labels], rows)))
    return found


def _value(value: Any) -> str:
    if value is None:
        return "undefined"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _decimals(*values: float) -> list[str]:
    return [f"{value:.3f}" for value in values]


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [list(map(markdown_text, line)) for line in (head, *rows)]
    cells.insert(1, ["---", *["---:"] * (len(head) - 1)])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
