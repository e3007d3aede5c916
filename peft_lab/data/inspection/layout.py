"""Files of somebody's data, and the splits that their names stand for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft_lab.data.data_source import BUILDERS
from peft_lab.data.profile import IMAGE_ENDINGS, SOUND_ENDINGS
from peft_lab.errors import TaskError, did_you_mean

#: Ending of a file -> builder that reads it; of a packed file, the ending before the packed one.
_TABLES = {
    **{".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json"},
    **{".parquet": "parquet", ".txt": "text"},
}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
#: Builders of folders of files, with the endings of these.
_FOLDERS = {"imagefolder": IMAGE_ENDINGS, "audiofolder": SOUND_ENDINGS}

#: Words in the names of files and folders -> split.
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "validate", "valid", "val", "dev", "development", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Layout:
    """Local files, or a data set of the Hub, by split.

    Attributes:
        name: of the data, as a task may be called.
        builder: that reads the files; "" for the Hub.
        files: split -> files or folders.
        hub: `path`, and `name` of the configuration, of a data set of the Hub.
        doubts: sentences about files that were left out or might be meant otherwise.
    """

    name: str
    builder: str = ""
    files: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    hub: Mapping[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


def find_layout(data: str) -> Layout:
    """Layout of a file, a folder, or an id of the Hub.

    Raises:
        TaskError: there is no such file, folder or id, or no file in it that can be read.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return named_files({"train": data})
    if _may_be_hub_id(data):
        return Layout(task_name(data.rpartition("/")[2]), hub={"path": data})
    raise TaskError(_missing(data, path))


def named_files(files: Mapping[str, str]) -> Layout:
    """Layout of files or folders that the user named for each split.

    Raises:
        TaskError: one is missing, cannot be read by its ending, or is of another form than the first.
    """
    if "train" not in files:
        raise TaskError(f"{', '.join(files)} files are named, but no train file; name one.")
    found: dict[str, tuple[Path, ...]] = {}
    builders: dict[str, str] = {}
    for split, name in files.items():
        path = Path(name).expanduser()
        if not path.exists():
            raise TaskError(_missing(name, path))
        if path.is_dir():
            part = _of_folder(path)
            found[split], builders[split] = _all_files(part), part.builder
        else:
            found[split], builders[split] = (path,), _builder(path)
    first = builders["train"]
    other = next((split for split, builder in builders.items() if builder != first), None)
    if other is not None:
        raise TaskError(
            f'"{files[other]}" is read by {builders[other]}, but "{files["train"]}" by {first}; give all splits in one '
            "form."
        )
    return Layout(task_name(_stem(Path(files["train"]))), first, found)


def task_name(text: str) -> str:
    """Name of a task from the name of a file or folder."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:60]
    return name or "my-task"


def _missing(data: str, path: Path) -> str:
    there = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, there)
    hint = "" if near or path.suffix else ' A data set of the Hub is named "owner/name".'
    return f'There is no file or folder "{data}".{near}{hint}'


def _may_be_hub_id(name: str) -> bool:
    owner, _, rest = name.partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) or Path(rest).suffix.lower() in (*_TABLES, *_PACKED):
        return False
    # a name below a folder that exists is a misspelt path
    return not Path(owner).is_dir()


def _builder(path: Path) -> str:
    ending = _ending(path)
    if ending not in _TABLES:
        raise TaskError(
            f'"{path}" is no data file by its ending; known are {", ".join(_TABLES)}, and {_PACKED[0]} of them.'
        )
    return _TABLES[ending]


def _ending(path: Path) -> str:
    """Ending of a file in lower case, without that of the packer."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _stem(path: Path) -> str:
    """Name for the data: the file's, or the folder's where the file is called by its split."""
    stem = path.name if path.is_dir() else path.name.partition(".")[0]
    return path.absolute().parent.name if split_of([stem]) else stem


def split_of(parts: Iterable[str]) -> str | None:
    """Split that the names of a file and its folders stand for, those that come first before others."""
    for part in parts:
        words = re.findall(r"[a-z]+", part.lower())
        found = {_SPLIT_WORDS[word.removesuffix("set")] for word in words if word.removesuffix("set") in _SPLIT_WORDS}
        if len(found) == 1:
            return found.pop()
    return None


def _of_folder(folder: Path) -> Layout:
    """Layout of a folder: one of images or sounds, or of tables."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    if any(path.relative_to(folder).parts[-2:-1] == ("masks",) for path in files):
        return _of_media(folder, "maskfolder", ())
    endings = Counter(_ending(path) for path in files)
    for builder, known in _FOLDERS.items():
        count = sum(endings[ending] for ending in known)
        tables = [path for path in files if _ending(path) in _TABLES and path.name.partition(".")[0] != "metadata"]
        # a text file or two beside the images say where they are from
        if builder in BUILDERS and count > 2 * len(tables):
            return _of_media(folder, builder, tables)
    tables = _tables_of(files)
    if not tables:
        raise TaskError(f'"{folder}" holds no data file by its ending; known are {", ".join(_TABLES)} and image files.')
    return _by_split(folder, tables, files)


def _of_media(folder: Path, builder: str, tables: Sequence[Path]) -> Layout:
    """Layout of folders of images, sounds, or images beside masks, by the names of the folders."""
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    splits: dict[str, tuple[Path, ...]] = {}
    for path in below:
        split = split_of([path.name])
        if split is not None and split not in splits:
            splits[split] = (path,)
    doubts = []
    if "train" not in splits:
        splits = {"train": (folder,)}
    else:
        others = [path.name for path in below if (path,) not in splits.values()]
        if others:
            doubts.append(f"folders left out, because their names are no splits: {', '.join(others)}")
    if tables:
        doubts.append(
            f'"{tables[0].name}" is not read: a table of labels beside the files is called metadata.csv and has a '
            'column "file_name"'
        )
    ordered = {split: splits[split] for split in _SPLITS if split in splits}
    return Layout(task_name(folder.absolute().name), builder, ordered, doubts=tuple(doubts))


def _tables_of(files: Sequence[Path]) -> list[Path]:
    """Files of the form that most have; text files count only where there is no other form."""
    tables = [
        path for path in files if _ending(path) in _TABLES and path.name.partition(".")[0] not in ("README", "LICENSE")
    ]
    builders = Counter(_TABLES[_ending(path)] for path in tables)
    if len(builders) > 1:
        del builders["text"]
    wanted = builders.most_common(1)[0][0] if builders else ""
    return [path for path in tables if _TABLES[_ending(path)] == wanted]


def _by_split(folder: Path, tables: Sequence[Path], files: Sequence[Path]) -> Layout:
    """Layout of tables, by the names of the files, or of their folders."""
    splits: dict[str, list[Path]] = {}
    left: list[Path] = []
    for path in tables:
        parts = path.relative_to(folder).parts
        split = split_of([path.name.partition(".")[0], *reversed(parts[:-1])])
        splits.setdefault(split, []).append(path) if split else left.append(path)
    doubts = []
    if "train" not in splits:
        splits = {"train": list(tables)}
        if len(tables) > 1:
            doubts.append(f"no file is named as train, so that all {len(tables)} files are its parts")
    elif left:
        doubts.append(f"files left out, because their names are no splits: {_names(left)}")
    other = [path for path in files if path not in tables and _ending(path) in _TABLES and _ending(path) != ".txt"]
    if other:
        doubts.append(f"files of another form are left out: {_names(other)}")
    ordered = {split: tuple(splits[split]) for split in _SPLITS if split in splits}
    return Layout(task_name(folder.absolute().name), _builder(tables[0]), ordered, doubts=tuple(doubts))


def _all_files(layout: Layout) -> tuple[Path, ...]:
    found: list[Path] = []
    for paths in layout.files.values():
        found += paths
    return tuple(found)


def _names(paths: Sequence[Path]) -> str:
    shown = ", ".join(path.name for path in paths[:3])
    return f"{shown}, ..." if len(paths) > 3 else shown
