"""Row inputs and the context of a forward call: every door through which a model is called."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import get_peft_model
from support.backbones import TINY, tiny_inputs
from support.fixture_methods import load
from support.properties import adapt, adapter_parameters, assert_close, move, output
from torch import Tensor, nn
from transformers import AutoModel, Trainer, TrainingArguments

import peft_lab
from peft_lab.errors import ConfigError
from peft_lab.tuners.forward_context import ForwardContext, WrappedForward, expand_rows
from peft_lab.tuners.row_input import RowInput

TwinLoraConfig = load("twin_lora").TwinLoraConfig
WEIGHTS = torch.tensor([0.0, 1.0, 0.3])


def twin(family: str, seed: int = 0, **fields: Any) -> Any:
    """A model with twin deltas whose mixture goes by a column, off its start."""
    torch.manual_seed(seed)
    base = TINY[family]()
    return move(get_peft_model(base, TwinLoraConfig(column="quality", **fields))).eval()


def prompted(family: str = "bert") -> Any:
    return move(adapt("metadata_prompt", TINY[family](), num_modes=3), scale=1.0)


@pytest.mark.parametrize("family", ["bert", "vit", "swin", "llama"])
def test_each_row_is_as_alone(family: str) -> None:
    """Also where a layer sees several windows of each row."""
    model, inputs = twin(family), tiny_inputs(TINY[family](), batch=3)
    together = output(model, inputs, row_weight=WEIGHTS)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = output(model, one, row_weight=WEIGHTS[row : row + 1])
        assert_close(together[row], alone[0])
    assert not torch.allclose(together, output(model, inputs, row_weight=1 - WEIGHTS), atol=1e-4)


def test_equals_the_formula() -> None:
    model, inputs = twin("bert"), tiny_inputs(TINY["bert"](), batch=3)
    layer = next(m for m in model.modules() if type(m).__name__ == "TwinLoraLayer")
    seen: dict[str, Tensor] = {}
    layer.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    output(model, inputs, row_weight=WEIGHTS)
    a, b, w = layer.twin_lora_a["default"], layer.twin_lora_b["default"], WEIGHTS[:, None, None]
    first, second = (seen["x"] @ a[i].T @ b[i].T for i in (0, 1))
    assert_close(seen["out"], layer.base_layer(seen["x"]) + w * first + (1 - w) * second)


def test_rows_of_a_mixed_batch_keep_their_inputs() -> None:
    model = twin("bert")
    model.add_adapter("other", TwinLoraConfig(column="quality"))
    move(model, "other", seed=5)
    inputs = tiny_inputs(TINY["bert"](), batch=3)
    names = ["other", "__base__", "default"]
    got = output(model, inputs, row_weight=WEIGHTS, adapter_names=names)
    model.set_adapter("other")
    assert_close(got[0], output(model, inputs, row_weight=WEIGHTS)[0])
    model.set_adapter("default")
    assert_close(got[2], output(model, inputs, row_weight=WEIGHTS)[2])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_blocks_see_the_inputs_of_their_forward(reentrant: bool) -> None:
    """Two forwards with other weights before one backward."""
    model, inputs = twin("bert").train(), tiny_inputs(TINY["bert"](), batch=3)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        outs = [model(**inputs, row_weight=w).logits.square().sum() for w in (WEIGHTS, 1 - WEIGHTS)]
        (outs[0] + 2 * outs[1]).backward()
        return [p.grad.clone() for p in adapter_parameters(model).values()]

    expected = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for got, wanted in zip(gradients(), expected, strict=True):
        assert_close(got, wanted, 1e-4)


def test_a_missing_column_is_named() -> None:
    model, inputs = twin("bert"), tiny_inputs(TINY["bert"]())
    with pytest.raises(ConfigError, match=r'row_weight, which the adapter reads from the column "quality"'):
        model(**inputs)
    for bad in (torch.ones(3), torch.ones(2, 2), torch.ones(2, dtype=torch.long)):
        with pytest.raises(ConfigError, match="expected one number for each of 2 rows"):
            model(**inputs, row_weight=bad)
    with pytest.raises(ConfigError, match="row_weight must be a tensor, got list"):
        model(**inputs, row_weight=[0.0, 1.0])


def test_a_declared_input_is_taken_out_where_its_adapter_is_off() -> None:
    base, inputs = TINY["bert"](), tiny_inputs(TINY["bert"]())
    model = twin("bert")
    with model.disable_adapter():
        assert_close(output(model, inputs, row_weight=WEIGHTS[:2]), output(base, inputs))
    model.add_adapter("plain", TwinLoraConfig())
    model.set_adapter("plain")
    assert torch.equal(output(model, inputs, row_weight=WEIGHTS[:2]), output(base, inputs))


def test_an_argument_that_nobody_declares_passes_untouched() -> None:
    seen = []

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

        def forward(self, hidden_states: Tensor, num_items_in_batch: Any = None) -> Tensor:
            seen.append(num_items_in_batch)
            return self.q_proj(hidden_states)

    model = get_peft_model(Own(), TwinLoraConfig(target_modules=["q_proj"], column="quality"))
    model(torch.ones(2, 4), num_items_in_batch=7, row_weight=torch.ones(2))
    assert seen == [7]


@pytest.mark.parametrize("whole", [True, False])
def test_forward_called_by_its_name_works_as_the_call(whole: bool) -> None:
    """Sentence-transformers calls `module.forward(...)`."""
    model, inputs = prompted(), tiny_inputs(TINY["bert"]())
    inner = model.get_base_model() if whole else model.get_base_model().bert
    ids = torch.tensor([2, 1])
    by_call, by_name = (call(**inputs, prompt_ids=ids)[0] for call in (inner, inner.forward))
    assert torch.equal(by_call, by_name)
    assert not torch.equal(by_name, inner.forward(**inputs, prompt_ids=1 - ids % 2)[0])


def test_a_bare_backbone_works_by_its_forward(tmp_path: Any) -> None:
    TINY["bert"]().bert.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    adapted = move(adapt("vpt", model))
    inputs = tiny_inputs(model)
    assert torch.equal(adapted.get_base_model().forward(**inputs)[0], adapted(**inputs)[0])


def test_trainer_keeps_the_declared_columns(tmp_path: Any) -> None:
    model = twin("bert")
    names = inspect.signature(model.get_base_model().forward).parameters
    assert list(names)[: len(names) - 2] == list(inspect.signature(TINY["bert"]().forward).parameters)[:-1]
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    trainer._set_signature_columns_if_needed()
    assert "row_weight" in trainer._signature_columns


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_a_context_of_its_own(way: Any) -> None:
    model, inputs = prompted(), tiny_inputs(TINY["bert"]())
    ids = torch.tensor([2, 1])
    expected = output(model, inputs, prompt_ids=ids)
    other = way(model)
    wrappers = [m.__dict__["forward"] for m in other.modules() if "forward" in m.__dict__]
    assert wrappers
    assert all(wrapper.module in set(other.modules()) for wrapper in wrappers)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.zero_()
    assert torch.equal(output(other, inputs, prompt_ids=ids), expected)


@pytest.mark.full
def test_compiled() -> None:
    model, inputs = twin("bert"), tiny_inputs(TINY["bert"](), batch=3)
    expected = output(model, inputs, row_weight=WEIGHTS)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert_close(compiled(**inputs, row_weight=WEIGHTS).logits, expected)


@pytest.mark.parametrize("inner", [True, False])
def test_accelerate_wraps_and_unwraps(inner: bool) -> None:
    model, inputs = prompted(), tiny_inputs(TINY["bert"]())
    model = model.get_base_model() if inner else model
    ids = torch.tensor([2, 1])
    expected = model(**inputs, prompt_ids=ids).logits.detach()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model)
    assert_close(prepared(**inputs, prompt_ids=ids).logits, expected, 0.1)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert_close(unwrapped(**inputs, prompt_ids=ids).logits, expected)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_generation_takes_row_inputs_as_arguments_or_around_it() -> None:
    model, ids = prompted("llama"), torch.tensor([[5, 6, 7], [5, 6, 7]])
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 0, "eos_token_id": None}
    modes = torch.tensor([2, 1])
    direct = model.generate(ids, prompt_ids=modes, **settings)
    with peft_lab.row_inputs(prompt_ids=modes):
        around = model.generate(ids, **settings)
    assert torch.equal(direct, around)


def test_unloading_and_deleting_leave_nothing() -> None:
    model = twin("bert")
    wrapper = model.get_base_model().__dict__["forward"]
    assert isinstance(wrapper, WrappedForward)
    base = model.unload()
    assert not any("forward" in m.__dict__ for m in base.modules())
    model = prompted()
    model.add_adapter("other", model.peft_config["default"])
    model.delete_adapter("default")
    wrappers = [m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__]
    assert all(set(w.declared) <= {"other"} for w in wrappers)


def test_nothing_is_left_behind_by_an_error() -> None:
    model, inputs = twin("bert"), tiny_inputs(TINY["bert"]())
    with pytest.raises(ConfigError):
        model(**inputs)
    assert ForwardContext.current() is None


def test_expand_rows() -> None:
    assert expand_rows(torch.tensor([1, 2]), 6).tolist() == [1, 1, 1, 2, 2, 2]
    with pytest.raises(ConfigError, match="w has 2 rows, but the batch has 5"):
        expand_rows(torch.tensor([1, 2]), 5, "w")


def test_a_default_is_computed_once_from_the_arguments() -> None:
    calls = []

    def count(arguments: Any) -> Tensor:
        calls.append(sorted(arguments))
        return torch.ones(2)

    context = ForwardContext(nn.Linear(1, 1), {"x": 1}, {}, {"w": RowInput("w", "float32", compute=count)})
    assert context.row_input("w", 4).tolist() == [1.0] * 4
    assert context.row_input("w").tolist() == [1.0] * 2
    assert calls == [["x"]]


def test_values_that_no_model_reads_are_an_error() -> None:
    base = TINY["bert"]()
    plain, inputs = adapt("lora", base), tiny_inputs(base)
    message = r"row_inputs\(row_weight\).*adapter that declares"
    with pytest.raises(ConfigError, match=message), peft_lab.row_inputs(row_weight=WEIGHTS[:2]):
        plain(**inputs)
    with pytest.raises(ZeroDivisionError), peft_lab.row_inputs(row_weight=WEIGHTS[:2]):
        raise ZeroDivisionError  # an error of the block itself is not hidden


def test_generate_runs_the_encoder_alone() -> None:
    model, inputs = twin("t5"), tiny_inputs(TINY["t5"](), batch=3)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    ids = inputs["input_ids"]
    with peft_lab.row_inputs(row_weight=WEIGHTS):
        together = model.generate(input_ids=ids, **settings)
    for row in range(3):
        with peft_lab.row_inputs(row_weight=WEIGHTS[row : row + 1]):
            assert torch.equal(model.generate(input_ids=ids[row : row + 1], **settings)[0], together[row])


def test_what_all_rows_share_takes_only_a_value_that_all_have() -> None:
    """DeBERTa projects its relative positions once for the whole batch."""
    model, inputs = twin("deberta-v2"), tiny_inputs(TINY["deberta-v2"](), batch=2)
    assert output(model, inputs, row_weight=torch.tensor([0.3, 0.3])).isfinite().all()
    with pytest.raises(ConfigError, match="row_weight has 2 rows, but the batch has 1"):
        model(**inputs, row_weight=torch.tensor([0.3, 0.4]))
