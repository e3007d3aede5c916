"""Runs of a comparison as a pandas DataFrame, and as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from peft_lab.comparison.records.run import Record
from peft_lab.metrics.baselines import baselines_of
from peft_lab.utils.text import csv_cell

#: Fields of a record in the first columns, and in the last ones.
SETTINGS = ("id", "study", "stage", "arm", "method", "task", "backbone", "seed", "learning_rate", "round", "status")
ENDING = ("folder", "error")


def run_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Runs with their scores and measures.

    Returns:
        One row for each run. Columns: `SETTINGS`, "tuned_NAME" for each tuned argument, "SPLIT_METRIC" for each score,
        each measure, `ENDING`. The values are Python objects as in the records, None if a run has none.
    """
    return pd.concat(
        [
            _attributes(records, SETTINGS),
            _frame([record.tuned for record in records]).add_prefix("tuned_"),
            _frame([_flat_scores(record) for record in records]),
            _frame([record.measures for record in records]),
            _attributes(records, ENDING),
        ],
        axis="columns",
    )


def results_frame(records: Sequence[Record], stage: str | None = None) -> pd.DataFrame:
    """Runs as a frame to compute with: `run_frame` with the dtypes of its values, and what else they have measured.

    Args:
        records: of a comparison.
        stage: "search" or "final" for the runs of that stage alone; None for all.

    Returns:
        One row for each run, in the order of the records, with an index of its own. Columns as in `run_frame`, and
        before the last ones "main_metric", "baseline", the score of the best baseline in that metric on the test rows,
        "beats_baseline", "wall_seconds" and "steps". A number that a run does not have is NaN.
    """
    chosen = [record for record in records if stage in (None, record.stage)]
    frame = run_frame(chosen)
    further = _frame([_further(record) for record in chosen])
    ending = frame.shape[1] - len(ENDING)
    whole = pd.concat([frame.iloc[:, :ending], further, frame.iloc[:, ending:]], axis="columns")
    # the columns of objects become int64, float64 or str; None among numbers becomes NaN
    return whole.apply(lambda column: pd.Series(column.tolist(), dtype=None if len(column) else object))


def _further(record: Record) -> dict[str, Any]:
    known = baselines_of(record.metrics, "test", record.main_metric)
    return {
        "main_metric": record.main_metric or None,
        "baseline": known[0][1] if known else None,
        "beats_baseline": record.metrics.get("beats_baseline"),
        "wall_seconds": record.metrics.get("wall_seconds"),
        "steps": record.steps,
    }


def _attributes(records: Sequence[Record], names: Sequence[str]) -> pd.DataFrame:
    columns = {}
    for name in names:
        columns[name] = [getattr(record, name) for record in records]
    return pd.DataFrame(columns, dtype=object)


def _flat_scores(record: Record) -> dict[str, float]:
    scores = {}
    for split, metrics in record.scores.items():
        for name, value in metrics.items():
            scores[f"{split}_{name}"] = value
    return scores


def _frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of different keys as a frame, its columns in alphabetical order."""
    columns: dict[str, list[Any]] = {}
    # the order of columns does not depend on the order of runs
    for name in sorted(set().union(*rows)):
        columns[name] = [row.get(name) for row in rows]
    # objects, so that a count stays a whole number where another run has none
    return pd.DataFrame(columns, index=range(len(rows)), dtype=object)


def results_csv(records: Sequence[Record]) -> str:
    """All runs with their scores and measures as CSV, one line each."""
    frame = run_frame(records)
    columns = {}
    for position in range(frame.shape[1]):
        # not DataFrame.map, which makes floats of the counts of a column that lacks some; by position, because a
        # measure may have the name of a score
        columns[position] = pd.Series([_csv_value(value) for value in frame.iloc[:, position]], dtype=object)
    head = [csv_cell(name) for name in frame.columns]
    return str(pd.DataFrame(columns).to_csv(index=False, header=head, lineterminator="\n"))


def _csv_value(value: Any) -> Any:
    """Value that a spreadsheet does not take for a formula.

    A score that is not a number is written as nan, a missing one is left empty.
    """
    # pandas would leave nan empty too, like a score that is missing
    return "nan" if value is not None and value != value else csv_cell(value)
