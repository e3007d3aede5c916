"""Families of audio backbones: Whisper, Wav2Vec2 and its relatives, the spectrogram transformer.

Data only.
"""

from __future__ import annotations

from peft_lab.backbones.family import Family, attention, families, in_blocks, post_norm, pre_norm
from peft_lab.backbones.text_families import SEQ2SEQ_BLOCK, SEQ2SEQ_PRE_NORM
from peft_lab.backbones.vision_families import VISION_OP, VIT_ALIASES, VIT_BLOCK, VIT_RESIDUAL

AUDIO: dict[str, Family] = {}

AUDIO |= families(
    "whisper",
    blocks=("encoder.layers.*", "decoder.layers.*"),
    roles={
        **SEQ2SEQ_BLOCK,
        "conv.stem": ("encoder.conv1", "encoder.conv2"),
        "embed.token": ("decoder.embed_tokens",),
        "norm.final": ("encoder.layer_norm", "decoder.layer_norm"),
    },
    residual=SEQ2SEQ_PRE_NORM,
)

# Transformers over the waveform -------------------------------------------------------------------------------------

_WAVEFORM_BLOCK = {
    **attention("attention", "q_proj", "k_proj", "v_proj", "attention.out_proj"),
    **in_blocks(mlp_up="feed_forward.intermediate_dense", mlp_down="feed_forward.output_dense"),
    **in_blocks(norm="layer_norm final_layer_norm"),
    "conv.stem": ("feature_extractor.conv_layers.*.conv",),
    # Base models normalise the first convolution alone, large ones each of them.
    "norm.stem": ("feature_extractor.conv_layers.*.layer_norm", "feature_projection.layer_norm"),
    # Large models have this norm behind the blocks, base models in front of them.
    "norm.final": ("encoder.layer_norm",),
}
_WAVEFORM_RESIDUAL = pre_norm(("attention", "layer_norm", "dropout"), ("mlp", "final_layer_norm", "feed_forward"))
AUDIO |= families(
    "wav2vec2 hubert unispeech unispeech-sat",
    blocks=("encoder.layers.*",),
    roles=_WAVEFORM_BLOCK,
    residual=_WAVEFORM_RESIDUAL,
    norm_first_flag="do_stable_layer_norm",
)
# WavLM reads the weights of its projections without calling them, so an adapter around them would do nothing.
AUDIO |= families(
    "wavlm",
    blocks=("encoder.layers.*",),
    roles={role: paths for role, paths in _WAVEFORM_BLOCK.items() if not role.startswith("attn.")},
    residual=_WAVEFORM_RESIDUAL,
    norm_first_flag="do_stable_layer_norm",
)
# Its norms stand behind the additions in every size.
AUDIO |= families(
    "data2vec-audio",
    blocks=("encoder.layers.*",),
    roles=_WAVEFORM_BLOCK,
    residual=post_norm(("attention", "dropout", "layer_norm"), ("mlp", "feed_forward", "final_layer_norm")),
)

# Transformers over the spectrogram ----------------------------------------------------------------------------------

# A vision transformer whose image is a spectrogram.
AUDIO |= families(
    "audio-spectrogram-transformer",
    blocks=("layers.*",),
    roles=VIT_BLOCK,
    op=VISION_OP,
    aliases=VIT_ALIASES,
    residual=VIT_RESIDUAL,
    prefix_tokens=("cls_token", "distillation_token"),
    bias_flags=("qkv_bias",),
)
