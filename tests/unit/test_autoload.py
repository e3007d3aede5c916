"""The hook of `import torch`: it imports nothing heavy, raises nothing, and each switch turns it off."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_runs import HEAVY, environment

#: A peft that can be imported in no time, and whose import calls the hook as that of torch does.
PEFT = "import peft_lab_autoload\npeft_lab_autoload.register()\nclass PeftModel: ...\n"
LOADED = f"print([name for name in {HEAVY!r} if name in sys.modules])"
CALL = "import sys, peft_lab_autoload; peft_lab_autoload.register()"


def run(code: str, folder: Path, *options: str, **env: str) -> tuple[str, str]:
    """Output and errors of a fresh interpreter that ended well."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, env=environment(env), cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def test_the_entry_point_leads_to_the_hook() -> None:
    (point,) = importlib.metadata.entry_points(group="torch.backends", name="peft_lab")
    assert point.value == "peft_lab_autoload:register"


@pytest.mark.parametrize("option", ["-B", "-I"])
def test_it_plants_the_finder_and_imports_nothing_heavy(option: str, tmp_path: Path) -> None:
    # -I leaves the working directory out of the path, as -P does from Python 3.11 on
    code = f"{CALL}; print(type(sys.meta_path[0]).__name__); {LOADED}"
    assert run(code, tmp_path, option) == ("_PeftFinder\n[]", "")


@pytest.mark.parametrize(("value", "planted"), [("0", False), ("1", True)])
def test_its_switch_turns_it_off(value: str, planted: bool, tmp_path: Path) -> None:
    code = f"{CALL}; print('peft_lab' in sys.modules)"
    assert run(code, tmp_path, PEFT_LAB_AUTOLOAD=value) == (str(planted), "")


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("peft_lab.py", "raise SystemExit('this script was run')", "peft_lab.py"),
        ("peft_lab/__init__.py", "raise SystemExit('this package was run')", "peft_lab/__init__.py"),
    ],
)
def test_another_thing_of_that_name_is_not_run_but_told(file: str, text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    output, errors = run(f"{CALL}; print('imported')", tmp_path)
    assert output == "imported"
    assert len(errors.splitlines()) == 1
    assert errors.startswith("peft-lab cannot register its methods with peft (ImportError: ")
    assert f"{tmp_path / named}" in errors
    assert "PEFT_LAB_AUTOLOAD=0" in errors


def test_a_broken_package_is_told_in_one_line(tmp_path: Path) -> None:
    package = tmp_path / "peft_lab"
    package.mkdir()
    (package / "_register_on_import.py").write_text("")
    (package / "__init__.py").write_text("raise ValueError('first line\\nsecond line')")
    output, errors = run(f"{CALL}; print('imported')", tmp_path)
    assert output == "imported"
    assert len(errors.splitlines()) == 1
    assert "(ValueError: first line second line)" in errors


@pytest.mark.full
@pytest.mark.parametrize("first", ["", f"{CALL}; "], ids=["within the import of peft", "before it"])
def test_an_error_of_the_registration_does_not_reach_the_import_of_peft(first: str, tmp_path: Path) -> None:
    # this peft has none of the modules that the registration needs
    (tmp_path / "peft.py").write_text(PEFT)
    output, errors = run(f"{first}import peft; print(peft.PeftModel.__name__)", tmp_path)
    assert output == "PeftModel"
    assert len(errors.splitlines()) == 1
    assert "cannot register its methods with peft (ModuleNotFoundError: " in errors


def test_an_import_of_the_package_by_the_program_itself_raises(tmp_path: Path) -> None:
    (tmp_path / "peft.py").write_text(PEFT)
    code = "import peft_lab\ntry:\n    import peft\nexcept ModuleNotFoundError as error:\n    print(error)"
    output, errors = run(code, tmp_path)
    assert "peft" in output
    assert errors == ""
