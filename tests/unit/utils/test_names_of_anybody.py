"""Names from files of anybody, shown: no control character, formula, markup or HTML gets through."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.tiny_runs import make_task

from peft_lab import errors, registry
from peft_lab.cli.app import main
from peft_lab.cli.output import new_table, print_out
from peft_lab.comparison.records.results import read_results
from peft_lab.comparison.records.run_frame import results_csv
from peft_lab.comparison.report.pages import as_html, as_latex, as_markdown
from peft_lab.comparison.report.report import build
from peft_lab.comparison.run.progress import Progress
from peft_lab.data.task_registry import parse_task
from peft_lab.errors import CONTROL, PeftLabError
from peft_lab.hub.model_card import Base, card_text, plain_card
from peft_lab.metrics.predictions import Predictions
from peft_lab.utils.terminal import shown
from peft_lab.utils.text import csv_cell, json_line, markdown_code, markdown_text, plain

NAMES = (
    *("=cmd|' /C calc'!A0", "+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1"),
    *("\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\x7f", "a\u202etxt.exe", "a\u2066b", "a\u200bb", "\U000e0041"),
    *("[red]x[/red]", "[/]", "[link=http://a.b]c[/link]", "<script>alert(1)</script>", "![a](http://b)"),
    *("a`b", "a|b", "a\nb", "$x^$", '"); import os; ("'),
)
ROOT = Path(__file__).parents[3]


def _records(name: str) -> list[Any]:
    """Records of a committed comparison with a name in each of their texts and keys."""
    found = []
    for record in read_results(ROOT / "benchmarks" / "results" / "reprogram"):
        metrics = json.loads(json.dumps(record.metrics))
        metrics["metrics"] = {split: {name: 0.5, **values} for split, values in metrics["metrics"].items()}
        metrics["data"] |= {"version": name, "fingerprint": name}
        texts = {key: f"{name}{getattr(record, key)}" for key in ("study", "arm", "method", "task", "backbone")}
        changed = dataclasses.replace(
            record,
            **texts,
            error=name,
            metrics=metrics,
            measures={**record.measures, name: 1.0},
            tuned={name: name},
            options={**record.options, "task": name},
            environment={"versions": {name: name}, "device": name, "platform": name},
        )
        found.append(changed)
    return [record for record in found if record.stage == "final"][:4]


@pytest.mark.parametrize("name", NAMES)
def test_csv_of_a_comparison(name: str) -> None:
    text = results_csv(_records(name))
    assert not CONTROL.search(text)
    for row in csv.reader(io.StringIO(text)):
        for cell in row:
            is_number = re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?|nan", cell)
            assert is_number or not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\uff1d")), cell


@pytest.mark.parametrize("name", NAMES)
def test_report_of_a_comparison(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    report = build(tmp_path, _records(name))
    page, text, latex = as_html(report), as_markdown(report), as_latex(report)
    for shown_text in (page, text, latex):
        assert not CONTROL.search(shown_text)
    for shown_text in (page, text):
        assert "<script>alert" not in shown_text
    assert "![a](" not in text
    # a bar in a name would add a cell to its row
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert tables
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def _metrics(name: str) -> dict[str, Any]:
    """Metrics of a run with a name in each of their texts."""
    return {
        "run": {"model_name_or_path": "org/base", "method": "lora", "output_dir": name, name: name, "lr": 1},
        "metrics": {"test": {name: 0.5, "accuracy": 0.5}, name: {"accuracy": 0.25}},
        **{"main_metric": "accuracy", "learning_rate": 1e-3, "seed": 0, "global_step": 1, "train_seconds": 1.0},
        **{"adapter_bytes": 1, "peak_memory_bytes": 1, "device": name, "versions": {"peft-lab": name, name: name}},
        "parameters": {"trainable": 1, "total": 2},
        "data": {"rows": {"test": 10, name: 5}, "labels": 3, "fingerprint": name},
        "baselines": [{"predictor": name, "metrics": {"test": {name: 0.25, "accuracy": 0.75}}}],
        "beats_baseline": False,
        "method_config": {"r": 1},
        "lora_export": {"title": name, "rank": 1, "max_relative_error": 0.0},
    }


@pytest.mark.parametrize("name", NAMES)
def test_model_card(name: str, tmp_path: Path) -> None:
    values = yaml.safe_load(make_task(tmp_path).read_text())
    task = parse_task({**values, "title": name, "licence": name, "homepage": name, "version": name})
    info, base = registry.method("lora"), Base(name, revision=name)
    config = {"target_modules": [name], "modules_to_save": name, "peft_version": name}
    items = Predictions("classification", {"reference": np.arange(3.0), "prediction": np.zeros(3)})
    whole = card_text(name, _metrics(name), info, task, base, items=items, labels=[name, "b", f"c{name}"])
    for text in (whole, plain_card(name, config, info, base, 1)):
        head, body = text.split("\n---\n", 1)
        assert yaml.safe_load(head.removeprefix("---\n"))
        assert not CONTROL.search(text)
        assert "<script>" not in re.sub(r"`[^`]*`|```.*?```", "", body, flags=re.DOTALL)
        tables = re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE)
        for table in tables:
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table
        # the code loads from this name and does nothing else
        code = body.split("```python\n")[1].split("```")[0]
        assert "import os" not in code.replace(json_line(name), "")
        compile(code, "card", "exec")


@pytest.mark.parametrize("name", NAMES)
def test_terminal(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    print_out(f"[bold]x[/]: {shown(name)}")
    table = new_table(name, title=name)
    table.add_row(name)
    print_out(table)
    with Progress(name, 1, 1) as progress:
        progress.done(_records(name)[0], fresh=True)
    monkeypatch.setattr(sys, "argv", ["peft-lab", "validate", name])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not CONTROL.search(out + err)
    # markup is shown as it was written
    if name.startswith("["):
        assert out.count(name) >= 2
        assert name in err


@pytest.mark.parametrize("name", NAMES)
def test_log(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("peft_lab").warning('The folder "%s" is odd.', name)
    assert not CONTROL.search(caplog.text)


@pytest.mark.parametrize("kind", [PeftLabError, *PeftLabError.__subclasses__()])
@pytest.mark.parametrize("name", [*NAMES, "x" * 10**6])
def test_every_error_is_one_short_visible_line(kind: type[PeftLabError], name: str) -> None:
    text = str(kind(f'There is no "{name}".'))
    assert not CONTROL.search(text)
    assert "\n" not in text
    assert len(text) < 2100
    assert text.startswith("There is no ")


@pytest.mark.parametrize("name", NAMES)
def test_a_text_keeps_its_meaning_where_it_is_read_again(name: str) -> None:
    assert json.loads(json_line({name: name})) == {name: name}
    assert not CONTROL.search(json_line(name))
    for text in (markdown_text(name), markdown_code(name), plain(name), str(csv_cell(name))):
        assert not CONTROL.search(text)
    assert csv_cell(-1.5) == -1.5


def test_nearest_names_are_not_sought_among_thousands() -> None:
    assert errors.did_you_mean("lora", (str(i) for i in range(10**5))) == ""
    assert errors.did_you_mean("x" * 10**5, ["lora"]) == ""
