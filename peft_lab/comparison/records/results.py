"""Files of a comparison: results.jsonl and the predictions of final runs.

A folder of a comparison holds study.yaml, results.jsonl and `runs/ID`, one folder for each run: the adapter, its
metrics.json and, if the run was scored on the test rows, items.csv. Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from peft_lab.comparison.records.run import Record
from peft_lab.errors import ConfigError
from peft_lab.metrics import predictions as row_predictions
from peft_lab.metrics.predictions import Predictions
from peft_lab.utils import strict_json

RESULTS, STUDY, COMPARISON, RUNS = "results.jsonl", "study.yaml", "comparison.json", "runs"

_FIELDS = frozenset(each.name for each in fields(Record))


def read_results(folder: str | Path) -> list[Record]:
    """Read the records of a comparison, in their order.

    Of a run that was repeated, the last record counts. Runs that the study no longer has are left out if
    comparison.json says which it has. An incomplete last line, left by a killed process, is passed over.

    Raises:
        ConfigError: there is no results.jsonl, or a line in it is not a record.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise ConfigError(f'"{folder}" holds no {RESULTS}; name the output_dir of a comparison.')
    journal = Journal(folder)
    journal.read()
    # a study may have shrunk, but its journal keeps every run
    included = Path(folder) / COMPARISON
    if not included.is_file():
        return list(journal.records.values())
    ids = set(json.loads(included.read_text(encoding="utf-8"))["runs"])
    return [record for record in journal.records.values() if record.id in ids]


class Journal:
    """Reader of a results.jsonl that grows.

    Attributes:
        records: id -> record, the last one of each.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / RESULTS
        self._position = self._lines = 0
        self.records: dict[str, Record] = {}

    def read(self) -> None:
        """Read the lines added since the last call.

        An incomplete line is left for the next call.
        """
        if not self._path.is_file():
            return
        # bytes, because a position in a text file is not a count of its characters
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                # another process may be writing this line
                if not line.endswith(b"\n"):
                    break
                self._position += len(line)
                self._lines += 1
                record = _parsed(line.decode("utf-8", errors="replace"), f'line {self._lines} of "{self._path}"')
                self.records[record.id] = record


def _parsed(line: str, where: str) -> Record:
    """Parse a line; keys of a later version are ignored."""
    try:
        # a record of an earlier version lacks fields that have defaults
        values: Mapping[str, Any] = json.loads(line)
        return Record(**{name: value for name, value in values.items() if name in _FIELDS})
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where} is not a record of a comparison: {error}.") from error


def append_record(folder: str | Path, record: Record) -> None:
    """Append a record to results.jsonl and flush it to the disk.

    Processes that write at the same time wait for one another.
    """
    path = Path(folder) / RESULTS
    # one write of one line, so that a killed process leaves at most one incomplete line
    line = strict_json.dumps(asdict(record)) + "\n"
    with FileLock(f"{path}.lock"):
        # otherwise the record would be joined to what a killed process left, and neither could be read
        _cut_incomplete_line(path)
        with path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def repair(folder: str | Path) -> bool:
    """Cut off an incomplete last line, left by a killed process.

    Returns True if there was one.
    """
    path = Path(folder) / RESULTS
    with FileLock(f"{path}.lock"):
        return _cut_incomplete_line(path)


def _cut_incomplete_line(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        # search backwards for the last newline, block by block: a file of many runs is not read as a whole
        while position:
            size = min(position, 1 << 16)
            file.seek(position - size)
            newline = file.read(size).rfind(b"\n")
            if newline >= 0:
                position = position - size + newline + 1
                break
            position -= size
        if position < end:
            file.truncate(position)
            os.fsync(file.fileno())
        return position < end


def read_predictions(folder: str | Path, record: Record) -> Predictions:
    """Read the predictions of a record's test rows.

    Raises:
        ConfigError: the run was not scored on the test rows, or its folder is gone.
    """
    return row_predictions.read_predictions(Path(folder) / record.folder / row_predictions.PREDICTIONS)
