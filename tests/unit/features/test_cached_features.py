"""Features computed once: the same logits as of the whole model, the store, runs, and what is refused."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.backbones import MODELS, tiny_inputs
from support.method_runs import interrupt, options_for
from support.properties import adapt, move
from support.tiny_runs import same_weights

from peft_lab.backbones.head_features import head_features
from peft_lab.errors import ConfigError
from peft_lab.features import store
from peft_lab.features.backbone import looked_up
from peft_lab.features.extract import MASK, POOLED, TOKENS, features_key, features_of
from peft_lab.training.cached_features import CachedFeatures
from peft_lab.training.run import train

FAMILIES = ["vit", "dinov2", "swin", "resnet", "convnext", "clip_classifier", "bert", "roberta", "distilbert"]
FAMILIES += ["deberta-v2", "modernbert", "albert"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_LAB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_on_stored_features_are_those_of_the_model(family: str, tokens: bool) -> None:
    base = MODELS[family]()
    facts = head_features(base)
    assert facts is not None
    inputs = tiny_inputs(base, batch=5)
    batches = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 3), slice(3, 5))]
    model = move(adapt("moment_probing", base)) if tokens else base
    plain: Any = model.get_base_model() if tokens else base
    found = features_of("k" * 64, plain, facts, lambda: iter(batches), tokens)
    numbers = {plain.main_input_name: torch.tensor([4, 0, 2])}
    if MASK in found:
        numbers["attention_mask"] = torch.from_numpy(found[MASK][[4, 0, 2]]).long()
    expected = model(**inputs).logits[[4, 0, 2]]
    with looked_up(plain, facts, [found]):
        torch.testing.assert_close(model(**numbers).logits, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(**inputs).logits[[4, 0, 2]], expected)
    assert (TOKENS in found) == tokens


def test_the_key_follows_weights_statistics_rows_and_processor() -> None:
    base = MODELS["resnet"]()
    facts = head_features(base)
    assert facts is not None
    keys = {features_key(base, facts, "rows", "processor")}
    keys.add(features_key(base, facts, "other", "processor"))
    keys.add(features_key(base, facts, "rows", "other"))
    with torch.no_grad():
        base.classifier[1].weight.add_(1.0)
        assert features_key(base, facts, "rows", "processor") in keys, "the head is of no account"
        base.resnet.embedder.embedder.normalization.running_mean.add_(1.0)
        keys.add(features_key(base, facts, "rows", "processor"))
        base.resnet.embedder.embedder.convolution.weight.add_(1.0)
        keys.add(features_key(base, facts, "rows", "processor"))
    assert len(keys) == 5


def test_features_with_tokens_serve_heads_without_them() -> None:
    base: Any = MODELS["vit"]()
    facts = head_features(base)
    assert facts is not None
    calls: list[bool] = []

    def batches() -> Any:
        calls.append(True)
        return iter([tiny_inputs(base, batch=3)])

    alone = features_of("a" * 64, base, facts, batches, False)
    both = features_of("a" * 64, base, facts, batches, True)
    assert len(calls) == 2
    again = features_of("a" * 64, base, facts, batches, False)
    assert len(calls) == 2
    assert again.keys() == alone.keys() == {POOLED}
    assert both.keys() == {POOLED, TOKENS}
    np.testing.assert_array_equal(again[POOLED], alone[POOLED])


def _arrays(value: float = 1.0) -> dict[str, np.ndarray]:
    return {POOLED: np.full((4, 2), value, dtype=np.float32)}


def test_an_entry_is_computed_once_and_mapped() -> None:
    calls: list[int] = []

    def compute() -> dict[str, np.ndarray]:
        calls.append(1)
        return _arrays()

    for _ in range(2):
        found = store.stored("a", compute)
        assert isinstance(found[POOLED], np.memmap)
        assert not found[POOLED].flags.writeable
        assert (found[POOLED] == 1.0).all()
    assert len(calls) == 1


def test_the_oldest_entries_go_and_too_large_ones_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = store.stored("a", _arrays)
    size = (tmp_path / "cache" / "features" / "a" / f"{POOLED}.npy").stat().st_size
    monkeypatch.setenv(store.LIMIT, str(int(2.5 * size)))
    for key in ("b", "c"):
        store.stored(key, _arrays)
    assert sorted(path.name for path in (tmp_path / "cache" / "features").iterdir()) == ["b", "c"]
    assert (first[POOLED] == 1.0).all(), "what is mapped stays readable"
    monkeypatch.setenv(store.LIMIT, "10")
    with pytest.raises(ConfigError, match=store.LIMIT):
        store.stored("d", _arrays)
    monkeypatch.setenv(store.LIMIT, "much")
    with pytest.raises(ConfigError, match="number of bytes"):
        store.stored("d", _arrays)


def _store_and_sum(number: int, results: Any) -> None:
    found = store.stored("shared", lambda: {POOLED: np.ones((2000, 100), dtype=np.float32)})
    results.put((number, float(found[POOLED].sum())))


def test_two_processes_store_one_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_store_and_sum, args=(number, results)) for number in range(2)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=60) for _ in processes) == [(0, 200_000.0), (1, 200_000.0)]
    for process in processes:
        process.join()
    assert [path.name for path in (tmp_path / "cache" / "features").iterdir()] == ["shared"]


@pytest.mark.full
@pytest.mark.parametrize("method", ["head", "moment_probing", "gda"])
def test_a_run_on_stored_features_ends_as_one_without(method: str, tmp_path: Path) -> None:
    """The tiny ViT has no dropout, so that evaluation mode changes nothing."""
    from support.tiny_runs import make_image_backbone, make_image_task, options

    make_image_task(tmp_path / "images")
    make_image_backbone(tmp_path / "vit")
    found = []
    for features in (None, "cached", "cached"):
        out = tmp_path / f"out{len(found)}"
        values = options(tmp_path / "images" / "colours.yaml", tmp_path / "vit", out, method=method, max_steps=4)
        result = train(**values, features=features)
        found.append([p.detach().clone() for p in result.model.parameters() if p.requires_grad])
        scores = result.metrics["metrics"]["test"]
        found[-1].append(torch.tensor([scores["loss"]]))
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-3)
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 3, "one entry a split"


@pytest.mark.full
@pytest.mark.parametrize("method", ["head", "moment_probing", "nmtune"])
def test_a_run_on_stored_features_goes_on_and_leaves_the_model_whole(method: str, tmp_path: Path) -> None:
    schedule = {"max_steps": 5, "save_steps": 2, "features": "cached", "gradient_checkpointing": True}
    alone = train(options_for(method, tmp_path, tmp_path / "alone", **schedule))
    interrupt(alone.output_dir, tmp_path / "out", 4)
    found = train(options_for(method, tmp_path, tmp_path / "out", **schedule))
    assert found.metrics["resumed_from"] == "checkpoint-4"
    assert same_weights(tmp_path / "out", alone.output_dir)
    plain = train(options_for(method, tmp_path, tmp_path / "plain", max_steps=1))
    assert found.metrics["parameters"] == plain.metrics["parameters"]
    assert found.model.state_dict().keys() == plain.model.state_dict().keys()
    assert not any(module.training for module in found.model.modules())


@pytest.mark.parametrize("method", ["lora", "mp_plus", "full", "linear_svm"])
def test_methods_that_run_the_backbone_themselves_are_refused(method: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave it out") as raised:
        train(**options_for(method, tmp_path, tmp_path / "out", max_steps=2, features="cached"))
    assert "\n" not in str(raised.value)


def test_other_values_and_heads_over_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='must be "cached"'):
        train(**options_for("head", tmp_path, tmp_path / "out", features="kept"))
    model = adapt("nmtune", MODELS["vit"](), second_view="shift")
    with pytest.raises(ConfigError, match="further views"):
        CachedFeatures(model, head_features(MODELS["vit"]()), "nmtune")
