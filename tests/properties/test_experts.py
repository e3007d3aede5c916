"""Adapters on the stacked weights of experts, for every method that declares them, and refusals of the others."""

from __future__ import annotations

import copy
import logging
from functools import cache
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel, get_peft_model
from support.backbones import EXPERTS, tiny_inputs
from support.cover import cover
from support.properties import EVERY_OWN, METHODS, adapt, adapter_parameters, config, equal_states, move, output
from torch import nn
from transformers import TrainingArguments

import peft_lab
from peft_lab import registry
from peft_lab.backbones.experts import ALL_EXPERTS, expert_parameters
from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.export.to_lora import convert
from peft_lab.loading.foreign_adapters import write_record
from peft_lab.loading.load_adapter import load_adapter
from peft_lab.training.trainer import LabTrainer
from peft_lab.tuners.expert_layer import ExpertsLayer, adapted_parameters
from peft_lab.tuners.registration import has_trait

CAN = [name for name in METHODS if registry.method(name).can("experts")]
OWN = [name for name in CAN if not registry.method(name).module.startswith("peft.")]
CANNOT = [name for name in EVERY_OWN if name not in CAN]
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
STACKED = {"target_parameters": [ALL_EXPERTS], "target_modules": []}

#: What is the same for every method is daily tested with one.
one = pytest.mark.parametrize("method", cover(OWN, lambda _: {"method"}))
cases = pytest.mark.parametrize(("method", "family"), cover([(m, f) for m in CAN for f in EXPERTS]))


@cache
def _built(family: str) -> nn.Module:
    return EXPERTS[family]()


def base_of(family: str = "mixtral") -> Any:
    """A copy of the family's model, so that no test changes the weights of another."""
    return copy.deepcopy(_built(family))


@cases
def test_start_train_merge_and_unload(method: str, family: str) -> None:
    base = base_of(family)
    inputs = tiny_inputs(base)
    start = output(base, inputs)
    model = adapt(method, base, **STACKED)
    if registry.method(method).can("identity_start"):
        assert torch.equal(output(model, inputs), start)
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    moved = output(move(model), inputs)
    assert not torch.equal(moved, start)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), start)
    model.merge_adapter()
    torch.testing.assert_close(output(model, inputs), moved)
    model.unmerge_adapter()
    if method in OWN:
        assert torch.equal(output(model, inputs), moved)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(output(merged, inputs), moved)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert not any(isinstance(module, ExpertsLayer) for module in merged.modules())
    if method in OWN:
        assert equal_states(model.unload().state_dict(), base.state_dict())


@pytest.mark.parametrize("method", OWN)
def test_exactly_the_experts_that_tokens_reach_are_trained(method: str) -> None:
    base = base_of()
    model = adapt(method, base, target_parameters=["experts.down_proj"], target_modules=[])
    reached: list[set[int]] = []
    for module in base_layers(model):
        module.gate.register_forward_hook(lambda _m, _x, out: reached.append(set(out[-1].unique().tolist())))
    ids = torch.tensor([[5]])
    model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).logits.square().sum().backward()
    for experts, (name, parameter) in zip(reached, adapter_parameters(model).items(), strict=True):
        assert parameter.shape[0] == 4, name
        assert {i for i, grad in enumerate(parameter.grad) if grad.any()} == experts


def base_layers(model: Any) -> list[Any]:
    """The blocks of experts of a Mixtral."""
    return [layer.mlp for layer in model.get_base_model().model.layers]


@pytest.mark.parametrize(("method", "low_cpu_mem_usage"), cover([(m, low) for m in CAN for low in (False, True)]))
def test_saved_adapter_loads_on_its_base_alone(method: str, low_cpu_mem_usage: bool, tmp_path: Any) -> None:
    base = base_of()
    inputs = tiny_inputs(base)
    model = move(adapt(method, base, **STACKED))
    model.save_pretrained(tmp_path)
    write_record(model, tmp_path)
    named = model.peft_config["default"].target_parameters
    assert sorted(named) == ["experts.down_proj", "experts.gate_up_proj"]
    moved = output(model, inputs)
    again: Any = PeftModel.from_pretrained(base_of(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(output(again, inputs), moved)
    assert torch.equal(output(load_adapter(base_of(), tmp_path), inputs), moved)
    if method in OWN:
        again.load_adapter(str(tmp_path), "second")
        again.set_adapter("second")
        again.delete_adapter("default")
        assert torch.equal(output(again, inputs), moved)
    other = base_of()
    with torch.no_grad():
        next(iter(expert_parameters(other).values()))[1, 0, 0] += 1
    with pytest.raises(AdapterMismatchError, match=r"layers\.0\.mlp\.experts\.gate_up_proj"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize("method", CAN)
def test_adapter_moves_between_a_backbone_and_the_model_around_it(method: str, tmp_path: Any) -> None:
    """Below another path the parameters are found like modules."""
    base = base_of()
    fields = {"target_parameters": [*expert_parameters(base)][1:], "target_modules": ["q_proj"]}
    model = move(adapt(method, base, **fields))
    model.save_pretrained(tmp_path)
    write_record(model, tmp_path)
    assert {*adapted_parameters(model.get_base_model())} == {*fields["target_parameters"]}
    moved = output(model.get_base_model().model, tiny_inputs(base))
    assert torch.equal(output(load_adapter(base_of().model, tmp_path), tiny_inputs(base)), moved)


@one
def test_every_implementation_reads_the_adapted_weights(method: str) -> None:
    base = base_of()
    outputs = []
    for implementation in IMPLEMENTATIONS:
        base.set_experts_implementation(implementation)
        outputs.append(output(move(adapt(method, base, **STACKED)), tiny_inputs(base)))
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0])


@one
def test_a_forward_that_is_bound_to_the_module_has_the_adapter_or_is_refused(method: str) -> None:
    base = base_of()
    inputs = tiny_inputs(base)
    moved = output(move(adapt(method, base, **STACKED)), inputs)
    add_hook_to_module(base.model.layers[0].mlp.experts, AlignDevicesHook(execution_device="cpu"))
    torch.manual_seed(0)
    assert torch.equal(output(move(get_peft_model(base, config(method, base, **STACKED))), inputs), moved)
    base = base_of()
    base.model.layers[1].mlp.experts.forward = base.model.layers[1].mlp.experts.forward
    with pytest.raises(ConfigError, match=r"forward of the experts \"model\.layers\.1\.mlp\.experts\" was replaced"):
        get_peft_model(base, config(method, base, **STACKED))


@one
def test_half_precision_rounds_as_a_merged_weight_does(method: str) -> None:
    base = base_of().to(torch.bfloat16)
    model = move(adapt(method, base, **STACKED))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    moved = output(model, tiny_inputs(base))
    model.merge_adapter()
    assert torch.equal(output(model, tiny_inputs(base)), moved)


@pytest.mark.parametrize(("method", "reentrant"), cover([(m, r) for m in OWN for r in (True, False)]))
def test_checkpointing_changes_no_gradient(method: str, reentrant: bool) -> None:
    base = base_of()
    base.config.use_cache = False
    model, inputs = move(adapt(method, base, **STACKED)).train(), tiny_inputs(base)
    again = copy.deepcopy(model)
    again.enable_input_require_grads()
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for each in (model, again):
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
    pairs = zip(adapter_parameters(model).values(), adapter_parameters(again).values(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


@pytest.mark.parametrize("method", OWN)
def test_rows_share_the_weights_of_experts(method: str, tmp_path: Any) -> None:
    base = base_of()
    model = move(adapt(method, base, **STACKED))
    inputs = {"input_ids": tiny_inputs(base)["input_ids"][:2].repeat(2, 1)[:2]}
    alone = output(model, inputs)
    assert torch.equal(output(model, inputs, adapter_names=["default", "default"]), alone)
    assert torch.equal(output(model, inputs, adapter_names=["__base__", "__base__"]), output(base, inputs))
    with pytest.raises(ConfigError, match="all rows share the weights of the experts"):
        output(model, inputs, adapter_names=["default", "__base__"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="stacked weights of experts, which all rows of a batch share"):
        peft_lab.load_many(base, {"one": tmp_path})


@pytest.mark.parametrize("method", CANNOT)
def test_other_methods_refuse_experts(method: str) -> None:
    with pytest.raises(ConfigError, match="cannot adapt stacked weights of experts"):
        config(method, target_parameters=["experts.down_proj"])


@pytest.mark.parametrize("method", CAN)
def test_a_name_that_fits_no_stacked_weight_is_refused(method: str) -> None:
    base = base_of()
    for name in ("experts.down_prj", "experts"):
        with pytest.raises(ConfigError, match=r"no stacked weight.*experts\.down_proj, experts\.gate_up_proj"):
            get_peft_model(base, config(method, base, target_parameters=[name]))


@pytest.mark.parametrize(("method", "targets"), cover([(m, t) for m in OWN for t in (None, "all-linear", ["q_proj"])]))
def test_the_share_of_experts_that_are_left_out_is_told(method: str, targets: Any, caplog: Any) -> None:
    base = base_of()
    total = sum(parameter.numel() for parameter in base.parameters())
    experts = sum(parameter.numel() for parameter in expert_parameters(base).values())
    caplog.set_level(logging.WARNING, "peft_lab")
    fields = {} if targets is None else {"target_modules": targets}
    adapt(method, base, **fields)
    assert f"{experts:,} of {total:,}" in caplog.text
    caplog.clear()
    adapt(method, base, **STACKED)
    assert "experts" not in caplog.text
    adapt(method, base, target_parameters=["experts.down_proj"], target_modules=[])
    assert "without an adapter: experts.gate_up_proj;" in caplog.text


@one
def test_blocks_are_chosen_as_for_modules(method: str) -> None:
    model = adapt(method, base_of(), target_parameters=[ALL_EXPERTS], target_modules=[], layers_to_transform=[1])
    assert model.peft_config["default"].recorded_fingerprints.keys() == {
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
    }


@one
def test_target_modules_of_a_second_adapter_mean_modules(method: str) -> None:
    """The layer on a stacked weight has the path of the parameter, which is no module."""
    model = adapt(method, base_of("qwen2_moe"), **STACKED)
    model.add_adapter("second", config(method, target_modules=["down_proj"]))
    assert model.peft_config["second"].recorded_fingerprints.keys() == {
        "model.layers.0.mlp.shared_expert.down_proj",
        "model.layers.1.mlp.shared_expert.down_proj",
    }


@pytest.mark.parametrize("method", [m for m in OWN if has_trait(registry.method(m), "exports_lora")])
def test_lora_of_peft_takes_over(method: str, tmp_path: Any) -> None:
    base = base_of("qwen2_moe")
    model = move(adapt(method, base, target_parameters=[ALL_EXPERTS], target_modules=["q_proj", "up_proj"]))
    done = convert(model)
    lora = get_peft_model(base_of("qwen2_moe"), done.config)
    state = {f"{key.rpartition('.')[0]}.default.weight": value for key, value in done.state.items()}
    assert not lora.load_state_dict(state, strict=False).unexpected_keys
    torch.testing.assert_close(output(lora, tiny_inputs(base)), output(model, tiny_inputs(base)))


@pytest.mark.parametrize("method", OWN)
def test_weight_decay_is_that_of_single_weights(method: str, tmp_path: Any) -> None:
    """The axis of the experts makes no matrix of a vector."""
    model = adapt(method, base_of(), target_parameters=[ALL_EXPERTS], target_modules=["q_proj"])
    trainer = LabTrainer(model=model, args=TrainingArguments(str(tmp_path), report_to=[]))
    decayed = {*trainer.get_decay_parameter_names(model)}
    names = adapter_parameters(model)
    assert len({name in decayed for name in names if "_shift" not in name}) == 1
