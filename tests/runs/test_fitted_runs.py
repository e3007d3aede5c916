"""Runs of methods that take no gradient steps: fitted, evaluated, saved, predicted with, and pushed with a warning."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from peft import get_peft_model
from support.backbones import TINY, tiny_inputs
from support.cover import cover
from support.method_runs import options_for
from support.properties import FITTED, config
from torch import nn

import peft_lab
from peft_lab import registry
from peft_lab.comparison.run.plan import candidates, count_runs
from peft_lab.comparison.study.schema import load_study
from peft_lab.errors import ConfigError
from peft_lab.hub.public_copy import stage
from peft_lab.training.evaluate import evaluate, predict
from peft_lab.training.run import train
from peft_lab.tuners.estimators import EstimatorHead
from peft_lab.tuners.registration import has_trait

FAST = {"do_predict": False, "learning_rate": 0, "max_steps": -1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fitted")


def head_of(model: nn.Module) -> EstimatorHead:
    return next(module for module in model.modules() if isinstance(module, EstimatorHead))


def test_methods_without_steps_are_those_whose_arrays_an_estimator_finds():
    assert len(FITTED) >= 11
    for name in FITTED:
        assert registry.method(name).learning_rate == 0
        assert has_trait(registry.method(name), "estimator_class")


@pytest.mark.parametrize("method", cover(FITTED))
def test_a_run_is_fitted_evaluated_and_loaded(method, place, tmp_path):
    result = train(options_for(method, place, tmp_path / "out", **FAST))
    metrics = result.metrics
    assert (metrics["global_step"], metrics["learning_rate"], metrics["parameters"]["trainable"]) == (0, 0.0, 0)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    scored = evaluate(tmp_path / "out", split="validation")
    assert scored["accuracy"] == metrics["metrics"]["validation"]["accuracy"]
    # a random backbone tells three equal classes apart a little; one class against the rest is another question
    trained = evaluate(tmp_path / "out", split="train")["accuracy"]
    assert trained > (0.3 if method == "gaussian_anomaly" else 0.37)
    rows = tmp_path / "rows.csv"
    rows.write_text("sentence\nthe song of the band\n")
    assert len(list(predict(tmp_path / "out", rows))) == 1


@pytest.mark.parametrize("method", cover(FITTED))
@pytest.mark.parametrize("classes", [2, 3])
@torch.no_grad()
def test_logits_are_the_scores_of_the_array_estimator(method, classes):
    base = TINY["bert"]()
    base.config.num_labels, base.num_labels = classes, classes
    base.classifier = nn.Linear(16, classes)
    model = fresh(base, method)
    inputs = tiny_inputs(base, batch=30)
    labels = torch.arange(30) % classes
    with pytest.raises(ConfigError, match=f'"{method}" is not fitted'):
        model(**inputs)
    peft_lab.read_training_data(model, [{**inputs, "labels": labels}])
    head = head_of(model)
    ((features, _),) = list(head.read_features([{**inputs, "labels": labels}]))
    rows = head.pool("default", features).numpy()
    if method == "linear_svm":  # fitted to the mean of several views, which are drawn
        model.peft_config["default"].views = 1
        peft_lab.read_training_data(model, [{**inputs, "labels": labels}])
    estimator = model.peft_config["default"].estimator()
    logits = model(**inputs).logits.double().numpy()
    if method == "gaussian_anomaly":
        estimator.fit(rows[labels.numpy() == 0])
        assert np.allclose(logits[:, 0] - logits[:, 1], estimator.decision_function(rows), atol=1e-3, rtol=1e-3)
        return
    expected = estimator.fit(rows, labels.numpy()).class_scores(rows)
    assert np.abs(logits - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


def fresh(base, method):
    return get_peft_model(base, config(method, base)).eval()


@torch.no_grad()
def test_a_class_without_training_rows_is_never_the_answer_and_others_are_in_place():
    base = TINY["bert"]()
    model, inputs = fresh(base, "nearest_mean"), tiny_inputs(base, batch=12)
    peft_lab.read_training_data(model, [{**inputs, "labels": 2 * (torch.arange(12) % 2)}])
    logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert set(logits.argmax(-1).tolist()) == {0, 2}


@torch.no_grad()
def test_texts_are_read_by_the_mean_of_their_tokens_and_images_as_the_head_reads_them():
    base = TINY["bert"]()
    inputs = tiny_inputs(base, batch=4)
    inputs["attention_mask"][:, -2:] = 0
    mean = base.eval().bert(**inputs).last_hidden_state[:, :-2].mean(1)
    assert torch.allclose(feature(base, inputs), mean, atol=1e-6)
    base = TINY["bert"]().eval()
    assert torch.allclose(feature(base, inputs, pooling="head"), base.bert(**inputs).pooler_output, atol=1e-6)
    base = TINY["vit"]().eval()
    inputs = tiny_inputs(base, batch=4)
    hidden = base.vit(**inputs).last_hidden_state
    assert torch.allclose(feature(base, inputs), hidden[:, 0], atol=1e-6)
    assert torch.allclose(feature(TINY["vit"](), inputs, pooling="mean"), hidden[:, 1:].mean(1), atol=1e-6)


def feature(base, inputs, **fields):
    head = head_of(get_peft_model(base, config("nearest_mean", base, **fields)).eval())
    ((features, _),) = list(head.read_features([{**inputs, "labels": torch.arange(4) % 3}]))
    return head.pool("default", features)


@pytest.mark.parametrize("method", ["gda", "prototype_transport", "nearest_mean"])
@torch.no_grad()
def test_rows_with_a_negative_label_have_none(method):
    base = TINY["bert"]()
    model, inputs = fresh(base, method), tiny_inputs(base, batch=30)
    labels = torch.arange(30) % 3
    labels[12:] = -100
    batch = {**inputs, "labels": labels}
    if method == "nearest_mean":
        with pytest.raises(ConfigError, match="takes no rows without labels: 18 of 30"):
            peft_lab.read_training_data(model, [batch])
        return
    peft_lab.read_training_data(model, [batch])
    with_all = model(**inputs).logits
    peft_lab.read_training_data(model, [{name: value[:12] for name, value in batch.items()}])
    assert not torch.allclose(model(**inputs).logits, with_all, atol=1e-3)


def test_views_of_a_row_are_averaged():
    from peft_lab.adapters.head.linear_svm import jittered

    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    views = jittered(images, 0.25)
    assert views.shape == images.shape
    assert not torch.equal(views, images)
    assert torch.equal(jittered(images, 0.0), images)
    seen = []
    for family in ("vit", "bert"):
        base = TINY[family]()
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        model, inputs = fresh(base, "linear_svm"), tiny_inputs(base, batch=12)
        head = head_of(model)
        batch = {**inputs, "labels": torch.arange(12) % 3}
        torch.manual_seed(0)
        ((several, _),) = list(head.read_rows("default", [batch]))
        head.configs["default"].views = 1
        ((one, _),) = list(head.read_rows("default", [batch]))
        seen.append(not torch.allclose(several, one))
        assert not any(module.training for module in base.modules())
    assert seen == [True, True]


def test_options_of_steps_are_refused_and_a_learning_rate_is_told(place, tmp_path, caplog):
    with pytest.raises(ConfigError, match="takes no early_stopping_patience"):
        train(options_for("gda", place, tmp_path / "a", early_stopping_patience=1))
    with pytest.raises(ConfigError, match="nothing of modules_to_save"):
        train(options_for("gda", place, tmp_path / "b", method_args={"modules_to_save": ["pooler"]}))
    with caplog.at_level(logging.WARNING):
        train(options_for("gda", place, tmp_path / "c", **FAST | {"learning_rate": 1e-3}))
    assert "learning_rate 0.001 has no effect" in caplog.text


def test_teen_and_fetril_say_what_they_equal_outside_of_a_protocol(caplog):
    for method, same in (("teen", "the nearest mean by cosine"), ("fetril", "a linear support vector machine")):
        base = TINY["bert"]()
        batch = {**tiny_inputs(base, batch=12), "labels": torch.arange(12) % 3}
        peft_lab.read_training_data(fresh(base, method), [batch])
        assert f"equals {same}" in caplog.text


def test_a_pushed_knn_warns_of_the_rows_that_it_holds(place, tmp_path, caplog):
    train(options_for("knn", place, tmp_path / "run", **FAST))
    stored = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["stored_rows"]
    assert stored == 96
    (tmp_path / "copy").mkdir()
    stage(tmp_path / "run", "someone/knn", tmp_path / "copy", base_model="org/base")
    assert "features of 96 training rows" in caplog.text


def test_a_study_has_no_rates_to_try(place, tmp_path):
    values = options_for("gda", place, tmp_path / "out")
    study = {
        "name": "heads",
        "tasks": [{"task": values["task"], "model_name_or_path": values["model_name_or_path"]}],
        "methods": ["gda", "lora"],
        "search": {"trials": 3},
        "seeds": 2,
    }
    found = load_study(study)
    arm = next(arm for arm in found.arms if arm.method == "gda")
    assert [trial.learning_rate for trial in candidates(found, arm, found.cells[0])] == [0.0]
    assert count_runs(found) == 3 * found.search.seeds + 2 * 2
    study["methods"] = [{"method": "gda", "learning_rates": [1e-3]}, "lora"]
    with pytest.raises(ConfigError, match="takes no gradient steps"):
        load_study(study)
