"""Columns of images, and folders of image files with a table beside them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from datasets import Image
from datasets.features.features import register_feature
from datasets.utils.file_utils import is_local_path

from peft_lab.data.read_files import as_dataset, column_names, read_rows
from peft_lab.data.row_checks import RowFault, numbered
from peft_lab.errors import TaskError
from peft_lab.utils.images import image_traits, open_image

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("peft_lab")

#: Tables that describe the images of their folder -> builder that reads them.
_TABLES = {"metadata.csv": "csv", "metadata.jsonl": "json", "metadata.parquet": "parquet"}


@dataclass
class RgbImage(Image):
    """Image feature whose files are opened as those of a prediction are."""

    _type: str = field(default="RgbImage", init=False, repr=False)

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> Any:
        """Upright RGB image of a stored file."""
        if not self.decode or not isinstance(value, dict):
            return super().decode_example(value, token_per_repo_id)
        file, name = _file(value)
        if file is None:
            # a file of the Hub, which datasets downloads
            return open_image(Image().decode_example(value, token_per_repo_id), name)
        return open_image(file, name)


# datasets calls the registration experimental in a warning of its own
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    register_feature(RgbImage, "RgbImage")


def _file(value: dict[str, Any]) -> tuple[Any, str | None]:
    """Source of a stored image for Pillow, None for one of the Hub, and its name."""
    path, data = value["path"], value["bytes"]
    if data is not None:
        return BytesIO(data), path or f"an image of {len(data)} bytes"
    return (path if path and is_local_path(path) else None), path


def image_faults(dataset: Dataset) -> list[RowFault]:
    """Rows whose image is missing or cannot be read, and what RGB does not keep of the others.

    Of most images only the header is read.
    """
    missing: list[int] = []
    unreadable: list[int] = []
    traits: dict[str, list[int]] = {"animated": [], "transparent": []}
    reason = ""
    for row, value in enumerate(_stored(dataset)):
        if value is None or (value["bytes"] is None and not value["path"]):
            missing.append(row)
            continue
        file, name = _file(value)
        if file is None:
            continue
        try:
            for trait in image_traits(file, name):
                traits[trait].append(row)
        except TaskError as error:
            reason = reason or str(error).rstrip(".")
            unreadable.append(row)
    return [
        RowFault("have no image", missing),
        RowFault(f"have an image that is not to be used: {reason}", unreadable),
        *trait_faults(traits),
    ]


def _stored(dataset: Dataset) -> Iterator[dict[str, Any] | None]:
    """Files of a column of images as they are stored, not decoded."""
    for table in dataset.select_columns(["image"]).with_format("arrow").iter(batch_size=1000):
        yield from table["image"].to_pylist()


def trait_faults(traits: dict[str, list[int]]) -> list[RowFault]:
    """Remarks on traits of images that RGB does not keep."""
    animated = "have an image of several frames, of which the first is taken"
    transparent = "have a transparent image, whose pixels count with the colours that they hide; paint it on a ground"
    return [
        RowFault(animated, traits["animated"], "remark"),
        RowFault(transparent, traits["transparent"], "remark"),
    ]


def read_described(folders: Sequence[str]) -> Dataset | None:
    """Images of folders that have a table `metadata.csv`, `.jsonl` or `.parquet`; None without one.

    The column `file_name` of a table names a file beside it, and becomes `image`; the others stay as they are.

    Raises:
        TaskError: a table names no file, or one that is not there.
    """
    tables = [path for folder in folders for path in sorted(Path(folder).rglob("metadata.*")) if path.name in _TABLES]
    if not tables:
        return None
    rows: list[dict[str, Any]] = []
    for table in tables:
        found = read_rows(_TABLES[table.name], [table])
        if "file_name" not in column_names(found):
            raise TaskError(f'"{table}" has no column "file_name".')
        paths = [_beside(table, row.get("file_name")) for row in found]
        wrong = [row for row, path in enumerate(paths) if path is None]
        if wrong:
            raise TaskError(
                f'"{table}": {len(wrong)} of {len(found)} rows name no image file beside it ({numbered(wrong)}; the '
                f'first has "{found[wrong[0]].get("file_name")}").'
            )
        rows += [{**row, "image": path} for row, path in zip(found, paths, strict=True)]
    named = {row["image"] for row in rows}
    left = [file for folder in folders for file in _image_files(folder) if str(file) not in named]
    if left:
        logger.warning("%d image files are in no table and are left out; the first is %s.", len(left), left[0])
    names = [name for name in column_names(rows) if name != "file_name"]
    return as_dataset(rows, names).cast_column("image", Image())


def _beside(table: Path, name: Any) -> str | None:
    """Path of a file in the folder of a table; None if there is none of that name."""
    # a table may be a stranger's, and must not lead out of its folder
    if not isinstance(name, str) or "://" in name or PurePosixPath(name).is_absolute() or ".." in Path(name).parts:
        return None
    path = table.parent / name
    return str(path) if path.is_file() else None


def _image_files(folder: str) -> list[Path]:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    endings = set(ImageFolder.EXTENSIONS)
    return [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in endings]


def warn_of_other_files(folders: Sequence[str]) -> None:
    """Warn of files in folders of images that are no images by their ending."""
    for folder in folders:
        images = set(_image_files(folder))
        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path not in images]
        # archives are unpacked, and hidden files are the system's
        other = [path for path in files if not path.name.startswith(".") and path.suffix.lower() != ".zip"]
        if other:
            logger.warning(
                "%d files in %s are no images and are left out; the first is %s.", len(other), folder, other[0]
            )
