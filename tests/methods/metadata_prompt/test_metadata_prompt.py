"""Prompts by metadata: each row gets the set that it names, in a forward, in training and in generation."""

from __future__ import annotations

import pytest
import torch
from support.backbones import TINY, tiny_inputs
from support.properties import adapt, adapter_parameters, move, output

from peft_lab.adapters.sequence.metadata_prompt import MetadataPromptConfig
from peft_lab.errors import ConfigError
from peft_lab.tuners.forward_context import row_inputs

GENERATE = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def _model(family: str, **fields):
    return move(adapt("metadata_prompt", TINY[family](), num_modes=3, num_prompts=2, **fields), scale=1.0)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("family", ["vit", "bert", "llama", "t5"])
def test_each_row_gets_its_own_set(family, deep):
    model, ids = _model(family, deep=deep), torch.tensor([2, 0, 1])
    inputs = tiny_inputs(TINY[family](), batch=3)
    got = output(model, inputs, prompt_ids=ids)
    for row, mode in enumerate(ids.tolist()):
        alone = output(model, {k: v[row : row + 1] for k, v in inputs.items()}, prompt_ids=ids[row : row + 1])
        assert torch.allclose(got[row], alone[0], atol=1e-5)
        same = output(model, inputs, prompt_ids=torch.full((3,), mode))
        assert torch.allclose(got[row], same[row], atol=1e-5)
        assert not torch.allclose(got[row], output(model, inputs, prompt_ids=(ids + 1) % 3)[row], atol=1e-4)
    assert torch.equal(output(model, inputs), output(model, inputs, prompt_ids=torch.zeros(3, dtype=torch.long)))


def test_equals_a_soft_prompt_of_that_set():
    model, ids = _model("llama"), torch.tensor([1, 1])
    (table,) = adapter_parameters(model).values()
    soft = adapt("soft_prompt", TINY["llama"](), num_virtual_tokens=2)
    with torch.no_grad():
        next(iter(adapter_parameters(soft).values())).copy_(table[1])
    inputs = tiny_inputs(TINY["llama"]())
    assert torch.equal(output(model, inputs, prompt_ids=ids), output(soft, inputs))


def test_only_the_sets_of_the_batch_get_a_gradient():
    model = _model("vit").train()
    model(**tiny_inputs(TINY["vit"]()), prompt_ids=torch.tensor([2, 2])).logits.square().sum().backward()
    (table,) = adapter_parameters(model).values()
    assert [bool(part.abs().sum() > 0) for part in table.grad] == [False, False, True]


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(beams):
    model, ids = _model("llama"), torch.tensor([[5, 6, 7], [5, 6, 7]])
    settings = {**GENERATE, "num_beams": beams, "output_logits": True, "return_dict_in_generate": True}
    with row_inputs(prompt_ids=torch.tensor([2, 1])):
        both = model.generate(ids, **settings)
    for row, mode in enumerate((2, 1)):
        with row_inputs(prompt_ids=torch.tensor([mode])):
            alone = model.generate(ids[:1], **settings)
        assert torch.equal(both.sequences[row], alone.sequences[0])
    assert not torch.equal(both.logits[0][0], both.logits[0][-1])


def test_instruction_around_a_generation_without_a_cache():
    """The prompts are made of the instruction alone, also when the text is read anew for every token."""
    model, ids = move(adapt("iapt", TINY["llama"]())), torch.tensor([[5, 6, 7], [9, 8, 7]])
    settings = {**GENERATE, "output_logits": True, "return_dict_in_generate": True}
    expected = torch.stack(model.generate(ids, **settings).logits)
    with row_inputs(instruction_mask=torch.ones_like(ids)):
        got = torch.stack(model.generate(ids, use_cache=False, **settings).logits)
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(torch.stack(model.generate(ids, use_cache=False, **settings).logits), got, atol=1e-5)


def test_errors():
    model, inputs = _model("vit", default_mode=None), tiny_inputs(TINY["vit"]())
    with pytest.raises(ConfigError, match="without prompt_ids"):
        model(**inputs)
    with pytest.raises(ConfigError, match=r"prompt_ids=\[0, 3\] must be from 0 to 2"):
        model(**inputs, prompt_ids=torch.tensor([0, 3]))
    for bad in (torch.tensor([0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ConfigError, match="expected one integer for each of 2 rows"):
            model(**inputs, prompt_ids=bad)
    with pytest.raises(ConfigError, match="default_mode=2 must be from 0 to 1"):
        MetadataPromptConfig(default_mode=2)
    with pytest.raises(ConfigError, match="num_prompts=0"):
        MetadataPromptConfig(num_prompts=0)
    with pytest.raises(ConfigError, match='Did you mean "prompt_ids"'), row_inputs(prompt_id=torch.tensor([1, 1])):
        model(**inputs)


def test_training_without_ids_is_warned_of():
    """A Trainer drops the column unless it is told not to, and then all rows would train one set."""
    model, ids = adapt("metadata_prompt", TINY["llama"](), num_modes=3).train(), torch.tensor([[5, 6, 7]])
    with pytest.warns(UserWarning, match=r"every row takes set 0 of 3.*remove_unused_columns=False"):
        model(ids)
    with pytest.raises(ConfigError, match="prompt_ids must be a tensor, got list"):
        model(ids, prompt_ids=[0])
