"""Closed schema of a task's `data`: a data set of the Hub, or local files. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from peft_lab.errors import TaskError
from peft_lab.utils.data_root import DATA_PREFIX
from peft_lab.utils.schema import Schema, check


class _CsvOptions(Schema):
    delimiter: str = ","
    column_names: Sequence[str] = ()
    quoting: Literal["minimal", "all", "nonnumeric", "none"] = "minimal"
    quotechar: str = '"'
    encoding: str = ""
    skiprows: int = 0


class _JsonOptions(Schema):
    field: str = ""
    encoding: str = ""


class _TextOptions(Schema):
    encoding: str = ""


#: Options of each `datasets` builder that a task may set. The list is closed, because a YAML file is never trusted.
_BUILDER_OPTIONS: dict[str, type[Schema]] = {
    "csv": _CsvOptions,
    "json": _JsonOptions,
    "parquet": Schema,
    "imagefolder": Schema,
    "audiofolder": Schema,
    "maskfolder": Schema,
    "text": _TextOptions,
    "webdataset": Schema,
}
#: Names of these builders.
BUILDERS = tuple(_BUILDER_OPTIONS)

#: Builders that read folders of files: images or sounds by class, and images beside their masks.
FOLDER_BUILDERS = ("imagefolder", "audiofolder", "maskfolder")


def _check_file(name: str) -> str:
    if not name:
        raise TaskError("a file name must not be empty.")
    if "://" in name:
        raise TaskError(f'file "{name}" is an address; files are local, a Hub data set is named by "path".')
    if "$" in name.removeprefix(DATA_PREFIX) or name.startswith("~"):
        raise TaskError(f'file "{name}": only a leading {DATA_PREFIX} is replaced, no other variable and no "~".')
    return name


def as_list(value: Any) -> Any:
    """List of one text; any other value as it is."""
    return [value] if isinstance(value, str) else value


# strict mode refuses a list in place of a tuple, and YAML has lists alone
_FileNames = Annotated[
    tuple[Annotated[str, AfterValidator(_check_file)], ...], Field(strict=False), BeforeValidator(as_list)
]


class _Files(Schema):
    train: _FileNames = ()
    validation: _FileNames = ()
    test: _FileNames = ()


class _HubData(Schema):
    path: str = ""
    name: str = ""
    revision: str = ""


class _LocalData(Schema):
    builder: Literal["csv", "json", "parquet", "imagefolder", "audiofolder", "maskfolder", "text", "webdataset"]
    files: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}


class DataSource(Schema):
    """Source of a task's rows.

    It is a data set of the Hub, or local files that a builder of `datasets` reads.

    Attributes:
        path, name, revision: Hub id, configuration and commit, branch or tag ("" for local files).
        builder: `csv`, `json`, `parquet`, `text`, `webdataset`, or one of `FOLDER_BUILDERS` ("" for the Hub).
        files: split -> file names as written: relative to the YAML file or to `${PEFT_LAB_DATA}`; `*` is a wildcard.
        options: options of the builder.
    """

    path: str = ""
    name: str = ""
    revision: str = ""
    builder: str = ""
    files: Mapping[str, tuple[str, ...]] = {}
    options: Mapping[str, Any] = {}


def data_source(values: Any) -> DataSource:
    """Build the checked value of `data`.

    Raises `TaskError` for an unknown key or a value of another form.
    """
    if isinstance(values, Mapping) and "builder" in values:
        return _local_data(values)
    hub = check(_HubData, values, 'the "data" of a Hub data set', TaskError)
    if not hub.path:
        raise TaskError('"data" needs "path" (a Hub id) or "builder" and "files" (local files).')
    # load_dataset would take the path of a local folder too, and read whatever is in it
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", hub.path):
        raise TaskError(f'data path "{hub.path}" is no Hub id; for local files give "builder" and "files" instead.')
    return DataSource(**dict(hub))


def _local_data(values: Mapping[str, Any]) -> DataSource:
    local = check(_LocalData, values, 'the "data" of local files', TaskError)
    # the keys of the files are the splits, so one that was not named must not appear as an empty one
    files = check(_Files, local.files, "the files", TaskError).model_dump(exclude_unset=True)
    if "train" not in files:
        raise TaskError('"files" of "data" must name at least the file of "train".')
    empty = next((split for split, names in files.items() if not names), None)
    if empty is not None:
        raise TaskError(f'the list of {empty} files is empty; name a file or leave "{empty}" out.')
    options = check(_BUILDER_OPTIONS[local.builder], local.options, f"the options of {local.builder}", TaskError)
    return DataSource(builder=local.builder, files=files, options=options.model_dump(exclude_unset=True))
