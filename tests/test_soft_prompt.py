"""Soft prompts against peft's own where that is right, and against the plain backbone where it is not."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from backbones import TINY
from peft import PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from properties import adapt, adapter_parameters, config, move, output

from peft_lab.adapters.soft_prompt import SoftPromptConfig
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
