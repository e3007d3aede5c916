"""Methods of one file each, put in as plug-ins: every property of the registry holds for them without another edit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


@pytest.mark.parametrize("method", METHODS)
def test_every_property_holds(method: str, plugins: Path) -> None:
    """A pytest of its own, whose registry has the methods, runs all cases that name one of them."""
    paths = [str(TESTS / path) for path in PROPERTIES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", method, *paths]
    env = {**os.environ, "PYTHONPATH": str(plugins)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=TESTS.parent, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    passed = int(done.stdout.rpartition(" passed")[0].rpartition(" ")[2].rpartition("\n")[2])
    assert passed >= 20, "cases of the method have run"
