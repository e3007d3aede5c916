"""Predictions for each scored row: `items.csv` in a run's folder."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_lab.errors import ConfigError
from peft_lab.utils.atomic_files import new_file
from peft_lab.utils.bounded_files import first_line, read_bytes

if TYPE_CHECKING:
    import numpy as np

#: Name of the file in a run's folder.
PREDICTIONS = "items.csv"
_MAX_BYTES, _MAX_COLUMNS = 64 * 2**20, 64


@dataclass(frozen=True)
class Predictions:
    """Predictions for each scored test row, in the order of the rows.

    Attributes:
        output_type: "classification" (columns reference, prediction: class indices; confidence: probability of the
            predicted class), "multiple_choice" (the same of positions of choices), "regression" (reference,
            prediction: values), "multi_label" (true, found, hits: numbers of labels; exact: 1 where the set of labels
            is right; and of metrics that are no sums over rows their value over all rows and without each row),
            "token_classification" (tokens: words of the row, hits: those with the right tag, and the numbers of
            true_entities, predicted_entities and correct_entities), "question_answering" (f1, exact_match: their
            values), "image_segmentation" (hits: pixels predicted right, pixels: those that count, mean_iou: a value
            whose mean is the metric and whose spread is that of its jackknife) or the name of a kind that predicts
            tokens (loss: sum of the negative log-probabilities of the answer's tokens, tokens: their number, hits:
            tokens predicted right, and, for each metric of what the model writes that the task has, its value, by its
            name, or the counts that it is computed from).
        columns: name -> array with one number for each row, (n,).
    """

    output_type: str
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    @property
    def correct(self) -> np.ndarray | None:
        """1.0 where a prediction is correct, else 0.0, (n,).

        That is the class, the set of labels, or a written answer that matches; None if none is known.
        """
        if self.output_type in ("classification", "multiple_choice"):
            return (self.columns["reference"] == self.columns["prediction"]).astype(float)
        return self.columns.get("exact" if self.output_type == "multi_label" else "exact_match")

    @property
    def classes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Class indices of reference and prediction, (n,) each; None if a row has no single class.

        None too if a file holds numbers that are no indices.
        """
        import numpy as np

        if self.output_type != "classification" or not len(self):
            return None
        pair = np.stack([self.columns["reference"], self.columns["prediction"]])
        # not a test of the dtype, because a file gives back whole numbers as floats
        whole = np.isfinite(pair).all() and (pair >= 0).all() and (pair == np.floor(pair)).all()
        return (pair[0].astype(int), pair[1].astype(int)) if whole else None


def write_predictions(folder: str | Path, predictions: Predictions) -> None:
    """Write the predictions into a run's folder.

    The file has the number of the row and a column each; its head holds the output type.
    """
    with new_file(Path(folder) / PREDICTIONS) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f"{predictions.output_type}:row", *predictions.columns])
        for row, values in enumerate(zip(*predictions.columns.values(), strict=True)):
            # nine digits bring back a float32 exactly
            writer.writerow([row, *(f"{value:.9g}" for value in values)])


def read_predictions(path: Path) -> Predictions:
    """Read the predictions of one file.

    Raises:
        ConfigError: the file is missing, or not one of predictions.
    """
    import numpy as np

    if not path.exists():
        raise ConfigError(f'There is no "{path}": that run was not scored on the test rows.')
    try:
        file = io.StringIO(read_bytes(path, _MAX_BYTES).decode("utf-8"), newline="")
        head = next(csv.reader(file), [""])
        output_type, colon, _ = head[0].partition(":")
        if not colon or len(head) > _MAX_COLUMNS:
            raise ConfigError(f'"{path}" is not a file of items: its first column must be "KIND:row".')
        values = np.loadtxt(file, delimiter=",", ndmin=2, usecols=range(1, len(head)))
    except (ValueError, csv.Error) as error:
        # a ConfigError is a ValueError too, and says already what is wrong
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f'"{path}" is not a file of items: {first_line(error)}.') from error
    if not len(values):
        values = np.empty((0, len(head) - 1))  # a file without rows has its columns all the same
    return Predictions(output_type, dict(zip(head[1:], values.T, strict=True)))
