"""Answers of a prediction beside their inputs, as JSON lines, CSV or Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_lab.errors import ConfigError
from peft_lab.utils import strict_json
from peft_lab.utils.atomic_files import check_can_be_made, new_file, new_folder
from peft_lab.utils.text import json_line

#: Endings of files of answers.
OUTPUT_FILES = (".jsonl", ".csv", ".parquet")
#: Name of an answer that is no mapping, such as a text that a model has written.
PREDICTION = "prediction"


def answer_line(row: Any, answer: Any) -> dict[str, Any]:
    """Echo of an input with its answer, whose keys stand beside it; images in the answer are left out."""
    found = answer if isinstance(answer, Mapping) else {PREDICTION: answer}
    found = {name: value for name, value in found.items() if not _is_image(value)}
    return {"input": _echo(row), **strict_json.finite(found)}


def check_output(file: str | Path, overwrite: bool, images: Sequence[str] = ()) -> Path:
    """Path of a file of answers, checked before any work.

    Args:
        file: the path.
        overwrite: what is there may be replaced.
        images: keys of answers that are images, which get a folder each beside the file.

    Raises:
        ConfigError: another ending than `OUTPUT_FILES`, or a file or folder is there and may not be replaced.
        WriteError: it cannot be made.
    """
    path = Path(file).expanduser()
    if not path.name.lower().endswith(OUTPUT_FILES):
        raise ConfigError(f'The output file "{file}" must end with {", ".join(OUTPUT_FILES)}.')
    if path.is_dir():
        raise ConfigError(f'The output file "{file}" is a folder; name a file in it.')
    if path.exists() and not overwrite:
        raise ConfigError(f'"{file}" is there already; pass --overwrite to replace it, or name another --output.')
    for folder in [_image_folder(path, name) for name in images]:
        if folder.exists() and not overwrite:
            raise ConfigError(
                f'"{folder}" is there already; pass --overwrite to write into it, or name another --output.'
            )
    check_can_be_made(path)
    return path


def write_answers(path: Path, rows: Sequence[Any], answers: Sequence[Any]) -> None:
    """Write answers beside their inputs, all of them or nothing.

    JSON lines are those of `answer_line`. Tables have the columns of the inputs, or one called "input", and then those
    of the answers; a name that both have becomes `predicted_NAME`. What is no number or text is JSON in a CSV cell. An
    image becomes the name of a PNG file, relative to the file of answers.

    Raises:
        WriteError: the disk refuses.
    """
    answers = _with_image_files(path, answers)
    with new_file(path) as partial:
        if path.suffix.lower() == ".jsonl":
            lines = [json_line(answer_line(row, answer)) + "\n" for row, answer in zip(rows, answers, strict=True)]
            partial.write_text("".join(lines), encoding="utf-8")
            return
        import pandas as pd

        table = _table(rows, answers)
        if path.suffix.lower() == ".parquet":
            pd.DataFrame(table).to_parquet(partial, index=False)
        else:
            pd.DataFrame(table).map(_cell).to_csv(partial, index=False)


def _with_image_files(path: Path, answers: Sequence[Any]) -> list[Any]:
    """Answers whose images are names of files, which are written into a folder for each key."""
    found = [dict(answer) if isinstance(answer, Mapping) else answer for answer in answers]
    keys = dict.fromkeys(
        key for answer in found if isinstance(answer, dict) for key in answer if _is_image(answer[key])
    )
    for key in keys:
        folder = _image_folder(path, key)
        with new_folder(folder) as partial:
            for number, answer in enumerate(found, start=1):
                name = f"{number:0{len(str(len(found)))}}.png"
                answer[key].save(partial / name)
                answer[key] = f"{folder.name}/{name}"
    return found


def _image_folder(path: Path, key: str) -> Path:
    return path.with_name(f"{path.stem}_{key}")


def _is_image(value: Any) -> bool:
    from PIL import Image

    return isinstance(value, Image.Image)


def _table(rows: Sequence[Any], answers: Sequence[Any]) -> list[dict[str, Any]]:
    lines = []
    for row, answer in zip(rows, answers, strict=True):
        line = answer_line(row, answer)
        echo = line.pop("input")
        given = dict(echo) if isinstance(echo, Mapping) else {"input": echo}
        lines.append((given, line))
    taken = {name for given, _ in lines for name in given}
    found = []
    for given, line in lines:
        named = {f"predicted_{name}" if name in taken else name: value for name, value in line.items()}
        found.append({**given, **named})
    return found


def _echo(row: Any) -> Any:
    """Value that stands for an input: the input itself, or the name of the file in it."""
    if isinstance(row, Mapping):
        # the bytes of a file would make a line of megabytes
        if row.keys() == {"bytes", "path"}:
            return row["path"]
        return {str(name): _echo(value) for name, value in row.items()}
    if isinstance(row, list | tuple):
        return [_echo(value) for value in row]
    if row is None or isinstance(row, str | int | float | bool):
        return strict_json.finite(row)
    return str(row) if isinstance(row, Path) else type(row).__name__


def _cell(value: Any) -> Any:
    return json_line(value) if isinstance(value, list | dict) else value
