"""The report of a comparison: whole, escaped, linked, and readable when runs failed or nothing has ended."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.compare_helpers import record
from support.report_pages import ACCURACY, ROWS, Page, comparison

from peft_lab.comparison.records.results import RESULTS, read_results
from peft_lab.comparison.records.run import Record
from peft_lab.comparison.records.run_frame import results_csv
from peft_lab.comparison.records.search_budget import overlapping
from peft_lab.comparison.report import plots, tables
from peft_lab.comparison.report.further_metrics import further_metrics_table
from peft_lab.comparison.report.pages import as_html, as_latex, as_markdown
from peft_lab.comparison.report.public_copy import without_paths
from peft_lab.comparison.report.report import build, write_report
from peft_lab.comparison.report.sections import slug
from peft_lab.comparison.report.sentences import interval_text
from peft_lab.comparison.stats.pareto import front_of_all
from peft_lab.comparison.stats.statistics import mean_score, rank_arms
from peft_lab.errors import ConfigError
from peft_lab.metrics.per_row import jackknife_values
from peft_lab.metrics.predictions import Predictions, write_predictions

HOSTILE = '<script>alert("x")</script>|`[a](javascript:alert(1))$x_1$'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = comparison(tmp_path_factory.mktemp("comparison"))
    write_report(found)
    return found


def test_everything_is_written(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    text = " ".join(page.text.split())
    assert "not distinguishable from" in text
    assert "head lacks seed 2." in text
    assert "RuntimeError: it broke" in text
    assert "every arm was tuned with the same number of candidates and runs" in text
    assert "Fewer than 200 validation rows on words (150) and signs (150)" in text
    assert "torch 2.13.0" in text
    assert "mixture of t distributions" in text
    for arm in ACCURACY:
        assert arm in text
    names = {path.name for path in (folder / "plots").iterdir()}
    for name in ("intervals", "pareto-trainable-parameters", "learning-rates", "training-loss", "confusion-2"):
        assert {f"words-tiny-{name}.png", f"signs-tiny-{name}.png"} <= names
    assert "all-tasks-intervals.png" in names


def test_the_page_needs_nothing_from_outside(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    for address in page.all("src") + page.all("srcset"):
        assert address.startswith("data:image/png;base64,")
    for address in page.all("href"):
        assert address.startswith(("#", "./runs/", "report.md", "report.tex", "results.csv"))
    assert not any(tag in ("link", "iframe", "object") for tag, _ in page.elements)
    assert "@import" not in (folder / "report.html").read_text()
    assert len(page.all("srcset")) == len(page.all("src")) == len(list((folder / "plots").iterdir()))
    assert all(page.all("alt"))


def test_links_lead_somewhere(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    ids = page.all("id")
    assert len(set(ids)) == len(ids)
    for address in page.all("href"):
        if address.startswith("#"):
            assert address[1:] in ids
        elif address.endswith("metrics.json"):
            assert (folder / address).is_file()
    headline = [entry for row in tables.headline(rank_arms(records_of(folder))[0]).rows for entry in row]
    unlinked = [entry.text for entry in headline if entry.group is None and re.search(r"\d", entry.text)]
    assert unlinked == []


def records_of(folder: Path) -> list[Record]:
    return [Record(**json.loads(line)) for line in (folder / RESULTS).read_text().splitlines()]


def test_columns_and_figures_are_chosen_by_plain_inputs(folder: Path) -> None:
    """In a browser: tests/full/test_report_browser.py."""
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert "aria-sort" in text
    regions = [attributes for _, attributes in page.elements if attributes.get("class") == "scroll"]
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in regions)
    inputs = [attributes for tag, attributes in page.elements if tag == "input"]
    radios = {attributes["name"] for attributes in inputs if attributes["type"] == "radio"}
    # one choice of costs and one of confusion matrices on each task, each with one figure chosen
    assert len(radios) == 4
    for name in radios:
        chosen = [one for one in inputs if one.get("name") == name and "checked" in one]
        assert [one["class"] for one in chosen] == ["o1"]
    assert len([attributes for tag, attributes in page.elements if tag == "label"]) == len(inputs)
    (rules,) = re.findall(r"nth-child\((\d+)\) \{ display: none", text)[-1:]
    widest = max(int(one["class"][1:]) for one in inputs if one["type"] == "checkbox")
    assert int(rules) == widest
    for words in ("What the words and columns mean", "probability of a difference this large", "baseline", "Pareto"):
        assert words in page.text


def test_markdown_and_csv(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "## words, tiny" in text
    assert "not distinguishable from" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records_of(folder))
    final = [row for row in rows if row["stage"] == "final" and row["status"] == "ok"]
    assert all(0 <= float(row["test_accuracy"]) <= 1 and row["trainable_parameters"] for row in final)
    assert [row["error"] for row in rows if row["status"] == "failed"] == ["RuntimeError: it broke"]


def test_tables_for_latex(folder: Path) -> None:
    text = (folder / "report.tex").read_text()
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 3
    for block in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL):
        rows = [line for line in block[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in rows} == {len(block[0])}
        assert re.findall(r"\\(\w+rule)", block[1])[:2] == ["toprule", "midrule"]
    # the baselines stand below a rule of their own, and one arm of each table is bold
    assert len(re.findall(r"\\midrule\nbaseline: uniform guessing & 0\.500 ", text)) == 2
    assert text.count(r"\bfseries lora r=8") + text.count(r"\bfseries svfit rank=8") == 3


def test_hostile_strings_stay_text(tmp_path: Path, plain: None) -> None:
    study = {"study": HOSTILE, "task": HOSTILE, "backbone": HOSTILE, "folder": "javascript:alert(1)"}
    runs = [record(HOSTILE, seed, options={"task": HOSTILE}, **study) for seed in (0, 1)]
    runs.append(
        record("=1+1", 0, error=HOSTILE, folder="../../etc", score=None, **{k: study[k] for k in ("study", "task")})
    )
    report = build(tmp_path, runs)
    page = Page(as_html(report))
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    own = ("#", "./", "report.md", "report.tex", "results.csv")
    assert all(address.startswith(own) for address in page.all("href"))
    assert HOSTILE in page.text
    assert not any("etc" in address for address in page.all("href"))
    text = as_markdown(report)
    assert "<script" not in text
    assert "[a](" not in text
    latex = as_latex(build(tmp_path, [record(r"\input{x}%$_^~&#{}" + "\n\\end{x}", 0, study="a\n\\input{y}")]))
    assert r"\input" not in latex.split("\n", 1)[1]
    assert latex.split("\n")[0].startswith("% a")
    assert r"\textbackslash{}input\{x\}\%\$\_\textasciicircum{}\textasciitilde{}\&\#\{\}" in latex
    assert "'=1+1" in results_csv(runs)


def test_figures_of_hostile_names_are_drawn(tmp_path: Path) -> None:
    cell = rank_arms([record(arm, seed, score=0.9) for arm in (HOSTILE, "$\\frac{", "a\nb") for seed in (0, 1)])[0]
    assert plots.render(lambda scheme: plots.forest(cell, scheme), plots.LIGHT).startswith(b"\x89PNG")


def test_without_matplotlib(tmp_path: Path, plain: None) -> None:
    path = write_report(comparison(tmp_path, [record("a", seed) for seed in (0, 1, 2)]))
    assert "There are no plots: matplotlib is not installed" in path.read_text()
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([], "No run has ended yet."),
        ([record("a", 0, "search")], "No final run has ended yet"),
        ([record("a", 0, score=None)], "No run on words with tiny gave a score. a has no score: its run failed."),
        ([record("a", 0)], "a is the only arm with a score, 0.900 (no interval)."),
        ([record("a", 0), record("b", 0, score=0.8)], "Fewer than 3 seeds on words (1 seed)"),
        ([record("a", 0, measures={}, curves={}, environment={}, options={})], "a is the only arm"),
        ([record("a", 0), record("a", 1, folder="")], "a is the only arm"),
    ],
)
def test_partial_results_are_readable(tmp_path: Path, plain: None, runs: list[Record], said: str) -> None:
    path = write_report(comparison(tmp_path, runs))
    assert said in " ".join(Page(path.read_text()).text.split())
    assert said.split(",")[0] in (tmp_path / "report.md").read_text() or "(" in said


def test_a_copy_to_share_has_no_runs_and_no_paths(tmp_path: Path, plain: None) -> None:
    local = {"run": {"output_dir": str(tmp_path), "seed": 0}, "method_config": {"base_model_name_or_path": "/models/x"}}
    runs = [record("a", seed) for seed in (0, 1)]
    runs = [replace(run, metrics=run.metrics | local, backbone="/models/x") for run in runs]
    own = comparison(tmp_path / "own", runs)
    (own / "study.yaml").write_text(f"tasks:\n- {{task: {tmp_path}/words.yaml, model_name_or_path: /models/x}}\n")
    page = write_report(own, tmp_path / "copy")
    assert page.parent == tmp_path / "copy"
    assert "words.yaml" in (page.parent / "study.yaml").read_text()
    assert not (tmp_path / "own" / "report.html").exists()
    for file in page.parent.iterdir():
        assert str(tmp_path) not in file.read_text(), file
        assert "/models" not in file.read_text(), file
    assert [run.metrics["run"]["seed"] for run in read_results(tmp_path / "copy")] == [0, 0]
    assert not [link for link in Page(page.read_text()).all("href") if link.startswith("./runs")]
    (tmp_path / "own" / "runs").mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match="holds runs; name a new folder"):
        write_report(tmp_path / "own", tmp_path / "own")


def with_metrics(one: Record, **scores: float | None) -> Record:
    """The run with further metrics on its test rows."""
    one.metrics["metrics"]["test"] |= {"loss": 0.3, **{name: value for name, value in scores.items() if value}}
    return one


def test_further_metrics_stand_in_a_table_of_their_own(tmp_path: Path, plain: None) -> None:
    """With the rows' part of their intervals, in the order of the main metric, and named as neither best nor worst."""
    rng, runs = np.random.default_rng(0), []
    reference = rng.integers(0, 2, ROWS).astype(float)
    for arm, accuracy in (("a", 0.9), ("b", 0.7)):
        for seed in (0, 1, 2):
            prediction = np.where(rng.random(ROWS) < accuracy, reference, 1 - reference)
            columns = {"reference": reference, "prediction": prediction, "confidence": rng.uniform(0.5, 1, ROWS)}
            items = Predictions("classification", columns)
            f1, ece = (jackknife_values(name, items, 2)[0] for name in ("f1", "ece"))
            score = float((reference == prediction).mean())
            runs.append(with_metrics(record(arm, seed, score=score), f1=f1, ece=ece, bleu=score))
            (tmp_path / runs[-1].folder).mkdir(parents=True)
            write_predictions(tmp_path / runs[-1].folder, items)
    report = build(tmp_path, runs)
    section = report.sections[0]
    assert [column.title for column in section.further_metrics.table.columns] == [
        "arm",
        "F1 (higher is better)",
        "calibration error (lower is better)",
        "bleu (higher is better)",
    ]
    assert "Intervals of bleu are over seeds alone" in section.further_metrics.words
    assert "calibration error" not in [column.title for column in section.table.columns]
    assert [row[0].text for row in section.further_metrics.table.rows] == [arm.label for arm in rank_arms(runs)[0].arms]
    f1 = [run.score(metric="f1") for run in runs[:3]]
    assert section.further_metrics.table.rows[0][1].sort == pytest.approx(np.mean(f1))
    over_seeds = interval_text(mean_score(dict(enumerate(runs[:3])), "f1", None)[0])
    assert section.further_metrics.table.rows[0][1].text != over_seeds
    assert section.further_metrics.table.rows[0][1].group == ("words", "tiny", "a")
    assert not any(entry.strong for row in section.further_metrics.table.rows for entry in row)
    page = Page(as_html(report))
    assert [attributes.get("class") for tag, attributes in page.elements if tag == "table"].count("sortable") >= 2
    for text in (" ".join(page.text.split()), as_markdown(report)):
        assert text.count("Further metrics") >= 1
        assert section.further_metrics.table.rows[1][2].text.replace("[", "").split()[0] in text
    write_report(comparison(tmp_path, runs), tmp_path / "copy")
    assert "### Further metrics" in (tmp_path / "copy" / "report.md").read_text()


def test_further_metrics_that_some_runs_lack(tmp_path: Path, plain: None) -> None:
    runs = [with_metrics(record("a", seed), f1=0.5 if seed else None) for seed in (0, 1, 2)]
    runs += [with_metrics(record("b", seed, score=0.8)) for seed in (0, 1)]
    rows = further_metrics_table(rank_arms(runs)[0]).table.rows
    assert [entry.text for row in rows for entry in row] == ["a", "0.500 [0.500, 0.500], 2 of 3 seeds", "b", "-"]
    assert further_metrics_table(rank_arms([with_metrics(record("a", 0))])[0]) is None
    assert "Further" not in as_markdown(build(tmp_path, [record("a", 0)]))


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no results"):
        write_report(tmp_path)


def test_unequal_budgets_are_told(tmp_path: Path, plain: None) -> None:
    runs = [record("a", 0, "search", rate=rate) for rate in (1e-3, 1e-2)] + [record("b", 0, "search")]
    report = build(tmp_path, runs)
    assert report.budget.startswith("The tuning budgets differ between the arms on words, tiny")
    assert build(tmp_path, [record("a", 0)]).budget.startswith("Nothing was searched")


def test_candidates_beyond_an_edge_are_told_and_counted(tmp_path: Path, plain: None) -> None:
    runs = [record(arm, 0, "search", rate=rate) for arm in ("a", "b") for rate in (1e-3, 1e-2)]
    assert [column.title for column in tables.tuning(runs).columns][3:5] == ["candidates", "runs"]
    runs.append(record("a", 0, "search", rate=1e-1, beyond=True))
    report = build(tmp_path, runs)
    assert "the same number of candidates and runs" in report.budget
    assert "went on beyond it" in report.budget
    assert [column.title for column in report.tuning.columns][3:6] == ["candidates", "beyond an edge", "runs"]
    assert [[entry.text for entry in row[3:6]] for row in report.tuning.rows] == [["3", "1", "3"], ["2", "0", "2"]]


def test_rate_at_the_edge_is_marked() -> None:
    runs = [record("a", 0, "search", rate=rate) for rate in (1e-3, 1e-2, 1e-1)]
    texts = [tables.tuning([*runs, record("a", 0, rate=rate)]).rows[0][6].text for rate in (1e-2, 1e-1)]
    assert texts == ["0.01", "0.1 (edge)"]


def test_runs_at_the_same_time_are_noticed() -> None:
    first = record("a", 0, started="2026-01-01T00:00:00", finished="2026-01-01T00:02:00")
    after = record("a", 1, started="2026-01-01T00:02:00", finished="2026-01-01T00:03:00")
    during = record("a", 2, started="2026-01-01T00:01:00", finished="2026-01-01T00:03:00")
    assert not overlapping([after, first])
    assert overlapping([first, during])
    assert "step_seconds" in tables.costs([after, first])
    assert "step_seconds" not in tables.costs([first, during])


def test_times_of_runs_at_the_same_time_are_on_no_front(tmp_path: Path, plain: None) -> None:
    costs = {"trainable_parameters": 10, "step_seconds": 0.1, "step_flops": 1e9}
    spans = {"a": ("2026-01-01T00:00:00", "2026-01-01T00:02:00"), "b": ("2026-01-01T00:01:00", "2026-01-01T00:03:00")}
    runs = [record(arm, 0, started=start, finished=end, measures=costs) for arm, (start, end) in spans.items()]
    front = build(tmp_path, runs).sections[0].front
    assert "step GFLOPs" in front
    assert "step ms" not in front


def test_local_folders_are_named_by_their_last_part() -> None:
    backbones = ("/home/somebody/tiny", "org/model", "/a/same", "/b/same")
    named = without_paths([record("a", 0, backbone=backbone) for backbone in backbones])
    assert [one.backbone for one in named] == ["tiny", "org/model", "/a/same", "/b/same"]


def test_data_is_listed_once(tmp_path: Path, plain: None) -> None:
    search, final = record("a", 0, "search"), record("a", 0)
    final.metrics["data"] = {**final.metrics["data"], "rows": {"train": 50, "validation": 150, "test": 9}}
    rows = build(tmp_path, [search, final]).data.rows
    assert [[entry.text for entry in row] for row in rows] == [
        ["words", "1", "abc", "50 train, 150 validation, 9 test"]
    ]


def test_cells_of_like_names_have_their_own_anchors(tmp_path: Path, plain: None) -> None:
    report = build(tmp_path, [record("a", 0, task="x y"), record("a", 0, task="x-y")])
    assert len({section.anchor for section in report.sections}) == 2
    assert slug("???") == "unnamed"


@pytest.mark.parametrize(("diverged", "scale"), [(9.0, "linear"), (10_000.0, "log")])
def test_a_run_that_diverged_does_not_flatten_the_others(diverged: float, scale: str) -> None:
    lines = [plots.Line("a", [1e-3, 1e-2, 1e-1], [7.0, 6.0, 5.0]), plots.Line("b", [1e-3, 1e-2], [8.0, diverged])]
    (axes,) = plots.chart(lines, ["a", "b"], ("learning rate", "perplexity"), plots.LIGHT, log_x=True).axes
    assert axes.get_yscale() == scale


def test_labels_do_not_overlap() -> None:
    """Twelve arms, most of them nearly in one place."""
    from matplotlib.figure import Figure

    rng = np.random.default_rng(1)
    points = [(1 + 0.02 * rng.random(), 0.9 + 0.02 * rng.random()) for _ in range(10)] + [(3, 0.7), (5, 0.95)]
    axes = Figure(figsize=(plots.WIDTH, 3.3), dpi=plots.DPI, layout="constrained").add_subplot()
    axes.plot(*zip(*points, strict=True), "o")
    labels = [f"method rank={index}" for index in range(12)]
    texts = plots.place_labels(axes, points, labels, [False] * 12, plots.LIGHT)
    boxes = [text.get_window_extent() for text in texts]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
        assert axes.get_window_extent().padded(1).containsx(box.x0)
        assert axes.get_window_extent().padded(1).containsx(box.x1)


def test_front_of_all() -> None:
    runs = [
        record(arm, seed, score=score, measures={"trainable_parameters": cost, "step_seconds": 0.1})
        for arm, score, cost in (("a", 0.9, 100), ("b", 0.8, 10), ("c", 0.7, 50))
        for seed in (0, 1)
    ]
    assert front_of_all(rank_arms(runs)[0], tables.costs([])) == (["a", "b"], ["trainable parameters", "step ms"])
