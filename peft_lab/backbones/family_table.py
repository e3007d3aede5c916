"""Role table: the modules that play each role, by backbone family. Data only; `module_roles` reads it.

A path is written relative to the backbone's root, with `*` for a block or list index and `{block}` for the path of one
block. Module names are those of transformers 5.23; `aliases` hold the names of other versions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from peft_lab.backbones.name_aliases import Renames, renames_of

#: Every role and what it means. The set is closed.
ROLES: dict[str, str] = {
    "attn.q": "query projection, of self- and cross-attention",
    "attn.k": "key projection, of self- and cross-attention",
    "attn.v": "value projection, of self- and cross-attention",
    "attn.qkv": "one projection that holds query, key and value",
    "attn.out": "projection of the attention output",
    "cross.q": "query projection of cross-attention only",
    "cross.k": "key projection of cross-attention only",
    "cross.v": "value projection of cross-attention only",
    "cross.out": "output projection of cross-attention only",
    "mlp.up": "first layer of the MLP",
    "mlp.gate": "gate of a gated MLP",
    "mlp.fused": "one layer that holds gate and up",
    "mlp.down": "last layer of the MLP",
    "conv": "ordinary convolution of a block",
    "conv.pointwise": "1x1 convolution (or its linear form) of a block; squeeze-and-excite is left out",
    "conv.depthwise": "depthwise convolution of a block",
    "conv.stem": "convolution that reads the input of a convolutional net",
    "conv.top": "last convolution behind the blocks",
    "downsample": "linear layer or convolution that changes the resolution between stages",
    "norm": "norms of a block",
    "norm.qk": "norms of query and key inside attention",
    "norm.stem": "norm right behind the patch embedding or the stem of a vision backbone",
    "norm.embed": "norm of the token embedding",
    "norm.downsample": "norm that belongs to a downsampling layer",
    "norm.final": "norm behind the last block",
    "embed.token": "token embedding",
    "embed.patch": "patch embedding of a vision transformer",
    "block": "one whole block",
    "linear": "all weight layers of the blocks (attention, MLP, ungrouped convolutions)",
    "op": "every op that SSF scales and shifts: vision backbones in full, in text backbones the blocks",
    "head": "task head in front of the backbone; for modules_to_save, never a target",
}

#: What the role `linear` is made of.
LINEAR: tuple[str, ...] = (
    *("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out"),
    *("mlp.up", "mlp.gate", "mlp.fused", "mlp.down", "conv", "conv.pointwise"),
)

_CONVOLUTIONS = (("conv.pointwise",), ("conv",))

#: What stands in for a role that a family does not have: the first group of which the family has any role.
FALLBACKS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("attn.q", "attn.k", "attn.v"), (("attn.qkv",), *_CONVOLUTIONS)),
    "attn.qkv": (("attn.q", "attn.k", "attn.v"), *_CONVOLUTIONS),
    "attn.out": _CONVOLUTIONS,
    "mlp.up": (("mlp.fused",), *_CONVOLUTIONS),
    "mlp.gate": (("mlp.fused",),),
    "mlp.fused": (("mlp.up", "mlp.gate"), *_CONVOLUTIONS),
    "mlp.down": _CONVOLUTIONS,
    "conv": (("conv.pointwise",),),
    "conv.pointwise": (("conv",),),
    "conv.stem": (("embed.patch",),),
    "embed.patch": (("conv.stem",),),
}


@dataclass(frozen=True)
class Family:
    """Where the roles are in the backbones of one naming.

    Attributes:
        name: the `model_type` of transformers.
        blocks: path of a block, one per stack of blocks.
        roles: role -> paths.
        op: the roles that make up `op`.
        aliases: (name in older versions, name in transformers 5.23) of path fragments; each stands for itself only.
        prefixes: attributes under which the backbone may sit, besides the class's `base_model_prefix`.
    """

    name: str
    blocks: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]]
    op: tuple[str, ...] = ("linear", "norm", "norm.qk")
    aliases: tuple[tuple[str, str], ...] = ()
    prefixes: tuple[str, ...] = ()

    @property
    def renames(self) -> Renames:
        """The aliases, ready to apply."""
        return renames_of(self.aliases)

    def has(self, role: str) -> bool:
        """Whether the family declares the role, alone or as a group."""
        return bool(self.paths(role))

    def paths(self, role: str) -> tuple[tuple[str, str], ...]:
        """The role's paths as (path of the block or "", path below it), each once and in the table's order."""
        if role == "block":
            return tuple((block, "") for block in self.blocks)
        if role in ("linear", "op") and role not in self.roles:
            members = LINEAR if role == "linear" else self.op
            return tuple(dict.fromkeys(p for member in members for p in self.paths(member)))
        found: list[tuple[str, str]] = []
        for path in self.roles.get(role, ()):
            if path.startswith("{block}."):
                found += [(block, path.removeprefix("{block}.")) for block in self.blocks]
            else:
                found.append(("", path))
        return tuple(found)


def path_regex(path: str) -> str:
    """A path as a regex in which every `*` is any index."""
    return re.escape(path).replace(r"\*", r"\d+")


def _in_blocks(**roles: str) -> dict[str, tuple[str, ...]]:
    """Roles inside the blocks: `attn_q="self_attn.q_proj"`, alternatives separated by a space."""
    return {
        role.replace("_", "."): tuple(f"{{block}}.{path}" for path in paths.split()) for role, paths in roles.items()
    }


def _attention(path: str, q: str, k: str, v: str, out: str) -> dict[str, tuple[str, ...]]:
    return _in_blocks(attn_q=f"{path}.{q}", attn_k=f"{path}.{k}", attn_v=f"{path}.{v}", attn_out=out)


FAMILIES: dict[str, Family] = {}


def _add(model_types: str, **parts: object) -> None:
    for name in model_types.split():
        FAMILIES[name] = Family(name=name, **parts)  # type: ignore[arg-type]


# Vision transformers ------------------------------------------------------------------------------------------------

_VISION_OP = ("embed.patch", "norm.stem", "norm", "linear", "norm.final")
_OLD_QKV = tuple((f"attention.attention.{name}", f"attention.{name[0]}_proj") for name in ("query", "key", "value"))
_OLD_SELF = tuple((f"attention.self.{name}", f"attention.{name[0]}_proj") for name in ("query", "key", "value"))
_OLD_DENSE = (
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)
_VIT_BLOCK = {
    **_attention("attention", "q_proj", "k_proj", "v_proj", "attention.o_proj"),
    **_in_blocks(mlp_up="mlp.fc1", mlp_down="mlp.fc2", norm="layernorm_before layernorm_after"),
    "embed.patch": ("embeddings.patch_embeddings.projection",),
    "norm.final": ("layernorm",),
}

_add(
    "vit deit beit vit_mae vit_msn ijepa",
    blocks=("layers.*",),
    roles=_VIT_BLOCK,
    op=_VISION_OP,
    aliases=(("encoder.layer.*", "layers.*"), *_OLD_QKV, *_OLD_DENSE),
)
_add(
    "swin",
    blocks=("encoder.layers.*.blocks.*",),
    roles={
        **_VIT_BLOCK,
        "norm.stem": ("embeddings.norm",),
        "downsample": ("encoder.layers.*.downsample.reduction",),
        "norm.downsample": ("encoder.layers.*.downsample.norm",),
    },
    op=_VISION_OP,
    aliases=(*_OLD_SELF, *_OLD_DENSE),
)
_add(
    "dinov2 dinov2_with_registers",
    blocks=("encoder.layer.*",),
    roles={
        **_VIT_BLOCK,
        # The giant model has a SwiGLU in place of fc1 and fc2; older versions hold its gate and up in one matrix.
        **_in_blocks(mlp_up="mlp.fc1 mlp.up_proj mlp.weights_in", mlp_down="mlp.fc2 mlp.down_proj"),
        **_in_blocks(mlp_gate="mlp.gate_proj"),
        **_in_blocks(norm="norm1 norm2"),
    },
    op=_VISION_OP,
    aliases=(*_OLD_QKV, _OLD_DENSE[0], ("mlp.weights_out", "mlp.down_proj")),
)
_add(
    "dinov3_vit",
    blocks=("model.layer.*",),
    roles={
        **_VIT_BLOCK,
        **_in_blocks(mlp_up="mlp.up_proj", mlp_gate="mlp.gate_proj", mlp_down="mlp.down_proj", norm="norm1 norm2"),
        "embed.patch": ("embeddings.patch_embeddings",),
        "norm.final": ("norm",),
    },
    op=_VISION_OP,
    aliases=(("layer.*", "model.layer.*"),),
)

# The towers of CLIP and SigLIP --------------------------------------------------------------------------------------

_CLIP_BLOCK = {
    **_attention("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.out_proj"),
    **_in_blocks(mlp_up="mlp.fc1", mlp_down="mlp.fc2", norm="layer_norm1 layer_norm2"),
}

_add(
    "clip_vision_model siglip_vision_model siglip2_vision_model",
    blocks=("encoder.layers.*",),
    roles={
        **_CLIP_BLOCK,
        "embed.patch": ("embeddings.patch_embedding",),
        "norm.stem": ("pre_layrnorm",),
        "norm.final": ("post_layernorm",),
    },
    op=_VISION_OP,
    prefixes=("vision_model",),
)
_add(
    "clip_text_model siglip_text_model siglip2_text_model",
    blocks=("encoder.layers.*",),
    roles={**_CLIP_BLOCK, "embed.token": ("embeddings.token_embedding",), "norm.final": ("final_layer_norm",)},
    prefixes=("text_model",),
)

# Convolutional nets -------------------------------------------------------------------------------------------------

_add(
    "convnext convnextv2",
    blocks=("encoder.stages.*.layers.*",),
    roles={
        **_in_blocks(mlp_up="pwconv1", mlp_down="pwconv2", norm="layernorm"),
        "conv.pointwise": ("{block}.pwconv1", "{block}.pwconv2"),
        "conv.depthwise": ("{block}.dwconv",),
        "conv.stem": ("embeddings.patch_embeddings",),
        "norm.stem": ("embeddings.layernorm",),
        "downsample": ("encoder.stages.*.downsampling_layer.1",),
        "norm.downsample": ("encoder.stages.*.downsampling_layer.0",),
        "norm.final": ("layernorm",),
    },
    # The final norm comes behind the pooling: the paper counts it to the head.
    op=("conv.stem", "norm.stem", "conv.depthwise", "norm", "linear"),
)
_add(
    "resnet",
    blocks=("encoder.stages.*.layers.*",),
    roles={
        **_in_blocks(conv="layer.*.convolution", norm="layer.*.normalization"),
        "conv.stem": ("embedder.embedder.convolution",),
        "norm.stem": ("embedder.embedder.normalization",),
        "downsample": ("{block}.shortcut.convolution",),
        "norm.downsample": ("{block}.shortcut.normalization",),
    },
    op=("conv.stem", "norm.stem", "conv", "norm", "downsample", "norm.downsample"),
)
_add(
    "efficientnet",
    blocks=("encoder.blocks.*",),
    roles={
        **_in_blocks(norm="expansion.expand_bn depthwise_conv.depthwise_norm projection.project_bn"),
        "conv.pointwise": ("{block}.expansion.expand_conv", "{block}.projection.project_conv"),
        "conv.depthwise": ("{block}.depthwise_conv.depthwise_conv",),
        "conv.stem": ("embeddings.convolution",),
        "norm.stem": ("embeddings.batchnorm",),
        "conv.top": ("encoder.top_conv",),
        "norm.final": ("encoder.top_bn",),
    },
    op=("conv.stem", "norm.stem", "linear", "conv.depthwise", "norm", "conv.top", "norm.final"),
)
_add(
    "mobilenet_v2",
    blocks=("layer.*",),
    roles={
        **_in_blocks(norm="expand_1x1.normalization conv_3x3.normalization reduce_1x1.normalization"),
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

# Text encoders ------------------------------------------------------------------------------------------------------

_BERT_BLOCK = {
    **_attention("attention.self", "query", "key", "value", "attention.output.dense"),
    **_in_blocks(mlp_up="intermediate.dense", mlp_down="output.dense"),
    **_in_blocks(norm="attention.output.LayerNorm output.LayerNorm"),
    "embed.token": ("embeddings.word_embeddings",),
    "norm.embed": ("embeddings.LayerNorm",),
}

_add(
    "bert roberta xlm-roberta camembert electra ernie data2vec-text",
    blocks=("encoder.layer.*",),
    roles=_BERT_BLOCK,
)
_add(
    "deberta-v2",
    blocks=("encoder.layer.*",),
    roles={
        **_BERT_BLOCK,
        **_attention("attention.self", "query_proj", "key_proj", "value_proj", "attention.output.dense"),
    },
)
_add(
    "deberta",
    blocks=("encoder.layer.*",),
    roles={
        **{role: paths for role, paths in _BERT_BLOCK.items() if role not in ("attn.q", "attn.k", "attn.v")},
        **_in_blocks(attn_qkv="attention.self.in_proj"),
    },
)
_add(
    "mpnet",
    blocks=("encoder.layer.*",),
    roles={
        **_BERT_BLOCK,
        **_attention("attention.attn", "q", "k", "v", "attention.attn.o"),
        **_in_blocks(norm="attention.LayerNorm output.LayerNorm"),
    },
)
_add(
    "albert",
    blocks=("encoder.albert_layer_groups.*.albert_layers.*",),
    roles={
        **_BERT_BLOCK,
        **_attention("attention", "query", "key", "value", "attention.dense"),
        **_in_blocks(mlp_up="ffn", mlp_down="ffn_output", norm="attention.LayerNorm full_layer_layer_norm"),
    },
)
_add(
    "distilbert",
    blocks=("transformer.layer.*",),
    roles={
        **_BERT_BLOCK,
        **_attention("attention", "q_lin", "k_lin", "v_lin", "attention.out_lin"),
        **_in_blocks(mlp_up="ffn.lin1", mlp_down="ffn.lin2", norm="sa_layer_norm output_layer_norm"),
    },
)
_add(
    "modernbert",
    blocks=("layers.*",),
    roles={
        **_in_blocks(attn_qkv="attn.Wqkv", attn_out="attn.Wo", mlp_fused="mlp.Wi", mlp_down="mlp.Wo"),
        **_in_blocks(norm="attn_norm mlp_norm"),
        "embed.token": ("embeddings.tok_embeddings",),
        "norm.embed": ("embeddings.norm",),
        "norm.final": ("final_norm",),
    },
)

# Decoders -----------------------------------------------------------------------------------------------------------

_LLAMA = {
    **_attention("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.o_proj"),
    **_in_blocks(mlp_up="mlp.up_proj", mlp_gate="mlp.gate_proj", mlp_down="mlp.down_proj"),
    "norm": tuple(
        f"{{block}}.{name}_layernorm" for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    ),
    "norm.qk": ("{block}.self_attn.q_norm", "{block}.self_attn.k_norm"),
    "embed.token": ("embed_tokens",),
    "norm.final": ("norm",),
}

_add(
    "llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text smollm3 granite olmo olmo2 seed_oss",
    blocks=("layers.*",),
    roles=_LLAMA,
)
_add(
    "phi3",
    blocks=("layers.*",),
    roles={
        **_in_blocks(attn_qkv="self_attn.qkv_proj", attn_out="self_attn.o_proj", norm="input_layernorm"),
        **_in_blocks(mlp_fused="mlp.gate_up_proj", mlp_down="mlp.down_proj"),
        "norm": ("{block}.input_layernorm", "{block}.post_attention_layernorm"),
        "embed.token": ("embed_tokens",),
        "norm.final": ("norm",),
    },
)
_add(
    "phi",
    blocks=("layers.*",),
    roles={
        **_attention("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.dense"),
        **_in_blocks(mlp_up="mlp.fc1", mlp_down="mlp.fc2", norm="input_layernorm"),
        "norm.qk": ("{block}.self_attn.q_layernorm", "{block}.self_attn.k_layernorm"),
        "embed.token": ("embed_tokens",),
        "norm.final": ("final_layernorm",),
    },
)
_add(
    "gpt2",
    blocks=("h.*",),
    roles={
        **_in_blocks(attn_qkv="attn.c_attn", attn_out="attn.c_proj", mlp_up="mlp.c_fc", mlp_down="mlp.c_proj"),
        **_in_blocks(norm="ln_1 ln_2"),
        "embed.token": ("wte",),
        "norm.final": ("ln_f",),
    },
)
_add(
    "opt",
    blocks=("decoder.layers.*",),
    roles={
        **_attention("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.out_proj"),
        **_in_blocks(mlp_up="fc1", mlp_down="fc2", norm="self_attn_layer_norm final_layer_norm"),
        "embed.token": ("decoder.embed_tokens",),
        "norm.final": ("decoder.final_layer_norm",),
    },
)

# Encoder-decoders ---------------------------------------------------------------------------------------------------


def _both_attentions(own: str, cross: str, q: str, k: str, v: str, out: str) -> dict[str, tuple[str, ...]]:
    roles: dict[str, tuple[str, ...]] = {}
    for part, name in {"q": q, "k": k, "v": v, "out": out}.items():
        roles[f"cross.{part}"] = (f"{{block}}.{cross}.{name}",)
        roles[f"attn.{part}"] = (f"{{block}}.{own}.{name}", *roles[f"cross.{part}"])
    return roles


_add(
    "t5 mt5 umt5",
    blocks=("encoder.block.*", "decoder.block.*"),
    roles={
        **_both_attentions("layer.*.SelfAttention", "layer.*.EncDecAttention", "q", "k", "v", "o"),
        # Gated versions have wi_0 (the gate) and wi_1 in place of wi.
        **_in_blocks(mlp_up="layer.*.DenseReluDense.wi layer.*.DenseReluDense.wi_1"),
        **_in_blocks(mlp_gate="layer.*.DenseReluDense.wi_0", mlp_down="layer.*.DenseReluDense.wo"),
        **_in_blocks(norm="layer.*.layer_norm"),
        "embed.token": ("shared",),
        "norm.final": ("encoder.final_layer_norm", "decoder.final_layer_norm"),
    },
)
_SEQ2SEQ = {
    **_both_attentions("self_attn", "encoder_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    **_in_blocks(mlp_up="fc1", mlp_down="fc2"),
    **_in_blocks(norm="self_attn_layer_norm encoder_attn_layer_norm final_layer_norm"),
}
_add(
    "whisper",
    blocks=("encoder.layers.*", "decoder.layers.*"),
    roles={
        **_SEQ2SEQ,
        "conv.stem": ("encoder.conv1", "encoder.conv2"),
        "embed.token": ("decoder.embed_tokens",),
        "norm.final": ("encoder.layer_norm", "decoder.layer_norm"),
    },
)
_add(
    "bart mbart",
    blocks=("encoder.layers.*", "decoder.layers.*"),
    roles={
        **_SEQ2SEQ,
        "embed.token": ("shared",),
        "norm.embed": ("encoder.layernorm_embedding", "decoder.layernorm_embedding"),
        "norm.final": ("encoder.layer_norm", "decoder.layer_norm"),
    },
)
