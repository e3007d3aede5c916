"""Inputs of a prediction: texts, files, folders, patterns of file names, files of rows, and standard input.

What a folder or a pattern means depends on what the kind of task reads: `Kind.input_files` says which files are inputs
themselves; where there are none, inputs are texts. Imports nothing heavy, except to read a file of rows.
"""

from __future__ import annotations

import glob
import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lab.data.read_files import decode_json, read_rows
from peft_lab.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from peft_lab.data.kind import Kind
    from peft_lab.data.task_schema import Task

logger = logging.getLogger("peft_lab")

#: Name of standard input among the inputs of a command.
STANDARD_INPUT = "-"
#: Endings of files of inputs -> builder and options that read them. They may be packed, as `.csv.gz`.
INPUT_FILES: dict[str, tuple[str, dict[str, str]]] = {
    ".txt": ("text", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}


def read_inputs(inputs: Sequence[Any], endings: Sequence[str] = ()) -> list[Any]:
    """Inputs as given, with the rows of files, the files of folders and of patterns in their places.

    Args:
        inputs: texts, files, folders, patterns such as `scans/*.png`, or files of rows (`INPUT_FILES`).
        endings: endings of the files that are inputs themselves, see `Kind.input_files`; empty for texts.

    Raises:
        ConfigError: a file or folder is not there, holds no input, or files of rows stand beside other inputs.
        TaskError: a file of rows cannot be read, or a row does not have the cells of its header.
    """
    expanded: list[Any] = []
    for value in inputs:
        expanded += _expanded(value, endings) if isinstance(value, str | Path) else [value]
    # a file may be an input itself, whatever its ending means for other kinds
    others = [value for value in expanded if not str(value).lower().endswith(tuple(endings))] if endings else expanded
    # a text may end like the name of a file of rows, so among several inputs only those that are there count
    rows = [value for value in others if _row_ending(value) and (len(expanded) == 1 or os.path.isfile(_path(value)))]
    if not rows:
        _check_files(expanded, endings)
        return expanded
    if len(rows) < len(expanded):
        raise ConfigError(f'"{rows[0]}" is a file of inputs, which must be the only input, or stand beside others.')
    found: list[Any] = []
    for value in rows:
        found += _rows_of(Path(_path(value)))
    _check_files(found, endings)
    return found


def read_standard_input(lines: Iterable[str], endings: Sequence[str] = ()) -> list[Any]:
    """Inputs from lines: one a line, or JSON lines if the first one is a JSON object.

    Args:
        lines: the lines; blank ones are passed over.
        endings: as for `read_inputs`.

    Raises:
        ConfigError: there is no input, a line of JSON is damaged or no object, or a file is not there.
    """
    numbered = [(number, line.rstrip("\r\n")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ConfigError("Standard input holds no input; give one a line, or JSON lines.")
    if not _is_object(numbered[0][1]):
        found: list[Any] = [line for _, line in numbered]
        _check_files(found, endings)
        return found
    rows = []
    for number, line in numbered:
        if not _is_object(line):
            raise ConfigError(f"Line {number} of standard input is no JSON object, as the lines before it are.")
        rows.append(decode_json(line))
    return rows


def input_columns(row: Any, task: Task, number: int) -> Any:
    """Input columns of a mapping; an input of another type is returned as it is.

    The columns may have the canonical names or those of the task's own data; further columns are left out. A file that
    a row holds by its bytes, as Parquet files of `datasets` do, becomes an open file.

    Raises:
        ConfigError: the row lacks a column.
    """
    if not isinstance(row, Mapping):
        return row
    chosen, missing = {}, []
    for name in task.inputs:
        source = task.columns[name]
        if name in row:
            chosen[name] = _opened(row[name])
        elif source in row:
            chosen[name] = _opened(row[source])
        elif name.partition("[")[0] in row:
            # one list in place of several columns
            chosen[name.partition("[")[0]] = row[name.partition("[")[0]]
        else:
            missing.append(name)
    if missing:
        raise ConfigError(f"Row {number} of the inputs lacks {', '.join(sorted(missing))}; it has {', '.join(row)}.")
    # a template refers to its columns by name, so it needs the mapping even if there is only one
    if len(chosen) == 1 and task.template is None:
        return next(iter(chosen.values()))
    return chosen or row


def check_top_k(top_k: int | None, kind: Kind, task: Task, labels: Sequence[str] | None) -> None:
    """Check the number of labels to answer with.

    Args:
        top_k: the number; None for the best label alone.
        kind, task: kind and task of the adapter.
        labels: its class names; None if they are not known yet.

    Raises:
        ConfigError: the kind ranks no labels, or there are not that many.
    """
    if top_k is None:
        return
    if not kind.ranks_labels or task.problem_type == "regression":
        what = "a regression" if kind.ranks_labels else f'of kind "{kind.name}"'
        raise ConfigError(f'"top_k" is for tasks of labels or choices; task "{task.name}" is {what}.')
    if top_k < 1:
        raise ConfigError(f'"top_k" must be at least 1, got {top_k}.')
    if labels is not None and top_k > len(labels):
        raise ConfigError(f'"top_k" must be at most the number of labels, {len(labels)}; got {top_k}.')


def _expanded(value: str | Path, endings: Sequence[str]) -> list[Any]:
    """Files that an input stands for, or the input itself."""
    path = _path(value)
    # a single word may be a text and, by chance, the name of a folder here
    if os.path.isdir(path) and (endings or isinstance(value, Path) or os.sep in value):
        return _files_below(Path(path), endings)
    # a text is a pattern only where it ends as a file of rows does: "is it raining?" has a sign of patterns too
    is_pattern = glob.has_magic(path) and not os.path.exists(path) and bool(endings or _row_ending(value))
    if not is_pattern:
        return [value]
    matches = sorted(found for found in glob.glob(path, recursive=True) if os.path.isfile(found))
    # without a match a text remains a text; a name of files cannot be anything else
    if not matches and endings:
        raise ConfigError(f'No file matches "{value}".')
    return [*matches] or [value]


def _files_below(folder: Path, endings: Sequence[str]) -> list[str]:
    """Files of a folder and the folders in it that are inputs, by name."""
    if not endings:
        raise ConfigError(
            f'"{folder}" is a folder, and this kind of task reads texts; name a file of them, which ends with '
            f"{', '.join(INPUT_FILES)}."
        )
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    found = [str(path) for path in files if path.name.lower().endswith(tuple(endings))]
    if not found:
        raise ConfigError(f'"{folder}" holds no file to predict for; these end with {", ".join(endings)}.')
    if len(found) < len(files):
        logger.warning(
            '%d of %d files in "%s" are left out, because they do not end with %s.',
            len(files) - len(found),
            len(files),
            folder,
            ", ".join(endings),
        )
    return found


def _rows_of(path: Path) -> list[Any]:
    if not os.path.isfile(path):
        raise ConfigError(f'There is no input file "{path}".')
    builder, options = INPUT_FILES[_row_ending(path)]
    rows: list[Any] = read_rows(builder, [path], options, bare=True)
    if not rows:
        raise ConfigError(f'"{path}" holds no input.')
    return [row["text"] for row in rows] if builder == "text" else rows


def _row_ending(value: Any) -> str:
    """Ending of a file of rows; empty for other inputs."""
    if not isinstance(value, str | Path):
        return ""
    name = str(value).lower().removesuffix(".gz")
    return next((ending for ending in INPUT_FILES if name.endswith(ending)), "")


def _check_files(values: Sequence[Any], endings: Sequence[str]) -> None:
    """Check that inputs which must be files are there, before a model is loaded for them."""
    for value in values if endings else ():
        # a text of several lines, such as a point cloud, is the input itself
        named = isinstance(value, str | Path) and "\n" not in str(value)
        if named and not os.path.isfile(_path(value)):
            folder = Path(_path(value)).parent
            near = did_you_mean(Path(value).name, [path.name for path in folder.iterdir()]) if folder.is_dir() else ""
            raise ConfigError(f'There is no file "{value}" to predict for.{near}')


def _path(value: str | Path) -> str:
    return os.path.expanduser(value)


def _is_object(line: str) -> bool:
    try:
        return isinstance(decode_json(line), dict)
    except ValueError:
        return False


def _opened(value: Any) -> Any:
    if isinstance(value, Mapping) and value.keys() == {"bytes", "path"}:
        return io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
    return value
