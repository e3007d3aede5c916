"""Families of vision backbones and of CLIP's and SigLIP's towers.

Data only.
"""

from __future__ import annotations

from peft_lab.backbones.family import Family, ResidualConnection, WindowNames, attention, families, in_blocks, pre_norm

VISION: dict[str, Family] = {}

# Vision transformers ------------------------------------------------------------------------------------------------

VISION_OP = ("embed.patch", "norm.stem", "norm", "linear", "norm.final")
_OLD_QKV = tuple((f"attention.attention.{name}", f"attention.{name[0]}_proj") for name in ("query", "key", "value"))
_OLD_SELF = tuple((f"attention.self.{name}", f"attention.{name[0]}_proj") for name in ("query", "key", "value"))
_OLD_DENSE = (
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
VIT_BLOCK = {
    **attention("attention", "q_proj", "k_proj", "v_proj", "attention.o_proj"),
    **in_blocks(mlp_up="mlp.fc1", mlp_down="mlp.fc2", norm="layernorm_before layernorm_after"),
    "embed.patch": ("embeddings.patch_embeddings.projection",),
    "norm.final": ("layernorm",),
}

VIT_ALIASES = (("encoder.layer.*", "layers.*"), *_OLD_QKV, *_OLD_DENSE)
# The norm and the last module before the addition, by family.
VIT_RESIDUAL = pre_norm(("attention", "layernorm_before", "dropout"), ("mlp", "layernorm_after", "dropout"))
_BEIT_RESIDUAL = pre_norm(("attention", "layernorm_before", "drop_path"), ("mlp", "layernorm_after", "drop_path"))
_SWIN_RESIDUAL = pre_norm(("attention", "layernorm_before", "drop_path"), ("mlp", "layernorm_after", "dropout"))
_DINO_RESIDUAL = pre_norm(("attention", "norm1", "drop_path"), ("mlp", "norm2", "drop_path"))

for _types, _residual, _prefix in (
    ("vit vit_mae vit_msn", VIT_RESIDUAL, ("cls_token",)),
    ("deit", VIT_RESIDUAL, ("cls_token", "distillation_token")),
    ("ijepa", VIT_RESIDUAL, ()),
    ("beit", _BEIT_RESIDUAL, ("cls_token",)),
):
    VISION |= families(
        _types,
        blocks=("layers.*",),
        roles=VIT_BLOCK,
        op=VISION_OP,
        aliases=VIT_ALIASES,
        residual=_residual,
        prefix_tokens=_prefix,
        bias_flags=() if _types == "beit" else ("qkv_bias",),
    )
# timm's own vision transformers; models of timm that are built otherwise are read as unknown ones.
VISION |= families(
    "timm_wrapper",
    blocks=("blocks.*",),
    roles={
        **in_blocks(attn_qkv="attn.qkv", attn_out="attn.proj", mlp_up="mlp.fc1", mlp_down="mlp.fc2"),
        **in_blocks(norm="norm1 norm2"),
        "embed.patch": ("patch_embed.proj",),
        "norm.stem": ("norm_pre",),
        "norm.final": ("norm",),
    },
    op=VISION_OP,
    residual=pre_norm(("attention", "norm1", "drop_path1"), ("mlp", "norm2", "drop_path2")),
    library="timm",
)
VISION |= families(
    "swin",
    blocks=("encoder.layers.*.blocks.*",),
    roles={
        **VIT_BLOCK,
        "norm.stem": ("embeddings.norm",),
        "downsample": ("encoder.layers.*.downsample.reduction",),
        "norm.downsample": ("encoder.layers.*.downsample.norm",),
    },
    op=VISION_OP,
    aliases=(*_OLD_SELF, *_OLD_DENSE),
    residual=_SWIN_RESIDUAL,
    bias_flags=("qkv_bias",),
    windows=WindowNames(
        grid="input_dimensions",
        norm_before="layernorm_before",
        attention="attention",
        bias="relative_position_bias",
        dropout="dropout",
        output="drop_path",
        downsample="downsample",
    ),
)
VISION |= families(
    "dinov2 dinov2_with_registers",
    blocks=("encoder.layer.*",),
    roles={
        **VIT_BLOCK,
        # The giant model has a SwiGLU in place of fc1 and fc2; older versions hold its gate and up in one matrix.
        **in_blocks(mlp_up="mlp.fc1 mlp.up_proj mlp.weights_in", mlp_down="mlp.fc2 mlp.down_proj"),
        **in_blocks(mlp_gate="mlp.gate_proj"),
        **in_blocks(norm="norm1 norm2"),
    },
    op=VISION_OP,
    aliases=(*_OLD_QKV, _OLD_DENSE[0], ("mlp.weights_out", "mlp.down_proj")),
    residual=_DINO_RESIDUAL,
    prefix_tokens=("cls_token", "register_tokens"),
    bias_flags=("qkv_bias",),
)
VISION |= families(
    "dinov3_vit",
    blocks=("model.layer.*",),
    roles={
        **VIT_BLOCK,
        **in_blocks(mlp_up="mlp.up_proj", mlp_gate="mlp.gate_proj", mlp_down="mlp.down_proj", norm="norm1 norm2"),
        "embed.patch": ("embeddings.patch_embeddings",),
        "norm.final": ("norm",),
    },
    op=VISION_OP,
    aliases=(("layer.*", "model.layer.*"),),
    residual=_DINO_RESIDUAL,
    prefix_tokens=("cls_token", "register_tokens"),
    bias_flags=("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"),
)

# Transformers for dense prediction ----------------------------------------------------------------------------------

# Each stage has a patch embedding and a final norm of its own; its attention reads keys that a convolution has reduced.
VISION |= families(
    "segformer",
    blocks=("stages.*.blocks.*",),
    roles={
        **VIT_BLOCK,
        **in_blocks(norm="layernorm_before layernorm_after attention.sequence_reduction.layer_norm"),
        "conv": ("{block}.attention.sequence_reduction.sequence_reduction",),
        "conv.depthwise": ("{block}.mlp.dwconv.dwconv",),
        "embed.patch": ("stages.*.patch_embeddings.proj",),
        "norm.stem": ("stages.*.patch_embeddings.layer_norm",),
        "norm.final": ("stages.*.layer_norm",),
    },
    op=(*VISION_OP, "conv.depthwise"),
    aliases=(
        ("encoder.block.*.*", "stages.*.blocks.*"),
        ("encoder.patch_embeddings.*", "stages.*.patch_embeddings"),
        ("encoder.layer_norm.*", "stages.*.layer_norm"),
        *_OLD_SELF,
        ("attention.output.dense", "attention.o_proj"),
        ("attention.self.sr", "attention.sequence_reduction.sequence_reduction"),
        ("attention.self.layer_norm", "attention.sequence_reduction.layer_norm"),
        ("layer_norm_1", "layernorm_before"),
        ("layer_norm_2", "layernorm_after"),
        ("mlp.dense1", "mlp.fc1"),
        ("mlp.dense2", "mlp.fc2"),
    ),
    residual=_BEIT_RESIDUAL,
    bias_flags=("qkv_bias",),
)
# Its neck reads the tokens of several blocks.
VISION |= families(
    "dpt",
    blocks=("encoder.layer.*",),
    roles={
        **attention("attention.attention", "query", "key", "value", "attention.output.dense"),
        **in_blocks(mlp_up="intermediate.dense", mlp_down="output.dense", norm="layernorm_before layernorm_after"),
        "embed.patch": ("embeddings.patch_embeddings.projection",),
        "norm.final": ("layernorm",),
    },
    op=VISION_OP,
    residual=pre_norm(
        ("attention", "layernorm_before", "attention.output.dropout"), ("mlp", "layernorm_after", "output.dropout")
    ),
    prefix_tokens=("cls_token",),
    bias_flags=("qkv_bias",),
)

# The towers of CLIP and SigLIP --------------------------------------------------------------------------------------

_CLIP_BLOCK = {
    **attention("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.out_proj"),
    **in_blocks(mlp_up="mlp.fc1", mlp_down="mlp.fc2", norm="layer_norm1 layer_norm2"),
}
_CLIP_RESIDUAL = pre_norm(("attention", "layer_norm1", "self_attn.out_proj"), ("mlp", "layer_norm2", "mlp"))

_CLIP_VISION = {
    **_CLIP_BLOCK,
    "embed.patch": ("embeddings.patch_embedding",),
    # transformers itself spells the name this way.
    "norm.stem": ("pre_layrnorm",),
    "norm.final": ("post_layernorm",),
}
VISION |= families(
    "clip_vision_model",
    blocks=("encoder.layers.*",),
    roles=_CLIP_VISION,
    op=VISION_OP,
    prefixes=("vision_model",),
    residual=_CLIP_RESIDUAL,
    prefix_tokens=("class_embedding",),
    patch_heads=("CLIPForImageClassification",),
    final_norm_of_pooled=True,
)
# SigLIP has neither a class token nor the norm of the stem, whose path then matches nothing.
VISION |= families(
    "siglip_vision_model siglip2_vision_model",
    blocks=("encoder.layers.*",),
    roles=_CLIP_VISION,
    op=VISION_OP,
    prefixes=("vision_model",),
    residual=_CLIP_RESIDUAL,
)
VISION |= families(
    "clip_text_model siglip_text_model siglip2_text_model",
    blocks=("encoder.layers.*",),
    roles={**_CLIP_BLOCK, "embed.token": ("embeddings.token_embedding",), "norm.final": ("final_layer_norm",)},
    prefixes=("text_model",),
    residual=_CLIP_RESIDUAL,
)

# Convolutional nets -------------------------------------------------------------------------------------------------

VISION |= families(
    "convnext convnextv2",
    blocks=("encoder.stages.*.layers.*",),
    roles={
        **in_blocks(mlp_up="pwconv1", mlp_down="pwconv2", norm="layernorm"),
        # ConvNeXt's MLP layers are 1x1 convolutions in linear form, so they play both roles.
        "conv.pointwise": ("{block}.pwconv1", "{block}.pwconv2"),
        "conv.depthwise": ("{block}.dwconv",),
        "conv.stem": ("embeddings.patch_embeddings",),
        "norm.stem": ("embeddings.layernorm",),
        # The norm comes before the convolution here.
        "downsample": ("encoder.stages.*.downsampling_layer.1",),
        "norm.downsample": ("encoder.stages.*.downsampling_layer.0",),
        "norm.final": ("layernorm",),
    },
    # The final norm comes behind the pooling: the paper counts it to the head.
    op=("conv.stem", "norm.stem", "conv.depthwise", "norm", "linear"),
    # The depthwise convolution reads the stream (batch, channels, height, width); the norm stands behind it.
    residual=(ResidualConnection("mlp", "", "drop_path"),),
)
VISION |= families(
    "resnet",
    blocks=("encoder.stages.*.layers.*",),
    roles={
        **in_blocks(conv="layer.*.convolution", norm="layer.*.normalization"),
        "conv.stem": ("embedder.embedder.convolution",),
        "norm.stem": ("embedder.embedder.normalization",),
        "downsample": ("{block}.shortcut.convolution",),
        "norm.downsample": ("{block}.shortcut.normalization",),
    },
    op=("conv.stem", "norm.stem", "conv", "norm", "downsample", "norm.downsample"),
)
VISION |= families(
    "efficientnet",
    blocks=("encoder.blocks.*",),
    roles={
        **in_blocks(norm="expansion.expand_bn depthwise_conv.depthwise_norm projection.project_bn"),
        "conv.pointwise": ("{block}.expansion.expand_conv", "{block}.projection.project_conv"),
        "conv.depthwise": ("{block}.depthwise_conv.depthwise_conv",),
        "conv.stem": ("embeddings.convolution",),
        "norm.stem": ("embeddings.batchnorm",),
        "conv.top": ("encoder.top_conv",),
        "norm.final": ("encoder.top_bn",),
    },
    op=("conv.stem", "norm.stem", "linear", "conv.depthwise", "norm", "conv.top", "norm.final"),
)
VISION |= families(
    "mobilenet_v2",
    blocks=("layer.*",),
    roles={
        **in_blocks(norm="expand_1x1.normalization conv_3x3.normalization reduce_1x1.normalization"),
        "conv.pointwise": ("{block}.expand_1x1.convolution", "{block}.reduce_1x1.convolution"),
        "conv.depthwise": ("{block}.conv_3x3.convolution",),
        # The stem is itself a small block: first, depthwise and reducing convolution.
        "conv.stem": tuple(f"conv_stem.{part}.convolution" for part in ("first_conv", "conv_3x3", "reduce_1x1")),
        "norm.stem": tuple(f"conv_stem.{part}.normalization" for part in ("first_conv", "conv_3x3", "reduce_1x1")),
        "conv.top": ("conv_1x1.convolution",),
        "norm.final": ("conv_1x1.normalization",),
    },
    op=("conv.stem", "norm.stem", "linear", "conv.depthwise", "norm", "conv.top", "norm.final"),
)
