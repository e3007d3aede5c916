"""Methods of one file each, put in as plug-ins: every property of the registry holds for them without another edit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
METHODS = sorted(file.stem for file in (TESTS / "fixtures" / "methods").glob("*.py"))
#: Tests over the registry; each of them has cases for every method.
PROPERTIES = ("properties", "unit/test_registry.py")


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """A folder for the module path with the methods installed as one package's entry points."""
    for name in METHODS:
        shutil.copy(TESTS / "fixtures" / "methods" / f"{name}.py", tmp_path / f"{name}.py")
    info = tmp_path / "fixture_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fixture-methods\nVersion: 1.0\n")
    entries = "".join(f"{name} = {name}:METHOD\n" for name in METHODS)
    (info / "entry_points.txt").write_text(f"[peft_lab.methods]\n{entries}")
    return tmp_path


def test_every_property_holds(plugins: Path) -> None:
    """A pytest of its own, whose registry has the methods, runs all cases that name one of them."""
    paths = [str(TESTS / path) for path in PROPERTIES]
    quiet = ["-rfEp", "--tb=short", "--disable-warnings", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *quiet, "-k", " or ".join(METHODS), *paths]
    env = {**os.environ, "PYTHONPATH": str(plugins)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=TESTS.parent, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join(line for line in lines if not line.startswith("PASSED"))[-10_000:]
    passed = Counter(name for line in lines if line.startswith("PASSED") for name in METHODS if name in line)
    assert all(passed[name] >= 20 for name in METHODS), "cases of each method have run"
