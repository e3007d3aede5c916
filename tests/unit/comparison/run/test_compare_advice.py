"""`recommend`: what it drops for the time, which arm it takes and why, and the run file that it ends in."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
from support.compare_helpers import PretendBackend, tiny_study

from peft_lab.comparison import load_study, recommend
from peft_lab.comparison.records.results import Journal
from peft_lab.comparison.records.run import Run
from peft_lab.comparison.run import runner
from peft_lab.comparison.run.recommend import PILOT_STEPS
from peft_lab.errors import ConfigError
from peft_lab.runs.run_config import load_run

SIZES = {"head": 99, "lora": 2000, "ssf": 500}

#: Scores of the seeds 0, 1 and 2, of which lora's are the best by less than seeds make.
ALIKE = {"head": (0.20, 0.24, 0.17), "lora": (0.94, 0.87, 0.92), "ssf": (0.87, 0.93, 0.90)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("advice")


@pytest.fixture(autouse=True)
def _without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_report", lambda folder: None)


@pytest.fixture(autouse=True)
def _stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes, so what the plans have time for does not depend on the speed of the machine."""
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)


def advise(place: Path, out: Path, backend: PretendBackend, minutes: float, **changes: Any) -> Any:
    values = tiny_study(place, methods=["head", "lora", "ssf"], seeds=3, search={"trials": 3}, **changes)
    study = load_study({**values, "limits": {"max_steps": 100}})
    return recommend(
        "-", "-", minutes, out / "run.yaml", output_dir=out / "study", study=study, backend=backend, workers=1
    )


def apart(run: Run) -> float:
    """Scores that tell ssf from lora and lora from head."""
    noise = random.Random(f"{run.method} {run.seed}").uniform(-0.001, 0.001)
    return {"head": 0.3, "lora": 0.6, "ssf": 0.9}[run.method] + noise


def alike(run: Run) -> float:
    """Scores that tell head from the others, but not lora from ssf."""
    scores = ALIKE[run.method]
    return scores[run.seed] if run.stage == "final" else sum(scores) / len(scores)


def test_the_best_arm_is_taken_if_it_can_be_told(place: Path, tmp_path: Path) -> None:
    found = advise(place, tmp_path, PretendBackend(apart, sizes=SIZES), minutes=60)
    assert found.arm == "ssf"
    assert found.dropped == ()
    assert "told apart" in found.reasons[-1]
    assert len([r for r in found.comparison.records if r.stage == "final"]) == 9


def test_of_arms_that_cannot_be_told_apart_the_smallest_is_taken(place: Path, tmp_path: Path) -> None:
    found = advise(place, tmp_path, PretendBackend(alike, sizes=SIZES), minutes=60)
    assert found.arm == "ssf"
    assert "cannot be told apart" in found.reasons[-1]
    assert "fewest" in found.reasons[-1]
    assert "ssf (500)" in found.reasons[-1]


def test_the_run_file_is_one_that_train_takes(place: Path, tmp_path: Path) -> None:
    found = advise(place, tmp_path, PretendBackend(apart, sizes=SIZES), minutes=60)
    config = load_run(found.file)
    assert config.check().name == "ssf"
    assert config.training_arguments["learning_rate"] == found.learning_rate
    assert config.training_arguments["max_steps"] == 100
    assert all(line.startswith("# ") for line in found.file.read_text().splitlines()[: len(found.reasons)])
    with pytest.raises(ConfigError, match="is there already"):
        advise(place, tmp_path, PretendBackend(apart), minutes=60)


def test_runs_that_only_measure_time_are_short_and_not_counted(place: Path, tmp_path: Path) -> None:
    found = advise(place, tmp_path, PretendBackend(apart, sizes=SIZES), minutes=60)
    journal = Journal(tmp_path / "study")
    journal.read()
    pilots = [r for r in journal.records.values() if r.steps == PILOT_STEPS]
    assert {r.arm for r in pilots} == {"head", "lora", "ssf"}
    assert all(r.score("test") is None for r in pilots)
    assert not {r.id for r in pilots} & {r.id for r in found.comparison.records}


@pytest.mark.parametrize(
    ("minutes", "words"),
    [
        (60, []),
        (40, ["beyond"]),
        (33, ["beyond", "seeds"]),
        (27, ["seeds", "learning rates"]),
        (6.6, ["seeds", "learning rates", "steps"]),
    ],
)
def test_what_the_time_does_not_suffice_for_is_said(
    place: Path, tmp_path: Path, minutes: float, words: list[str]
) -> None:
    backend = PretendBackend(apart, workers=1, step_seconds=dict.fromkeys(SIZES, 1.0), sizes=SIZES)
    found = advise(place, tmp_path, backend, minutes)
    known = ("beyond", "seeds", "learning rates", "steps", "left out")
    assert [word for word in known if any(word in sentence for sentence in found.dropped)] == words
    assert all(sentence in found.file.read_text() for sentence in found.dropped)


def test_a_rate_at_an_edge_is_searched_beyond_and_told_of(place: Path, tmp_path: Path) -> None:
    def score(run: Run) -> float:
        return apart(run) + 0.01 * math.log10(run.learning_rate)

    found = advise(place, tmp_path, PretendBackend(score, sizes=SIZES), minutes=60)
    records = found.comparison.records
    assert len([r for r in records if r.beyond]) == 2 * 3
    assert found.learning_rate == max(r.learning_rate for r in records if r.arm == found.arm)
    assert found.reasons[-1].startswith("Its learning rate is the highest that was tried")


def test_the_slowest_arm_goes_first(place: Path, tmp_path: Path) -> None:
    backend = PretendBackend(apart, workers=1, step_seconds={"lora": 5.0}, sizes=SIZES)
    found = advise(place, tmp_path, backend, minutes=1)
    assert {r.arm for r in found.comparison.records} == {"head", "ssf"}
    assert any(sentence.startswith("lora was left out") for sentence in found.dropped)


def test_too_little_time_is_an_error_that_names_the_need(place: Path, tmp_path: Path) -> None:
    backend = PretendBackend(apart, step_seconds=dict.fromkeys(SIZES, 60.0), sizes=SIZES)
    with pytest.raises(ConfigError, match=r"two methods with two seeds each take about \d+"):
        advise(place, tmp_path, backend, minutes=1)
    assert not (tmp_path / "run.yaml").exists()


def test_a_method_that_does_not_fit_the_backbone_is_left_out(place: Path, tmp_path: Path) -> None:
    def score(run: Run) -> float:
        if run.method == "ssf":
            raise RuntimeError("no such layer")
        return apart(run)

    found = advise(place, tmp_path, PretendBackend(score, sizes=SIZES), minutes=60)
    assert found.arm == "lora"
    assert any("ssf was left out" in sentence and "no such layer" in sentence for sentence in found.dropped)
