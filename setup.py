"""Packages and package data, computed from the folders: a method or a kind of task is added by its files alone."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
#: Package -> folder. `adapters` and `tasks` stand at the top of the repository and are installed inside `peft_lab`.
FOLDERS = {"peft_lab": "peft_lab", "peft_lab.adapters": "adapters", "peft_lab.tasks": "tasks"}
LEFT_OUT = {"__pycache__"}


def packages() -> dict[str, str]:
    """Every package -> its folder relative to the root: each folder that holds an `__init__.py`."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("__init__.py")):
            steps = file.parent.relative_to(ROOT / folder).parts
            found[".".join((package, *steps))] = file.parent.relative_to(ROOT).as_posix()
    return found


def package_data(known: dict[str, str]) -> dict[str, list[str]]:
    """Package data: files that are no modules, and all files of folders without an `__init__.py`."""
    found: dict[str, list[str]] = {}
    owners = {folder: package for package, folder in known.items()}
    for top in FOLDERS.values():
        for file in sorted((ROOT / top).rglob("*")):
            if not file.is_file() or file.suffix == ".pyc" or LEFT_OUT & set(file.parts):
                continue
            folder = next(p for p in file.relative_to(ROOT).parents if p.as_posix() in owners)
            if file.suffix == ".py" and file.parent == ROOT / folder:  # a module of a package is known already
                continue
            name = file.relative_to(ROOT / folder).as_posix()
            found.setdefault(owners[folder.as_posix()], []).append(name)
    return found


KNOWN = packages()
setup(packages=list(KNOWN), package_dir=KNOWN, package_data=package_data(KNOWN), py_modules=["peft_lab_autoload"])
