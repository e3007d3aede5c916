"""Public copy of a comparison: no runs, no paths of this machine."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from peft_lab.backbones.pypi_weights import is_local
from peft_lab.comparison.records.results import RESULTS, RUNS, STUDY
from peft_lab.comparison.records.run import Record
from peft_lab.errors import ConfigError
from peft_lab.runs import run_folder
from peft_lab.runs.run_config import dump_yaml, read_run_file
from peft_lab.utils import strict_json


def copy_records(folder: Path, out: Path, records: Sequence[Record]) -> None:
    """Write the study and records of a comparison into another folder.

    Args:
        folder: the comparison's folder.
        out: the folder to write to.
        records: its records, as `without_paths` returns them.

    Raises:
        ConfigError: `out` is a file, or holds runs; the study is no YAML mapping.
    """
    if (out / RUNS).exists() or (out.exists() and not out.is_dir()):
        raise ConfigError(f'"{out}" is a file or holds runs; name a new folder for the copy.')
    out.mkdir(parents=True, exist_ok=True)
    lines = [strict_json.dumps(dataclasses.asdict(record)) + "\n" for record in records]
    (out / RESULTS).write_text("".join(lines), encoding="utf-8")
    if (folder / STUDY).is_file():
        study = run_folder.without_paths(read_run_file(folder / STUDY))
        (out / STUDY).write_text(dump_yaml(study), encoding="utf-8")


def without_paths(records: Sequence[Record]) -> list[Record]:
    """Remove the folders of this machine from records.

    A backbone in a local folder is named by the folder's last part, unless two would be the same.
    """
    paths = {record.backbone for record in records}
    names = {path: _public_name(path) for path in paths}
    # two folders may end in the same name; these keep their paths
    uses = Counter(names.values())
    public = []
    for record in records:
        name = names[record.backbone]
        shared = dataclasses.replace(
            record,
            backbone=name if uses[name] == 1 else record.backbone,
            options=run_folder.without_paths(record.options),
            metrics=run_folder.without_paths(record.metrics),
        )
        public.append(shared)
    return public


def _public_name(backbone: str) -> str:
    return Path(backbone).name if is_local(backbone) else backbone
