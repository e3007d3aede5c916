"""The schema of a study: what it accepts, what it refuses and in which words, and what it plans."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_lab.cli.compare import show_study
from peft_lab.comparison import default_study, load_study
from peft_lab.comparison.run.plan import (
    arm_runs,
    candidates,
    check_first_runs,
    count_runs,
    rate_grid,
    rounds,
    shortened,
)
from peft_lab.comparison.study.study import Search
from peft_lab.errors import PeftLabError
from peft_lab.registry import method

STUDY: dict[str, Any] = {
    "name": "coffee",
    "tasks": [{"task": "snips", "model_name_or_path": "minilm", "max_steps": 40}],
    "methods": ["lora", {"method": "svfit", "args": {"rank": [8, "full"]}}],
    "limits": {"max_steps": 60},
}


ROOT = Path(__file__).parents[4]
SHIPPED = [ROOT / "examples" / "study.yaml", *sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))]


def study(**changes: Any) -> dict[str, Any]:
    return {**STUDY, **changes}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nmethods: [lora]\ntasks: [snips]\nmethods: [svfit]\n", 'the key "methods" is given twice'),
        ("name: a\nlimits: {max_steps: 1, max_steps: 2}\n", 'the key "max_steps" is given twice'),
        ("name: a\nsearch: 2001-99-99\n", "is not readable YAML or JSON"),
        ("[" * 5000, "is not readable YAML or JSON"),
        ("name: !!python/object/apply:os.getcwd []\n", "is not readable YAML or JSON"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(PeftLabError, match=message):
        load_study(tmp_path / "study.yaml")


@pytest.mark.parametrize("file", SHIPPED, ids=[file.stem for file in SHIPPED])
def test_a_shipped_study_is_valid_without_the_data(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PEFT_LAB_DATA", raising=False)
    found = load_study(file)
    assert found.name
    check_first_runs(found)
    trained = [arm for arm in found.arms if method(arm.method).takes_steps]
    if found.search.strategy == "none":  # the default rate, or the one that is given
        assert all(len(arm.learning_rates) <= 1 for arm in trained)
    else:
        assert all(len(arm.learning_rates) == found.search.trials for arm in trained)


def test_a_list_of_values_makes_an_arm_of_each() -> None:
    found = load_study(study())
    assert [arm.label for arm in found.arms] == ["lora", "svfit rank=8", "svfit rank=full"]
    assert [arm.args for arm in found.arms] == [{}, {"rank": 8}, {"rank": "full"}]


def test_a_list_of_shares_makes_an_arm_of_each() -> None:
    prune = {"by": "magnitude", "share": [0.5, "9e-1"]}
    arms = [
        "head",
        {"method": "lora", "training": {"prune": prune}},
        {"method": "full", "training": {"prune": {"share": [0.5]}}},
    ]
    found = load_study(study(methods=arms))
    assert [arm.label for arm in found.arms] == ["head", "lora share=0.5", "lora share=9e-1", "full"]
    pruned = [found.options(found.cells[0], arm).get("prune") for arm in found.arms]
    assert pruned == [None, {"by": "magnitude", "share": 0.5}, {"by": "magnitude", "share": 0.9}, {"share": 0.5}]
    assert load_study(found.to_dict()) == found


def test_an_argument_that_is_a_list_is_one_value() -> None:
    one = {"method": "lora", "args": {"target_modules": ["query", "value"]}}
    several = {"method": "lora", "args": {"target_modules": [["query"], ["query", "value"]]}, "name": "wide"}
    found = load_study(study(methods=[one, several]))
    assert [arm.args["target_modules"] for arm in found.arms] == [["query", "value"], ["query"], ["query", "value"]]


@pytest.mark.parametrize(
    "search",
    [{}, {"strategy": "none"}, {"strategy": "halving", "trials": 8, "factor": 2}, {"extend": 2}, {"extend": 0}],
)
def test_the_written_study_is_the_same_study(search: dict[str, Any]) -> None:
    arms = [
        "head",
        {"method": "svfit", "args": {"rank": [8, "full"]}},
        {"method": "lora", "args": {"target_modules": [["query"], ["query", "value"]]}},
    ]
    found = load_study(study(methods=arms, search=search, seeds=[3, 5], training={"weight_decay": 0.1}))
    assert load_study(yaml.safe_load(yaml.safe_dump(found.to_dict()))) == found


def test_options_go_from_the_study_over_its_limits_to_the_task() -> None:
    found = load_study(study(training={"weight_decay": 0.1, "max_steps": 80}))
    options = found.options(found.cells[0], found.arms[0])
    assert (options["max_steps"], options["weight_decay"]) == (40, 0.1)
    plain = load_study(study(tasks=["snips"], model_name_or_path=["minilm"], training={"max_steps": 80}))
    assert plain.options(plain.cells[0], plain.arms[0])["max_steps"] == 60


def test_an_arm_has_the_recipe_of_its_method() -> None:
    arms = ["ssf", {"method": "ssf", "name": "cached", "training": {"features": "cached", "layer_decay": 0.5}}]
    found = load_study(study(methods=arms, training={"layer_decay": 0.9}))
    plain, other = (found.options(found.cells[0], arm) for arm in found.arms)
    assert (plain["layer_decay"], other["layer_decay"], other["features"]) == (0.9, 0.5, "cached")
    assert "features" not in plain


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": [{"method": "lora", "training": {"weight_decay": 1}}]}, 'Unknown key "weight_decay"'),
        ({"task": 1}, 'Unknown key "task"'),
        ({"seed": 3}, 'Did you mean "seeds"'),
        ({"methods": ["loraa"]}, 'Did you mean "lora"'),
        ({"methods": []}, '"methods"'),
        ({"methods": [{"method": "lora", "arg": {}}]}, 'Did you mean "args"'),
        ({"methods": [{"method": "svfit", "args": {"rnk": 8}}]}, 'Did you mean "rank"'),
        ({"methods": [{"method": "head", "args": {"r": 8}}]}, "baseline"),
        ({"methods": ["lora", "lora"]}, '"name"'),
        ({"methods": [{"method": "lora", "args": {"r": 4}, "tune": {"r": [4, 8]}}]}, "both fixed"),
        ({"methods": [{"method": "lora", "learning_rates": [0.1, 0.2]}]}, "2 candidates"),
        ({"methods": [{"method": "lora", "learning_rates": [1, 2, 3, 4]}]}, "4 learning rates"),
        ({"methods": [{"method": "lora", "learning_rates": [-1, 2, 3]}]}, "positive"),
        ({"tasks": ["snipps"], "model_name_or_path": "minilm"}, 'Did you mean "snips"'),
        ({"tasks": ["snips"]}, "model_name_or_path"),
        ({"tasks": [{"task": "snips", "model_name_or_path": "minilm", "steps": 3}]}, '"steps"'),
        ({"tasks": [{"task": "snips", "model_name_or_path": "minilm", "learning_rate": 3}]}, "learning_rates"),
        ({"tasks": 2 * STUDY["tasks"]}, "twice"),
        ({"training": {"seed": 3}}, "seeds"),
        ({"training": {"weight_decy": 3}}, 'Did you mean "weight_decay"'),
        ({"methods": [{"method": "lora", "training": {"prune": {"share": [0.5, 1.5]}}}]}, "below 1, got 1.5"),
        ({"methods": [{"method": "lora", "training": {"prune": {"share": []}}}]}, "must be a number, not a list"),
        ({"methods": [{"method": "lora", "training": {"prun": {"share": 0.5}}}]}, 'Did you mean "prune"'),
        ({"training": {"prune": {"by": "l1", "share": 0.5}}}, 'method "lora" keeps them frozen'),
        ({"search": {"strategy": "gird"}}, 'Did you mean "grid"'),
        ({"search": {"strategy": "none", "trials": 3}}, "no effect"),
        ({"search": {"strategy": "halving", "trials": 3}}, "at least 4 trials"),
        ({"search": {"trials": 0}}, "at least 1"),
        ({"search": {"extend": -1}}, "at least 0"),
        ({"search": {"strategy": "none", "extend": 1}}, "no effect"),
        ({"limits": {"max_steps": 3, "seconds": 3}}, "not both"),
        ({"limits": {"trainable_parameters": 9}, "methods": ["ssf"]}, "cannot be sized"),
        ({"limits": {"trainable_parameters": 9}}, "is fixed"),
        ({"seeds": [1, 1]}, "twice"),
        ({"seeds": True}, "seeds"),
        ({"measures": {"shift": "snips"}}, 'Did you mean "shifted"'),
        ({"measures": {"shifted": "sign-digits"}}, "kind"),
        ({"launcher": "torchrun"}, '"torchrun"'),
        ({"launcher": {"accelerate": {"config_file": "fsdp"}}}, 'Did you mean "fsdp2"?'),
        ({"name": "a/b"}, "name"),
    ],
)
def test_refusals_name_the_mistake(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PeftLabError) as caught:
        load_study(study(**changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_start_from_the_file_of_the_study(tmp_path: Path) -> None:
    from support import tiny_runs

    tiny_runs.make_task(tmp_path / "mine")
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study(tasks=["mine/topics.yaml"], model_name_or_path="minilm")))
    assert load_study(file).cells[0].source == str(tmp_path / "mine" / "topics.yaml")
    assert load_study(file).cells[0].task == "topics"


def test_a_task_with_steps_of_its_own_is_searched_with_the_same_part_of_them() -> None:
    tasks = [{"task": "snips", "model_name_or_path": "minilm", "name": str(n), "max_steps": n} for n in (60, 600)]
    found = load_study(study(tasks=tasks, search={"max_steps": 20}))
    searched = [next(arm_runs(found, cell, found.arms[0]))[0].options["max_steps"] for cell in found.cells]
    assert searched == [20, 200]


@pytest.mark.parametrize("strategy", ["grid", "halving", "none"])
def test_a_task_has_learning_rates_of_its_own_for_the_arms_that_it_names(strategy: str) -> None:
    trials = 1 if strategy == "none" else 4
    plain, own = ([rate * step for step in (1, 3, 10, 30)[:trials]] for rate in (1e-3, 1e-4))
    task = {"task": "snips", "model_name_or_path": "minilm"}
    tasks = [task, {**task, "name": "own", "learning_rates": {"lora": own}}]
    search = {"strategy": strategy} | ({"trials": trials} if trials > 1 else {})
    values = study(tasks=tasks, methods=[{"method": "lora", "learning_rates": plain}, "svfit"], search=search)
    found = load_study(load_study(values).to_dict())  # as a folder of results keeps it
    lora, _ = found.arms
    tried = {
        (arm.label, cell.task): [c.learning_rate for c in candidates(found, arm, cell)]
        for arm, cell in product(found.arms, found.cells)
    }
    assert tried["lora", "snips"] == plain
    assert tried["lora", "own"] == own
    assert tried["svfit", "own"] == tried["svfit", "snips"]
    runs = next(arm_runs(found, found.cells[1], lora))
    assert [run.options["learning_rate"] for run, _ in zip(runs, own, strict=False)] == own


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"lor": [1e-3]}, r'"learning_rates" of task "snips" names the arm "lor", .* Did you mean "lora"\?'),
        ({"lora": [1e-3]}, r'Arm "lora" on task "snips" gives 1 candidates, but every arm has 3 trials'),
        ({"lora": [1e-3, 1e-2, 0.1, 1]}, r'Arm "lora" on task "snips" gives 4 learning rates, but .* 3 trials'),
        ({"lora": [1e-3, 1e-2, "high"]}, r'learning_rates of task "snips" for arm "lora" must be a positive number'),
        ([1e-3], r'"learning_rates" of task "snips" must be a mapping'),
    ],
)
def test_wrong_learning_rates_of_a_task_are_refused(rates: Any, message: str) -> None:
    task = {"task": "snips", "model_name_or_path": "minilm", "learning_rates": rates}
    with pytest.raises(PeftLabError, match=message):
        load_study(study(tasks=[task]))


def test_the_head_alone_is_searched_where_the_rate_of_heads_is_fixed() -> None:
    task = {"task": "snips", "model_name_or_path": "minilm", "head_learning_rate": 3e-3}
    found = load_study(study(tasks=[task], methods=["head", "lora"]))
    head, lora = (found.options(found.cells[0], arm) for arm in found.arms)
    assert "head_learning_rate" not in head
    assert lora["head_learning_rate"] == 3e-3


@pytest.mark.parametrize("strategy", ["grid", "halving", "none"])
def test_every_arm_has_the_same_budget(strategy: str) -> None:
    search = {"strategy": strategy} | ({} if strategy == "none" else {"trials": 8})
    arms = ["lora", "head", {"method": "svfit", "tune": {"rank": [8, 4, "full"]}}] if search.get("trials") else ["lora"]
    found = load_study(study(methods=arms, search=search))
    budgets = set()
    for arm in found.arms:
        waves = arm_runs(found, found.cells[0], arm)
        first = next(waves)
        budgets.add((len(first), sum(run.options["max_steps"] for run in first)))
        assert len(candidates(found, arm, found.cells[0])) == found.search.trials
    assert len(budgets) == 1


def test_search_runs_never_see_the_test_rows() -> None:
    found = load_study(study())
    for arm in found.arms:
        for run in next(arm_runs(found, found.cells[0], arm)):
            assert run.stage == "search"
            assert run.options["do_predict"] is False


def test_tuned_values_are_searched_within_the_trials() -> None:
    arms = [{"method": "svfit", "tune": {"rank": [8, 4]}}]
    found = load_study(study(methods=arms, search={"trials": 4}))
    tried = candidates(found, found.arms[0], found.cells[0])
    assert len(tried) == 4
    assert len({(t.learning_rate, t.tuned["rank"]) for t in tried}) == 4
    assert {t.tuned["rank"] for t in tried} <= {8, 4}
    assert 8 in {
        t.tuned["rank"] for t in tried if t.learning_rate == method("svfit").learning_rate
    }  # the default is tried


def test_halving_gives_the_rounds_growing_parts_of_the_steps() -> None:
    assert rounds(Search(strategy="halving", trials=8)) == [(8, 0.25), (4, 0.5), (2, 1.0)]
    assert rounds(Search(strategy="halving", trials=9, factor=3)) == [(9, 1 / 3), (3, 1.0)]
    assert rounds(Search(strategy="grid", trials=5)) == [(5, 1.0)]


def test_a_part_of_a_training_in_its_own_unit() -> None:
    assert shortened({"max_steps": 60}, 0.5) == {"max_steps": 30}
    assert shortened({"max_seconds": 60.0}, 0.5) == {"max_seconds": 30.0}
    assert shortened({}, 0.5) == {"num_train_epochs": 1.5}
    assert shortened({"max_seconds": 60.0}, 0.5, max_steps=10) == {"max_steps": 5}


def test_a_grid_of_learning_rates_lies_around_the_default() -> None:
    assert rate_grid(1e-3, 3) == (0.00032, 0.001, 0.0032)
    assert rate_grid(1e-3, 2) == (0.001, 0.0032)
    assert rate_grid(1e-3, 5) == (0.0001, 0.00032, 0.001, 0.0032, 0.01)


def test_the_usual_comparison() -> None:
    found = default_study("snips", "minilm")
    assert len(found.arms) == 6
    assert count_runs(found) == 6 * (3 + 3)


def test_a_study_is_validated_without_torch(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study()))
    script = "import sys; sys.argv[1:] = ['validate', sys.argv[1]]\nfrom peft_lab.cli.app import app\n"
    script += "try: app()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=False)
    assert "18 runs" in done.stdout, done.stderr
    assert done.stdout.strip().endswith("False")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare"], "Name a study file"),
        (["compare", "--task", "snips"], "--model_name_or_path"),
        (["compare", "--task", "snipps", "--model_name_or_path", "minilm"], 'Did you mean "snips"'),
        (["compare", "FILE", "--max_steps", "3"], "--max_steps does not go with a study file"),
        (["compare", "FILE", "--backend", "rey"], 'Did you mean "ray"'),
        (["compare", "none.yaml"], "There is no run file"),
        (["recommend", "--task", "snipps", "--model_name_or_path", "minilm"], 'Did you mean "snips"'),
    ],
)
def test_the_command_line_refuses_in_one_sentence(tmp_path: Path, arguments: list[str], words: str) -> None:
    from typer.testing import CliRunner

    from peft_lab.cli.app import app

    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study()))
    arguments = [str(file) if word == "FILE" else word for word in arguments]
    done = CliRunner().invoke(app, [*arguments, "--output_dir", str(tmp_path / "out")])
    assert isinstance(done.exception, PeftLabError)
    assert words in str(done.exception)


def test_arms_with_the_same_run_are_refused_beforehand(tmp_path: Path) -> None:
    twin = {"task": "snips", "name": "again", "model_name_or_path": "minilm"}
    values = study(tasks=[{**twin, "name": "snips"}, twin])
    with pytest.raises(PeftLabError, match='on task "again" is the same run as'):
        show_study(values, str(tmp_path / "study.yaml"))


def test_the_runs_of_a_study_are_said_beforehand(tmp_path: Path) -> None:
    plain = study(methods=["lora", "head"], seeds=3, search={"trials": 3})
    assert show_study(plain, str(tmp_path / "study.yaml")).endswith("3 seeds, 12 runs")
    extended = study(methods=["lora", "head"], seeds=3, search={"trials": 3, "extend": 2, "seeds": 2})
    assert "18 runs, at most 8 more" in show_study(extended, str(tmp_path / "study.yaml"))
