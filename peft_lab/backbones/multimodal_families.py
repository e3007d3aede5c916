"""Families of backbones that fuse text and images: BLIP's two towers.

Data only.
"""

from __future__ import annotations

from peft_lab.backbones.family import Family, families, in_blocks, post_norm, pre_norm
from peft_lab.backbones.vision_families import VISION_OP

MULTIMODAL: dict[str, Family] = {}

MULTIMODAL |= families(
    "blip_vision_model",
    blocks=("encoder.layers.*",),
    roles={
        **in_blocks(attn_qkv="self_attn.qkv", attn_out="self_attn.projection"),
        **in_blocks(mlp_up="mlp.fc1", mlp_down="mlp.fc2", norm="layer_norm1 layer_norm2"),
        "embed.patch": ("embeddings.patch_embedding",),
        "norm.final": ("post_layernorm",),
    },
    op=VISION_OP,
    prefixes=("vision_model",),
    residual=pre_norm(("attention", "layer_norm1", "self_attn.projection"), ("mlp", "layer_norm2", "mlp")),
    prefix_tokens=("class_embedding",),
)
# Its blocks attend to the image in the calls that give one, and read text alone in the others.
MULTIMODAL |= families(
    "blip_text_model",
    blocks=("encoder.layer.*",),
    roles={
        **in_blocks(attn_q="attention.self.query crossattention.self.query", cross_q="crossattention.self.query"),
        **in_blocks(attn_k="attention.self.key crossattention.self.key", cross_k="crossattention.self.key"),
        **in_blocks(attn_v="attention.self.value crossattention.self.value", cross_v="crossattention.self.value"),
        **in_blocks(attn_out="attention.output.dense crossattention.output.dense"),
        **in_blocks(cross_out="crossattention.output.dense"),
        **in_blocks(mlp_up="intermediate.dense", mlp_down="output.dense"),
        **in_blocks(norm="attention.output.LayerNorm crossattention.output.LayerNorm output.LayerNorm"),
        "embed.token": ("embeddings.word_embeddings",),
        "norm.embed": ("embeddings.LayerNorm",),
    },
    prefixes=("text_model", "text_encoder"),
    residual=post_norm(
        ("attention", "attention.output.dropout", "attention.output.LayerNorm"),
        ("cross_attention", "crossattention.output.dropout", "crossattention.output.LayerNorm"),
        ("mlp", "output.dropout", "output.LayerNorm"),
    ),
)
