"""The wheel: it holds every file, a new method or task needs no edit elsewhere, and imports run one way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Folder of the repository -> folder in the wheel.
FOLDERS = {"peft_lab": "peft_lab", "adapters": "peft_lab/adapters", "tasks": "peft_lab/tasks"}
#: The hook of `import torch`, which stands outside of the package.
AUTOLOAD = "peft_lab_autoload.py"
CACHES = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", ".*_cache")

METHOD = '''
"""A method that a test adds: it multiplies the output of a linear layer."""

from __future__ import annotations

from dataclasses import dataclass

from peft_lab.registry import MethodInfo

METHOD = MethodInfo(
    name="added",
    title="Added",
    paper="",
    place="weight",
    config="AddedConfig",
    roles=("attention",),
    capabilities=("linear",),
)


@dataclass
class AddedConfig:
    factor: float = 1.0
'''

TASK = """
name: added-task
kind: text_classification
metrics: [accuracy]
version: "1"
licence: CC0-1.0
data: {builder: csv, files: {train: train.csv, validation: validation.csv}}
columns: {text: text, label: label}
labels: [a, b]
"""


def copy_source(target: Path) -> Path:
    """Copy what the wheel is built from, so that no build folder appears in the repository."""
    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", AUTOLOAD):
        shutil.copyfile(ROOT / name, target / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=CACHES)
    return target


def build_wheel(source: Path, out: Path) -> Path:
    """Build the wheel offline, with the setuptools of this environment."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("peft_lab-*.whl")
    return wheel


def install(wheel: Path, site: Path) -> Path:
    """Unpack a wheel, as an installation does with one of pure Python."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def run(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code that finds the installed package before that of the repository."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=site,
        env={**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def lint_imports(site: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of pyproject.toml on the installed package, as `make lint` does."""
    arguments = ["lint-imports", "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    code = f"import sys; sys.argv = {arguments!r}; from importlinter.cli import lint_imports_command as main; main()"
    return run(site, code)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_source(folder / "source"), folder / "out")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("site"))


def test_the_wheel_holds_every_file_of_the_tree_and_no_other(wheel: Path) -> None:
    expected = {AUTOLOAD}
    for folder, inside in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(f"{inside}/{path.relative_to(ROOT / folder).as_posix()}")
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if not name.endswith("/") and ".dist-info/" not in name}
    assert found == expected
    assert "peft_lab/hub/model_card.md.jinja" in found
    assert "peft_lab/py.typed" in found


def test_an_added_method_and_task_are_installed_without_an_edit_elsewhere(tmp_path: Path) -> None:
    source = copy_source(tmp_path / "source")
    method = source / "adapters" / "weight" / "added"
    method.mkdir()
    (method / "__init__.py").write_text("")
    (method / "method.py").write_text(METHOD)
    (method / "constants.json").write_text("[1]")
    (source / "tasks" / "added-task.yaml").write_text(TASK)
    site = install(build_wheel(source, tmp_path / "out"), tmp_path / "site")
    found = run(
        site,
        """
        import json
        from pathlib import Path
        import peft_lab
        from peft_lab.registry import config_fields
        info = peft_lab.list_methods()["added"]
        print(json.dumps({
            "module": info.module,
            "data": (info.path.parent / "constants.json").read_text(),
            "fields": list(config_fields("added")),
            "task": peft_lab.list_tasks()["added-task"].kind,
            "config": peft_lab.AddedConfig().factor,
            "home": str(Path(peft_lab.__file__).parents[1]),
        }))
        """,
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == {
        "module": "peft_lab.adapters.weight.added.method",
        "data": "[1]",
        "fields": ["factor"],
        "task": "text_classification",
        "config": 1.0,
        "home": str(site),
    }


def test_imports_run_one_way(installed: Path) -> None:
    pytest.importorskip("importlinter")
    done = lint_imports(installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "named"),
    [
        ("adapters/weight/svfit/method.py", "from peft_lab.training import run", "peft_lab.training"),
        ("tasks/kinds/causal_lm.py", "from peft_lab.loading import load_run", "peft_lab.loading"),
    ],
)
def test_an_import_of_a_higher_package_is_refused(
    file: str, line: str, named: str, installed: Path, tmp_path: Path
) -> None:
    pytest.importorskip("importlinter")
    site = tmp_path / "site"
    shutil.copytree(installed, site, ignore=CACHES)
    target = site / "peft_lab" / file
    first = "from __future__ import annotations\n"  # no import may stand before this one
    assert first in target.read_text()
    target.write_text(target.read_text().replace(first, f"{first}\n{line}\n", 1))
    done = lint_imports(site)
    assert done.returncode == 1, done.stdout + done.stderr
    module = "peft_lab." + file.removesuffix(".py").replace("/", ".")
    assert "Packages import lower ones alone BROKEN" in done.stdout
    assert module in done.stdout
    assert named in done.stdout
