"""Reading of csv and JSON files, for training and for predictions.

Every cell is the text that stands in the file: no number, date or missing value is made of it. Of JSON, true and false
stay truth values and null a missing one.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lab.data.row_checks import numbered
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]

#: Counts up when the same file is read otherwise, because `datasets` keeps what was read.
_VERSION = 1


def read_rows(
    builder: str, files: Sequence[str | Path], options: Mapping[str, Any] | None = None, bare: bool = False
) -> list[Any]:
    """Rows of files, in order, as mappings of their columns.

    Args:
        builder: `csv`, `json`, `parquet`, or `text` with one text a line.
        files: paths; packed ones (`.gz`, `.zip`, ...) are unpacked.
        options: options of the builder, as in a task file.
        bare: hand on rows of JSON that are texts or lists, as inputs of a prediction may be.

    Raises:
        TaskError: a file cannot be read, or a row does not have the cells of its header.
    """
    rows: list[Any] = []
    for name in files:
        for path in _unpacked(str(name)):
            try:
                found = _READERS[builder](path, options or {})
                rows += found if bare else _objects(found)
            except TaskError as error:
                raise TaskError(f'"{name}": {error}') from error
            # csv and datasets raise errors of many classes, and all of them are about the file
            except (OSError, ValueError, TypeError, LookupError, RecursionError, csv.Error) as error:
                raise TaskError(f'"{name}" cannot be read as {builder}: {" ".join(str(error).split())}.') from error
    return rows


def as_dataset(rows: Sequence[Row], columns: Sequence[str]) -> Dataset:
    """Data set of some columns of rows, kept in the cache of `datasets`.

    Raises:
        TaskError: a column holds values of several kinds.
    """
    from datasets import Dataset, Features

    features = Features({name: _feature(name, _column(rows, name)) for name in columns})
    # named by content, so that a file that was changed is read again, and one that was copied is not
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(json.dumps([row.get(name) for name in columns]).encode())
    digest.update(json.dumps([_VERSION, str(features)]).encode())
    if not rows:
        return Dataset.from_dict({name: [] for name in columns}, features=features)

    def chosen() -> Iterator[Row]:
        for row in rows:
            yield {name: row.get(name) for name in columns}

    return Dataset.from_generator(chosen, features=features, fingerprint=digest.hexdigest())


def _column(rows: Sequence[Row], name: str) -> list[Any]:
    return [row.get(name) for row in rows]


def column_names(rows: Sequence[Row]) -> list[str]:
    """Names of the columns of rows, in order of appearance."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
    return list(names)


def _unpacked(name: str) -> list[str]:
    import datasets

    manager = datasets.DownloadManager()
    return list(manager.iter_files([manager.extract(name)]))


def _open(path: str, options: Mapping[str, Any], newline: str | None = None) -> Any:
    # utf-8-sig leaves out the mark that some programs write first
    return open(path, encoding=options.get("encoding") or "utf-8-sig", newline=newline)


def _objects(rows: list[Any]) -> list[Row]:
    """Rows as mappings; a list of texts is one of rows with the column `text`."""
    wrong = [number for number, row in enumerate(rows) if not isinstance(row, (dict, str))]
    if wrong:
        raise TaskError(f"{len(wrong)} of {len(rows)} rows are no objects ({numbered(wrong)}).")
    for number, row in enumerate(rows):
        if isinstance(row, str):
            rows[number] = {"text": row}
    return rows


def _csv_rows(path: str, options: Mapping[str, Any]) -> list[Row]:
    """Rows of a csv file; each must have as many cells as the header."""
    # the module's own limit of 128 kB would refuse long texts
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # in reading, quoting matters for "none" alone: the values of csv's QUOTE_NONNUMERIC would become numbers
    style = {
        "delimiter": options.get("delimiter", ","),
        "quotechar": options.get("quotechar", '"'),
        "quoting": csv.QUOTE_NONE if options.get("quoting") == "none" else csv.QUOTE_MINIMAL,
    }
    # csv needs the line ends as they are, because a quoted cell may hold some
    with _open(path, options, newline="") as file:
        lines = islice(file, options.get("skiprows", 0), None)
        reader = csv.reader(lines, strict=True, **style)
        names = list(options.get("column_names") or next(reader, ()))
        double = next((name for name in names if name and names.count(name) > 1), None)
        if double is not None:
            raise TaskError(f'the column "{double}" is there twice; rename one.')
        cells = _with_blank_cells(reader, len(names))
        wrong = [row for row, values in enumerate(cells) if len(values) != len(names)]
    if wrong:
        raise TaskError(
            f"{len(wrong)} of {len(cells)} rows do not have the {len(names)} cells of the header "
            f"({numbered(wrong)}; the first has {len(cells[wrong[0]])}); put texts that hold "
            f'"{style["delimiter"]}" in quotes.'
        )
    # programs that number their rows write a first column without a name
    rows = [dict(zip(names, values, strict=True)) for values in cells]
    for row in rows:
        row.pop("", None)
    return rows


def _with_blank_cells(lines: Iterator[list[str]], width: int) -> list[list[str]]:
    """Cells of lines; a blank line is an empty cell where there is one column, and no row elsewhere."""
    found: list[list[str]] = []
    blank = 0
    for cells in lines:
        if not cells:
            blank += width == 1
            continue
        # blank lines at the end of a file are none of its rows
        found += [[""]] * blank
        found.append(cells)
        blank = 0
    return found


def _text_rows(path: str, options: Mapping[str, Any]) -> list[Row]:
    with _open(path, options) as file:
        lines = [line.rstrip("\n") for line in file]
    # blank lines at the end are none of the texts
    while lines and not lines[-1].strip():
        lines.pop()
    return [{"text": line} for line in lines]


def _parquet_rows(path: str, options: Mapping[str, Any]) -> list[Row]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def _json_rows(path: str, options: Mapping[str, Any]) -> list[Any]:
    """Rows of JSON lines, of a list of objects, or of an object with a list for each column."""
    with _open(path, options) as file:
        text = file.read()
    if options.get("field"):
        value = _decode(text)
        if not isinstance(value, dict) or options["field"] not in value:
            raise TaskError(f'there is no field "{options["field"]}".')
        return _json_table(value[options["field"]])
    if text.lstrip().startswith("["):
        return _json_table(_decode(text))
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(_decode(line))
        except ValueError as error:
            # one object over several lines holds columns
            if not rows and line.strip() in ("{", "{ "):
                return _json_table(_decode(text))
            raise TaskError(f"line {number} is not JSON: {error}.") from error
    return _json_table(rows)


def _json_table(value: Any) -> list[Any]:
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise TaskError("the columns have different numbers of rows.")
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise TaskError("it must hold a list of rows, or one row a line.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the key "{double}" is there twice')
    return found


def _constant(text: str) -> str | None:
    # programs write NaN for a value that is missing
    return None if text == "NaN" else text


_decode: Callable[[str], Any] = json.JSONDecoder(
    object_pairs_hook=_once, parse_float=str, parse_int=str, parse_constant=_constant
).decode

_READERS: dict[str, Callable[[str, Mapping[str, Any]], list[Any]]] = {
    "csv": _csv_rows,
    "json": _json_rows,
    "parquet": _parquet_rows,
    "text": _text_rows,
}


#: dtype of `datasets` for values of each class; those of JSON are texts and truth values.
_DTYPES = {str: "string", bool: "bool", int: "int64", float: "float64"}


def _feature(name: str, values: Sequence[Any]) -> Any:
    """Feature of `datasets` for the values of a column, which must be of one type."""
    from datasets import List, Value

    given = [value for value in values if value is not None]
    types = {type(value) for value in given} or {str}
    if len(types) == 1 and types <= _DTYPES.keys():
        return Value(_DTYPES[types.pop()])
    if types == {list}:
        return List(_feature(name, [entry for value in given for entry in value]))
    if types == {dict}:
        return {key: _feature(f"{name}.{key}", _column(given, key)) for key in column_names(given)}
    held = ", ".join(sorted(kind.__name__ for kind in types))
    raise TaskError(f'the column "{name}" holds values of the types {held}; write all of them as text.')
