"""The run option `prune`: what is pruned, trained on it, saved and loaded again."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from support.tiny_runs import (
    make_backbone,
    make_image_backbone,
    make_image_task,
    make_task,
    options,
    same_weights,
    weights,
)
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerControl, TrainerState

import peft_lab
from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.loading.load_run import load
from peft_lab.runs.run_config import RunConfig
from peft_lab.training.pruning import L1Penalty
from peft_lab.training.run import train

HALF = {"by": "magnitude", "share": 0.5}
#: A method of each way to act; `zeros` needs a pruned base.
METHODS = {
    "lora": {},
    "ssf": {},
    "svfit": {},
    "vpt": {},
    "bottleneck": {},
    "sparse_support": {"support": "zeros", "density": 0.05},
    "head": {},
    "nearest_mean": {},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruning")
    return {"task": make_task(folder / "data"), "backbone": make_backbone(folder / "bert"), "folder": folder}


@pytest.fixture(scope="module")
def run(place):
    """Train once for each name, and keep the result."""
    made = {}

    def once(name, **changes):
        if name not in made:
            made[name] = train(options(place["task"], place["backbone"], place["folder"] / name, **changes))
        return made[name]

    return once


def fresh(place) -> nn.Module:
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(place["backbone"], num_labels=3).eval()


@torch.no_grad()
def logits(model, place):
    tokens = AutoTokenizer.from_pretrained(place["backbone"])(["rain and sun", "a song please"], return_tensors="pt")
    return model.eval()(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits


def linears(model) -> dict[str, torch.Tensor]:
    """Weights of the linear layers of the backbone, by path."""
    inside = getattr(model, "bert", model)
    found = {name: m.weight for name, m in inside.named_modules() if isinstance(m, nn.Linear)}
    return {name.removesuffix(".base_layer"): weight for name, weight in found.items()}


def pruned_by_torch(place, share) -> dict[str, torch.Tensor]:
    base = fresh(place)
    parts = [(m, "weight") for m in base.bert.modules() if isinstance(m, nn.Linear)]
    prune.global_unstructured(parts, prune.L1Unstructured, amount=share)
    return linears(base)


# What is pruned -----------------------------------------------------------------------------------------------------


def test_the_smallest_weights_of_the_base_are_zero_and_nothing_else_is(place, run):
    found = run("lora", prune=HALF)
    base = found.model.get_base_model()
    names = {name.replace(".base_layer", ""): value for name, value in base.named_parameters()}
    for path, expected in pruned_by_torch(place, 0.5).items():
        assert torch.equal(names[f"bert.{path}.weight"], expected), path
    dense = dict(fresh(place).named_parameters())
    rest = [name for name in dense if "embeddings" in name or "LayerNorm" in name or name.endswith("bias")]
    rest = [name for name in rest if not name.startswith("classifier")]
    assert rest
    assert all(torch.equal(names[name], dense[name]) for name in rest)
    total = sum(value.numel() for value in linears(fresh(place)).values())
    summary = found.metrics["pruning"]
    assert (summary["pruned"], summary["weights"], summary["layers"]) == (total // 2, total, 13)
    assert found.metrics["run"]["prune"] == HALF
    saved = json.loads((found.output_dir / "metrics.json").read_text())
    assert saved["pruning"] == summary
    losses = [
        entry["loss"]
        for entry in run("longer", prune=HALF, max_steps=40, logging_steps=10).trainer.state.log_history
        if "loss" in entry
    ]
    assert losses[-1] < losses[0]


@pytest.mark.full
def test_whole_filters_are_zero_where_they_are_asked_for(place, run):
    found = run("filters", prune={"share": 0.25, "structured": True}, method="ssf")
    base = found.model.get_base_model()
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and "classifier" not in name and "query" in name:
            zeros = (module.weight == 0).all(1)
            norms = fresh(place).get_submodule(name.replace(".base_layer", "")).weight.norm(dim=1)
            assert int(zeros.sum()) == len(norms) // 4
            assert norms[zeros].max() < norms[~zeros].min()
    assert torch.equal(logits(load(found.output_dir).model, place), logits(found.model, place))


# Saving and loading -------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_prunes_its_base_again(method, place, run):
    found = run(method, method=method, method_args=METHODS[method], prune=HALF)
    expected = logits(found.model, place)
    assert torch.equal(logits(load(found.output_dir).model, place), expected)
    base = fresh(place)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = peft_lab.load_adapter(base, found.output_dir)
        assert torch.equal(logits(adapted, place), expected)
        # the base is pruned already, and so takes a second adapter
        assert peft_lab.load_adapter(adapted, found.output_dir, "second").peft_config.keys() == {"default", "second"}
    assert not any("pruned_base" in str(warning.message) for warning in told)
    # without pruning its answers would be others, and that is told
    if method in ("lora", "head"):
        with pytest.warns(UserWarning, match="pruned_base"):
            dense = PeftModel.from_pretrained(fresh(place), found.output_dir)
        assert not torch.allclose(logits(dense, place), expected, atol=1e-4)
        return
    with pytest.raises(AdapterMismatchError, match="differs from the one the adapter was trained on"):
        PeftModel.from_pretrained(fresh(place), found.output_dir)


@pytest.mark.full
@pytest.mark.parametrize("structured", [False, True])
def test_masks_of_bip_are_found_on_training_rows_and_saved(structured, place, run, tmp_path, monkeypatch):
    chosen = {"by": "bip", "share": 0.5, "steps": 3, "structured": structured}
    values = options(place["task"], place["backbone"], tmp_path / "out", method="ssf", prune=chosen)
    values |= {"save_strategy": "steps", "save_steps": 3}
    found = train(values)
    dense, trained = linears(fresh(place)), linears(found.model.get_base_model())
    kept = {path: weight != 0 for path, weight in trained.items()}
    assert all(torch.equal(weight, dense[path] * kept[path]) for path, weight in trained.items())
    summary, total = found.metrics["pruning"], sum(weight.numel() for weight in dense.values())
    assert summary["pruned"] == sum(int((~mask).sum()) for mask in kept.values())
    assert summary["pruned"] == pytest.approx(total / 2, abs=1)
    magnitude = {"share": 0.5, "structured": structured}
    other = linears(run(f"by size {structured}", method="ssf", prune=magnitude).model.get_base_model())
    assert any(not torch.equal(kept[path], weight != 0) for path, weight in other.items())
    assert torch.equal(logits(load(tmp_path / "out").model, place), logits(found.model, place))
    sizes = {
        name: (tmp_path / "out" / name).stat().st_size for name in ("adapter_model.safetensors", "pruning.safetensors")
    }
    assert found.metrics["adapter_bytes"] == sum(sizes.values())
    assert sizes["pruning.safetensors"] < 4096 + (0 if structured else total // 8)
    # a resume takes the masks of its checkpoint
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    (tmp_path / "out" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    monkeypatch.setattr("peft_lab.training.pruning.bip_masks", lambda *args, **kwargs: pytest.fail("searched again"))
    assert train(values).metrics["resumed_from"] == "checkpoint-3"
    assert same_weights(tmp_path / "out", tmp_path / "whole")
    (tmp_path / "out" / "pruning.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no pruning\.safetensors"):
        load(tmp_path / "out")


@pytest.mark.full
def test_a_base_of_other_weights_is_refused_and_so_are_mixtures(place, run, tmp_path, caplog):
    found = run("ssf", method="ssf", prune=HALF).output_dir
    other = AutoModelForSequenceClassification.from_pretrained(make_backbone(tmp_path / "other", seed=1), num_labels=3)
    with pytest.raises(AdapterMismatchError, match=r"pruned of 8,\d+ of .* others are the smallest"):
        peft_lab.load_adapter(other, found)
    caplog.clear()
    peft_lab.load_adapter(other, found, allow_other_base=True)
    assert "others are the smallest weights; its answers may be worthless" in caplog.text
    dense = run("dense ssf", method="ssf").output_dir
    both = peft_lab.load_adapter(fresh(place), dense)
    with pytest.raises(AdapterMismatchError, match="dense and has other adapters on it"):
        peft_lab.load_adapter(both, found, "pruned")
    pruned = peft_lab.load_adapter(fresh(place), found)
    with pytest.raises(AdapterMismatchError, match="trained on a dense one"):
        peft_lab.load_adapter(pruned, dense, "plain")
    filters = run("filters", prune={"share": 0.25, "structured": True}, method="ssf").output_dir
    with pytest.raises(AdapterMismatchError, match="pruned otherwise"):
        peft_lab.load_adapter(pruned, filters, "filters")
    with pytest.raises(ConfigError, match="quantised, sharded or not loaded"):
        peft_lab.load_adapter(AutoModelForSequenceClassification.from_config(other.config).to("meta"), found)


def test_a_record_that_was_changed_is_refused(place, run, tmp_path):
    shutil.copytree(run("ssf", method="ssf", prune=HALF).output_dir, tmp_path / "copy")
    file = tmp_path / "copy" / "pruning.json"
    values = json.loads(file.read_text())
    for change, message in (({"share": 2}, "share"), ({"more": 1}, "more"), ({"sha256": 3}, "must be text")):
        file.write_text(json.dumps(values | change))
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / "copy")


@pytest.mark.full
def test_merged_and_converted_adapters_answer_as_before(place, run, tmp_path):
    from peft_lab.export.merge import merge
    from peft_lab.export.to_lora import to_lora

    found = run("svfit", method="svfit", prune=HALF)
    expected = logits(found.model, place)
    merge(found.output_dir, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged, place), expected, atol=1e-4)
    to_lora(found.output_dir, tmp_path / "lora")
    assert torch.allclose(logits(load(tmp_path / "lora").model, place), expected, atol=1e-4)
    with pytest.warns(UserWarning, match="pruned_base"):
        PeftModel.from_pretrained(fresh(place), tmp_path / "lora")


@pytest.mark.full
def test_many_adapters_on_one_pruned_base(place, run):
    names = {"a": run("lora", prune=HALF), "b": run("longer", prune=HALF, max_steps=40, logging_steps=10)}
    tenants = peft_lab.load_many(fresh(place), {name: each.output_dir for name, each in names.items()})
    tokens = AutoTokenizer.from_pretrained(place["backbone"])(["rain and sun", "a song please"], return_tensors="pt")
    rows = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    found = tenants(**rows, adapter_names=["a", "b"]).logits
    assert torch.allclose(found[0], logits(names["a"].model, place)[0], atol=1e-5)
    assert torch.allclose(found[1], logits(names["b"].model, place)[1], atol=1e-5)
    with pytest.raises(AdapterMismatchError, match="trained on a dense one"):
        tenants.add("dense", run("dense", method="lora").output_dir)
    others = peft_lab.load_many(fresh(place), {"dense": run("dense", method="lora").output_dir})
    with pytest.raises(AdapterMismatchError, match="dense and has other adapters"):
        others.add("pruned", names["a"].output_dir)


# Training on it -----------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("changes", [{"weight_decay": 0.1}, {"sam_rho": 0.05, "optim": "sgd", "learning_rate": 0.1}])
def test_full_fine_tuning_keeps_the_zeros(changes, place, run, tmp_path):
    values = options(
        place["task"], place["backbone"], tmp_path / "out", method="full", **{"learning_rate": 1e-3} | changes
    )
    model = train({**values, "prune": HALF}).model
    kept = {path: value != 0 for path, value in pruned_by_torch(place, 0.5).items()}
    before = linears(fresh(place))
    for path, weight in linears(model).items():
        assert torch.equal(weight != 0, kept[path]), path
    assert any((weight != before[path])[kept[path]].any() for path, weight in linears(model).items())
    assert weights(tmp_path / "out").keys() == dict(model.named_parameters()).keys()
    assert torch.equal(logits(load(tmp_path / "out").model, place), logits(model, place))
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.full
def test_a_module_that_an_adapter_trains_in_full_keeps_the_zeros(place, tmp_path):
    values = options(
        place["task"],
        place["backbone"],
        tmp_path / "out",
        method_args={"modules_to_save": ["classifier", "pooler.dense"]},
    )
    model = train({**values, "prune": HALF}).model
    pooler = model.get_base_model().bert.pooler.dense.modules_to_save["default"].weight
    expected = pruned_by_torch(place, 0.5)["pooler.dense"]
    assert torch.equal(pooler == 0, expected == 0)
    assert not torch.equal(pooler, expected)


def test_the_gradient_of_the_l1_penalty_is_that_of_the_loss(place):
    model = fresh(place)
    paths = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "bert" in name]
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "labels": torch.tensor([1])}
    whole = model(**inputs).loss + 0.01 * sum(model.get_submodule(path).weight.abs().sum() for path in paths)
    expected = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(whole, list(model.parameters())), strict=True)
    )
    model(**inputs).loss.backward()
    L1Penalty(paths, 0.01).on_pre_optimizer_step(None, TrainerState(), TrainerControl(), model=model)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


@pytest.mark.full
def test_sparse_then_prune(place, run):
    def size(name, penalty):
        return run(
            name, method="full", learning_rate=1e-3, max_steps=20, prune={"by": "l1", "share": 0.6, "penalty": penalty}
        )

    strong, weak = size("strong", 1.0), size("weak", 1e-9)
    plain = run("plain", method="full", learning_rate=1e-3, max_steps=20)
    for found in (strong, weak):
        zeros = sum(int((weight == 0).sum()) for weight in linears(found.model).values())
        summary = found.metrics["pruning"]
        assert zeros == summary["pruned"] == round(0.6 * summary["weights"])
        assert torch.equal(logits(load(found.output_dir).model, place), logits(found.model, place))
    # without a penalty it is the plain training, pruned
    dense = linears(plain.model)
    assert all(torch.allclose(w, dense[n] * (w != 0), atol=1e-5) for n, w in linears(weak.model).items())
    whole = sum(float(weight.detach().abs().sum()) for weight in linears(strong.model).values())
    assert whole < 0.98 * sum(float(weight.detach().abs().sum()) for weight in linears(weak.model).values())


@pytest.mark.full
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_ends_as_one_in_a_piece(method, place, tmp_path):
    values = options(
        place["task"],
        place["backbone"],
        tmp_path / "out",
        method=method,
        save_strategy="steps",
        save_steps=3,
        prune=HALF,
    )
    values |= {"learning_rate": 1e-3}
    train(values)
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    for name in ("metrics.json", "adapter_model.safetensors", "model.safetensors"):
        (tmp_path / "out" / name).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    assert train(values).metrics["resumed_from"] == "checkpoint-3"
    assert same_weights(tmp_path / "out", tmp_path / "whole")
    (tmp_path / "out" / "metrics.json").unlink()
    with pytest.raises(ConfigError, match=r"prune: .* there, .* here"):
        train({**values, "prune": {"share": 0.6}})


@pytest.mark.full
def test_cached_features_are_those_of_the_pruned_base(place, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_LAB_CACHE", str(tmp_path / "cache"))
    base = options(place["task"], place["backbone"], tmp_path / "out", method="head")
    train({**base, "features": "cached", "output_dir": str(tmp_path / "dense")})
    train({**base, "features": "cached", "prune": HALF, "output_dir": str(tmp_path / "stored")})
    train({**base, "prune": HALF, "output_dir": str(tmp_path / "computed")})
    assert same_weights(tmp_path / "stored", tmp_path / "computed", 1e-4)
    assert not same_weights(tmp_path / "stored", tmp_path / "dense", 1e-3)


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prune": {"share": 1}}, '"share" of prune must be over 0 and below 1, got 1'),
        ({"prune": {"share": 0}}, '"share" of prune must be over 0 and below 1, got 0'),
        ({"prune": {"by": "magnitude"}}, '"share" is missing in prune'),
        ({"prune": {"by": "magnitud", "share": 0.5}}, 'Did you mean "magnitude"'),
        ({"prune": {"shares": 0.5}}, r'Unknown key "shares" in prune\. Did you mean "share"'),
        ({"prune": "half"}, "for example share=0.5"),
        ({"prune": {"share": 0.5, "structured": "some"}}, "true or false"),
        ({"prune": {"share": 0.5, "penalty": 0.1}}, "penalty is for by=bip and by=l1"),
        ({"prune": {"share": 0.5, "steps": 3}}, "steps is for by=bip, not by=magnitude"),
        ({"prune": {"share": 0.5, "by": "bip", "steps": 0}}, "at least 1"),
        ({"prune": {"share": 0.5, "by": "l1"}}, 'method "lora" keeps them frozen; take --method full'),
        ({"prune": {"share": 0.5, "by": "l1"}, "method": "head"}, 'method "head" keeps them frozen'),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(values, message):
    run = {"task": "snips", "model_name_or_path": "minilm", "method": "lora", "output_dir": "-"}
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping({**run, **values}).check()


def test_quantised_weights_are_refused():
    from peft_lab.registry import method
    from peft_lab.runs.pruning import check_prune

    with pytest.raises(ConfigError, match="quantization=nf4 have no values of their own"):
        check_prune(HALF, method("lora"), {"quantization": "nf4"})


def test_a_method_that_prunes_by_itself_is_refused(tmp_path):
    from transformers import ViTForImageClassification

    backbone = make_image_backbone(tmp_path / "vit")
    ViTForImageClassification.from_pretrained(backbone, num_labels=5).save_pretrained(backbone)
    values = options(make_image_task(tmp_path / "data"), backbone, tmp_path / "out", method="pixel_prompt", prune=HALF)
    with pytest.raises(ConfigError, match='"pixel_prompt" with its own sparsity both set weights'):
        train({**values, "method_args": {"inner_size": 16, "sparsity": 0.2}})
    assert not (tmp_path / "out").exists()
    found = train({**values, "method_args": {"inner_size": 16}})
    assert found.metrics["pruning"]["pruned"] > 0
    model = load(tmp_path / "out").model
    assert model.get_base_model().vit.layers[0].mlp.fc1.weight.eq(0).float().mean() > 0.2


def test_flags_are_those_of_the_file():
    from peft_lab.runs.command_line import parse_arguments
    from peft_lab.runs.run_config import load_run

    flags = "--prune by=magnitude share=5e-1 --prune structured=true --task t --model_name_or_path m --method lora"
    _, found = parse_arguments(flags.split())
    config = load_run(None, {**found, "output_dir": "o"})
    assert config.prune == {"by": "magnitude", "share": 0.5, "structured": True}
    assert RunConfig.from_mapping(config.to_dict()) == config


def test_what_is_said_of_a_pruned_run(run, capsys):
    from peft_lab.cli.runs import _show_metrics
    from peft_lab.hub.adapter_info import adapter_info

    found = run("lora", prune=HALF)
    words = "8,704 of 17,408 weights (50.0 %) by magnitude"
    assert f"| pruned of the base | {words} |" in (found.output_dir / "README.md").read_text()
    told = adapter_info(found.output_dir)
    assert told["base_model"]["pruned"] == words
    assert told["load"][0] == "from peft_lab.loading.load_run import load"
    assert "pruned_base" not in told["method"]["arguments"]
    _show_metrics(found.metrics, found.output_dir)
    assert f"Pruned of the base: {words}" in " ".join(capsys.readouterr().out.split())
