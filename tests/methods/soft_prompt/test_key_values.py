"""Trained keys and values: peft's prefix tuning where that works, and right where it is not."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from support.backbones import MODELS, TINY, tiny_inputs
from support.cover import cover
from support.properties import adapt, adapter_parameters, assert_close, config, main_tensor, move, output
from support.sequences import GENERATE, padded_texts, positions

from peft_lab.errors import ConfigError

IDS = torch.tensor([[7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 0, 0]])
MASK = (IDS != 0).long()
TOKENS = 4
#: Families with keys and values of their own, of GPT-2's sort and Phi-3's; width of the keys of a tiny one.
DECODERS = {"gpt2": 16, "opt": 16, "llama": 8, "qwen2": 8, "qwen3": 8, "mistral": 8, "gemma": 8, "gemma2": 8}
DECODERS |= {"gemma3_text": 8, "phi": 16, "phi_qk_norm": 16, "phi3": 16}
ENCODERS = {"bert": 16, "roberta": 16, "electra": 16, "vit": 16, "t5": 16, "distilbert": 16, "modernbert": 16}
#: Decoders with windows, whose caches have prompts in all blocks or in none; and a head that peft mixes in no batch.
SLIDING, NO_MIXED_HEAD = ("mistral", "gemma2", "gemma3_text"), ("modernbert",)
#: Those that peft's prefix tuning knows, with its task type.
PEFT = {**dict.fromkeys(DECODERS, "CAUSAL_LM"), "gpt2_classifier": "SEQ_CLS", "llama_classifier": "SEQ_CLS"}
PEFT |= {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "electra": "SEQ_CLS"}


def _adapted(family: str, **fields):
    return adapt("soft_prompt", MODELS[family]().eval(), key_values=True, num_virtual_tokens=TOKENS, **fields)


def _copied_from(theirs, ours) -> None:
    """Put parameters of peft (tokens, 2 x layers x width of the keys) into ours."""
    flat = theirs.get_prompt_embedding_to_save("default")
    flat = flat.reshape(TOKENS, -1)
    layers = [m for m in ours.modules() if type(m).__name__ == "SoftPromptLayer"]
    for part, parameter in zip(flat.chunk(2 * len(layers), -1), _keys_and_values(layers), strict=True):
        parameter.copy_(part)


def _keys_and_values(layers):
    for layer in layers:
        yield layer.soft_prompt_keys["default"]
        yield layer.soft_prompt_values["default"]


@pytest.mark.parametrize("family", cover(PEFT, lambda case: {PEFT[case[0]]} | ({case[0]} & {"gpt2", "llama", "qwen3"})))
@torch.no_grad()
def test_equals_prefix_tuning_of_peft(family):
    base = MODELS[family]().eval()
    config = PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type=PEFT[family])
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    for parameter in theirs.prompt_encoder.parameters():
        parameter.normal_()
    ours = _adapted(family, modules_to_save=[])
    _copied_from(theirs, ours)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    found = ours(**inputs).logits
    try:
        expected = theirs(**inputs).logits
    except ValueError as error:  # peft 0.21 looks for the name that the cache had before transformers 5.24
        pytest.skip(str(error))
    keep = MASK.bool() if expected.ndim == 3 else slice(None)
    assert not torch.allclose(found[keep], base(**inputs).logits[keep], atol=1e-3)
    assert (found - expected)[keep].abs().max() < 2e-5


@pytest.mark.parametrize("family", cover([*DECODERS, *ENCODERS], lambda case: {case[0] in DECODERS}))
def test_counts_and_gradients(family):
    widths = {**DECODERS, **ENCODERS}
    model = move(_adapted(family))
    parameters = adapter_parameters(model)
    assert sum(p.numel() for p in parameters.values()) == 2 * 2 * TOKENS * widths[family]
    main_tensor(model(**tiny_inputs(MODELS[family]()))).float().square().sum().backward()
    # The value of a prompt acts in every block; keys act where there is more than one.
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters.values())
    assert sum(p.numel() for p in adapter_parameters(_adapted(family, layers_to_transform=[1])).values()) == (
        2 * TOKENS * widths[family]
    )


@pytest.mark.parametrize("family", cover(DECODERS, lambda case: {case[0]} & {"gpt2", "llama"}))
@torch.no_grad()
def test_padding_caches_and_generation(family):
    """Left padding, a cache, decoding and teacher forcing give the same logits, with and without a choice of blocks."""
    model, inputs = move(_adapted(family)), padded_texts()
    model.add_adapter("other", config("soft_prompt", key_values=True, num_virtual_tokens=2))
    move(model, "other", seed=3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for name in ("default", "other"):
        model.set_adapter(name)
        full = model(**inputs, position_ids=positions(mask), use_cache=False).logits
        assert_close(full[0, 4:], model(input_ids=ids[:1, 4:]).logits[0], 1e-5)
        out = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **GENERATE)
        longer = torch.cat([mask, torch.ones_like(mask[:, :4])], 1)
        forced = model(
            input_ids=out.sequences, attention_mask=longer, position_ids=positions(longer), use_cache=False
        ).logits
        assert_close(torch.stack(out.logits, 1), forced[:, 8:-1], 2e-4)
        assert torch.equal(model.generate(**inputs, use_cache=False, **GENERATE), out.sequences)


@pytest.mark.parametrize(
    "family",
    cover(
        [f for f in (*DECODERS, *ENCODERS) if f not in NO_MIXED_HEAD],
        lambda case: {case[0]} & {"gpt2", "llama", "bert"},
    ),
)
@torch.no_grad()
def test_rows_of_a_batch(family):
    """Adapters of keys and values, of tokens, of an MLP and none at all, each as alone."""
    base = MODELS[family]().eval()
    model = move(_adapted(family))
    others = {
        "wide": {"key_values": True, "num_virtual_tokens": 6, "prefix_projection": True},
        "some": {"key_values": True, "num_virtual_tokens": 3, "layers_to_transform": None if family == "t5" else [1]},
        "tokens": {"deep": False, "num_virtual_tokens": 2},
    }
    for seed, (name, fields) in enumerate(others.items()):
        model.add_adapter(name, config("soft_prompt", **fields))
        move(model, name, seed=seed + 5)
    inputs, names = tiny_inputs(base, batch=5), ["wide", "default", "__base__", "some", "tokens"]
    mixed = output(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        part = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == "__base__":
            alone = output(base, part)
        else:
            model.set_adapter(name)
            alone = output(model, part)
        assert_close(mixed[row : row + 1], alone, 1e-5)
    if family in DECODERS and family not in SLIDING:
        written = model.generate(inputs["input_ids"], adapter_names=names, **GENERATE)
        for row, name in enumerate(names):
            model.set_adapter("default" if name == "__base__" else name)
            ids = inputs["input_ids"][row : row + 1]
            if name == "__base__":
                assert torch.equal(written[row : row + 1], base.generate(ids, **GENERATE))
            else:
                assert torch.equal(written[row : row + 1], model.generate(ids, **GENERATE))


@torch.no_grad()
def test_a_block_without_keys_of_its_own_sees_none():
    """What a block makes of the places of its keys goes no further, unlike prompts that are tokens."""
    model, seen = move(_adapted("llama", layers_to_transform=[0])), []
    model.add_adapter("tokens", config("soft_prompt", num_virtual_tokens=2))
    for block in (m.base_layer for m in model.modules() if type(m).__name__ == "SoftPromptLayer"):
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    for name, lengths in (("default", [6 + TOKENS, 6]), ("tokens", [8, 8])):
        model.set_adapter(name)
        model(input_ids=IDS, attention_mask=MASK)
        assert seen == lengths
        seen.clear()


@torch.no_grad()
def test_added_behind_an_adapter_of_tokens():
    base = TINY["llama"]().eval()
    model = adapt("soft_prompt", base)
    model.add_adapter("prefix", config("soft_prompt", key_values=True, num_virtual_tokens=TOKENS))
    model.set_adapter("prefix")
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    one = model(**inputs).logits
    move(model, "prefix")
    assert not torch.allclose(model(**inputs).logits, one, atol=1e-3)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_saved_and_under_gradient_checkpointing(family, projected, tmp_path):
    base, inputs = MODELS[family]().eval(), {"input_ids": IDS, "attention_mask": MASK}
    grads = []
    for reentrant in (None, False, True):
        model = move(_adapted(family, prefix_projection=projected)).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        first, second = (model(**inputs).logits.square().mean() for _ in range(2))
        (first + 2 * second).backward()
        grads.append({n: p.grad for n, p in adapter_parameters(model).items()})
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad)
        assert_close(grads[2][name], grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    bare = model.unload().eval()
    assert torch.equal(output(bare, inputs), output(base, inputs))
    assert not [h for m in bare.modules() for h in m._forward_hooks.values() if "WriteKeyValues" in type(h).__name__]


@torch.no_grad()
def test_an_mlp_is_pefts_encoder():
    base = TINY["llama"]().eval()
    wanted = PrefixTuningConfig(
        num_virtual_tokens=TOKENS, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=6
    )
    theirs = get_peft_model(copy.deepcopy(base), wanted).eval()
    ours = _adapted("llama")
    _copied_from(theirs, ours)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    expected = theirs(**inputs).logits
    assert (ours(**inputs).logits - expected)[MASK.bool()].abs().max() < 2e-5
    count = sum(p.numel() for p in adapter_parameters(_adapted("llama", prefix_projection=True)).values())
    assert count == TOKENS * 16 + 16 * 17 + 2 * 2 * 8 * 17


@pytest.mark.parametrize("family", ["swin", "deberta-v2", "deberta"])
def test_attention_that_reads_no_other_keys_is_refused(family):
    base = MODELS[family]()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ConfigError, match="has no place for trained keys and values"):
        get_peft_model(base, config("soft_prompt", key_values=True))
    assert [name for name, _ in base.named_modules()] == before


def test_bad_fields_and_texts_too_long():
    for fields in ({"domain_components": 2}, {"prompt_tuning_init": "SAMPLE_VOCAB"}):
        with pytest.raises(ConfigError, match="key_values=True trains keys and values"):
            config("soft_prompt", key_values=True, **fields)
    model = _adapted("bert")
    model(input_ids=torch.full((1, 60), 7))
    with pytest.raises(ConfigError, match="do not fit into the 64 positions of BertModel"):
        model(input_ids=torch.full((1, 61), 7))
