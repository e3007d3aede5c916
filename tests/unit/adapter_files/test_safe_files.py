"""Checks on the files of a folder from anywhere: links, pipes, code and JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from peft_lab.adapter_files.safe_files import check_folder, parse_json
from peft_lab.errors import PeftLabError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the names of an adapter's files."""
    home = tmp_path / "adapter"
    home.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "labels.json"):
        (home / name).write_text("{}")
    check_folder(home)
    return home


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "labels.json", "other"])
def test_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    outside.write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(PeftLabError, match="link that leads out"):
        check_folder(folder)


def test_pipe_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(PeftLabError, match="not a plain file"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_weights_that_are_pickled_alone_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    check_folder(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(PeftLabError, match=f"only in {name}.*safetensors"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_remote_code_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text('{"auto_map": {"AutoModel": "x.Y"}}')
    with pytest.raises(PeftLabError, match="auto_map"):
        check_folder(folder)


@pytest.mark.parametrize("part", ["../../x.safetensors", "/x.safetensors", "x.bin", 7, "a/b.safetensors"])
def test_index_names_only_files_beside_it(folder: Path, part: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": part}}))
    with pytest.raises(PeftLabError, match="no safetensors file beside it"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"peft_type": "X", "peft_type": "LORA"}', "given twice"),
        ("[" * 200_000, "not readable JSON"),
        ('{"a": ' * 50 + "1" + "}" * 50, "nested more than"),
        ('{"peft_type": NaN}', "not a number of JSON"),
        ("[]", "must hold a JSON mapping"),
        ("\xff", "not readable JSON"),
    ],
)
def test_bad_json_is_refused(text: str, match: str) -> None:
    with pytest.raises(PeftLabError, match=match):
        parse_json(text.encode("latin-1"), "The file")
