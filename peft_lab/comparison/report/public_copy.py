"""A comparison as others may see it: the records without folders of this machine, in a folder without the runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from peft_lab.backbones.pypi_weights import is_local
from peft_lab.comparison.records.results import RESULTS, RUNS, STUDY
from peft_lab.comparison.records.run import Record
from peft_lab.errors import ConfigError
from peft_lab.runs import run_folder
from peft_lab.runs.run_config import dump_yaml, read_run_file


def copy_records(folder: Path, out: Path, records: Sequence[Record]) -> None:
    """Put the study of a comparison and its records, as `without_paths` gives them, into a folder without runs.

    Raises:
        ConfigError: `out` is a file, or holds runs; the study is no YAML mapping.
    """
    if (out / RUNS).exists() or (out.exists() and not out.is_dir()):
        raise ConfigError(f'"{out}" is a file or holds runs; name a new folder for the copy.')
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).write_text(
        "".join(f"{json.dumps(dataclasses.asdict(record))}\n" for record in records), encoding="utf-8"
    )
    if (folder / STUDY).is_file():
        study = run_folder.without_paths(read_run_file(folder / STUDY))
        (out / STUDY).write_text(dump_yaml(study), encoding="utf-8")


def without_paths(records: Sequence[Record]) -> list[Record]:
    """The records without folders of this machine.

    A backbone in a local folder is named by the folder's last part, unless two would be the same.
    """
    paths = {record.backbone for record in records}
    names = {path: Path(path).name if is_local(path) else path for path in paths}
    unique = {path: name if list(names.values()).count(name) == 1 else path for path, name in names.items()}
    return [
        dataclasses.replace(
            record,
            backbone=unique[record.backbone],
            options=run_folder.without_paths(record.options),
            metrics=run_folder.without_paths(record.metrics),
        )
        for record in records
    ]
