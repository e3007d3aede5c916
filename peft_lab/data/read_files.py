"""Reading of csv and JSON files, for training and for predictions.

Every cell is the text that stands in the file: no number, date or missing value is made of it. Of JSON, true and false
stay truth values and null a missing one.
"""

from __future__ import annotations

import codecs
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
        for path in unpacked(str(name)):
            try:
                found = _READERS[builder](path, options or {})
                rows += found if bare else _objects(found)
            except TaskError as error:
                raise TaskError(f'"{name}": {error}') from error
            except UnicodeError as error:
                raise TaskError(_not_utf8(str(name), path, error)) from error
            # csv and datasets raise errors of many classes, and all of them are about the file
            except (OSError, ValueError, TypeError, LookupError, RecursionError, csv.Error) as error:
                raise TaskError(f'"{name}" cannot be read as {builder}: {" ".join(str(error).split())}.') from error
    return rows


def stream_rows(builder: str, name: str | Path, options: Mapping[str, Any] | None = None) -> Iterator[Row]:
    """Rows of one file, read one after the other.

    Args:
        builder: `csv`, `json` (lines of it), `parquet` or `text`.
        name: path; a packed one is unpacked first.
        options: options of the builder.

    Raises:
        TaskError: the file cannot be read, or a row is not as the first ones are.
    """
    for path in unpacked(str(name)):
        try:
            yield from _STREAMS[builder](path, options or {})
        except TaskError as error:
            raise TaskError(f'"{name}": {error}') from error
        except UnicodeError as error:
            raise TaskError(_not_utf8(str(name), path, error)) from error
        except (OSError, ValueError, TypeError, LookupError, RecursionError, csv.Error) as error:
            raise TaskError(f'"{name}" cannot be read as {builder}: {" ".join(str(error).split())}.') from error


def in_memory(rows: Sequence[Row], columns: Sequence[str]) -> Dataset:
    """Data set of some columns of a few rows.

    Raises:
        TaskError: a column holds values of several kinds.
    """
    from datasets import Dataset

    return Dataset.from_dict({name: _column(rows, name) for name in columns}, features=_features(rows, columns))


def as_dataset(rows: Sequence[Row], columns: Sequence[str]) -> Dataset:
    """Data set of some columns of rows, kept in the cache of `datasets`.

    Raises:
        TaskError: a column holds values of several kinds.
    """
    from datasets import Dataset

    features = _features(rows, columns)
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


def _features(rows: Sequence[Row], columns: Sequence[str]) -> Any:
    from datasets import Features

    return Features({name: _feature(name, _column(rows, name)) for name in columns})


def _column(rows: Sequence[Row], name: str) -> list[Any]:
    return [row.get(name) for row in rows]


def column_names(rows: Sequence[Row]) -> list[str]:
    """Names of the columns of rows, in order of appearance."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
    return list(names)


def unpacked(name: str) -> list[str]:
    """Paths of the files that a packed one holds; of any other, its own."""
    import datasets

    manager = datasets.DownloadManager()
    return list(manager.iter_files([manager.extract(name)]))


def _open(path: str, options: Mapping[str, Any], newline: str | None = None) -> Any:
    # utf-8-sig leaves out the mark that some programs write first
    return open(path, encoding=options.get("encoding") or "utf-8-sig", newline=newline)


def guess_encoding(path: str) -> str | None:
    """Encoding of a text file that is not UTF-8; None for one that is."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    with open(path, "rb") as file:
        mark = file.read(2)
        file.seek(0)
        try:
            while block := file.read(1 << 20):
                decode(block)
            decode(b"", final=True)
            return None
        except UnicodeDecodeError:
            if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                return "utf-16"
        # Windows has quotes and dashes at codes that Latin-1 leaves to control characters
        file.seek(0)
        return "cp1252" if any(0x80 <= byte <= 0x9F for byte in file.read(1 << 24)) else "latin-1"


def _not_utf8(name: str, path: str, error: UnicodeError) -> str:
    """Sentence about a file whose bytes are not of its encoding, with the mend."""
    tried = str(getattr(error, "encoding", "") or "utf-8")
    line = 0
    with open(path, "rb") as file:
        for data in file:
            line += 1
            try:
                data.decode(tried)
            except UnicodeError:
                break
    encoding = guess_encoding(path) or "utf-8"
    return (
        f'"{name}" is not in the encoding {tried} (line {line}); name its own in the task file, such as '
        f"`options: {{encoding: {encoding}}}`."
    )


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
    with _open(path, options, newline="") as file:
        names, cells = _csv_cells(file, options)
        lines = list(cells)
    wrong = [row for row, values in enumerate(lines) if len(values) != len(names)]
    if wrong:
        raise TaskError(
            f"{len(wrong)} of {len(lines)} rows do not have the {len(names)} cells of the header "
            f"({numbered(wrong)}; the first has {len(lines[wrong[0]])}); {_quote_texts(options)}"
        )
    return [_csv_row(names, values) for values in lines]


def _csv_stream(path: str, options: Mapping[str, Any]) -> Iterator[Row]:
    with _open(path, options, newline="") as file:
        names, cells = _csv_cells(file, options)
        for number, values in enumerate(cells, start=1):
            if len(values) != len(names):
                raise TaskError(
                    f"row {number} does not have the {len(names)} cells of the header, but {len(values)}; "
                    f"{_quote_texts(options)}"
                )
            yield _csv_row(names, values)


def _csv_cells(file: Any, options: Mapping[str, Any]) -> tuple[list[str], Iterator[list[str]]]:
    """Names of the columns of a csv file, and the cells of its rows."""
    # the module's own limit of 128 kB would refuse long texts
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # in reading, quoting matters for "none" alone: the values of csv's QUOTE_NONNUMERIC would become numbers
    style = {
        "delimiter": options.get("delimiter", ","),
        "quotechar": options.get("quotechar", '"'),
        "quoting": csv.QUOTE_NONE if options.get("quoting") == "none" else csv.QUOTE_MINIMAL,
    }
    # csv needs the line ends as they are, because a quoted cell may hold some
    reader = csv.reader(islice(file, options.get("skiprows", 0), None), strict=True, **style)
    names = list(options.get("column_names") or next(reader, ()))
    double = next((name for name in names if name and names.count(name) > 1), None)
    if double is not None:
        raise TaskError(f'the column "{double}" is there twice; rename one.')
    return names, _with_blank_cells(reader, len(names))


def _csv_row(names: Sequence[str], values: Sequence[str]) -> Row:
    row = dict(zip(names, values, strict=True))
    # programs that number their rows write a first column without a name
    row.pop("", None)
    return row


def _quote_texts(options: Mapping[str, Any]) -> str:
    return f'put texts that hold "{options.get("delimiter", ",")}" in quotes.'


def _with_blank_cells(lines: Iterator[list[str]], width: int) -> Iterator[list[str]]:
    """Cells of lines; a blank line is an empty cell where there is one column, and no row elsewhere."""
    blank = 0
    for cells in lines:
        if not cells:
            blank += width == 1
            continue
        # blank lines at the end of a file are none of its rows
        for _ in range(blank):
            yield [""]
        blank = 0
        yield cells


def _text_rows(path: str, options: Mapping[str, Any]) -> list[Row]:
    return list(_text_stream(path, options))


def _text_stream(path: str, options: Mapping[str, Any]) -> Iterator[Row]:
    blank: list[str] = []
    with _open(path, options) as file:
        for line in file:
            blank.append(line.rstrip("\n"))
            # blank lines at the end are none of the texts
            if line.strip():
                yield from ({"text": text} for text in blank)
                blank = []


def _parquet_rows(path: str, options: Mapping[str, Any]) -> list[Row]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def _parquet_stream(path: str, options: Mapping[str, Any]) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=100):
            yield from batch.to_pylist()


def _json_stream(path: str, options: Mapping[str, Any]) -> Iterator[Row]:
    """Rows of JSON lines; the form of a whole list or table needs all of a file."""
    with _open(path, options) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = decode_json(line)
            except ValueError as error:
                raise TaskError(f"line {number} is not JSON: {error}; a stream needs one row a line.") from error
            if not isinstance(row, (dict, str)):
                raise TaskError(f"line {number} is no object, and a stream needs one row a line.")
            yield {"text": row} if isinstance(row, str) else row


def _json_rows(path: str, options: Mapping[str, Any]) -> list[Any]:
    """Rows of JSON lines, of a list of objects, or of an object with a list for each column."""
    with _open(path, options) as file:
        text = file.read()
    if options.get("field"):
        value = decode_json(text)
        if not isinstance(value, dict) or options["field"] not in value:
            raise TaskError(f'there is no field "{options["field"]}".')
        return _json_table(value[options["field"]])
    if text.lstrip().startswith("["):
        return _json_table(decode_json(text))
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(decode_json(line))
        except ValueError as error:
            # one object over several lines holds columns
            if not rows and line.strip() in ("{", "{ "):
                return _json_table(decode_json(text))
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


#: Parser of JSON text by which every number stays the text that stands in it; raises `ValueError`.
decode_json: Callable[[str], Any] = json.JSONDecoder(
    object_pairs_hook=_once, parse_float=str, parse_int=str, parse_constant=_constant
).decode

_READERS: dict[str, Callable[[str, Mapping[str, Any]], list[Any]]] = {
    "csv": _csv_rows,
    "json": _json_rows,
    "parquet": _parquet_rows,
    "text": _text_rows,
}

_STREAMS: dict[str, Callable[[str, Mapping[str, Any]], Iterator[Row]]] = {
    "csv": _csv_stream,
    "json": _json_stream,
    "parquet": _parquet_stream,
    "text": _text_stream,
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
