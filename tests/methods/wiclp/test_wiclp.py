"""WiCLP: counts, both projections by hand, its place in each encoder, padding, rows, what it costs and refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.backbones import MODELS, TINY, bare, tiny_inputs
from support.properties import TEXT_ENCODERS, adapt, adapter_parameters, assert_close, config, main_tensor, move, output
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, CLIPTextConfig, CLIPTextModel

from peft_lab.adapters import WiCLPConfig
from peft_lab.errors import ConfigError
from peft_lab.registry import method
from peft_lab.training.step_cost import count_flops, frozen_floor, kept_activations, training_step


@pytest.mark.parametrize(("fields", "expected"), [({}, 2_949_888), ({"projection": "linear"}, 590_592)])
def test_published_counts(fields: dict[str, Any], expected: int) -> None:
    """The text encoder of Stable Diffusion 1.4, 768 wide."""
    with torch.device("meta"):
        base = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    model = get_peft_model(base, WiCLPConfig(**fields))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def _parameters(model: nn.Module, adapter: str = "default") -> tuple[Tensor, Tensor]:
    weight, bias = adapter_parameters(model, adapter).values()
    return weight.detach(), bias.detach()


def by_hand(tokens: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """E' = E + b + sum over the window of W_j E_(t+j), token by token; tokens beyond both ends are zero."""
    reach, read = weight.shape[-1] // 2, tokens if mask is None else tokens * mask[..., None]
    found = tokens + bias
    for position in range(tokens.shape[1]):
        for step in range(-reach, reach + 1):
            if 0 <= position + step < tokens.shape[1]:
                found[:, position] += read[:, position + step] @ weight[:, :, step + reach].T
    return found


def _tokens(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Output of the model's text encoder."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for name in ("text_model", "text_encoder"):
        inner = getattr(inner, name, inner)
    inner = bare(inner) if hasattr(inner, inner.base_model_prefix) else inner
    inner = inner.get_encoder() if inner.config.is_encoder_decoder else inner
    return inner(**text).last_hidden_state


FAMILIES = [*TEXT_ENCODERS, "clip_text", "t5_classifier", "bart", "mbart", "blip", "deberta"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_tokens_of_each_encoder(family: str) -> None:
    base = MODELS[family]().eval()
    inputs = tiny_inputs(base)
    tokens = _tokens(base, inputs)
    for fields in ({}, {"kernel_size": 3}, {"projection": "linear"}):
        model = adapt("wiclp", base, **fields)
        assert torch.equal(_tokens(model, inputs), tokens)
        move(model)
        assert_close(_tokens(model, inputs), by_hand(tokens, *_parameters(model)))


@pytest.mark.parametrize("family", ["bert", "clip", "t5", "t5_classifier", "bart"])
@torch.no_grad()
def test_what_reads_the_tokens_sees_them(family: str) -> None:
    """Heads, the pooled token of CLIP, T5's decoder."""
    base = MODELS[family]().eval()
    inputs = tiny_inputs(base)
    model = move(adapt("wiclp", base))
    plain, seen = output(base, inputs), output(model, inputs)
    assert not torch.allclose(plain, seen, atol=1e-4)
    if family == "clip":
        tokens = by_hand(_tokens(base, inputs), *_parameters(model))
        ends = inputs["input_ids"].argmax(-1)  # the highest number marks the pooled token
        expected = base.text_projection(tokens[torch.arange(2), ends])
        features = model.get_base_model()(**inputs).text_embeds
        assert_close(features, expected / expected.norm(dim=-1, keepdim=True))
        assert torch.equal(model(**inputs).image_embeds, base(**inputs).image_embeds)


@pytest.mark.parametrize("family", ["bert", "t5_classifier", "clip_text", "modernbert"])
@torch.no_grad()
def test_padding_policy(family: str) -> None:
    """Masked, a text gives the same alone and beside a longer one; kept, its last tokens see the padding."""
    base = MODELS[family]().eval()
    inputs = tiny_inputs(base)
    short, length = {name: value[:, :5] for name, value in inputs.items()}, 5
    padded = {name: value.clone() for name, value in inputs.items()}
    padded["attention_mask"][:, length:] = 0
    for padding in ("keep", "mask"):
        model = move(adapt("wiclp", base, padding=padding), scale=0.1)
        alone, beside = _tokens(model, short), _tokens(model, padded)[:, :length]
        assert torch.allclose(alone, beside, atol=1e-4) == (padding == "mask")
        plain = _tokens(base, padded)
        mask = padded["attention_mask"] if padding == "mask" else None
        assert_close(_tokens(model, padded), by_hand(plain, *_parameters(model), mask))


@torch.no_grad()
def test_rows_with_adapters_of_both_policies() -> None:
    base = TINY["bert"]()
    model = move(adapt("wiclp", base, padding="mask"))
    model.add_adapter("kept", config("wiclp", kernel_size=3))
    move(model, "kept", seed=2)
    inputs = tiny_inputs(base, batch=3)
    inputs["attention_mask"][0, 5:] = 0
    inputs["attention_mask"][2, 4:] = 0
    mixed = output(model, inputs, adapter_names=["default", "__base__", "kept"])
    assert_close(mixed[0], output(model, inputs)[0])
    model.set_adapter("kept")
    assert_close(mixed[2], output(model, inputs)[2])
    assert_close(mixed[1], output(base, inputs)[1])


@torch.no_grad()
def test_generation_runs_the_encoder_alone() -> None:
    base = TINY["t5"]().eval()
    model = move(adapt("wiclp", base, padding="mask"))
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    settings = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    for beams in (1, 2):
        mask = (ids > 0).long()
        written = model.generate(input_ids=ids, attention_mask=mask, num_beams=beams, **settings)
        logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=written.sequences[:, :1]).logits
        if beams == 1:
            assert_close(written.scores[0], logits[:, -1])


def test_with_a_head_and_without(tmp_path: Any) -> None:
    full = TINY["bert"]().eval()
    model = move(adapt("wiclp", full, padding="mask"))
    model.save_pretrained(tmp_path)
    inputs = tiny_inputs(full)
    again = PeftModel.from_pretrained(copy.deepcopy(bare(full)), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(main_tensor(again(**inputs)), _tokens(model, inputs))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_the_same(reentrant: bool) -> None:
    """The last norm of BERT lies in a checkpointed block."""
    base, found = TINY["bert"](), []
    model = move(adapt("wiclp", base, padding="mask")).train()
    inputs = tiny_inputs(base)
    inputs["attention_mask"][0, 5:] = 0
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**inputs).logits.square().sum().backward()
        found.append([p.grad for p in adapter_parameters(model).values()])
    for got, wanted in zip(found[1], found[0], strict=True):
        assert_close(got, wanted, 1e-4)


@pytest.mark.full
def test_a_step_stays_within_its_budget() -> None:
    """On an encoder of the size that other methods are measured on, with texts of 65 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    base = BertForSequenceClassification(BertConfig(**sizes, vocab_size=99, num_labels=10)).train()
    inputs = {"input_ids": torch.randint(5, 99, (8, 65))}

    def cost(model: nn.Module) -> tuple[int, int]:
        with kept_activations(model, inputs) as kept:
            loss = model(**inputs).logits.square().mean()
            saved = kept.bytes()
        del loss
        return count_flops(training_step(model, inputs)), saved

    with frozen_floor(base) as model:
        floor = cost(model)
    found = cost(adapt("wiclp", base).train())
    assert all(own <= most * least for own, most, least in zip(found, method("wiclp").budget, floor, strict=True))


@torch.no_grad()
def test_what_it_refuses() -> None:
    for fields, match in (
        ({"kernel_size": 4}, "kernel_size=4 must be odd and at least 3"),
        ({"kernel_size": 1}, "kernel_size=1 must be odd and at least 3"),
        ({"projection": "linear", "padding": "mask"}, "has no effect on projection"),
        ({"layers_to_transform": [0]}, "takes no layers_to_transform"),
    ):
        with pytest.raises(ConfigError, match=match):
            WiCLPConfig(**fields)
    for family, match in (
        ("llama", "LlamaForCausalLM has no text encoder"),
        ("vit", "ViTForImageClassification has no text encoder"),
        ("albert", "has a text encoder whose output is that of no single norm"),
    ):
        with pytest.raises(ConfigError, match=match):
            adapt("wiclp", TINY[family]())
    model = adapt("wiclp", TINY["bert"](), padding="mask")
    inputs = tiny_inputs(TINY["bert"]())
    with pytest.raises(ConfigError, match="needs one number for each of 7 tokens, and the mask has 5"):
        model(**inputs, wiclp_mask=torch.ones(2, 5))
