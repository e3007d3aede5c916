"""Columns of images: files that are opened as those of a prediction are, and the faults of their rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import TYPE_CHECKING, Any

from datasets import Image
from datasets.features.features import register_feature
from datasets.utils.file_utils import is_local_path

from peft_lab.data.row_checks import RowFault
from peft_lab.errors import TaskError
from peft_lab.utils.images import image_traits, open_image

if TYPE_CHECKING:
    from datasets import Dataset


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
