"""Trained rows of the token embeddings (`trainable_token_indices`): for every method as for peft's LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.backbones import tiny_inputs
from support.cover import cover, each_place
from support.properties import METHODS, ON_OPS, OWN, UNTRAINED, adapt, config, move, needs_add_adapter, output
from torch import nn

from peft_lab import registry
from peft_lab.errors import ConfigError
from peft_lab.export.to_lora import convert
from peft_lab.loading.load_adapter import load_adapter
from peft_lab.serve.tenants import load_many

TOKENS = [7, 9]
FAMILIES = ("llama", "gpt2", "bert", "t5")
EVERYWHERE = pytest.mark.parametrize(
    ("method", "family"), cover([(m, f) for m in METHODS for f in FAMILIES], each_place)
)
ENTRY = "token_adapter.trainable_tokens_delta"
LLAMA = pytest.mark.parametrize("family", ["llama"])


def trained(method: str, base: Any, name: str = "default", tokens: Any = TOKENS) -> Any:
    """A copy of the base with an adapter that trains token rows, moved off its start."""
    return move(adapt(method, base, trainable_token_indices=tokens), name)


def text(base: Any) -> dict[str, torch.Tensor]:
    """Inputs that hold the trained tokens."""
    inputs = tiny_inputs(base)
    inputs["input_ids"][:, 1] = TOKENS[0]
    return inputs


@EVERYWHERE
def test_these_rows_alone_are_trained_saved_and_loaded(method: str, family: str, base: Any, tmp_path: Path) -> None:
    model = adapt(method, base, trainable_token_indices=TOKENS)
    inputs = text(base)
    rows = [name for name, parameter in model.named_parameters() if ENTRY in name and parameter.requires_grad]
    assert len(rows) == 1
    assert model.get_parameter(rows[0]).shape == (2, base.get_input_embeddings().weight.shape[1])
    model.train()
    model(**inputs)[0].float().square().sum().backward()
    assert model.get_parameter(rows[0]).grad.abs().sum() > 0
    before = output(model, inputs)
    with torch.no_grad():
        model.get_parameter(rows[0]).add_(0.5)
    moved = output(model, inputs)
    assert not torch.equal(moved, before)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert [tuple(value.shape) for key, value in saved.items() if "embed" in key or ENTRY in key] == [(2, 16)]
    assert torch.equal(output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), inputs), moved)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(output(model, inputs), output(base, inputs))


@LLAMA
@pytest.mark.parametrize("method", [name for name in OWN if registry.method(name).can("merge")])
@pytest.mark.parametrize("tied", [True, False])
def test_they_are_merged_and_a_tied_head_shows_them(method: str, family: str, tied: bool, base: Any) -> None:
    base = tie(base) if tied else base
    model, inputs = trained(method, base), text(base)
    heads = [module for name, module in model.named_modules() if name.endswith("lm_head.token_adapter")]
    assert bool(heads) == tied
    with model.disable_adapter():
        assert not [name for name, p in model.named_parameters() if ENTRY in name and p.requires_grad]
    assert [name for name, p in model.named_parameters() if ENTRY in name and p.requires_grad]
    expected = output(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(output(model, inputs), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), expected)
    alone = model.merge_and_unload()
    assert type(alone.get_input_embeddings()) is type(base.get_input_embeddings())
    assert (alone.get_output_embeddings().weight is alone.get_input_embeddings().weight) == tied
    torch.testing.assert_close(output(alone, inputs), expected, atol=1e-5, rtol=1e-5)


@LLAMA
@pytest.mark.parametrize("method", cover(OWN, each_place))
def test_adapters_with_and_without_them_live_on_one_model(method: str, family: str, base: Any, tmp_path: Path) -> None:
    inputs = text(base)
    model = trained(method, base)
    with_rows = output(model, inputs)
    model.add_adapter("plain", config(method, base))
    if method in UNTRAINED:
        for name, parameter in model.named_parameters():
            if "plain" in name:
                torch.nn.init.normal_(parameter)
    move(model, "plain", seed=3)
    model.set_adapter("plain")
    without = output(model, inputs)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and ENTRY in name]
    model.save_pretrained(tmp_path, selected_adapters=["plain"], save_embedding_layers=False)
    assert not [key for key in load_file(tmp_path / "plain" / "adapter_model.safetensors") if ENTRY in key]
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain")
    assert torch.equal(output(again, inputs), without)
    if registry.method(method).can("mixed_batch"):
        model.eval()
        with torch.no_grad():
            mixed = model(**inputs, adapter_names=["default", "plain"])[0]
        torch.testing.assert_close(mixed, torch.stack([with_rows[0], without[1]]), atol=1e-5, rtol=1e-5)
    model.set_adapter("default")
    assert torch.equal(output(model, inputs), with_rows)
    # adapters that were frozen stay so after they were disabled
    model.set_requires_grad("default", False)
    with model.disable_adapter():
        pass
    assert not [name for name, p in model.named_parameters() if p.requires_grad and ENTRY in name]
    model.delete_adapter("default")
    assert torch.equal(output(model, inputs), without)
    assert not [name for name in model.state_dict() if ENTRY in name]


@LLAMA
@pytest.mark.parametrize("method", cover(OWN, each_place))
def test_a_file_without_them_or_with_others_is_refused(method: str, family: str, base: Any, tmp_path: Path) -> None:
    trained(method, base).save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    (key,) = [name for name in state if ENTRY in name]
    cut = {name: value for name, value in state.items() if name != key}
    for changed, words in (
        (cut, "lacks"),
        ({**state, key.replace("embed_tokens", "other"): state[key].clone()}, "unknown entry"),
        ({**state, key: state[key][:1].clone()}, "shape"),
        ({**state, key: state[key] * torch.nan}, "not finite"),
    ):
        save_file(changed, file)
        with pytest.raises(ConfigError, match=words):
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


@LLAMA
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"trainable_token_indices": []}, "names no token"),
        ({"trainable_token_indices": [1, 1]}, "distinct"),
        ({"trainable_token_indices": [-1]}, "distinct numbers from 0"),
        ({"trainable_token_indices": {"embed(": [1]}}, "no module name"),
        ({"trainable_token_indices": [10**6]}, "resize_token_embeddings"),
        ({"trainable_token_indices": {"nowhere": [1]}}, "no such module"),
        ({"trainable_token_indices": {"input_layernorm": [1]}}, "no token embedding"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "trained whole"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens", "q_proj"]}, "adapted by a method"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(
    fields: dict[str, Any], words: str, family: str, base: Any
) -> None:
    model = copy.deepcopy(base)
    with pytest.raises(ConfigError, match=words):
        get_peft_model(model, config("svfit", model, **fields))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]


@LLAMA
def test_a_second_adapter_of_the_embedding_is_refused(family: str, base: Any) -> None:
    model = trained("svfit", base)
    with pytest.raises(ConfigError, match="Another adapter trains rows"):
        model.add_adapter("more", config("svfit", base, target_modules=["embed_tokens"]))
    model.add_adapter("rows", config("svfit", base, trainable_token_indices=[3]))
    with pytest.raises(ConfigError, match="one at a time"):
        model.base_model.set_adapter(["default", "rows"])
    other = adapt("svfit", base, target_modules=["embed_tokens"])
    with pytest.raises(ConfigError, match="adapted by a method"):
        other.add_adapter("more", config("svfit", base, target_modules=["q_proj"], trainable_token_indices=[3]))


def tie(base: Any) -> Any:
    """A copy of a decoder whose head is its embedding."""
    base = copy.deepcopy(base)
    base.config.tie_word_embeddings = True
    base.set_output_embeddings(torch.nn.Linear(16, base.config.vocab_size, bias=False))
    base.tie_weights()
    return base


@LLAMA
def test_a_tied_head_that_is_trained_whole_is_tied_no_longer(family: str, base: Any, tmp_path: Path) -> None:
    base = tie(base)
    both = {"trainable_token_indices": TOKENS, "modules_to_save": ["lm_head"]}
    model, inputs = move(adapt("svfit", base, **both)), text(base)
    before = output(model, inputs)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight[TOKENS[1]] += 1
    expected = output(model, inputs)
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), inputs), expected)
    with pytest.raises(ConfigError, match='trains "lm_head" whole'):
        model.add_adapter("more", config("svfit", base, trainable_token_indices=[3]))
    other = adapt("svfit", base, trainable_token_indices=TOKENS)
    with pytest.raises(ConfigError, match="cannot be trained whole"):
        other.add_adapter("more", config("svfit", base, modules_to_save=["lm_head"]))


@LLAMA
@needs_add_adapter
def test_other_ways_to_load_them(family: str, base: Any, tmp_path: Path) -> None:
    """Loading by transformers' own method, as LoRA in place of the method, and a backbone without the head."""
    model, inputs = trained("svfit", base), text(base)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path / "svfit", save_embedding_layers=False)
    own = copy.deepcopy(base)
    own.load_adapter(str(tmp_path / "svfit"))
    assert torch.equal(output(own, inputs), expected)
    done = convert(model)
    done.config.save_pretrained(tmp_path / "lora")
    save_file(done.state, tmp_path / "lora" / "adapter_model.safetensors")
    as_lora = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    torch.testing.assert_close(output(as_lora, inputs), expected, atol=1e-5, rtol=1e-5)
    hidden = model.base_model.model.model(**inputs).last_hidden_state
    alone = load_adapter(copy.deepcopy(base.model), tmp_path / "svfit").eval()
    torch.testing.assert_close(alone(**inputs).last_hidden_state, hidden)


@LLAMA
def test_rows_that_are_not_finite_are_not_merged(family: str, base: Any) -> None:
    model = trained("svfit", base)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ENTRY in name).fill_(torch.inf)
    with pytest.raises(ConfigError, match="token rows"):
        model.merge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if ENTRY not in k)


@LLAMA
def test_uses_without_a_meaning_for_them_say_so(family: str, base: Any, tmp_path: Path) -> None:
    model = trained("svfit", base)
    with pytest.raises(ConfigError, match="no weighted sum"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ConfigError, match="load_many does not serve"):
        load_many(copy.deepcopy(base).eval(), {"a": tmp_path})


class _Net(nn.Module):
    """A model of one's own, with an embedding that no family names."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.body, self.top = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.top(self.body(self.emb(ids)).mean(1))


@pytest.mark.parametrize("method", ON_OPS)
def test_they_are_trained_in_a_model_of_ones_own(method: str, tmp_path: Path) -> None:
    base, ids = _Net(), torch.arange(6).reshape(2, 3)
    model = move(adapt(method, base, target_modules=["body"], trainable_token_indices={"emb": [0, 5]}))
    model(ids).sum().backward()
    assert [n for n, p in model.named_parameters() if "trainable_tokens_delta" in n and p.grad is not None]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(ids), model(ids))
