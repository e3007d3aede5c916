"""Ties, classes, agreement and the rows that every arm gets wrong, in a report."""

from __future__ import annotations

import csv
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.compare_helpers import record
from support.report_pages import ROWS, Page, comparison
from support.tiny_runs import make_task

from peft_lab.cli.demo import leading
from peft_lab.comparison.records.results import read_predictions, read_results
from peft_lab.comparison.report import plots, tables
from peft_lab.comparison.report.answers import MAX_ROWS, agreement_table, class_table, read_answers, wrong_rows
from peft_lab.comparison.report.report import build, write_report
from peft_lab.comparison.report.row_texts import RowTexts, row_texts
from peft_lab.comparison.report.sentences import describe, leaders
from peft_lab.comparison.run.recommend import choose
from peft_lab.comparison.stats.statistics import rank_arms
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import load_task
from peft_lab.metrics.predictions import Predictions, write_predictions
from peft_lab.runs.run_folder import write_labels


def cell_of(**scores: float):
    """Cell of arms whose runs have the scores of three seeds around these means."""
    runs = []
    for number, (arm, score) in enumerate(scores.items()):
        # other seeds are good for another arm, else no difference would vary
        shifts = np.roll((-0.01, 0.0, 0.01), number)
        runs += [record(arm, seed, score=score + float(shift)) for seed, shift in enumerate(shifts)]
    return rank_arms(runs)[0]


@pytest.mark.parametrize("second", [0.8, 0.8001], ids=["equal", "equal as printed"])
def test_arms_of_the_same_score_tie(second: float) -> None:
    cell = cell_of(b=0.8, a=second, c=0.5)
    assert set(leaders(cell)) == {"a", "b"}
    assert describe(cell).startswith("a and b tie for the highest mean accuracy, 0.800; of these, a is better than c")
    assert "has the highest" not in describe(cell)
    rows = tables.headline(cell).rows
    assert not any(entry.strong for row in rows for entry in row)
    assert [row[3].text for row in rows][:2] == ["tie for the best", "tie for the best"]
    # of one arm with a higher score, nothing of this is said
    alone = cell_of(b=0.8, a=0.7, c=0.5)
    assert describe(alone).startswith("b has the highest mean accuracy, 0.800 [")
    assert [row[0].strong for row in tables.headline(alone).rows] == [True, False, False]


def test_arms_that_all_tie() -> None:
    cell = cell_of(c=0.8, a=0.8, b=0.8)
    assert [arm.label for arm in cell.arms] == ["a", "b", "c"]
    assert describe(cell) == "a, b and c tie for the highest mean accuracy, 0.800, and there is no other arm." + (
        " The intervals are over seeds alone: the runs left nothing from which the test rows could be resampled."
    )


def test_one_seed_ties_too() -> None:
    cell = rank_arms([record(arm, 0, score=0.75) for arm in ("b", "a")])[0]
    assert describe(cell).startswith("a and b tie for the highest mean accuracy, 0.750, with one seed.")


def test_a_recommendation_names_ties() -> None:
    # made-up runs have 100 parameters for each letter of the label
    arm, reasons = choose(cell_of(bb=0.8, aa=0.8))
    assert arm == "aa"
    assert "aa and bb have the fewest; of these aa is taken, the first in the table." in reasons[1]
    arm, reasons = choose(cell_of(bbb=0.8, aa=0.8))
    assert reasons[1].endswith("aa is taken because it has the fewest of them; its mean ties for the best.")
    arm, reasons = choose(cell_of(bbb=0.8, aa=0.801))
    assert reasons[1].endswith("aa is taken because it has the fewest of them; its mean is also the best.")
    arm, reasons = choose(cell_of(bb=0.8, aa=0.801))
    assert reasons[1].endswith("aa and bb have the fewest; of these aa is taken, the one with the best mean.")


def test_the_demo_names_ties() -> None:
    def runs(**scores: float):
        return {method: [{"metrics": {"test": {"accuracy": score}}}] for method, score in scores.items()}

    assert leading(runs(lora=0.9, ssf=0.9001, svfit=0.8)) == (
        ["lora", "ssf"],
        "LoRA and SSF tie for the highest accuracy with seed 0, 0.900.",
    )
    assert leading(runs(lora=0.9, ssf=0.95))[1] == "SSF has the highest accuracy with seed 0, 0.950."
    assert leading(runs(lora=0.9)) == (["lora"], "")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comparison(tmp_path_factory.mktemp("answers"))


def answers_of(folder: Path):
    predictions = partial(read_predictions, folder)
    cell = rank_arms(read_results(folder), predictions)[0]
    return read_answers(cell, folder, predictions)


def test_classes_are_means_over_seeds_and_chosen_by_column(made: Path) -> None:
    found = answers_of(made)
    table = class_table(found).table
    assert {row[0].text for row in table.rows} == {"no", "yes"}
    shown = [column.title for column in tables.chosen(table).columns]
    assert shown == ["class", "rows", *(f"{arm.label} F1" for arm in found.cell.arms)]
    assert len(table.columns) == 2 + 3 * len(found.cell.arms)
    # the table's precision against the share of right rows among those called so
    (row,) = [row for row in table.rows if row[0].text == "yes"]
    column = [column.title for column in table.columns].index("head precision")
    precisions = []
    for items in found.arms["head"].values():
        called = items.columns["prediction"] == 1
        precisions.append((items.columns["reference"][called] == 1).mean())
    assert row[column].sort == pytest.approx(np.mean(precisions))


def test_agreement_of_an_arm_with_itself_is_that_of_its_seeds(made: Path) -> None:
    found = answers_of(made)
    table = agreement_table(found).table
    labels = [column.title for column in table.columns[1:]]
    values = np.array([[entry.sort for entry in row[1:]] for row in table.rows])
    assert (values == values.T).all()
    seeds = [items.columns["prediction"] for items in found.arms["head"].values()]
    between = [(seeds[one] == seeds[other]).mean() for one, other in ((0, 1), (0, 2), (1, 2))]
    assert values[labels.index("head"), labels.index("head")] == pytest.approx(np.mean(between))


def test_runs_that_are_gone_leave_the_parts_out(made: Path, tmp_path: Path, plain: None) -> None:
    """Of a copy to share, and where the predictions are those of other rows."""
    page = write_report(made, tmp_path / "copy")
    assert "Agreement" in page.read_text(), "a copy is made where the runs are"
    shutil.copy(made / "results.jsonl", tmp_path / "results.jsonl")
    again = build(tmp_path, read_results(tmp_path))
    assert [section.parts for section in again.sections] == [[], []]
    whole = tmp_path / "whole"
    shutil.copytree(made, whole)
    gone = read_results(whole)[3]
    write_predictions(
        whole / gone.folder, Predictions("classification", {"reference": np.ones(3), "prediction": np.ones(3)})
    )
    assert gone.arm not in answers_of(whole).arms


def test_rows_that_every_arm_gets_wrong(tmp_path: Path, plain: None) -> None:
    """Their texts stand in the page where the data are those of the run, and escaped; never in a copy to share."""
    run = tmp_path / "runs" / "a"
    make_task(run, rows=30)
    (run / "topics.yaml").rename(run / "task.yaml")
    hostile = '<b onclick="x">[a](javascript:b)</b>'
    with (run / "test.csv").open("a", newline="") as file:
        csv.writer(file).writerow([hostile, "food"])
    task = load_task(run / "task.yaml")
    splits = load_splits(task, test=True)
    rows = len(splits.test)
    labels = list(splits.labels)
    reference = np.asarray(splits.test["label"][:], dtype=float)
    wrong = (reference + 1) % len(labels)
    prediction = np.where(np.arange(rows) < rows - 2, reference, wrong)
    (run / "metrics.json").write_text(json.dumps({"run": {"task": "topics.yaml"}}))
    write_labels(run, labels)
    items = Predictions("classification", {"reference": reference, "prediction": prediction})
    write_predictions(run, items)
    one = record("a", 0, score=float((reference == prediction).mean()), folder="runs/a")
    one.metrics["data"] = {"rows": {"test": rows}, "fingerprints": splits.fingerprints, "labels": len(labels)}
    found = comparison(tmp_path, [one])
    (section,) = build(found, [one]).sections
    (part,) = [part for part in section.parts if part.title == "Rows that every arm gets wrong"]
    assert part.words.startswith(f"2 of the {rows} test rows are wrong in every run of every arm.")
    last = part.table.rows[-1]
    assert [entry.text for entry in last] == [
        str(rows - 1),
        str(rows),
        hostile,
        "food",
        f"{labels[int(wrong[-1])]} (1)",
    ]
    page = Page(write_report(found).read_text())
    assert hostile in page.text
    assert not any("onclick" in attributes for _, attributes in page.elements)
    copy = write_report(found, tmp_path / "copy").read_text()
    assert "javascript" not in copy
    assert "left out of a copy to share" in copy
    # other data than those of the run are not shown, and neither are any where the task is not known
    with (run / "test.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["snow", "weather"])
    assert "not those of the runs any more" in row_texts(found, one, [0]).reason
    (run / "metrics.json").write_text("{}")
    (run / "task.yaml").unlink()
    assert "does not say which task it was trained on" in row_texts(found, one, [0]).reason


def test_a_table_of_wrong_rows_has_an_end(made: Path) -> None:
    found = answers_of(made)
    reference = next(iter(found.arms["head"].values())).columns["reference"]
    items = Predictions("classification", {"reference": reference, "prediction": 1 - reference})
    none_right = type(found)(found.cell, found.labels, {"a": {0: items}})
    part = wrong_rows(none_right, lambda rows: RowTexts())
    assert part.words.startswith(f"{ROWS} of the {ROWS} test rows")
    assert len(part.table.rows) == MAX_ROWS
    all_right = type(found)(
        found.cell,
        found.labels,
        {"a": {0: Predictions("classification", {"reference": reference, "prediction": reference})}},
    )
    assert wrong_rows(all_right, lambda rows: RowTexts()).table is None


@pytest.mark.parametrize(("baseline", "line"), [(0.75, 0.75), (0.1, None), (None, None)])
def test_the_best_baseline_stands_in_the_plots(baseline: float | None, line: float | None) -> None:
    """As a dashed line, or in words where a line would leave the arms no room."""
    cell = cell_of(a=0.8, b=0.7)
    for one in [run for arm in cell.arms for run in arm.records if baseline is not None]:
        recorded = (("weaker", baseline - 0.05), ("best", baseline))
        one.metrics["baselines"] = [
            {"predictor": name, "metrics": {"test": {"accuracy": score}}} for name, score in recorded
        ]
    (forest,) = plots.forest(cell, plots.LIGHT).axes
    (pareto,) = plots.pareto(cell, {"a": 1.0, "b": 2.0}, "step ms", plots.LIGHT).axes
    for axes, label in ((forest, forest.get_xlabel()), (pareto, pareto.get_ylabel())):
        dashed = [one for one in axes.lines if one.get_linestyle() == "--"]
        assert len(dashed) == (line is not None)
        assert ("dashed: best baseline, 0.750" in label) == (line is not None)
        assert ("best baseline, 0.100, is further down" in label) == (baseline == 0.1)
    if line is not None:
        (drawn,) = [one for one in forest.lines if one.get_linestyle() == "--"]
        assert list(drawn.get_xdata()) == [line, line]


@pytest.mark.parametrize("classes", [2, 12, 13])
def test_a_heat_map_has_the_counts_of_few_classes(classes: int) -> None:
    counts = np.arange(classes**2).reshape(classes, classes)
    (axes,) = plots.heat_map(counts, [f"${index}" for index in range(classes)], plots.DARK).axes
    shares = axes.images[0].get_array()
    assert np.allclose(shares.sum(1), 1)
    few = classes <= plots.NAMED_CLASSES
    assert [text.get_text() for text in axes.texts] == (
        [f"{count}" for count in counts.ravel() if count] if few else []
    )
