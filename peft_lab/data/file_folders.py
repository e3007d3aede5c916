"""Folders of image or sound files: by class, with a table beside them, or with a folder of masks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from peft_lab.data.file_column import stored_paths
from peft_lab.data.read_files import as_dataset, column_names, read_rows
from peft_lab.data.row_checks import numbered
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("peft_lab")

#: Tables that describe the files of their folder -> builder that reads them.
_TABLES = {"metadata.csv": "csv", "metadata.jsonl": "json", "metadata.parquet": "parquet"}
#: Builder of folders by class -> the column of their files, which is also what messages call one.
_COLUMNS = {"imagefolder": "image", "audiofolder": "audio"}
#: Folders of a `maskfolder`, and the columns that they become.
_PAIRED = {"images": "image", "masks": "mask"}


def read_folders(builder: str, folders: Sequence[str], split: str) -> Dataset:
    """Files of folders.

    Args:
        builder: `imagefolder` or `audiofolder`, which go by the table beside the files or by the names of their
            folders, or `maskfolder`, which has images in `images` and masks of the same names in `masks`.
        folders: paths.
        split: its name, for `datasets`.

    Raises:
        TaskError: a table names no file or one that is not there, or images and masks are no pairs.
    """
    import datasets

    if builder == "maskfolder":
        return _read_pairs(folders)
    described = _read_described(builder, folders)
    if described is not None:
        return described
    _warn_of_other_files(builder, folders)
    if builder == "audiofolder":
        return _sounds_by_class(folders)
    files = [f"{folder}/**" for folder in folders]  # else files in folders of folders are missed
    return datasets.load_dataset(builder, data_files={split: files}, split=split)


def _sounds_by_class(folders: Sequence[str]) -> Dataset:
    """Sounds of folders of classes; the builder of `datasets` needs torchcodec."""
    rows = []
    for folder in folders:
        for path in _files_of("audiofolder", folder):
            if path.parent == Path(folder):
                raise TaskError(
                    f'"{path}" stands in no folder of a class; sort the files into one folder a class, or describe '
                    'them in a table "metadata.csv".'
                )
            rows.append({"audio": str(path), "label": path.parent.name})
    data = as_dataset(rows, ["audio", "label"])
    return stored_paths(data, "audio", data["audio"][:])


def _read_pairs(folders: Sequence[str]) -> Dataset:
    """Images and masks of folders, in the order of their names; an ending may differ."""
    rows: list[dict[str, Any]] = []
    for folder in folders:
        found = {part: _by_stem(Path(folder) / part) for part in _PAIRED}
        for part, other in (("images", "masks"), ("masks", "images")):
            alone = sorted(found[part].keys() - found[other].keys())
            if alone:
                raise TaskError(
                    f'"{folder}": {len(alone)} of {len(found[part])} files in "{part}" have none of the same name in '
                    f'"{other}"; the first is {found[part][alone[0]].name}.'
                )
        for stem in sorted(found["images"]):
            rows.append({column: str(found[part][stem]) for part, column in _PAIRED.items()})
    from datasets import Image

    data = as_dataset(rows, list(_PAIRED.values()))
    for column in _PAIRED.values():
        data = data.cast_column(column, Image())
    return data


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise TaskError(f'there is no folder "{folder}"; a maskfolder has the folders "images" and "masks".')
    found: dict[str, Path] = {}
    for path in _files_of("imagefolder", str(folder)):
        stem = str(path.relative_to(folder).with_suffix(""))
        if stem in found:
            raise TaskError(f'"{folder}": {found[stem].name} and {path.name} have one name; rename one.')
        found[stem] = path
    return found


def _read_described(builder: str, folders: Sequence[str]) -> Dataset | None:
    """Files of folders that have a table `metadata.csv`, `.jsonl` or `.parquet`; None without one.

    The column `file_name` of a table names a file beside it, and becomes `image` or `audio`; the others
    stay as they are.

    Raises:
        TaskError: a table names no file, or one that is not there.
    """
    tables = [path for folder in folders for path in sorted(Path(folder).rglob("metadata.*")) if path.name in _TABLES]
    if not tables:
        return None
    from datasets import Image

    column = _COLUMNS[builder]
    rows: list[dict[str, Any]] = []
    for table in tables:
        found = read_rows(_TABLES[table.name], [table])
        if "file_name" not in column_names(found):
            raise TaskError(f'"{table}" has no column "file_name".')
        paths = [_beside(table, row.get("file_name")) for row in found]
        wrong = [row for row, path in enumerate(paths) if path is None]
        if wrong:
            raise TaskError(
                f'"{table}": {len(wrong)} of {len(found)} rows name no {column} file beside it ({numbered(wrong)}; the '
                f'first has "{found[wrong[0]].get("file_name")}").'
            )
        rows += [{**row, column: path} for row, path in zip(found, paths, strict=True)]
    named = {row[column] for row in rows}
    left = [file for folder in folders for file in _files_of(builder, folder) if str(file) not in named]
    if left:
        logger.warning("%d %s files are in no table and are left out; the first is %s.", *(len(left), column, left[0]))
    names = [name for name in column_names(rows) if name != "file_name"]
    data = as_dataset(rows, names)
    if builder == "audiofolder":
        return stored_paths(data, column, data[column][:])
    return data.cast_column(column, Image())


def _beside(table: Path, name: Any) -> str | None:
    """Path of a file in the folder of a table; None if there is none of that name."""
    # a table may be a stranger's, and must not lead out of its folder
    if not isinstance(name, str) or "://" in name or PurePosixPath(name).is_absolute() or ".." in Path(name).parts:
        return None
    path = table.parent / name
    return str(path) if path.is_file() else None


def _files_of(builder: str, folder: str) -> list[Path]:
    from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    endings = set((AudioFolder if builder == "audiofolder" else ImageFolder).EXTENSIONS)
    return [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in endings]


def _warn_of_other_files(builder: str, folders: Sequence[str]) -> None:
    """Warn of files that are none of a folder's by their ending."""
    called = "images" if builder == "imagefolder" else "sounds"
    for folder in folders:
        own = set(_files_of(builder, folder))
        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path not in own]
        # archives are unpacked, and hidden files are the system's
        other = [path for path in files if not path.name.startswith(".") and path.suffix.lower() != ".zip"]
        if other:
            logger.warning(
                "%d files in %s are no %s and are left out; the first is %s.", len(other), folder, called, other[0]
            )
