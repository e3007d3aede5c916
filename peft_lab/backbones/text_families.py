"""Families of text backbones.

Encoders, decoders and encoder-decoders. Data only.
"""

from __future__ import annotations

from peft_lab.backbones.family import Family, ResidualConnection, attention, families, in_blocks, post_norm, pre_norm

TEXT: dict[str, Family] = {}

# Text encoders ------------------------------------------------------------------------------------------------------

_BERT_BLOCK = {
    **attention("attention.self", "query", "key", "value", "attention.output.dense"),
    **in_blocks(mlp_up="intermediate.dense", mlp_down="output.dense"),
    **in_blocks(norm="attention.output.LayerNorm output.LayerNorm"),
    "embed.token": ("embeddings.word_embeddings",),
    "norm.embed": ("embeddings.LayerNorm",),
}
_BERT_RESIDUAL = post_norm(
    ("attention", "attention.output.dropout", "attention.output.LayerNorm"),
    ("mlp", "output.dropout", "output.LayerNorm"),
)

TEXT |= families(
    "bert roberta xlm-roberta camembert electra ernie data2vec-text",
    blocks=("encoder.layer.*",),
    roles=_BERT_BLOCK,
    residual=_BERT_RESIDUAL,
)
TEXT |= families(
    "deberta-v2",
    blocks=("encoder.layer.*",),
    roles={
        **_BERT_BLOCK,
        **attention("attention.self", "query_proj", "key_proj", "value_proj", "attention.output.dense"),
    },
    residual=_BERT_RESIDUAL,
    position_biases=("relative_pos",),
)
# Unlike its second version, DeBERTa holds query, key and value in one matrix.
TEXT |= families(
    "deberta",
    blocks=("encoder.layer.*",),
    roles={
        **{role: paths for role, paths in _BERT_BLOCK.items() if role not in ("attn.q", "attn.k", "attn.v")},
        **in_blocks(attn_qkv="attention.self.in_proj"),
    },
    residual=_BERT_RESIDUAL,
    position_biases=("relative_pos",),
)
TEXT |= families(
    "mpnet",
    blocks=("encoder.layer.*",),
    roles={
        **_BERT_BLOCK,
        **attention("attention.attn", "q", "k", "v", "attention.attn.o"),
        **in_blocks(norm="attention.LayerNorm output.LayerNorm"),
    },
    residual=post_norm(
        ("attention", "attention.dropout", "attention.LayerNorm"), ("mlp", "output.dropout", "output.LayerNorm")
    ),
    position_biases=("position_bias",),
)
# ALBERT's layers share the blocks of a group, so its indices count groups and not layers.
TEXT |= families(
    "albert",
    blocks=("encoder.albert_layer_groups.*.albert_layers.*",),
    roles={
        **_BERT_BLOCK,
        **attention("attention", "query", "key", "value", "attention.dense"),
        **in_blocks(mlp_up="ffn", mlp_down="ffn_output", norm="attention.LayerNorm full_layer_layer_norm"),
    },
    # No dropout stands behind ALBERT's MLP, so its last linear layer gives the summand.
    residual=post_norm(
        ("attention", "attention.output_dropout", "attention.LayerNorm"), ("mlp", "ffn_output", "full_layer_layer_norm")
    ),
)
TEXT |= families(
    "distilbert",
    blocks=("transformer.layer.*",),
    roles={
        **_BERT_BLOCK,
        **attention("attention", "q_lin", "k_lin", "v_lin", "attention.out_lin"),
        **in_blocks(mlp_up="ffn.lin1", mlp_down="ffn.lin2", norm="sa_layer_norm output_layer_norm"),
    },
    # DistilBERT has a dropout behind its MLP, but none behind its attention.
    residual=post_norm(
        ("attention", "attention.out_lin", "sa_layer_norm"), ("mlp", "ffn.dropout", "output_layer_norm")
    ),
)
TEXT |= families(
    "modernbert",
    blocks=("layers.*",),
    roles={
        **in_blocks(attn_qkv="attn.Wqkv", attn_out="attn.Wo", mlp_fused="mlp.Wi", mlp_down="mlp.Wo"),
        **in_blocks(norm="attn_norm mlp_norm"),
        "embed.token": ("embeddings.tok_embeddings",),
        "norm.embed": ("embeddings.norm",),
        "norm.final": ("final_norm",),
    },
    residual=pre_norm(("attention", "attn_norm", "attn.out_drop"), ("mlp", "mlp_norm", "mlp")),
    bias_flags=("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"),
)

# Decoders -----------------------------------------------------------------------------------------------------------

# One list serves all these families: a norm that a family lacks matches nothing.
_LLAMA = {
    **attention("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.o_proj"),
    **in_blocks(mlp_up="mlp.up_proj", mlp_gate="mlp.gate_proj", mlp_down="mlp.down_proj"),
    "norm": tuple(
        f"{{block}}.{name}_layernorm" for name in ("input", "post_attention", "pre_feedforward", "post_feedforward")
    ),
    "norm.qk": ("{block}.self_attn.q_norm", "{block}.self_attn.k_norm"),
    "embed.token": ("embed_tokens",),
    "norm.final": ("norm",),
}

# Attention returns a tuple, so its last layer, which returns a tensor, stands for it.
_LLAMA_RESIDUAL = pre_norm(
    ("attention", "input_layernorm", "self_attn.o_proj"), ("mlp", "post_attention_layernorm", "mlp")
)
# A second norm stands behind each sub-layer, before the addition.
_GEMMA2_RESIDUAL = pre_norm(
    ("attention", "input_layernorm", "post_attention_layernorm"),
    ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
# OLMo 2 normalises what a sub-layer gives and never the stream that it reads.
_OLMO2_RESIDUAL = pre_norm(("attention", "", "post_attention_layernorm"), ("mlp", "", "post_feedforward_layernorm"))

for _types, _residual, _flags in (
    ("llama smollm3", _LLAMA_RESIDUAL, ("attention_bias", "mlp_bias")),
    ("granite", _LLAMA_RESIDUAL, ("attention_bias", "mlp_bias")),
    ("seed_oss", _LLAMA_RESIDUAL, ("attention_bias", "attention_out_bias", "mlp_bias")),
    # The experts of a mixture are one parameter and no modules: target_parameters names them.
    ("qwen3 gemma olmo qwen3_moe olmoe", _LLAMA_RESIDUAL, ("attention_bias",)),
    ("mistral ministral qwen2 mixtral", _LLAMA_RESIDUAL, ()),
    ("gemma2 gemma3_text", _GEMMA2_RESIDUAL, ("attention_bias",)),
    ("olmo2", _OLMO2_RESIDUAL, ("attention_bias",)),
):
    TEXT |= families(
        _types,
        blocks=("layers.*",),
        roles=_LLAMA,
        residual=_residual,
        residual_multiplier="residual_multiplier" if _types == "granite" else "",
        bias_flags=_flags,
    )
# One expert that all tokens pass stands beside the others.
TEXT |= families(
    "qwen2_moe",
    blocks=("layers.*",),
    roles={
        **_LLAMA,
        **in_blocks(mlp_up="mlp.up_proj mlp.shared_expert.up_proj"),
        **in_blocks(mlp_gate="mlp.gate_proj mlp.shared_expert.gate_proj"),
        **in_blocks(mlp_down="mlp.down_proj mlp.shared_expert.down_proj"),
    },
    residual=_LLAMA_RESIDUAL,
)
TEXT |= families(
    "phi3",
    blocks=("layers.*",),
    roles={
        **in_blocks(attn_qkv="self_attn.qkv_proj", attn_out="self_attn.o_proj", norm="input_layernorm"),
        **in_blocks(mlp_fused="mlp.gate_up_proj", mlp_down="mlp.down_proj"),
        "norm": ("{block}.input_layernorm", "{block}.post_attention_layernorm"),
        "embed.token": ("embed_tokens",),
        "norm.final": ("norm",),
    },
    residual=pre_norm(
        ("attention", "input_layernorm", "resid_attn_dropout"), ("mlp", "post_attention_layernorm", "resid_mlp_dropout")
    ),
)
TEXT |= families(
    "phi",
    blocks=("layers.*",),
    roles={
        **attention("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.dense"),
        **in_blocks(mlp_up="mlp.fc1", mlp_down="mlp.fc2", norm="input_layernorm"),
        "norm.qk": ("{block}.self_attn.q_layernorm", "{block}.self_attn.k_layernorm"),
        "embed.token": ("embed_tokens",),
        "norm.final": ("final_layernorm",),
    },
    # Both read one norm, so the dropout that both end with would not tell them apart.
    residual=pre_norm(("attention", "input_layernorm", "self_attn.dense"), ("mlp", "input_layernorm", "mlp")),
)
TEXT |= families(
    "gpt2",
    blocks=("h.*",),
    roles={
        **in_blocks(attn_qkv="attn.c_attn", attn_out="attn.c_proj", mlp_up="mlp.c_fc", mlp_down="mlp.c_proj"),
        **in_blocks(norm="ln_1 ln_2"),
        "embed.token": ("wte",),
        "norm.final": ("ln_f",),
    },
    residual=pre_norm(("attention", "ln_1", "attn.resid_dropout"), ("mlp", "ln_2", "mlp")),
)
TEXT |= families(
    "opt",
    blocks=("decoder.layers.*",),
    roles={
        **attention("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.out_proj"),
        **in_blocks(mlp_up="fc1", mlp_down="fc2", norm="self_attn_layer_norm final_layer_norm"),
        "embed.token": ("decoder.embed_tokens",),
        "norm.final": ("decoder.final_layer_norm",),
    },
    residual=pre_norm(("attention", "self_attn_layer_norm", "self_attn.out_proj"), ("mlp", "final_layer_norm", "fc2")),
    norm_first_flag="do_layer_norm_before",
    bias_flags=("enable_bias",),
)

# Encoder-decoders ---------------------------------------------------------------------------------------------------


def _both_attentions(own: str, cross: str, q: str, k: str, v: str, out: str) -> dict[str, tuple[str, ...]]:
    roles: dict[str, tuple[str, ...]] = {}
    for part, name in {"q": q, "k": k, "v": v, "out": out}.items():
        roles[f"cross.{part}"] = (f"{{block}}.{cross}.{name}",)
        roles[f"attn.{part}"] = (f"{{block}}.{own}.{name}", *roles[f"cross.{part}"])
    return roles


TEXT |= families(
    "t5 mt5 umt5",
    blocks=("encoder.block.*", "decoder.block.*"),
    roles={
        **_both_attentions("layer.*.SelfAttention", "layer.*.EncDecAttention", "q", "k", "v", "o"),
        # Gated versions have wi_0 (the gate) and wi_1 in place of wi.
        **in_blocks(mlp_up="layer.*.DenseReluDense.wi layer.*.DenseReluDense.wi_1"),
        **in_blocks(mlp_gate="layer.*.DenseReluDense.wi_0", mlp_down="layer.*.DenseReluDense.wo"),
        **in_blocks(norm="layer.*.layer_norm"),
        "embed.token": ("shared",),
        "norm.final": ("encoder.final_layer_norm", "decoder.final_layer_norm"),
    },
    residual=(
        # The sub-layers are numbered, and the encoder's second one is the MLP.
        ResidualConnection("attention", "layer.0.layer_norm", "layer.0.dropout"),
        ResidualConnection(
            "cross_attention", "layer.1.layer_norm", "layer.1.dropout", only_with="layer.1.EncDecAttention"
        ),
        ResidualConnection("mlp", "layer.1.layer_norm", "layer.1.dropout", only_with="layer.1.DenseReluDense"),
        ResidualConnection("mlp", "layer.2.layer_norm", "layer.2.dropout"),
    ),
    position_biases=("position_bias",),
)
SEQ2SEQ_BLOCK = {
    **_both_attentions("self_attn", "encoder_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    **in_blocks(mlp_up="fc1", mlp_down="fc2"),
    **in_blocks(norm="self_attn_layer_norm encoder_attn_layer_norm final_layer_norm"),
}
SEQ2SEQ_PRE_NORM = pre_norm(
    ("attention", "self_attn_layer_norm", "self_attn.out_proj"),
    ("cross_attention", "encoder_attn_layer_norm", "encoder_attn.out_proj"),
    ("mlp", "final_layer_norm", "fc2"),
)
_SEQ2SEQ_POST_NORM = post_norm(
    ("attention", "self_attn.out_proj", "self_attn_layer_norm"),
    ("cross_attention", "encoder_attn.out_proj", "encoder_attn_layer_norm"),
    ("mlp", "fc2", "final_layer_norm"),
)
# BART has no final norms, mBART has them: a path that a model lacks matches nothing.
_BART = {
    **SEQ2SEQ_BLOCK,
    "embed.token": ("shared",),
    "norm.embed": ("encoder.layernorm_embedding", "decoder.layernorm_embedding"),
    "norm.final": ("encoder.layer_norm", "decoder.layer_norm"),
}
for _types, _residual in (("bart", _SEQ2SEQ_POST_NORM), ("mbart", SEQ2SEQ_PRE_NORM)):
    TEXT |= families(_types, blocks=("encoder.layers.*", "decoder.layers.*"), roles=_BART, residual=_residual)
