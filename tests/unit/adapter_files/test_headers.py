"""Headers of safetensors files that lie about what follows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_lab.adapter_files.safe_files import check_size, read_header
from peft_lab.errors import PeftLabError

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def _file(folder: Path, header: dict[str, Any], size: int = 24) -> Path:
    """A file with this header and `size` bytes of tensors."""
    path, text = folder / "adapter_model.safetensors", json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


def test_header_is_read(tmp_path: Path) -> None:
    path = _file(tmp_path, {"__metadata__": {"format": "pt"}, "a": ENTRY})
    assert read_header(path) == {"a": ("F32", [2, 3])}


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1])
def test_absurd_length_is_refused(tmp_path: Path, length: int) -> None:
    path = _file(tmp_path, {"a": ENTRY})
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(PeftLabError, match="no safetensors file that can be read"):
        read_header(path)


@pytest.mark.parametrize(
    "changes",
    [
        *({"dtype": "F64"}, {"dtype": "F4"}, {"dtype": 7}, {"shape": [2, 4]}, {"shape": [-2, -3]}, {"shape": 6}),
        *({"shape": [1] * 9}, {"data_offsets": [0, 10**15]}, {"data_offsets": [24, 0]}, {"data_offsets": [24]}),
    ],
)
def test_entry_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(PeftLabError, match="no safetensors file that can be read"):
        read_header(_file(tmp_path, {"a": {**ENTRY, **changes}}))


@pytest.mark.parametrize("start", [0, 8, 32])
def test_tensors_that_overlap_or_leave_a_gap_are_refused(tmp_path: Path, start: int) -> None:
    other = {**ENTRY, "data_offsets": [start, start + 24]}
    with pytest.raises(PeftLabError, match="it is damaged"):
        read_header(_file(tmp_path, {"a": ENTRY, "b": other}, 56))


@pytest.mark.parametrize("size", [0, 23, 25])
def test_file_of_another_length_than_its_tensors_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(PeftLabError, match="cut short or too long"):
        read_header(_file(tmp_path, {"a": ENTRY}, size))


@pytest.mark.parametrize("header", [b'{"a": NaN}', b"[" * 100_000, b""])
def test_header_that_is_no_json_mapping_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(PeftLabError, match="no safetensors file that can be read"):
        read_header(path)


@pytest.mark.parametrize("header", [{"a" * 5000: ENTRY}, {"a": {**ENTRY, "shape": [1] * 50 + [2, 3]}}])
def test_name_and_shape_that_no_adapter_has(tmp_path: Path, header: dict[str, Any]) -> None:
    with pytest.raises(PeftLabError, match="of a name or shape that no adapter has"):
        read_header(_file(tmp_path, header))


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_lab.utils.safetensors_header._MAX_TENSORS", 1)
    other = {**ENTRY, "data_offsets": [24, 48]}
    with pytest.raises(PeftLabError, match="declares 2 tensors; at most 1 are read"):
        read_header(_file(tmp_path, {"a": ENTRY, "b": other}, 48))


def test_size_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(2**30)  # takes no space on the disk
    check_size(path, 2**30)
    with pytest.raises(PeftLabError, match=r"1,073,741,824 bytes, more than the 1,000"):
        check_size(path, 1000)
