"""The pages of the gallery: their commands are run as printed, and the scores that they name come out again."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.processor_time import keeps_limit
from support.tiny_runs import environment

from peft_lab.backbones.pypi_weights import BACKBONES
from peft_lab.registry import list_kinds

ROOT = Path(__file__).parents[2]
GALLERY = ROOT / "docs" / "gallery"
PAGES = sorted(path for path in GALLERY.glob("*.md") if path.stem != "index")
BLOCK = re.compile(r"^```(\w+)(?: title=\"(\S+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: `<!-- result: runs/ratings pearsonr 0.88 0.05 -->`: run, metric of its test rows, value, and greatest distance.
RESULT = re.compile(r"<!-- result: (\S+) (\w+) (\S+) (\S+) -->")
#: Of processor time for all commands of a page: a minute when it was written, and as much again for a busy machine.
SECONDS = 120


def test_every_kind_has_a_page() -> None:
    assert {page.stem for page in PAGES} == set(list_kinds())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_its_result(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = RESULT.findall(text)
    assert found, f"{page.name} has no line such as <!-- result: runs/NAME accuracy 0.95 0.03 -->"
    for _, _, value, _ in found:
        assert value in RESULT.sub("", text), f"{page.name} does not show the value {value} that it is checked against"
    for heading in ("## Data", "## Commands", "## Result", "## What to try next"):
        assert f"\n{heading}\n" in text, heading


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_give_its_result(page: Path, tmp_path: Path) -> None:
    blocks, text = BLOCK.findall(page.read_text(encoding="utf-8")), page.read_text(encoding="utf-8")
    for name, backbone in BACKBONES.items():
        if re.search(rf"--model_name_or_path {re.escape(name)}\b", text) and find_spec(backbone.module) is None:
            pytest.skip(f"{name} is not installed: pip install {backbone.install}")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    for _, title, code in blocks:
        if title:
            (tmp_path / title).write_text(code, encoding="utf-8")
    began, used = time.perf_counter(), os.times()
    for language, _, code in blocks:
        for line in code.splitlines() if language == "console" else ():
            run(line, tmp_path)
    after = os.times()
    # of the processor, because other tests run beside this one
    seconds = after.children_user + after.children_system - used.children_user - used.children_system
    for folder, metric, value, distance in RESULT.findall(text):
        found = json.loads((tmp_path / folder / "metrics.json").read_text())["metrics"]["test"][metric]
        assert found == pytest.approx(float(value), abs=float(distance)), metric
    print(f"{page.stem}: {seconds:.0f} s of processor time, {time.perf_counter() - began:.0f} s in all")
    assert keeps_limit(seconds, SECONDS)


def run(line: str, folder: Path) -> None:
    """Run a printed command with this interpreter."""
    name, *arguments = shlex.split(line)
    program = {"peft-lab": [sys.executable, "-m", "peft_lab"], "python": [sys.executable]}[name]
    done = subprocess.run(
        [*program, *arguments],
        capture_output=True,
        text=True,
        env=environment(fast=True),
        cwd=folder,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
