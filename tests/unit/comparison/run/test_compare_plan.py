"""What a comparison does next, with made-up results: searches, choices, failures, going on, growing, ending in time."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from support.compare_helpers import PretendBackend, tiny_study

from peft_lab.comparison import Comparison, compare, load_study, read_results
from peft_lab.comparison.records.results import COMPARISON, Journal
from peft_lab.comparison.records.run import Run
from peft_lab.comparison.records.search_budget import search_budgets
from peft_lab.comparison.run import plan
from peft_lab.comparison.study.parameter_budget import fit
from peft_lab.data.task_registry import load_task
from peft_lab.data.task_schema import Task
from peft_lab.errors import ConfigError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


def run(place: Path, out: Path, score: Any, **changes: Any) -> tuple[Comparison, PretendBackend]:
    backend = PretendBackend(score)
    limits = {"limits": {"max_steps": 40}}
    return compare(tiny_study(place, **limits, **changes), out, backend=backend, report=False), backend


def near(rate: float) -> Any:
    """A score that is best at a learning rate."""
    return lambda run: 1 / (1 + abs(math.log10(run.learning_rate / rate)))


@pytest.mark.parametrize("search", [{"trials": 5}, {"strategy": "halving", "trials": 8}])
def test_the_best_learning_rate_on_validation_rows_is_taken(place: Path, tmp_path: Path, search: Any) -> None:
    done, backend = run(place, tmp_path, near(9.5e-3), search=search, methods=["lora", "head"])
    finals = [r for r in done.records if r.stage == "final"]
    assert {(r.arm, r.seed) for r in finals} == {(a, s) for a in ("lora", "head") for s in (0, 1)}
    assert {r.learning_rate for r in finals} == {9.5e-3}
    assert {r.seed for r in done.records if r.stage == "search"}.isdisjoint({0, 1})
    assert len(backend.runs) == len(done.records)
    first, second = search_budgets(done.records)
    assert (first.trials, first.runs, first.steps) == (second.trials, second.runs, second.steps)
    assert json.loads((tmp_path / COMPARISON).read_text())["equal_budgets"] is True


def test_a_key_that_tasks_did_not_have_before_changes_no_run_that_leaves_it_out(place: Path, monkeypatch: Any) -> None:
    class Newer(Task):
        fresh: str = ""

    task = load_task(tiny_study(place)["tasks"][0]["task"])

    def newer(**values: str) -> Task:
        found = Newer.model_construct(**dict(task), **values)
        found._origin = task.origin
        return found

    def id_of(found: Task) -> str:
        monkeypatch.setattr(plan, "load_task", lambda source: found)
        plan._task_content.cache_clear()
        return plan.run_id({"task": "t", "model_name_or_path": "m", "method": "lora"}, "final", {})

    assert id_of(task) == id_of(newer()) != id_of(newer(fresh="given"))
    assert id_of(task) != id_of(task.model_copy(update={"split_seed": 1}))
    plan._task_content.cache_clear()


def test_halving_spends_less_than_the_grid(place: Path, tmp_path: Path) -> None:
    done, _ = run(place, tmp_path, near(1e-3), search={"strategy": "halving", "trials": 8}, methods=["lora"])
    (spent,) = search_budgets(done.records)
    assert (spent.trials, spent.runs, spent.steps) == (8, 14, 8 * 10 + 4 * 20 + 2 * 40)


@pytest.mark.parametrize(
    ("best", "extend", "beyond", "edge"),
    [
        (1e-1, 2, [1e-2, 3.2e-2], "highest"),
        (1e-1, 9, [1e-2, 3.2e-2, 1e-1, 3.2e-1], ""),
        (1e-6, 2, [3.2e-5, 1e-5], "lowest"),
        (1e-3, 2, [], ""),
    ],
)
@pytest.mark.parametrize("strategy", ["grid", "halving"])
def test_a_search_goes_on_beyond_an_edge(
    place: Path, tmp_path: Path, best: float, extend: int, beyond: list[float], edge: str, strategy: str
) -> None:
    search = {"strategy": strategy, "trials": 4, "extend": extend, "seeds": 2}
    arms = [{"method": "lora", "learning_rates": [1e-4, 3.2e-4, 1e-3, 3.2e-3]}]
    done, _ = run(place, tmp_path, near(best), search=search, methods=arms)
    further = [r for r in done.records if r.beyond]
    assert list(dict.fromkeys(r.learning_rate for r in further)) == pytest.approx(beyond, rel=0.1)
    assert len(further) == 2 * len(beyond) <= plan.count_beyond(done.study)
    assert {(r.stage, r.options["max_steps"], r.options["do_predict"]) for r in further} <= {("search", 40, False)}
    (choice,) = done.choices
    assert choice.edge == edge
    assert choice.candidate is not None
    nearest = min(choice.tried, key=lambda trial: abs(math.log10(trial["learning_rate"] / best)))
    assert choice.candidate.learning_rate == nearest["learning_rate"]
    again, backend = run(place, tmp_path, near(best), search=search, methods=arms)
    assert backend.runs == []
    assert again.choices == done.choices


def test_all_arms_have_the_same_right_to_go_on(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def score(run: Run) -> float:
        if run.method == "lora" and run.learning_rate > 1e-2:
            raise RuntimeError("out of memory")
        return near(1.0 if run.method == "lora" else 1e-5)(run)

    done, _ = run(place, tmp_path, score, search={"trials": 3, "extend": 2})
    spent = {item.arm: item for item in search_budgets(done.records)}
    assert (spent["lora"].trials, spent["lora"].beyond) == (4, 1)  # a rate that fails bounds the others
    assert (spent["head"].trials, spent["head"].beyond) == (5, 2)
    assert {choice.arm: choice.edge for choice in done.choices} == {"lora": "", "head": "lowest"}
    assert json.loads((tmp_path / COMPARISON).read_text())["equal_budgets"] is True
    counted = len(done.records)
    assert counted == plan.count_runs(done.study) + 3
    assert f"{counted} of {counted} runs done" in capsys.readouterr().err


def test_a_rate_that_was_beyond_an_edge_may_become_a_given_one(place: Path, tmp_path: Path) -> None:
    def grown(trials: int, **search: int) -> tuple[Comparison, PretendBackend]:
        arms = [{"method": name, "learning_rates": [1e-3, 1e-2, 1e-1][:trials]} for name in ("head", "lora")]
        return run(place, tmp_path, near(1e-2), search={"trials": trials, **search}, methods=arms)

    done, _ = grown(2, extend=1)
    assert [r.beyond for r in done.records if r.learning_rate == 1e-1] == [True, True]
    done, again = grown(3)
    assert not again.runs
    assert not any(r.beyond for r in done.records)
    assert json.loads((tmp_path / COMPARISON).read_text())["equal_budgets"] is True
    assert [(item.trials, item.beyond) for item in search_budgets(read_results(tmp_path))] == [(3, 0), (3, 0)]


def test_less_perplexity_is_better(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support import compare_helpers

    def metrics(run: Run, score: float) -> dict[str, Any]:
        return {"main_metric": "perplexity", "metrics": {"validation": {"perplexity": score, "loss": 0.0}}}

    monkeypatch.setattr(compare_helpers, "metrics_of", metrics)
    done, _ = run(place, tmp_path, lambda r: r.learning_rate, search={"trials": 3}, methods=["lora"], seeds=1)
    assert done.choices[0].candidate is not None
    assert done.choices[0].candidate.learning_rate == 0.00095
    assert done.choices[0].edge == "lowest"


def test_a_candidate_that_diverged_or_failed_is_not_taken(place: Path, tmp_path: Path) -> None:
    def score(run: Run) -> float:
        if run.learning_rate == 0.003:
            raise RuntimeError("out of memory")
        return math.nan if run.learning_rate > 0.003 else 0.1

    done, _ = run(place, tmp_path, score, search={"trials": 3}, methods=["lora"])
    assert {r.learning_rate for r in done.records if r.stage == "final"} == {0.00095}
    (failed,) = done.failed
    assert failed.error == "RuntimeError: out of memory"


def test_an_arm_without_any_candidate_left_ends_and_the_others_go_on(place: Path, tmp_path: Path) -> None:
    def score(run: Run) -> float:
        if run.method == "lora":
            raise RuntimeError("no")
        return 0.5

    done, _ = run(place, tmp_path, score, search={"trials": 3})
    assert len(done.failed) == 3
    assert {r.arm for r in done.records if r.stage == "final"} == {"head"}
    assert [choice.candidate is None for choice in done.choices if choice.arm == "lora"] == [True]
    assert json.loads((tmp_path / COMPARISON).read_text())["equal_budgets"] is False


def test_nothing_is_repeated_and_a_study_may_grow_and_shrink(place: Path, tmp_path: Path) -> None:
    _, first = run(place, tmp_path, near(1e-3))
    assert len(first.runs) == 4
    done, second = run(place, tmp_path, near(1e-3), methods=["head", "lora", "ssf"], seeds=3)
    assert len(second.runs) == 5
    assert len(done.records) == 9
    done, third = run(place, tmp_path, near(1e-3), methods=["ssf"], seeds=3)
    assert not third.runs
    assert [r.arm for r in read_results(tmp_path)] == ["ssf"] * 3
    whole = Journal(tmp_path)
    whole.read()
    assert len(whole.records) == 9


def test_an_arm_may_be_renamed(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path, near(1e-3), methods=["lora"])
    _, again = run(place, tmp_path, near(1e-3), methods=[{"method": "lora", "name": "baseline"}])
    assert not again.runs
    assert {r.arm for r in read_results(tmp_path)} == {"baseline"}


def test_other_options_are_other_runs(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path, near(1e-3), methods=["lora"])
    _, again = run(place, tmp_path, near(1e-3), methods=["lora"], training={"weight_decay": 0.1})
    assert len(again.runs) == 2


def test_the_same_run_twice_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the same run as arm"):
        run(place, tmp_path, near(1e-3), methods=["lora", {"method": "lora", "name": "again"}])


def test_a_folder_of_something_else_is_left_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds no comparison"):
        run(place, tmp_path, near(1e-3))


def test_a_folder_of_another_comparison_is_left_alone(place: Path, tmp_path: Path) -> None:
    run(place, tmp_path, near(1e-3))
    with pytest.raises(ConfigError, match='"tiny", not "other"'):
        run(place, tmp_path, near(1e-3), name="other")


def test_after_the_deadline_nothing_is_started(place: Path, tmp_path: Path) -> None:
    backend = PretendBackend(near(1e-3))
    done = compare(tiny_study(place), tmp_path, backend=backend, deadline=time.monotonic(), report=False)
    assert not backend.runs
    assert done.unfinished == 4


def test_limits_of_time_count_seconds_in_all_stages(place: Path) -> None:
    from peft_lab.comparison.run.plan import arm_runs

    study = load_study(tiny_study(place, limits={"seconds": 8}, search={"strategy": "halving", "trials": 4}))
    wave = next(arm_runs(study, study.cells[0], study.arms[0]))
    assert {run.options["max_seconds"] for run in wave} == {4.0}
    assert all("max_steps" not in run.options for run in wave)


@pytest.mark.parametrize("limit", [130, 137, 1000, 99999])
def test_the_size_is_the_largest_within_the_limit(limit: int) -> None:
    value, count = fit(lambda size: 30 + 100 * size, limit, "Arm")
    assert count == 30 + 100 * value <= limit < 30 + 100 * (value + 1)


def test_a_size_that_the_method_refuses_is_too_large() -> None:
    def count(size: int) -> int:
        if size > 37:
            raise ConfigError("rank over 37")
        return 10 * size

    assert fit(count, 500, "Arm") == (37, 370)


def test_what_cannot_be_sized_says_so() -> None:
    with pytest.raises(ConfigError, match="50 trainable parameters at its smallest, more than 40"):
        fit(lambda size: 50 * size, 40, "Arm")
    with pytest.raises(ConfigError, match="cannot be sized"):
        fit(lambda size: 50, 400, "Arm")
    with pytest.raises(ConfigError, match="160 trainable parameters at its largest"):
        fit(lambda size: 10 * min(size, 16), 400, "Arm")


@pytest.mark.parametrize(("method", "limit"), [("lora", 700), ("svfit", 200)])
def test_arms_are_made_as_large_as_is_asked(place: Path, tmp_path: Path, method: str, limit: int) -> None:
    from peft_lab import registry
    from peft_lab.comparison.run import plan
    from peft_lab.comparison.study import parameter_budget
    from peft_lab.data.splits import load_splits
    from peft_lab.data.task_registry import kind, load_task
    from peft_lab.loading.load_run import adapt, count_parameters, load_base

    study = load_study(tiny_study(place, methods=[method], limits={"max_steps": 3, "trainable_parameters": limit}))
    cell, arm = study.cells[0], study.arms[0]
    name = parameter_budget.size_field(method, {})
    question = plan.size_run(study, cell, arm, name, limit)
    (tmp_path / "runs").mkdir()
    parameter_budget.find_size(tmp_path, question, name, limit)
    found = parameter_budget.read_size(parameter_budget.size_file(tmp_path, question.id))
    task = load_task(cell.source)
    counts = []
    for value in (found[name], found[name] + 1):
        _, base = load_base(kind(task.kind), task, load_splits(task).labels, cell.backbone)
        counts.append(
            count_parameters(adapt(base, registry.method(method), {name: value}, kind(task.kind).info.task_type))[0]
        )
    assert counts[0] <= limit < counts[1]
    assert next(plan.arm_runs(study, cell, arm, found))[0].method_args == found


def test_an_arm_that_cannot_be_sized_ends_the_comparison_before_it_starts(place: Path, tmp_path: Path) -> None:
    study = tiny_study(place, methods=["ssf"], limits={"max_steps": 3, "trainable_parameters": 700})
    with pytest.raises(ConfigError, match="cannot be sized"):
        compare(study, tmp_path, backend=PretendBackend(near(1e-3)), report=False)
