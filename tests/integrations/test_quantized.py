"""Adapters on quantised bases: bitsandbytes, torchao and HQQ, all of which run on a CPU."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.backbones import tiny, tiny_inputs
from support.method_runs import interrupt
from support.properties import (
    DRAWS,
    EVERY,
    HEADS,
    IMAGES,
    KEEPS_HEAD,
    METHODS,
    ON_OPS,
    RESIDUAL,
    UNTRAINED,
    adapter_parameters,
    as_read,
    assert_close,
    config,
    fill,
    main_tensor,
    move,
    output,
)
from support.tiny_runs import make_backbone, make_task, options
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
)

import peft_lab
from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.backbones.quantized_loading import FORMS
from peft_lab.backbones.quantized_weight import dense_weight, quantization
from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.training.read_training_data import read_training_data
from peft_lab.tuners.registration import has_trait

bitsandbytes = pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
hqq = pytest.importorskip("hqq.core.quantize")

AUTO = {
    "bert": AutoModelForSequenceClassification,
    "vit": AutoModelForImageClassification,
    "llama": AutoModelForCausalLM,
}
LIBRARIES = {**FORMS, "hqq": "hqq"}
Load = Callable[..., Any]


def model_of(family: str) -> nn.Module:
    """A tiny random model whose layers have 64 inputs, the block of bitsandbytes' scales."""
    settings = tiny(family).config.to_dict() | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    torch.manual_seed(0)
    return type(tiny(family))(type(tiny(family).config)(**settings))


def family_of(method: str) -> str:
    return "vit" if method in (*IMAGES, *KEEPS_HEAD, *DRAWS) else "bert"


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Function that loads a tiny family in a form, "" for float32; `change` is applied to the weights before."""
    saved: dict[Any, Path] = {}

    def load(family: str, form: str = "", change: Callable[[nn.Module], None] | None = None, **options: Any) -> Any:
        key = (family, change)
        if key not in saved:
            model = model_of(family)
            if change is not None:
                change(model)
            saved[key] = tmp_path_factory.mktemp(family)
            model.save_pretrained(saved[key])
        options = {"dtype": "float32", **options}
        if form != "hqq":
            model, _ = load_checkpoint(AUTO[family], str(saved[key]), quantization=form or None, **options)
            return model.eval()
        # transformers 5 loads no HQQ yet, so the layers are replaced here, as `hqq` itself does it
        model, _ = load_checkpoint(AUTO[family], str(saved[key]), **options)
        settings = hqq.BaseQuantizeConfig(nbits=4, group_size=16)
        for path, module in [*model.named_modules()]:
            if isinstance(module, nn.Linear) and not path.startswith(("classifier", "lm_head")):
                layer = hqq.HQQLinear(module, copy.deepcopy(settings), compute_dtype=torch.float32, device="cpu")
                model.set_submodule(path, layer)
        return model.eval()

    return load


def forms(use: str, names: tuple[str, ...] = tuple(LIBRARIES)) -> pytest.MarkDecorator:
    """Parametrise a test over forms, each as a line of its library in the table."""
    marks = {name: pytest.mark.integration(library=LIBRARIES[name], use=f"{name} weights: {use}") for name in names}
    return pytest.mark.parametrize("form", [pytest.param(name, marks=marks[name]) for name in names])


def put(method: str, model: Any, **fields: Any) -> Any:
    """A fresh adapter on a model itself; one that reads data has read some."""
    torch.manual_seed(0)
    adapted = fill(get_peft_model(model, config(method, model, **fields)))
    if method in KEEPS_HEAD:
        read_training_data(adapted, [{**tiny_inputs(model), "labels": torch.arange(2)}])
    return adapted


def train(model: Any, rate: float = 3e-2, steps: int = 6) -> list[float]:
    """Losses of a few steps on one batch."""
    inputs = as_read(model, tiny_inputs(model.get_base_model(), labels=True))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(steps):
        loss = model.train()(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@forms("training, save, reload")
@pytest.mark.parametrize("method", [*EVERY, *KEEPS_HEAD])
def test_adapter_is_trained_saved_and_reloaded(method: str, form: str, load: Load, tmp_path: Path) -> None:
    family = family_of(method)
    base = load(family, form)
    kinds = {quantization(module) for module in base.modules()} - {""}
    assert kinds == {"hqq-4bit" if form == "hqq" else form}
    inputs = tiny_inputs(base)
    before = output(base, inputs)
    model = put(method, base)
    if method not in UNTRAINED:
        # heads of several layers are trained at their own, lower rates
        losses = train(model, peft_lab.registry.method(method).learning_rate if method in HEADS else 3e-2)
        assert losses[-1] < losses[0]
    trained = output(model, inputs)
    assert not torch.allclose(trained, before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(family, form), tmp_path)
    assert_close(output(again, inputs), trained, 1e-6)
    with again.disable_adapter():
        if method not in KEEPS_HEAD:
            assert_close(output(again, inputs), output(load(family, form), inputs), 1e-6)


@pytest.mark.parametrize("form", LIBRARIES)
def test_dequantised_weight_is_the_one_that_the_module_multiplies_by(form: str, load: Load) -> None:
    module = next(m for m in load("llama", form).modules() if quantization(m))
    unit = torch.eye(module.in_features)
    with torch.no_grad():
        product = module(unit) - (0 if module.bias is None else module.bias)
    # LLM.int8 quantises what comes in too
    assert_close(dense_weight(module), product.T, 1e-2 if form == "int8" else 1e-5)


@pytest.mark.parametrize("form", LIBRARIES)
@pytest.mark.parametrize("rank", [3, "full"])
def test_singular_bases_are_those_of_the_dequantised_weight(form: str, rank: Any, load: Load) -> None:
    model = put("svfit", load("llama", form), rank=rank)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = dense_weight(layer.base_layer)
    values = torch.linalg.svdvals(weight)[: 3 if rank == 3 else None]
    assert_close(layer.bases("default").s, values)
    with torch.no_grad():
        layer.svfit_delta["default"].fill_(0.5)
        bases, x = layer.bases("default"), torch.randn(2, weight.shape[1])
        change = layer(x) - layer.base_layer(x)
    assert_close(change, x @ (0.5 * bases.u @ bases.vh).T, 1e-5)


@pytest.mark.parametrize("form", LIBRARIES)
@pytest.mark.parametrize("method", ["lora", *ON_OPS, *RESIDUAL])
def test_gradients_pass_the_base_and_checkpointing_keeps_them(method: str, form: str, load: Load) -> None:
    found = []
    for checkpointing in (False, True):
        model = move(put(method, load("llama", form))).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**tiny_inputs(model.get_base_model(), labels=True)).loss.backward()
        found.append({name: p.grad for name, p in adapter_parameters(model).items() if p.requires_grad})
    for name, gradient in found[0].items():
        assert gradient is not None
        assert bool(gradient.any()), name
        assert_close(found[1][name], gradient, 1e-6)
    if form == "int8":
        return
    # the same as on plain weights of the same values
    plain = load("llama")
    for path, module in load("llama", form).named_modules():
        if quantization(module):
            plain.get_submodule(path).weight.data.copy_(dense_weight(module))
    model = move(put(method, plain)).train()
    model(**tiny_inputs(plain, labels=True)).loss.backward()
    for name, parameter in adapter_parameters(model).items():
        gradient = found[0][name.replace("..", ".")]
        assert (parameter.grad - gradient).norm() <= 2e-2 * gradient.norm(), name


def test_differences_of_a_checkpoint_to_quantised_weights_are_refused(load: Load, tmp_path: Path) -> None:
    model_of("bert").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is quantised \(nf4\)"):
        put("atlas", load("bert", "nf4"), vectors=[str(tmp_path)])


@pytest.mark.parametrize("method", ["svfit", "ssf"])
def test_adapter_after_an_evaluation_sees_the_weight_as_it_is(method: str, tmp_path: Path, load: Load) -> None:
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    base = nn.Sequential(layer).to("cpu").eval()
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, for which alone the weights are packed anew")
    exact = dense_weight(copy.deepcopy(base)[0])
    x = torch.randn(4, 64)
    layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        base(x)
    assert layer.weight.quant_state.packing_format_for_cpu
    # packing rounds the scales to bfloat16
    assert_close(dense_weight(layer), exact, 2**-8)
    model = put(method, base, target_modules=["0"])
    assert not layer.weight.quant_state.packing_format_for_cpu
    with torch.no_grad():
        unit = model.base_model.model[0].base_layer(torch.eye(64)) - layer.bias
    assert_close(unit.T, exact, 2**-8)
    # and no later evaluation packs them again, after which gradients would stop at the module
    with torch.no_grad():
        model.eval()(x)
    x.requires_grad_()
    model.train()(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())


@forms("an adapter of it on the unquantised base, and back", tuple(FORMS))
@pytest.mark.parametrize("method", METHODS)
def test_adapter_moves_between_forms_of_one_base_and_says_so(
    method: str, form: str, load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture, refused: Callable[[str], None]
) -> None:
    for there, here in ((form, ""), ("", form)):
        folder = tmp_path / (there or "float32")
        move(put(method, load("bert", there))).save_pretrained(folder)
        caplog.clear()
        if has_trait(peft_lab.registry.method(method), "dtype_bound"):
            with pytest.raises(AdapterMismatchError, match="save_bases=True"):
                peft_lab.load_adapter(load("bert", here), folder)
            refused("only if its bases are saved with it")
            continue
        with caplog.at_level(logging.WARNING, "peft_lab"):
            model = peft_lab.load_adapter(load("bert", here), folder)
        if method == "lora":
            continue
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1
        assert f"in {there or 'float32'}, and this is the base in {here or 'float32'}" in said[0]
        assert adapter_parameters(model)


@pytest.mark.parametrize("form", FORMS)
def test_saved_bases_move_svfit_between_forms_exactly(form: str, load: Load, tmp_path: Path) -> None:
    trained = move(put("svfit", load("llama", form), save_bases=True))
    trained.save_pretrained(tmp_path)
    here = peft_lab.load_adapter(load("llama"), tmp_path)
    for name, layer in trained.named_modules():
        if hasattr(layer, "svfit_delta"):
            assert torch.equal(here.get_submodule(name).delta_weight("default"), layer.delta_weight("default"))


def _noise(share: float) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    noise = torch.randn(module.weight.shape, generator=generator)
                    module.weight.add_(share * module.weight.std() * noise)

    return change


def _other(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(module.weight.std() * torch.randn(module.weight.shape, generator=generator))


_FAR, _NEAR = _noise(0.3), _noise(0.01)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["ssf", "vpt"])
def test_another_base_is_refused_in_every_form(method: str, form: str, load: Load, tmp_path: Path) -> None:
    move(put(method, load("bert", form))).save_pretrained(tmp_path)
    for change in (_other, _FAR):
        for here in ("", form):
            with pytest.raises(AdapterMismatchError, match="checkpoint and revision"):
                peft_lab.load_adapter(load("bert", here, change), tmp_path)
    # a change below the error of quantising cannot be told from it in another form, but it can in the same
    peft_lab.load_adapter(load("bert", "", _NEAR), tmp_path)
    peft_lab.load_adapter(load("bert", "", _FAR), tmp_path, allow_other_base=True)


@forms("merging into it", tuple(LIBRARIES))
@pytest.mark.parametrize("method", ["svfit", "ssf"])
def test_merging_into_quantised_weights_is_refused_and_changes_nothing(
    method: str, form: str, load: Load, refused: Callable[[str], None]
) -> None:
    model = move(put(method, load("bert", form)))
    inputs = tiny_inputs(model.get_base_model())
    before = output(model, inputs)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ConfigError, match="peft-lab merge"):
            merge()
    assert torch.equal(output(model, inputs), before)
    base = load("bert", form)
    assert_close(output(model.unload(), inputs), output(base, inputs), 1e-6)
    refused("`peft-lab merge` dequantises first")


@forms("rows of one batch with adapters of their own, `load_many`")
@pytest.mark.parametrize("method", ["svfit", "ssf", "lora"])
def test_rows_of_one_batch_have_their_own_adapters(method: str, form: str, load: Load, tmp_path: Path) -> None:
    inputs = tiny_inputs(load("bert"))
    alone: dict[str, Tensor] = {"__base__": output(load("bert", form), inputs)}
    for seed, name in enumerate(("one", "two")):
        model = move(put(method, load("bert", form), modules_to_save=[]), seed=seed)
        model.save_pretrained(tmp_path / name)
        alone[name] = output(model, inputs)
    tenants = peft_lab.load_many(load("bert", form), {name: tmp_path / name for name in ("one", "two")})
    for names in (["one", "two"], ["two", "__base__"]):
        expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
        # LLM.int8 rounds by the largest value of what comes in
        assert_close(main_tensor(tenants(**inputs, adapter_names=names)), expected, 2e-3 if form == "int8" else 1e-5)


def test_odd_layers_stay_unquantised_and_are_named(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = BertForSequenceClassification(tiny("bert").config)
    odd.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "peft_lab"):
        model, _ = load_checkpoint(AUTO["bert"], str(tmp_path), quantization="nf4", dtype="float32")
    assert not any(quantization(module) for module in model.modules())
    assert "no multiple of 64" in caplog.text
    # what it spares the layers: 4-bit values that are read by the scales of other blocks
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(32, 16, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False)
    exact = torch.randn(16, 32) * torch.arange(1, 17)[:, None]
    layer.weight.data.copy_(exact)
    layer = layer.to("cpu")
    assert (dense_weight(copy.deepcopy(layer)) - exact).norm() > 0.2 * exact.norm()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "peft_lab"):
        put("ssf", nn.Sequential(layer), target_modules=["0"])
    assert "wrong scales" in caplog.text


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a task and a backbone for runs."""
    place = tmp_path_factory.mktemp("runs")
    make_task(place / "task")
    make_backbone(place / "bert", width=64)
    return place


@forms("`peft-lab train`, evaluate, predict, merge", tuple(FORMS))
@pytest.mark.parametrize("method", ["svfit", "ssf", "lora"])
def test_run_is_recorded_and_read_in_its_form(method: str, form: str, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = options(place / "task" / "topics.yaml", place / "bert", out, method=method, quantization=form)
    metrics = peft_lab.train(run).metrics
    assert metrics["run"]["quantization"] == form
    # counted by their values, not by the bytes that hold them
    plain = sum(p.numel() for p in BertModel.from_pretrained(place / "bert").parameters())
    assert metrics["parameters"]["total"] > plain
    found = peft_lab.evaluate(out)
    # LLM.int8 takes outliers by batch
    assert found["loss"] == pytest.approx(metrics["metrics"]["test"]["loss"], rel=1e-3 if form == "int8" else 1e-5)
    assert peft_lab.predict(out, ["the song now"])[0]["label"]
    card = (out / "README.md").read_text()
    assert f"quantised to `{form}`" in card
    assert 'model = load("run").model' in card
    loaded = peft_lab.loading.load_run.load(out)
    assert {quantization(module) for module in loaded.model.modules()} == {"", form}
    peft_lab.merge(out, tmp_path / "merged")
    merged = AUTO["bert"].from_pretrained(tmp_path / "merged").eval()
    assert not any(quantization(module) for module in merged.modules())
    inputs = loaded.processor(["the song now please"], return_tensors="pt")
    values = peft_lab.loading.load_run.load(out, dequantised=True).model
    assert_close(output(merged, inputs), output(values, inputs), 1e-5)
    # LLM.int8 rounds what comes in as well, which a merged float32 model does not
    if form != "int8":
        assert_close(output(merged, inputs), output(loaded.model, inputs), 1e-5)
    if method == "svfit":
        peft_lab.to_lora(out, tmp_path / "lora")
        again = peft_lab.loading.load_run.load(tmp_path / "lora").model
        assert_close(output(again, inputs), output(loaded.model, inputs), 1e-5)


@pytest.mark.parametrize("form", ["nf4", "torchao-int8"])
def test_interrupted_run_goes_on_in_its_form(form: str, place: Path, tmp_path: Path) -> None:
    def run(folder: str) -> dict[str, Any]:
        changes = {"method": "svfit", "quantization": form, "save_strategy": "steps", "save_steps": 3}
        return options(place / "task" / "topics.yaml", place / "bert", tmp_path / folder, **changes)

    whole = peft_lab.train(run("whole"))
    interrupt(tmp_path / "whole", tmp_path / "again", step=3)
    again = peft_lab.train(run("again"))
    assert again.metrics["resumed_from"] == "checkpoint-3"
    assert again.metrics["metrics"] == whole.metrics["metrics"]
    interrupt(tmp_path / "whole", tmp_path / "other", step=3)
    with pytest.raises(ConfigError, match=r"quantization|base"):
        peft_lab.train({**run("other"), "quantization": "int8"})


@pytest.mark.parametrize("form", LIBRARIES)
def test_quantised_module_cannot_be_trained_in_full(form: str, load: Load) -> None:
    base = load("bert", form)
    inputs = tiny_inputs(base)
    before = output(base, inputs)
    with pytest.raises(ConfigError, match="cannot be trained"):
        put("ssf", base, modules_to_save=["query"])
    assert torch.equal(output(base, inputs), before)


def test_quantised_checkpoint_is_not_quantised_again(load: Load, tmp_path: Path) -> None:
    load("bert", "int8").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="quantised already"):
        load_checkpoint(AUTO["bert"], str(tmp_path), quantization="nf4", dtype="float32")
    model, _ = load_checkpoint(AUTO["bert"], str(tmp_path), dtype="float32")
    assert {quantization(module) for module in model.modules()} == {"", "int8"}
