"""Out-of-distribution scores of the arms of a comparison: measures of runs, and the table of the report."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score
from support import tiny_runs
from support.compare_helpers import tiny_study

from peft_lab.comparison.records.results import OOD_SCORES, read_predictions
from peft_lab.comparison.records.run import Record
from peft_lab.comparison.report.ood_table import ood_table
from peft_lab.comparison.run.measures import measure
from peft_lab.comparison.run.plan import arm_runs
from peft_lab.comparison.stats.statistics import rank_arms
from peft_lab.comparison.study.schema import from_mapping, load_study
from peft_lab.errors import ConfigError
from peft_lab.training.run import train


def other_task(folder: Path) -> Path:
    """A task with rows of filler words alone, and labels that the other task does not have."""
    path = tiny_runs.make_task(folder, rows=24, name="fillers")
    for split in ("train", "validation", "test"):
        rows = list(csv.DictReader((folder / f"{split}.csv").open()))
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["sentence", "topic"])
            writer.writeheader()
            for number, row in enumerate(rows):
                words = [word for word in row["sentence"].split() if word in tiny_runs.FILLERS]
                writer.writerow({"sentence": " ".join(words), "topic": f"number {number % 5}"})
    return path


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    """The final runs of two seeds, with what was measured of them."""
    folder = tmp_path_factory.mktemp("ood")
    values = tiny_study(folder, methods=["lora"], limits={"max_steps": 40}, ood=str(other_task(folder / "other")))
    study = load_study(values)
    found = []
    for run in next(arm_runs(study, study.cells[0], study.arms[0])):
        place = folder / "runs" / run.id
        metrics = train({**run.options, "output_dir": str(place)}).metrics
        measures = measure(run, place, metrics)
        found.append(
            Record.of(
                run, status="ok", metrics=metrics, measures=measures, folder=f"runs/{run.id}", finished="2026-01-01"
            )
        )
    return folder, found


def test_measures_are_those_of_the_scores_of_the_rows(records: Any) -> None:
    folder, runs = records
    for record in runs:
        scores = load_file(folder / record.folder / OOD_SCORES)
        for name in ("knn", "mahalanobis", "energy", "msp"):
            own, other = scores[f"{name}.own"], scores[f"{name}.other"]
            assert (len(own), len(other)) == (24, 24)
            area = roc_auc_score([1] * 24 + [0] * 24, [*own, *other])
            assert record.measures[f"ood_{name}_auroc"] == pytest.approx(area)
            assert 0 <= record.measures[f"ood_{name}_fpr95"] <= 1


def test_maximum_softmax_is_the_confidence_of_the_predictions(records: Any) -> None:
    folder, runs = records
    items = read_predictions(folder, runs[0])
    found = load_file(folder / runs[0].folder / OOD_SCORES)["msp.own"]
    assert sorted(found) == pytest.approx(sorted(items.columns["confidence"]), abs=1e-5)


def test_the_table_has_bootstrap_intervals_or_says_that_it_has_none(records: Any, tmp_path: Path) -> None:
    folder, runs = records
    (cell,) = rank_arms(runs, partial(read_predictions, folder))
    part = ood_table(cell, folder)
    assert part is not None
    assert part.table is not None
    assert "bootstrap intervals over seeds, test rows" in part.words
    (row,) = part.table.rows
    assert len(row) == len(part.table.columns) == 9
    mean = sum(record.measures["ood_knn_auroc"] for record in runs) / 2
    assert row[1].sort == pytest.approx(mean)
    low, high = map(float, row[1].text.partition(" [")[2].rstrip("]").split(", "))
    assert low <= mean <= high
    copied = ood_table(cell, tmp_path)
    assert copied is not None
    assert "over seeds alone" in copied.words
    plain = [Record.of(record, metrics=record.metrics) for record in runs]
    assert ood_table(rank_arms(plain, partial(read_predictions, folder))[0], folder) is None


def test_scores_that_are_none_are_named(records: Any, tmp_path: Path) -> None:
    _, runs = records
    (cell,) = rank_arms(runs)
    (tmp_path / runs[0].folder).mkdir(parents=True)
    (tmp_path / runs[0].folder / OOD_SCORES).write_bytes(b"no scores")
    with pytest.raises(ConfigError, match="is not a file of scores"):
        ood_table(cell, tmp_path)


def test_the_key_stands_in_the_study_in_its_measures_or_in_a_task(tmp_path: Path) -> None:
    other = str(other_task(tmp_path / "other"))
    plain = tiny_study(tmp_path)
    entry = {**plain["tasks"][0], "ood": other}
    for changes in ({"ood": other}, {"measures": {"ood": other}}, {"tasks": [entry]}):
        study = load_study(tiny_study(tmp_path, **changes))
        assert study.cells[0].ood == other
        # a study that is written out is the same study
        again = from_mapping(yaml.safe_load(yaml.safe_dump(study.to_dict())), "it", tmp_path)
        assert again.cells[0].ood == other
    ids = []
    for changes in ({}, {"ood": other}):
        study = load_study(tiny_study(tmp_path, **changes))
        ids.append(next(arm_runs(study, study.cells[0], study.arms[0]))[0].id)
    assert ids[0] != ids[1]


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    own = tiny_study(tmp_path)["tasks"][0]["task"]
    wrong = {own: "is that task itself", "sign-digits": "of kind image_classification"}
    for name, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            load_study(tiny_study(tmp_path, ood=name))
    with pytest.raises(ConfigError, match="give it once"):
        load_study(tiny_study(tmp_path, ood="snips", measures={"ood": "snips"}))
