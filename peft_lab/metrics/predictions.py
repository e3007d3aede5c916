"""What was found for each scored row of a task: items.csv in the folder of a run. Imports nothing heavy."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_lab.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

ITEMS = "items.csv"


@dataclass(frozen=True)
class Items:
    """What was found for each scored test row, in the order of the rows.

    Attributes:
        kind: "classification" (columns reference, prediction: class indices; confidence: probability of the predicted
            class), "regression" (reference, prediction: values) or "causal_lm" (loss: sum of the negative
            log-probabilities of the answer's tokens, tokens: their number, hits: tokens predicted right, and, for
            each metric of what the model writes that the task has, its value, by its name).
        columns: name -> array with one number for each row.
    """

    kind: str
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    @property
    def correct(self) -> np.ndarray | None:
        """1.0 where a classifier is right or a written answer matches, else 0.0; None if nothing is either."""
        if self.kind == "classification":
            return (self.columns["reference"] == self.columns["prediction"]).astype(float)
        return self.columns.get("exact_match")


def write_items(folder: str | Path, items: Items) -> None:
    """Write items.csv into a run's folder: the number of the row and a column each; the kind stands in the head."""
    path = Path(folder) / ITEMS
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f"{items.kind}:row", *items.columns])
        for row, values in enumerate(zip(*items.columns.values(), strict=True)):
            writer.writerow([row, *(f"{value:.9g}" for value in values)])
    os.replace(partial, path)


def read_item_file(path: Path) -> Items:
    """The items in one items.csv; raises `ConfigError` if it is missing or not one."""
    import numpy as np

    if not path.is_file():
        raise ConfigError(f'There is no "{path}": that run was not scored on the test rows.')
    with path.open(encoding="utf-8", newline="") as file:
        head = next(csv.reader(file), [""])
        kind, colon, _ = head[0].partition(":")
        if not colon:
            raise ConfigError(f'"{path}" is not a file of items: its first column must be "KIND:row".')
        values = np.loadtxt(file, delimiter=",", ndmin=2, usecols=range(1, len(head)))
    if not len(values):
        values = np.empty((0, len(head) - 1))
    return Items(kind, dict(zip(head[1:], values.T, strict=True)))
