"""Soft prompts against peft's own where that is right, and against the plain backbone where it is not."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from support.backbones import TINY, tiny_inputs
from support.properties import adapt, adapter_parameters, config, fill, main_tensor, move, output

from peft_lab.adapters.sequence.soft_prompt.method import SoftPromptConfig
from peft_lab.errors import ConfigError

IDS = torch.tensor([[7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 0, 0]])
MASK = (IDS != 0).long()


@torch.no_grad()
def test_equals_peft_where_positions_play_no_part():
    """GPT-2 without its table of positions, on a batch padded at the right."""
    base = TINY["gpt2"]().eval()
    base.transformer.wpe.weight.data.zero_()
    ours = move(adapt("soft_prompt", base, num_virtual_tokens=4))
    wanted = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", num_layers=2, token_dim=16)
    theirs = get_peft_model(copy.deepcopy(base), wanted).eval()
    (values,) = adapter_parameters(ours).values()
    theirs.prompt_encoder["default"].embedding.weight.copy_(values)
    expected = theirs(input_ids=IDS, attention_mask=MASK).logits[:, 4:]
    got = ours(input_ids=IDS, attention_mask=MASK).logits
    assert (got - expected)[MASK.bool()].abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi"])
@torch.no_grad()
def test_equals_embeddings_put_before_the_text_at_position_zero(family):
    """What the prompts are, by hand: input embeddings in front, all of them at the position where the text begins."""
    base = TINY[family]().eval()
    base.set_attn_implementation("eager")
    ours = move(adapt("soft_prompt", base, num_virtual_tokens=4))
    (values,) = adapter_parameters(ours).values()
    embeddings = torch.cat([values.expand(2, -1, -1), base.get_input_embeddings()(IDS)], 1)
    positions = torch.tensor([[0, 0, 0, 0, 0, 1, 2, 3, 4, 5]])
    mask = torch.nn.functional.pad(MASK, (4, 0), value=1)
    expected = base(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions).logits[:, 4:]
    got = ours(input_ids=IDS, attention_mask=MASK).logits
    assert (got - expected)[MASK.bool()].abs().max() < 1e-5


@torch.no_grad()
def test_left_padding_where_peft_errs():
    base = TINY["llama"]().eval()
    wanted = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    theirs, ours = get_peft_model(copy.deepcopy(base), wanted).eval(), move(adapt("soft_prompt", base))
    ids, mask = torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    settings = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    for model, right in ((ours, True), (theirs, False)):
        padded = model.generate(input_ids=ids, attention_mask=mask, **settings).logits[0]
        alone = model.generate(input_ids=ids[:, 2:], attention_mask=mask[:, 2:], **settings).logits[0]
        assert torch.allclose(padded, alone, atol=1e-5) == right


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "gemma"])
@torch.no_grad()
def test_text_start_is_what_the_backbone_makes_of_the_text(family, deep):
    base = TINY[family]().eval()
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": [7, 8, 9]}
    model = adapt("soft_prompt", base, num_virtual_tokens=5, deep=deep, **text)
    stack = base.get_encoder() if family == "t5" else base.base_model
    found = stack(input_ids=torch.tensor([[7, 8, 9, 7, 8]]), output_hidden_states=True).hidden_states
    values = list(adapter_parameters(model).values())
    assert len(values) == (2 if deep else 1)
    for value, hidden in zip(values, found, strict=False):
        torch.testing.assert_close(value, hidden[0], atol=1e-5, rtol=1e-5)
    # a second adapter starts at the plain backbone's states too
    model.add_adapter("second", config("soft_prompt", num_virtual_tokens=5, deep=deep, **text))
    for value, second in zip(values, adapter_parameters(model, "second").values(), strict=True):
        torch.testing.assert_close(value, second, atol=1e-6, rtol=1e-5)
    assert not hasattr(model.peft_config["default"], "starts")


def test_the_config_of_a_saved_adapter_starts_another_at_its_text(tmp_path):
    base = TINY["gpt2"]()
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": [7, 8, 9]}
    model = adapt("soft_prompt", copy.deepcopy(base), num_virtual_tokens=5, **text)
    start = {name: value.clone() for name, value in adapter_parameters(model).items()}
    fill(model)
    model.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    read.inference_mode = False
    again = get_peft_model(copy.deepcopy(base), read)
    for name, value in adapter_parameters(again).items():
        torch.testing.assert_close(value, start[name], atol=1e-6, rtol=1e-5)
    # and one that is loaded to be trained on has its own values
    trained = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    for name, value in adapter_parameters(trained).items():
        assert torch.equal(value, adapter_parameters(model)[name])


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 11, "or": 12, "bad": 13}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]").save_pretrained(folder)
    return str(folder)


def test_a_text_becomes_token_ids_and_a_file_names_no_tokenizer(tokenizer, tmp_path):
    made = SoftPromptConfig(
        prompt_tuning_init="TEXT", prompt_tuning_init_text="good or bad", tokenizer_name_or_path=tokenizer
    )
    assert made.prompt_tuning_init_text == [11, 12, 13]
    assert made.tokenizer_name_or_path is None
    base = TINY["gpt2"]()
    model = get_peft_model(copy.deepcopy(base), made)
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text()) | {"tokenizer_name_or_path": tokenizer, "prompt_tuning_init_text": "good"}
    for dropped in ("none", "peft_type"):
        values.pop(dropped, None)
        path.write_text(json.dumps(values))
        reader = PeftConfig if dropped == "none" else SoftPromptConfig
        with pytest.raises(ConfigError, match="must not name a tokenizer"):
            reader.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0 must be at least 1"),
        ({"prompt_tuning_init": "TEXT"}, "go together"),
        ({"prompt_tuning_init_text": [1]}, "go together"),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}, "tokenizer_name_or_path"),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": []}, "no tokens"),
        ({"prompt_tuning_init": "TXT"}, 'prompt_tuning_init=.*Did you mean "TEXT"'),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": [99]}, "outside of the vocabulary of 99"),
    ],
)
def test_bad_fields(fields, match):
    with pytest.raises(ConfigError, match=match):
        get_peft_model(TINY["gpt2"](), SoftPromptConfig(**fields))


def test_a_backbone_without_a_vocabulary():
    with pytest.raises(ConfigError, match=r'ViTModel has no vocabulary.*"RANDOM"'):
        adapt("soft_prompt", TINY["vit"](), prompt_tuning_init="SAMPLE_VOCAB")


# Prompts that an MLP makes ------------------------------------------------------------------------------------------

PROJECTED = {"num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 6}


def _named(model) -> dict[str, torch.Tensor]:
    """The parameters of the MLP by `name`, or `name block` where each block has its own."""
    found = {}
    for name, value in adapter_parameters(model).items():
        part = next(p for p in name.split(".") if p.startswith("soft_prompt_")).removeprefix("soft_prompt_")
        block = next(p for p in name.split(".") if p.isdigit())
        found[f"{part} {block}" if part.startswith("out") else part] = value
    return found


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
@torch.no_grad()
def test_an_mlp_makes_the_prompts_by_its_formula(family, deep):
    base = TINY[family]().eval()
    model = move(adapt("soft_prompt", base, deep=deep, **PROJECTED))
    values = _named(model)
    plain = adapt("soft_prompt", base, deep=deep, num_virtual_tokens=4)
    blocks = list(adapter_parameters(plain).values())
    assert len(blocks) == (2 if deep else 1)
    for block, prompts in enumerate(blocks):
        hidden = torch.tanh(values["tokens"] @ values["in_weight"].T + values["in_bias"])
        prompts.copy_(hidden @ values[f"out_weight {block}"].T + values[f"out_bias {block}"])
    inputs = tiny_inputs(base)
    torch.testing.assert_close(output(model, inputs), output(plain, inputs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output(model, inputs), base(**inputs)[0], atol=1e-3)
    n, d, m, blocks = 4, 16, 6, 2 if deep else 1
    assert sum(v.numel() for v in values.values()) == n * d + m * (d + 1) + blocks * d * (m + 1)


def test_the_prompts_are_those_of_pefts_encoder():
    """peft's, for keys and values, on an equal seed of weights: its second layer is that of all blocks in one."""
    from peft import PrefixEncoder, PrefixTuningConfig

    model = adapt("soft_prompt", TINY["llama"](), deep=True, **PROJECTED)
    values = _named(model)
    wanted = PrefixTuningConfig(
        num_virtual_tokens=4, num_layers=1, token_dim=16, encoder_hidden_size=6, prefix_projection=True
    )
    encoder = PrefixEncoder(wanted)
    with torch.no_grad():
        encoder.embedding.weight.copy_(values["tokens"])
        first, second = encoder.transform[0], encoder.transform[2]
        first.weight.copy_(values["in_weight"]), first.bias.copy_(values["in_bias"])
        second.weight.copy_(torch.cat([values["out_weight 0"], values["out_weight 1"]]))
        second.bias.copy_(torch.cat([values["out_bias 0"], values["out_bias 1"]]))
        theirs = encoder(torch.arange(4)).split(16, -1)
    plain = adapt("soft_prompt", TINY["llama"](), deep=True, num_virtual_tokens=4)
    with torch.no_grad():
        for prompts, block in zip(adapter_parameters(plain).values(), theirs, strict=True):
            prompts.copy_(block)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    torch.testing.assert_close(output(model, inputs), output(plain, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("family", ["llama", "t5", "vit", "swin"])
def test_an_mlp_trains_and_is_saved(family, deep, tmp_path):
    base = TINY[family]().eval()
    model = adapt("soft_prompt", base, deep=deep, num_virtual_tokens=3, prefix_projection=True)
    inputs = tiny_inputs(base)
    main_tensor(model(**inputs)).float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in adapter_parameters(model).values())
    move(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(output(loaded, inputs), output(model, inputs))


def test_adapters_with_and_without_an_mlp_in_one_batch():
    model = adapt("soft_prompt", TINY["bert"](), deep=True, **PROJECTED)
    model.add_adapter("plain", config("soft_prompt", deep=True, num_virtual_tokens=2))
    model.add_adapter("wide", config("soft_prompt", deep=True, num_virtual_tokens=3, prefix_projection=True))
    for seed, name in enumerate(("default", "plain", "wide")):
        move(model, name, seed=seed)
    inputs, names = tiny_inputs(TINY["bert"](), batch=4), ["wide", "default", "__base__", "plain"]
    mixed = output(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        part = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = output(model, part, adapter_names=[name])
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_an_mlp_under_gradient_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model = adapt("soft_prompt", TINY["llama"](), deep=True, **PROJECTED).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        grads.append([p.grad for p in adapter_parameters(model).values()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"encoder_hidden_size": 8}, "encoder_hidden_size=8 has no effect without prefix_projection=True"),
        ({"encoder_hidden_size": 0, "prefix_projection": True}, "encoder_hidden_size=0 must be at least 1"),
        ({"prompt_tuning_init": "SAMPLE_VOCAB", "prefix_projection": True}, "'SAMPLE_VOCAB' says where prompts start"),
        ({"domain_components": 2, "prefix_projection": True}, "domain_components=2 says where prompts start"),
    ],
)
def test_bad_fields_of_an_mlp(fields, match):
    with pytest.raises(ConfigError, match=match):
        SoftPromptConfig(**fields)
