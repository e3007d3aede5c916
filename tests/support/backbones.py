"""Tiny random models of every backbone family and inputs for them: deterministic, without dropout, fast to build.

`TINY` has one model per `model_type`, with a task head where the family has one; `VARIANTS` has other classes and
shapes of the same families. All parameters and running statistics are random, so that no op is an accidental identity.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

# Tiny vocabularies lie below the default special tokens, which transformers reports at each build.
logging.getLogger("transformers.configuration_utils").setLevel(logging.ERROR)

CLASSES = 3
VOCABULARY = 99

_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_IMAGE = {**_SHAPE, "image_size": 16, "patch_size": 8}
_TEXT = {
    **_SHAPE,
    **{
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
_GROUPED = {**_TEXT, "num_key_value_heads": 1, "head_dim": 8}
_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_STAGES = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
_CONVNEXT = {
    **{"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "patch_size": 4, "image_size": 32},
    "layer_scale_init_value": 0.5,
}
_T5 = {
    **{"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    **_SPECIAL,
}
_SEQ2SEQ = {
    **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 1},
    **_SPECIAL,
}
_WHISPER = {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
WAVEFORM = {
    **{**_SHAPE, "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8},
    **{"vocab_size": VOCABULARY, "apply_spec_augment": False, "layerdrop": 0.0},
}
_SPECTROGRAM = {**_SHAPE, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8}
SEGFORMER = {
    **{"num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "strides": [4, 2]},
    **{"patch_sizes": [7, 3], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8},
    **{"drop_path_rate": 0.0, "image_size": 32},
}
_DPT = {
    **_IMAGE,
    "initializer_range": 0.2,
    "num_hidden_layers": 4,
    "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [4, 4, 8, 8],
}
_UPERNET = {"hidden_size": 8, "pool_scales": [1, 2], "auxiliary_channels": 8}
_TOWERS = {"text_config": {**_TEXT, "projection_dim": 8}, "vision_config": _IMAGE, "projection_dim": 8}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}


def _build(cls: type[PreTrainedModel], **settings: Any) -> PreTrainedModel:
    config: PretrainedConfig = cls.config_class(**settings)
    parts = (getattr(config, name) for name in config.sub_configs)
    # DPT may have a backbone of another family, and has none here.
    for part in (config, *filter(None, parts)):
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
        part.num_labels = CLASSES
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
            for norm in norms:
                norm.weight.uniform_(0.5, 1.5)
                norm.momentum = 1.0
            if norms:  # running statistics of real activations: else a deep net of frozen norms dies out
                model.train()(**tiny_inputs(model, batch=8))
                model.eval()
    return model


def _model(name: str, **settings: Any) -> Callable[[], PreTrainedModel]:
    return partial(_build, getattr(hf, name), **settings)


TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": _model("ViTForImageClassification", **_IMAGE),
    "deit": _model("DeiTForImageClassification", **_IMAGE),
    "dinov2": _model("Dinov2ForImageClassification", **_IMAGE),
    "dinov2_with_registers": _model("Dinov2WithRegistersForImageClassification", **_IMAGE),
    "dinov3_vit": _model("DINOv3ViTModel", **_IMAGE),
    "beit": _model("BeitForImageClassification", **_IMAGE),
    "clip": _model("CLIPModel", **_TOWERS),
    "siglip": _model("SiglipModel", **_TOWERS),
    "swin": _model("SwinForImageClassification", **_STAGES),
    "convnext": _model("ConvNextForImageClassification", **_CONVNEXT),
    "resnet": _model("ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2]),
    "efficientnet": _model(
        "EfficientNetForImageClassification",
        width_coefficient=0.1,
        depth_coefficient=0.1,
        hidden_dim=128,
        image_size=32,
    ),
    "mobilenet_v2": _model(
        "MobileNetV2ForImageClassification", depth_multiplier=0.1, min_depth=8, image_size=32, finegrained_output=False
    ),
    "bert": _model("BertForSequenceClassification", **_TEXT),
    "roberta": _model("RobertaForSequenceClassification", **_TEXT),
    "xlm-roberta": _model("XLMRobertaForSequenceClassification", **_TEXT),
    "camembert": _model("CamembertForSequenceClassification", **_TEXT),
    "electra": _model("ElectraForSequenceClassification", embedding_size=8, **_TEXT),
    "distilbert": _model(
        "DistilBertForSequenceClassification",
        **{"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64, **_SPECIAL},
    ),
    "deberta-v2": _model(
        "DebertaV2ForSequenceClassification",
        **{"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True, **_DEBERTA, **_TEXT},
    ),
    "modernbert": _model("ModernBertForSequenceClassification", cls_token_id=1, sep_token_id=2, **_TEXT),
    "mpnet": _model("MPNetForSequenceClassification", **_TEXT),
    "albert": _model("AlbertForSequenceClassification", embedding_size=8, **_TEXT),
    "gpt2": _model("GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=64, **_SPECIAL),
    "opt": _model("OPTForCausalLM", ffn_dim=32, word_embed_proj_dim=16, **_TEXT),
    "llama": _model("LlamaForCausalLM", **_GROUPED),
    "qwen2": _model("Qwen2ForCausalLM", **_GROUPED),
    "qwen3": _model("Qwen3ForCausalLM", **_GROUPED),
    "mistral": _model("MistralForCausalLM", **_GROUPED),
    "gemma": _model("GemmaForCausalLM", **_GROUPED),
    "gemma2": _model("Gemma2ForCausalLM", **_GROUPED),
    "gemma3_text": _model("Gemma3ForCausalLM", **_GROUPED),
    "phi": _model("PhiForCausalLM", **_TEXT),
    "phi3": _model("Phi3ForCausalLM", **_TEXT),
    "t5": _model("T5ForConditionalGeneration", **_T5),
    "whisper": _model("WhisperForConditionalGeneration", **_WHISPER),
    "wav2vec2": _model("Wav2Vec2ForSequenceClassification", **WAVEFORM),
    "audio-spectrogram-transformer": _model("ASTForAudioClassification", **_SPECTROGRAM),
    "segformer": _model("SegformerForSemanticSegmentation", **SEGFORMER),
    "dpt": _model("DPTForSemanticSegmentation", fusion_hidden_size=8, **_DPT),
}

_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2}
#: Mixtures of experts, whose stacked weights are named in `target_parameters`.
EXPERTS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": _model("MixtralForCausalLM", num_local_experts=4, **_EXPERTS),
    "qwen3_moe": _model("Qwen3MoeForCausalLM", num_experts=4, moe_intermediate_size=12, **_EXPERTS),
    "qwen2_moe": _model(
        "Qwen2MoeForCausalLM",
        num_experts=4,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
        **_EXPERTS,
    ),
    "olmoe": _model("OlmoeForCausalLM", num_experts=4, **_EXPERTS),
}

VARIANTS: dict[str, Callable[[], PreTrainedModel]] = {
    "deit_teacher": _model("DeiTForImageClassificationWithTeacher", **_IMAGE),
    "vit_mae": _model("ViTMAEModel", **_IMAGE),
    "vit_msn": _model("ViTMSNForImageClassification", **_IMAGE),
    "dinov2_swiglu": _model("Dinov2ForImageClassification", use_swiglu_ffn=True, **_IMAGE),
    "dinov3_gated": _model("DINOv3ViTModel", use_gated_mlp=True, **_IMAGE),
    "beit_final_norm": _model("BeitForImageClassification", use_mean_pooling=False, **_IMAGE),
    "clip_vision": _model("CLIPVisionModel", **_IMAGE),
    "clip_vision_projected": _model("CLIPVisionModelWithProjection", **_IMAGE),
    "clip_text": _model("CLIPTextModel", **_TEXT),
    "clip_classifier": _model("CLIPForImageClassification", **_TOWERS),
    "siglip_vision": _model("SiglipVisionModel", **_IMAGE),
    "siglip_classifier": _model("SiglipForImageClassification", **_TOWERS),
    "blip": _model(
        "BlipForImageTextRetrieval",
        text_config={**_TEXT, "encoder_hidden_size": 16},
        vision_config=_IMAGE,
        image_text_hidden_size=8,
    ),
    "convnextv2": _model("ConvNextV2ForImageClassification", **{**_CONVNEXT, "layer_scale_init_value": 0.0}),
    "resnet_basic": _model(
        "ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"
    ),
    "deberta": _model("DebertaForSequenceClassification", **_DEBERTA, **_TEXT),
    "phi_qk_norm": _model("PhiForCausalLM", qk_layernorm=True, **_TEXT),
    "gpt2_classifier": _model(
        "GPT2ForSequenceClassification", n_embd=16, n_layer=2, n_head=2, n_positions=64, **_SPECIAL
    ),
    "llama_classifier": _model("LlamaForSequenceClassification", **_GROUPED),
    "t5_gated": _model("T5ForConditionalGeneration", feed_forward_proj="gated-gelu", **_T5),
    "t5_classifier": _model("T5ForSequenceClassification", **_T5),
    "whisper_classifier": _model("WhisperForAudioClassification", **_WHISPER),
    "hubert_stable": _model("HubertForSequenceClassification", do_stable_layer_norm=True, **WAVEFORM),
    "beit_segmenter": _model(
        "BeitForSemanticSegmentation",
        out_indices=[0, 1, 2, 3],
        pool_scales=[1, 2],
        auxiliary_channels=8,
        **{**_IMAGE, "num_hidden_layers": 4},
    ),
    "upernet_swin": _model(
        "UperNetForSemanticSegmentation",
        backbone_config=hf.SwinConfig(
            out_features=["stage1", "stage2", "stage3"], **{**_STAGES, "depths": [1, 1, 1], "num_heads": [1, 2, 2]}
        ),
        auxiliary_in_channels=32,
        **_UPERNET,
    ),
    "upernet_convnext": _model(
        "UperNetForSemanticSegmentation",
        backbone_config=hf.ConvNextConfig(out_features=["stage1", "stage2"], **_CONVNEXT),
        use_auxiliary_head=False,
        **_UPERNET,
    ),
    "mbart": _model("MBartForSequenceClassification", max_position_embeddings=64, **_SEQ2SEQ),
    "bart": _model("BartForSequenceClassification", max_position_embeddings=64, **_SEQ2SEQ),
}

MODELS = {**TINY, **VARIANTS}


def unknown(name: str) -> PreTrainedModel:
    """A model of a family that is not in the role table."""
    if name in ("gptj", "codegen"):
        settings = {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64, **_SPECIAL}
        return hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(name, **settings))
    if name in ("starcoder2", "gpt_neox"):
        return hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(name, **_TEXT))
    if name == "pegasus":
        return hf.PegasusForConditionalGeneration(hf.PegasusConfig(**_SEQ2SEQ))
    if name == "falcon":
        return hf.FalconForSequenceClassification(hf.FalconConfig(**_TEXT))
    return hf.LayoutLMForSequenceClassification(hf.LayoutLMConfig(**_TEXT))


@cache
def tiny(name: str) -> PreTrainedModel:
    """A model of `MODELS`, built once for all tests: only to look at."""
    return MODELS[name]()


def found(model: nn.Module, pattern: str) -> list[str]:
    """Paths of the modules that peft would find with this regex."""
    return [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]


def bare(model: PreTrainedModel) -> PreTrainedModel:
    """The backbone inside a model with a head."""
    return getattr(model, model.base_model_prefix)


class Custom(nn.Module):
    """A backbone with a head of one's own, under any names."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def tiny_inputs(model: PreTrainedModel, batch: int = 2, labels: bool = False) -> dict[str, Tensor]:
    """Valid keyword arguments for `model.forward`, the same at each call.

    Args:
        model: a model of `TINY` or `VARIANTS`, bare or with a head.
        batch: number of rows.
        labels: add `labels` (class indices, or tokens for generative models) where the model takes them.
    """
    config, random = model.config, torch.Generator().manual_seed(1)
    vision = getattr(config, "vision_config", config)
    # A classifier made of CLIP or SigLIP keeps the vision tower alone.
    two_towers = hasattr(config, "text_config") and (hasattr(model, "text_model") or hasattr(model, "text_encoder"))
    inputs: dict[str, Tensor] = {}
    if model.main_input_name == "input_ids" or two_towers:
        ids = torch.randint(5, VOCABULARY, (batch, 7), generator=random)
        # Text towers pool at the end-of-text token, and so does T5's classifier.
        ids[:, -1] = 2
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.main_input_name == "pixel_values" or two_towers:
        size = getattr(vision, "image_size", 32)
        inputs["pixel_values"] = torch.randn(batch, 3, size, size, generator=random)
    if model.main_input_name == "input_features":
        inputs["input_features"] = torch.randn(batch, config.num_mel_bins, 32, generator=random)
    if model.main_input_name == "input_values":
        # A spectrogram (frames, bins), or a waveform of so many samples.
        bins = getattr(config, "num_mel_bins", None)
        shape = (config.max_length, bins) if bins else (200,)
        inputs["input_values"] = torch.randn(batch, *shape, generator=random)
    classifies = "Classification" in type(model).__name__
    if config.is_encoder_decoder and not classifies:
        inputs["decoder_input_ids"] = torch.randint(5, VOCABULARY, (batch, 5), generator=random)
    if labels and "labels" in inspect.signature(model.forward).parameters:
        inputs["labels"] = _targets(model, inputs, batch, classifies)
    return inputs


def _targets(model: PreTrainedModel, inputs: dict[str, Tensor], batch: int, classifies: bool) -> Tensor:
    """Classes of rows or of pixels, or tokens."""
    if "Segmentation" in type(model).__name__:
        height, width = inputs["pixel_values"].shape[-2:]
        return (torch.arange(batch * height * width) % CLASSES).reshape(batch, height, width)
    if classifies:
        return torch.arange(batch) % CLASSES
    return inputs.get("decoder_input_ids", inputs.get("input_ids")).clone()
