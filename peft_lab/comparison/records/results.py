"""Files of a comparison: results.jsonl and the predictions of final runs.

A folder of a comparison holds study.yaml, results.jsonl and `runs/ID`, one folder for each run: the adapter, its
metrics.json and, if the run was scored on the test rows, items.csv. Imports nothing heavy.
"""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from peft_lab.comparison.records.run import Record
from peft_lab.errors import ConfigError
from peft_lab.metrics import predictions as row_predictions
from peft_lab.metrics.predictions import Predictions
from peft_lab.runs.metrics_schema import check_form
from peft_lab.utils import strict_json
from peft_lab.utils.bounded_files import MAX_JSON_BYTES, check_size, parse_json, read_json

RESULTS, STUDY, COMPARISON, RUNS = "results.jsonl", "study.yaml", "comparison.json", "runs"

_FIELDS = frozenset(each.name for each in fields(Record))
_RECORD = TypeAdapter(Record)
_MAX_BYTES, _MAX_RECORDS = 512 * 2**20, 50_000


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
    runs = read_json(included).get("runs")
    if not isinstance(runs, list) or not all(isinstance(run, str) for run in runs):
        raise ConfigError(f'"{included}" must hold a list of the runs of the comparison under "runs".')
    ids = set(runs)
    return [record for record in journal.records.values() if record.id in ids]


class Journal:
    """Reader of a results.jsonl that grows.

    Attributes:
        records: id -> record, the last one of each.
        line_of: id -> number of that record's line, from 1.
        lines: number of lines that were read.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / RESULTS
        self._position = self.lines = 0
        self.records: dict[str, Record] = {}
        self.line_of: dict[str, int] = {}

    def read(self) -> None:
        """Read the lines added since the last call.

        An incomplete line is left for the next call.
        """
        if not self._path.is_file():
            return
        check_size(self._path, _MAX_BYTES)
        # bytes, because a position in a text file is not a count of its characters
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in iter(partial(file.readline, MAX_JSON_BYTES), b""):
                if len(line) == MAX_JSON_BYTES:
                    raise ConfigError(f'Line {self.lines + 1} of "{self._path}" is too long for a record.')
                # another process may be writing this line
                if not line.endswith(b"\n"):
                    break
                self._position += len(line)
                self.lines += 1
                record = _parsed(line, f'line {self.lines} of "{self._path}"')
                self.records[record.id] = record
                self.line_of[record.id] = self.lines
                if len(self.records) > _MAX_RECORDS:
                    raise ConfigError(f'"{self._path}" holds more than {_MAX_RECORDS:,} runs.')

    def standing(self, run_id: str, retry_until: int = 0) -> Record | None:
        """Record of a run that is not to be repeated; None if there is none.

        Args:
            run_id: the run.
            retry_until: failures up to this line are to be tried again. Lines tell what came first, which times do not
                once a clock was set back.
        """
        record = self.records.get(run_id)
        return record if record is not None and (record.ok or self.line_of[run_id] > retry_until) else None


def _parsed(line: bytes, where: str) -> Record:
    """Parse a line; keys of a later version are ignored."""
    # a run that diverged may have NaN among its curves
    values = parse_json(line, where, lenient=True)
    known = {name: value for name, value in values.items() if name in _FIELDS}
    try:
        # a record of an earlier version lacks fields that have defaults
        record = _RECORD.validate_python(known)
    except ValidationError as failure:
        first = failure.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f'{where} is not a record of a comparison: "{key}", {first["msg"]}.') from failure
    check_form(record.metrics, f'"metrics" in {where}')
    # files of the folder are read and written below this name
    if Path(record.folder).is_absolute() or ".." in Path(record.folder).parts or "\0" in record.folder:
        raise ConfigError(f'{where} names the folder "{record.folder}", which lies outside of the comparison.')
    return record


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
    path = Path(folder) / record.folder / row_predictions.PREDICTIONS
    _check_inside(path, Path(folder))
    return row_predictions.read_predictions(path)


#: File of a run's folder with the out-of-distribution scores of each row, `NAME.own` and `NAME.other`, float64 (n,).
OOD_SCORES = "ood_scores.safetensors"


def read_ood_scores(folder: str | Path, record: Record) -> dict[str, Any] | None:
    """Read the out-of-distribution scores of the rows of a record.

    Returns:
        None if the run has left none, or its folder is gone.

    Raises:
        ConfigError: the file is not one of scores.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(folder) / record.folder / OOD_SCORES
    if not path.is_file():
        return None
    _check_inside(path, Path(folder))
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(
            f'"{path}" is not a file of scores: {error}; remove it, or run the comparison again.'
        ) from error


def _check_inside(path: Path, folder: Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f'"{path}" leads out of the comparison by a link; replace it by the file itself.')
