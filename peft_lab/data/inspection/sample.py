"""First rows of somebody's data, as plain mappings, from files, folders or the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from peft_lab.data.inspection.layout import Layout, split_of
from peft_lab.data.inspection.text_form import csv_options, text_options
from peft_lab.data.profile import IMAGE_ENDINGS, SOUND_ENDINGS
from peft_lab.data.read_files import read_rows, stream_rows, unpacked
from peft_lab.errors import TaskError

#: Rows of a split that are looked at, at most, and bytes of the images and sounds among them.
MOST_ROWS, _MOST_BYTES = 20_000, 100 * 2**20
#: Builder of a folder -> name of its column of files, and their endings.
_MEDIA = {"imagefolder": ("image", IMAGE_ENDINGS), "audiofolder": ("audio", SOUND_ENDINGS)}
_DESCRIBED = {"metadata.csv": "csv", "metadata.jsonl": "json", "metadata.parquet": "parquet"}


@dataclass(frozen=True)
class Sample:
    """First rows of each split.

    Attributes:
        layout: the files, or the data set.
        options: options of the builder.
        rows: split -> rows.
        whole: True if these are all rows.
        class_names: column of numbers -> names that the source declares for its classes.
        splits: our splits -> those of a data set of the Hub.
        doubts: sentences about the form of the files.
    """

    layout: Layout
    options: Mapping[str, Any]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    whole: bool
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


def read_sample(layout: Layout) -> Sample:
    """First rows of each split of a layout.

    Raises:
        TaskError: the data cannot be read, or have no rows.
    """
    if layout.hub:
        return _of_hub(layout)
    options, doubts = _options(layout)
    rows, whole = {}, True
    for split, files in layout.files.items():
        rows[split], ends = _bounded(_rows(layout.builder, files, options))
        whole = whole and ends
        if not rows[split]:
            raise TaskError(f'"{files[0]}" has no rows.')
    names = _declared_classes(layout.files["train"][0]) if layout.builder == "parquet" else {}
    return Sample(layout, options, rows, whole, names, doubts=(*layout.doubts, *doubts))


def _options(layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """Options of the builder, which must be those of all files."""
    find = {"csv": csv_options, "json": text_options, "text": text_options}.get(layout.builder)
    if find is None:
        return {}, []
    found: tuple[dict[str, Any], list[str]] | None = None
    for path in [path for files in layout.files.values() for path in files]:
        if not path.stat().st_size:
            raise TaskError(f'"{path}" is empty; it has neither a header nor rows.')
        options, doubts = find(path)
        first = found[0] if found else options
        differing = [name for name in sorted({*first, *options}) if first.get(name) != options.get(name)]
        if differing:
            raise TaskError(
                f'"{path}" differs from the first file in its {", ".join(differing)}; write both in one form.'
            )
        found = found or (options, doubts)
    return found or ({}, [])


def _bounded(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], bool]:
    """First rows, and whether these are all."""
    found: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        if len(found) == MOST_ROWS or size > _MOST_BYTES:
            return found, False
        found.append(row)
        for value in row.values():
            data = value.get("bytes") if isinstance(value, Mapping) else value
            size += len(data) if isinstance(data, bytes) else 0
    return found, True


def _rows(builder: str, files: Sequence[Path], options: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for path in files:
        if builder == "maskfolder":
            yield from _of_pairs(path)
        elif builder in _MEDIA:
            yield from _of_media(builder, path)
        elif builder == "json" and not _is_json_lines(path):
            yield from read_rows(builder, [path], options)
        else:
            yield from stream_rows(builder, path, options)


def _is_json_lines(path: Path) -> bool:
    with open(unpacked(str(path))[0], "rb") as file:
        beginning = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    # a list of all rows, or one object over several lines
    return not beginning.startswith(b"[") and beginning.partition(b"\n")[0].strip() != b"{"


def _of_media(builder: str, folder: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a folder of files: those of its table, else one for each file, with its folder's name as label."""
    name, endings = _MEDIA[builder]
    tables = [path for path in sorted(folder.rglob("metadata.*")) if path.name in _DESCRIBED]
    for table in tables:
        for row in read_rows(_DESCRIBED[table.name], [table]):
            file = row.pop("file_name", None)
            yield {name: {"bytes": None, "path": str(table.parent / str(file))}, **row}
    if tables:
        return
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in endings]
    # datasets takes labels of folders only where there are several
    labelled = len({path.parent for path in files}) > 1
    for path in files:
        label = {"label": path.parent.name} if labelled else {}
        yield {name: {"bytes": None, "path": str(path)}, **label}


def _of_pairs(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a folder of images beside one of masks of the same names; a run refuses those without a partner."""
    masks = {path.stem: path for path in sorted((folder / "masks").rglob("*")) if path.suffix.lower() in IMAGE_ENDINGS}
    for path in sorted((folder / "images").rglob("*")):
        if path.stem in masks:
            yield {
                "image": {"bytes": None, "path": str(path)},
                "mask": {"bytes": None, "path": str(masks[path.stem])},
            }


def _declared_classes(path: Path) -> dict[str, list[str]]:
    """Names of classes that `datasets` has written into a parquet file."""
    import pyarrow.parquet as pq

    text = (pq.read_schema(path).metadata or {}).get(b"huggingface")
    features = json.loads(text).get("info", {}).get("features", {}) if text else {}
    classes = {name: value for name, value in features.items() if value.get("_type") == "ClassLabel"}
    return {name: value["names"] for name, value in classes.items() if value.get("names")}


def _of_hub(layout: Layout) -> Sample:
    """First rows of a data set of the Hub, by its splits' names."""
    import datasets

    name = layout.hub["path"]
    try:
        configs = datasets.get_dataset_config_names(name)
        chosen = "default" if "default" in configs else configs[0]
        found: Any = datasets.load_dataset(name, chosen, streaming=True)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise TaskError(
            f'There is no file or folder "{name}", and the Hub gave no data set of that name: {reason}.'
        ) from error
    doubts = []
    if len(configs) > 1:
        others = ", ".join(config for config in configs if config != chosen)
        doubts.append(f'of its configurations "{chosen}" is taken; the others are {others[:200]}')
        layout = replace(layout, hub={"path": name, "name": chosen})
    splits: dict[str, str] = {}
    for theirs in found:
        ours = split_of([theirs])
        if ours is not None:
            splits.setdefault(ours, theirs)
    left = [theirs for theirs in found if theirs not in splits.values()]
    if "train" not in splits:
        splits["train"] = next(iter(found))
        doubts.append(f'no split is called train, so that "{splits["train"]}" is taken')
    elif left:
        doubts.append(f"splits left out: {', '.join(left)}")
    rows = {ours: list(islice(_undecoded(found[theirs]), MOST_ROWS // 20)) for ours, theirs in splits.items()}
    features = found[splits["train"]].features or {}
    names = {column: each.names for column, each in features.items() if isinstance(each, datasets.ClassLabel)}
    return Sample(layout, {}, rows, False, names, splits, (*layout.doubts, *doubts))


def _undecoded(stream: Any) -> Any:
    """Stream whose images and sounds stay files."""
    for name, feature in (stream.features or {}).items():
        if hasattr(feature, "decode"):
            stream = stream.cast_column(name, type(feature)(decode=False))
    return stream
