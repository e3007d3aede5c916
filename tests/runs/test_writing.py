"""What the disk refuses is one sentence at every function that writes, leaves nothing, and can be repeated."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import disks
from support.compare_helpers import PretendBackend, record, tiny_study
from support.tiny_runs import make_backbone, make_task, options

from peft_lab import WriteError, compare, merge, push, recommend, to_lora, train
from peft_lab.comparison.records.results import append_record
from peft_lab.comparison.report.report import write_report
from peft_lab.utils import atomic_files


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, a task, a trained run and the records of a comparison."""
    folder = tmp_path_factory.mktemp("writing")
    make_backbone(folder / "backbone")
    make_task(folder / "task")
    train(_options(folder, folder / "run"))
    (folder / "records").mkdir()
    for arm, seed in (("lora", 0), ("lora", 1), ("ssf", 0), ("ssf", 1)):
        append_record(folder / "records", record(arm, seed))
    return folder


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """No matplotlib, because drawing takes seconds."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))


def _options(place: Path, out: Path) -> dict:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "eval_strategy": "no"}
    return options(place / "task" / "topics.yaml", place / "backbone", out, method="svfit", **saving)


def _compare(place: Path, out: Path) -> None:
    compare(tiny_study(place), out, backend=PretendBackend(lambda run: 0.5), report=False)


#: Every function of the package that writes where the user says.
WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "train": lambda place, out: train(_options(place, out)),
    "merge": lambda place, out: merge(place / "run", out),
    "to_lora": lambda place, out: to_lora(place / "run", out),
    "compare": _compare,
    "report": lambda place, out: write_report(place / "records", out),
}
#: These find out before any work is done.
EARLY = {
    **WRITERS,
    "recommend": lambda place, out: recommend("task", "backbone", 1, out, study=tiny_study(place)),
}


def _refused(write: Callable[[Path, Path], object], place: Path, out: Path) -> str:
    with pytest.raises(WriteError) as refusal:
        write(place, out)
    said = str(refusal.value)
    assert "\n" not in said
    assert said.endswith(".")
    return said


@pytest.mark.parametrize("fault", ["file", "name", "link", "read-only"])
@pytest.mark.parametrize("writer", EARLY)
def test_a_place_that_cannot_be_written_is_refused_first(place: Path, tmp_path: Path, writer: str, fault: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    paths = {
        "file": (tmp_path / "file" / "out", "not a directory"),
        "name": (tmp_path / "folder" / ("n" * 300), "name too long"),
        "link": (tmp_path / "link", "symbolic link"),
        "read-only": (tmp_path / "disk" / "new" / "out", "read-only"),
    }
    out, reason = paths[fault]
    with disks.tiny_disk(tmp_path / "disk", "ro"):
        before = sorted(tmp_path.rglob("*"))
        assert reason in _refused(EARLY[writer], place, out)
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_nothing_and_room_is_all_that_is_missing(place: Path, tmp_path: Path, writer: str) -> None:
    with disks.tiny_disk(tmp_path / "disk", "size=8k") as disk:
        assert "no space is left" in _refused(WRITERS[writer], place, disk / "new" / "out")
        left = [path for path in disk.rglob("*") if path.is_file()]
        # a comparison keeps its study and the records that it has
        assert not [path for path in left if writer != "compare" or ".partial-" in path.name]
        disks.resize(disk, "size=100m")
        WRITERS[writer](place, disk / "new" / "out")
        assert not [path for path in disk.rglob("*") if ".partial-" in path.name]


@pytest.mark.full
def test_a_run_goes_on_from_its_last_whole_checkpoint(place: Path, tmp_path: Path) -> None:
    with disks.tiny_disk(tmp_path / "disk", "size=100m") as disk:
        train(_options(place, disk / "all"))
        used = sum(path.stat().st_blocks * 512 for path in (disk / "all" / "checkpoint-1").iterdir())
        shutil.rmtree(disk / "all")
        disks.resize(disk, f"size={3 * used // 2}")
        values = _options(place, disk / "out")
        with pytest.raises(WriteError, match="goes on from its last whole checkpoint"):
            train(values)
        assert sorted(path.name for path in (disk / "out").iterdir()) == ["checkpoint-1", "run.yaml"]
        disks.resize(disk, "size=100m")
        assert train(values).metrics["resumed_from"] == "checkpoint-1"


def test_a_full_disk_of_temporary_files_is_named(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with disks.tiny_disk(tmp_path / "disk", "size=8k") as disk:
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        (disk / "fill").write_bytes(b"0" * 4096)
        with pytest.raises(WriteError, match=str(disk)):
            push(place / "run", "someone/name", base_model="org/base")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_what_libraries_say_of_a_full_disk_is_understood(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(WriteError, match=r"no space is left"), atomic_files.write_errors(tmp_path):
        raise error


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "gone"), RuntimeError("shapes"), KeyError("a")])
def test_other_errors_stay_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), atomic_files.write_errors(tmp_path):
        raise error


def test_a_new_file_replaces_what_a_link_names_and_writes_devices(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    atomic_files.write_text("/dev/null", "lost")
    assert not os.path.isfile("/dev/null")
    with pytest.raises(KeyError), atomic_files.new_file(tmp_path / "a" / "b" / "real") as partial:
        partial.write_text({}["half"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
