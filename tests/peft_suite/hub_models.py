"""Tiny random models in the layout of the Hub's cache, under the names that peft's tests load."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_VOCABULARY = 512
_TOKENS = {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {**_TOKENS, **_BLOCKS, "max_position_embeddings": 512}
_GPT = {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_OPT = {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_T5 = {**_TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BART = {
    **{**_TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 2},
    **{"max_position_embeddings": 512, "forced_eos_token_id": None},
}
_DEBERTA = {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 3}

#: Name on the Hub -> class in transformers and values of its config.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "facebook/opt-125m": ("OPTForCausalLM", _OPT),
    "hf-internal-testing/tiny-random-BertModel": ("BertModel", _TEXT),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT),
    "openai-community/gpt2": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _TEXT),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _TEXT),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("BloomForCausalLM", {**_TOKENS, **_BLOCKS}),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", _DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", _DEBERTA),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": ("ResNetForImageClassification", _RESNET),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", _TEXT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _TEXT),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _T5),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", _LLAMA),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
}


def fill_cache(cache: Path) -> None:
    """Write every model of `MODELS`, with a tokenizer, into a cache folder; those that are there stay."""
    for name, (class_name, values) in MODELS.items():
        _save(cache, name, lambda folder, c=class_name, v=values: _save_model(folder, c, v))
    _save(cache, "hf-internal-testing/tiny-sd-pipe", _save_pipeline)
    _save(cache, "peft-internal-testing/tiny-opt-lora-revision", _save_lora, revision="test")


def _save(cache: Path, name: str, write: Callable[[Path], None], revision: str = "main") -> None:
    repository = cache / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / revision
    if reference.is_file():
        return
    commit = hashlib.sha1(name.encode()).hexdigest()
    write(repository / "snapshots" / commit)
    # Written last, so that a model whose writing was stopped is written again.
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)


def _save_lora(folder: Path) -> None:
    get_peft_model(_model("OPTForCausalLM", _OPT), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)


def _save_model(folder: Path, class_name: str, values: dict[str, Any]) -> None:
    model = _model(class_name, values)
    model.save_pretrained(folder)
    if "ImageClassification" in class_name:
        hf.ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    else:
        _tokenizer().save_pretrained(folder)


def _model(class_name: str, values: dict[str, Any]) -> hf.PreTrainedModel:
    """A model with random weights large enough that its outputs differ from row to row."""
    cls = getattr(hf, class_name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _tokenizer(length: int = 512) -> hf.PreTrainedTokenizerFast:
    """A tokenizer of bytes for texts of at most `length` tokens."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **names)


def _save_pipeline(folder: Path) -> None:
    """Stable Diffusion with every part tiny."""
    import diffusers

    torch.manual_seed(0)
    clip = {**_TOKENS, **_BLOCKS, "max_position_embeddings": 77}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    text = hf.CLIPTextModel(hf.CLIPTextConfig(**clip)).eval()
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=_tokenizer(77),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
