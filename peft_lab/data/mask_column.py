"""Columns of masks: images whose values are the classes of the pixels, and the faults of their rows."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from peft_lab.data.file_column import file_name, file_states, is_missing, stored_feature
from peft_lab.data.row_checks import RowFault
from peft_lab.data.row_maps import map_rows
from peft_lab.errors import TaskError
from peft_lab.metrics.segmentation import IGNORED

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

#: Raise it when the same file is read otherwise, because what was found in a file is kept.
_VERSION = 1
#: Modes of Pillow whose values are numbers, and not colours.
_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
#: Formats that change values.
_LOSSY = ("JPEG", "MPO")


def read_mask(value: Mapping[str, Any], reduced: bool = False) -> np.ndarray:
    """Classes of the pixels of a stored mask, uint8 (height, width).

    They are grey values, or indices of the palette where the image has one.

    Args:
        value: mapping of `bytes` and `path`.
        reduced: 0 means no class, so that it becomes `IGNORED` and every other value one less.

    Raises:
        TaskError: the file is no image of numbers, or a value is above 255.
    """
    import numpy as np
    from PIL import Image

    name = file_name(value, "a mask")
    try:
        with Image.open(value["path"] if value["bytes"] is None else BytesIO(value["bytes"])) as image:
            if image.mode not in _MODES:
                raise ValueError(f"it has colours (mode {image.mode}), and a mask has one number for each pixel")
            if image.format in _LOSSY:
                raise ValueError(f"{image.format} changes values, and with them classes; save masks as PNG")
            values = np.asarray(image)
    except (OSError, ValueError, SyntaxError, IndexError, struct.error, Image.DecompressionBombError) as error:
        raise TaskError(f'"{name}" is no mask: {" ".join(str(error).split()).rstrip(".")}.') from error
    values = values.astype(np.int64)
    if values.size and values.max() > IGNORED:
        raise TaskError(f'"{name}" is no mask: it holds the value {values.max()}, and classes go from 0 to 254.')
    if reduced:
        values = np.where((values == 0) | (values == IGNORED), IGNORED, values - 1)
    return values.astype(np.uint8)


def mask_traits(dataset: Dataset, reduced: bool) -> list[dict[str, Any]]:
    """Traits of the mask of each row, and the size of its image.

    They are `name`, `error` (the reason why the mask cannot be read, else ""), `missing`, `size` and `image_size`
    (width and height; empty if unknown), `values` and `pixels` (the number of each value). They are kept for a later
    run.
    """
    columns = ["image", "mask"]
    rows = dataset.select_columns(columns)
    for column in columns:
        rows = rows.cast_column(column, stored_feature())
    reads = [_VERSION, reduced, file_states(rows, columns)]
    options = {"remove_columns": columns, "desc": "Reading masks", "fn_kwargs": {"reduced": reduced}}
    return list(map_rows(rows, _traits, reads, **options))


def _traits(row: Mapping[str, Any], reduced: bool) -> dict[str, Any]:
    import numpy as np

    mask = row["mask"]
    found: dict[str, Any] = {"name": "", "error": "", "missing": is_missing(mask), "size": [], "image_size": []}
    found |= {"values": [], "pixels": []}
    if found["missing"]:
        return found
    found |= {"name": file_name(mask, "a mask"), "image_size": _image_size(row["image"])}
    try:
        classes = read_mask(mask, reduced)
    except TaskError as error:
        return {**found, "error": str(error).rstrip(".")}
    values, pixels = np.unique(classes, return_counts=True)
    return {**found, "size": [*classes.shape[::-1]], "values": values.tolist(), "pixels": pixels.tolist()}


def _image_size(value: Any) -> list[int]:
    """Width and height of a stored image as it is opened, upright; [] if it cannot be read."""
    from PIL import Image

    if is_missing(value):
        return []
    try:
        with Image.open(value["path"] if value["bytes"] is None else BytesIO(value["bytes"])) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return [image.height, image.width] if turned else [image.width, image.height]
    # what is wrong with an image is said by its own check
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
        return []


def mask_faults(traits: Sequence[Mapping[str, Any]], classes: int | None) -> list[RowFault]:
    """Rows whose mask is missing, damaged, of another size than its image, beyond the classes, or without any.

    `classes` is their number; None if they are those of the data.
    """
    unreadable = [row for row, found in enumerate(traits) if found["error"]]
    other = [r for r, found in enumerate(traits) if found["size"] and found["image_size"] not in ([], found["size"])]
    beyond = [r for r, found in enumerate(traits) if classes is not None and beyond_classes(found, classes)]
    blank = [r for r, found in enumerate(traits) if found["size"] and not set(found["values"]) - {IGNORED}]
    said = {
        "unreadable": f": {traits[unreadable[0]]['error']}" if unreadable else "",
        "other": _sizes(traits[other[0]]) if other else "",
        "beyond": _value(traits[beyond[0]], classes or 0) if beyond else "",
    }
    return [
        RowFault("have no mask", [row for row, found in enumerate(traits) if found["missing"]]),
        RowFault(f"have a mask that is not to be used{said['unreadable']}", unreadable),
        RowFault(f"have a mask of another size than their image{said['other']}", other),
        RowFault(f"have a mask with a value that is no class{said['beyond']}", beyond),
        RowFault("have a mask without a pixel of any class", blank),
    ]


def beyond_classes(found: Mapping[str, Any], classes: int) -> list[int]:
    """Values of a mask that are no classes."""
    return [value for value in found["values"] if classes <= value < IGNORED]


def classes_in(traits: Sequence[Mapping[str, Any]]) -> list[int]:
    """Classes that occur in masks, in order."""
    counts: Counter[int] = Counter()
    for found in traits:
        counts.update(set(found["values"]) - {IGNORED})
    return sorted(counts)


def _sizes(found: Mapping[str, Any]) -> str:
    (width, height), (own_width, own_height) = found["size"], found["image_size"]
    return f': "{found["name"]}" has {width} x {height} pixels, its image {own_width} x {own_height}'


def _value(found: Mapping[str, Any], classes: int) -> str:
    value = beyond_classes(found, classes)[0]
    return f': "{found["name"]}" has {value}, and there are {classes} classes, from 0 on'
