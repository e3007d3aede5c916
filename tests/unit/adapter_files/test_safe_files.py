"""Headers of safetensors files that describe something else than the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from peft_lab.adapter_files.safe_files import read_header
from peft_lab.errors import ConfigError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _write(folder: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def test_dtype_and_shape_by_name(tmp_path: Path) -> None:
    assert read_header(_write(tmp_path, {"a": ENTRY, "__metadata__": {"format": "pt"}})) == {"a": ("F32", [2])}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"a": ENTRY}, bytes(4), None),
        ({"a": ENTRY}, bytes(16), None),
        ({"a": {**ENTRY, "shape": [3]}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": [-2]}}, bytes(8), None),
        ({"a": {**ENTRY, "shape": [2**63, 2**63]}}, bytes(8), None),
        ({"a": {**ENTRY, "dtype": "X"}}, bytes(8), None),
        ({"a": ENTRY, "b": ENTRY}, bytes(8), None),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, bytes(24), None),
        ({"a": ENTRY}, bytes(8), 2**40),
        ({"a": ENTRY}, bytes(8), 2**64 - 1),
        (b'{"a": NaN}', b"", None),
        (b"[" * 100_000, b"", None),
        (b"", b"", None),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, header: Any, data: bytes, length: int | None) -> None:
    with pytest.raises(ConfigError, match="no safetensors file that can be read"):
        read_header(_write(tmp_path, header, data, length))


@pytest.mark.parametrize("header", [{"a" * 5000: ENTRY}, {"a": {**ENTRY, "shape": [1] * 50 + [2]}}])
def test_names_and_shapes_that_no_adapter_has(tmp_path: Path, header: Any) -> None:
    with pytest.raises(ConfigError, match="of a name or shape that no adapter has"):
        read_header(_write(tmp_path, header))


def test_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_lab.adapter_files.safe_files._MAX_TENSORS", 1)
    other = {**ENTRY, "data_offsets": [8, 16]}
    with pytest.raises(ConfigError, match="declares 2 tensors; at most 1 are read"):
        read_header(_write(tmp_path, {"a": ENTRY, "b": other}, bytes(16)))
