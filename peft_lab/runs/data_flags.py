"""Options that name data instead of a task, as in the example scripts of Hugging Face: `train_file`, `text_column`.

A task file is proposed for them as `peft-lab init` does, and written beside the output folder; the run then uses it as
any task of the user's own. Imports nothing heavy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft_lab.errors import ConfigError
from peft_lab.registry import list_kinds
from peft_lab.utils import plain_yaml

logger = logging.getLogger("peft_lab")

_SPLITS = ("train", "validation", "test")


@lru_cache(maxsize=1)
def data_flags() -> dict[str, str]:
    """Options that name data -> help."""
    found = {}
    for split in _SPLITS:
        found[f"{split}_file"] = f"File of the {split} rows, instead of --task: csv, tsv, json, jsonl, parquet or txt."
    for split in _SPLITS:
        found[f"{split}_dir"] = f"Folder of the {split} rows, with one folder of images for each class, or with files."
    found["kind"] = "Kind of task of these data, if the surest one is not meant."
    for column in _columns():
        found[f"{column}_column"] = f'Their column for "{column}"; proposed if left out.'
    return found


def with_task(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run with a task file in the place of those that name data.

    Raises:
        ConfigError: they do not go together, or the task file stands there with other content.
        TaskError: the data cannot be read, or are of no kind of task.
        WriteError: the task file cannot be written.
    """
    given, rest = {}, {}
    for name, value in values.items():
        # the scripts for images and sounds call them image_column_name and so on
        short = name.removesuffix("_name") if name.endswith("_column_name") else name
        if short in data_flags():
            given[short] = str(value)
        else:
            rest[name] = value
    if not given:
        return rest
    _check(given, rest)
    target = task_path(str(rest["output_dir"]))
    rest["task"] = _written(given, target, replace=str(rest.get("overwrite_output_dir")).lower() == "true")
    return rest


def task_path(output_dir: str) -> Path:
    """Place of the task file that is written for a run on named data: beside its folder."""
    folder = Path(output_dir)
    return folder.with_name(f"{folder.name}.task.yaml")


def _columns() -> list[str]:
    """Canonical columns of all kinds."""
    return list(dict.fromkeys(column for info in list_kinds().values() for column in info.columns))


def _check(given: Mapping[str, str], rest: Mapping[str, Any]) -> None:
    sources = [name for name in given if name.endswith(("_file", "_dir"))]
    first = next(iter(given))
    if rest.get("task"):
        raise ConfigError(f"{first} names data, and task a task file with its own; give one of them.")
    if not sources:
        raise ConfigError(f"{first} is for data that are named by train_file or train_dir; give one of these.")
    for split in _SPLITS:
        if {f"{split}_file", f"{split}_dir"} <= given.keys():
            raise ConfigError(f"{split}_file and {split}_dir both name the {split} rows; give one of them.")
    if not {"train_file", "train_dir"} & given.keys():
        raise ConfigError(f"{sources[0]} is given without train_file or train_dir; name the training rows too.")
    if not rest.get("output_dir"):
        raise ConfigError("Missing: output_dir; the task file for the data is written beside it.")


def _written(given: Mapping[str, str], target: Path, replace: bool) -> str:
    """Path of the task file for named data."""
    from peft_lab.data.inspection.layout import named_files
    from peft_lab.data.inspection.propose import draft_task, write_draft

    files = {}
    for split in _SPLITS:
        name = given.get(f"{split}_file", given.get(f"{split}_dir"))
        if name is not None:
            files[split] = name
    columns = {column: given[f"{column}_column"] for column in _columns() if f"{column}_column" in given}
    draft = draft_task(named_files(files), target, columns, given.get("kind"))
    # the same command finds its own file, to go on or in another process
    if target.exists() and not replace:
        if plain_yaml.read_file(target) != draft.values:
            raise ConfigError(
                f'"{target}" holds another task than the one for these data; take it by --task {target}, choose '
                "another --output_dir, or pass --overwrite_output_dir to write it anew."
            )
        return str(target)
    write_draft(draft, target, overwrite=True)
    doubts = f"; look at: {'; '.join(draft.doubts)}" if draft.doubts else ""
    logger.warning('Task file "%s" is written for the data (%s)%s.', target, draft.values["kind"], doubts)
    return str(target)
