"""`recommend`: what it drops for the time, which arm it takes and why, and the run file that it ends in."""

from __future__ import annotations

import itertools
import math
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support.compare_helpers import PretendBackend, tiny_study

from peft_lab.comparison import load_study, recommend
from peft_lab.comparison.records.results import Journal
from peft_lab.comparison.records.run import Run
from peft_lab.comparison.run import runner
from peft_lab.comparison.run.time_plan import PILOT_STEPS, seeds_to_separate
from peft_lab.comparison.stats.estimates import Estimate, VarianceComponent
from peft_lab.comparison.stats.statistics import PairTest
from peft_lab.errors import ConfigError
from peft_lab.registry import method
from peft_lab.runs.run_config import load_run
from peft_lab.utils.interruption import Stopped

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


def advise(
    place: Path, out: Path, backend: PretendBackend, minutes: float, output: Path | None = None, **changes: Any
) -> Any:
    values = tiny_study(place, methods=["head", "lora", "ssf"], seeds=3, search={"trials": 3}, **changes)
    study = load_study({**values, "limits": {"max_steps": 100}})
    return recommend(
        "-", "-", minutes, output or out / "run.yaml", output_dir=out / "study", study=study, backend=backend, workers=1
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
    found = advise(place, tmp_path, backend, minutes=5)
    assert {r.arm for r in found.comparison.records} == {"head", "ssf"}
    assert any(sentence.startswith("lora was left out") for sentence in found.dropped)


def test_little_time_leaves_the_default_method_with_the_steps_that_fit(place: Path, tmp_path: Path) -> None:
    backend = PretendBackend(apart, workers=1, step_seconds=dict.fromkeys(SIZES, 5.0), sizes=SIZES)
    found = advise(place, tmp_path, backend, minutes=1.2)
    assert found.arm == "lora"
    assert found.score is not None
    assert PILOT_STEPS <= found.options["max_steps"] < 25
    assert "head and ssf were not tried because the time is short." in found.dropped
    assert "only arm with a score" in found.reasons[0]
    assert any(re.match(r"With --minutes \d+: 2 seeds", sentence) for sentence in found.more)


def test_without_a_score_the_default_is_named_as_such_and_may_be_replaced(place: Path, tmp_path: Path) -> None:
    def fails(run: Run) -> float:
        raise RuntimeError("no such layer")

    found = advise(place, tmp_path, PretendBackend(fails, sizes=SIZES), minutes=60)
    assert (found.arm, found.score, found.finished) == ("lora", None, False)
    assert found.answer.startswith("No evidence yet; the default is lora")
    assert "no such layer" in found.reasons[0]
    config = load_run(found.file)
    assert config.check().name == "lora"
    assert config.training_arguments["learning_rate"] == method("lora").learning_rate
    again = advise(place, tmp_path / "more", PretendBackend(apart, sizes=SIZES), 60, output=found.file)
    assert again.finished
    assert again.file.read_text().startswith(f"# {again.answer}")


def test_a_time_that_is_over_at_once_still_ends_with_an_answer(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(1000.0, 30.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    backend = PretendBackend(apart, sizes=SIZES)
    found = advise(place, tmp_path, backend, minutes=0.05)
    assert backend.runs == []
    assert found.answer.startswith("No evidence yet")
    assert "try --minutes 10" in found.more[0]


def test_a_signal_leaves_the_answer_from_what_is_there(place: Path, tmp_path: Path) -> None:
    def score(run: Run) -> float:
        if run.stage == "final" and run.seed == 1:
            raise Stopped(signal.SIGINT)
        return apart(run)

    with pytest.raises(Stopped) as raised:
        advise(place, tmp_path, PretendBackend(score, workers=1, sizes=SIZES), minutes=60)
    found = raised.value.result
    assert found.score is not None
    assert not found.finished
    assert any("not made or not ended when it was stopped" in sentence for sentence in found.dropped)
    assert "the same command goes on" in raised.value.hint
    # the same call goes on, and replaces the answer
    journal = Journal(tmp_path / "study")
    journal.read()
    backend = PretendBackend(apart, workers=1, sizes=SIZES)
    assert advise(place, tmp_path, backend, minutes=60).arm == "ssf"
    assert not {run.id for run in backend.runs} & journal.records.keys()


@pytest.mark.parametrize(("gap", "spread", "separable"), [(0.2, 0.02, True), (0.001, 0.0, False)])
def test_the_seeds_that_would_separate_two_arms_follow_from_the_variance(
    gap: float, spread: float, separable: bool
) -> None:
    parts = (VarianceComponent(spread**2 / 2, 1, "seeds"), VarianceComponent(1e-4, 99, "rows"))
    pair = PairTest("a", "b", Estimate(gap, None, None, "seeds and rows", parts), 2, p=0.2)
    found = seeds_to_separate(pair)
    assert (found is not None) == separable
    if found is not None:
        error = math.sqrt(spread**2 / found + 1e-4)
        assert gap >= 2 * error


def test_a_method_that_does_not_fit_the_backbone_is_left_out(place: Path, tmp_path: Path) -> None:
    def score(run: Run) -> float:
        if run.method == "ssf":
            raise RuntimeError("no such layer")
        return apart(run)

    found = advise(place, tmp_path, PretendBackend(score, sizes=SIZES), minutes=60)
    assert found.arm == "lora"
    assert any("ssf was left out" in sentence and "no such layer" in sentence for sentence in found.dropped)
