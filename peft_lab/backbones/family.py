"""Facts about a backbone family: roles, residual connections, names, flags.

Strings only.

A path is written relative to the backbone's root, with `*` for a block or list index and `{block}` for the path of one
block. Module names are those of transformers 5.23; `aliases` hold the names of other versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft_lab.backbones.name_aliases import Renames, renames_of

#: Role -> its meaning. The set is closed.
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

#: Roles that the role `linear` is made of.
LINEAR: tuple[str, ...] = (
    *("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out"),
    *("mlp.up", "mlp.gate", "mlp.fused", "mlp.down", "conv", "conv.pointwise"),
)

_CONVOLUTIONS = (("conv.pointwise",), ("conv",))

#: Substitutes for a role that a family lacks: the first group of which the family has any role.
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


class ResidualConnection(NamedTuple):
    """Residual connection around a sub-layer: stream + sub-layer(stream).

    Paths are relative to the block.

    The stream enters through `norm_before`. Without such a norm it is the block's input for the first sub-layer, and
    the result of the sub-layer before for the others. The result is the output of `norm_after`; without one, the sum.

    Attributes:
        sub_layer: "attention", "cross_attention" or "mlp".
        norm_before: norm that reads the stream (pre-norm); "" if there is none.
        output: last module before the addition, whose output (a tensor) is the summand. Two sub-layers may end with the
            same module (a shared dropout or drop path): then its first call behind `norm_before` is meant.
        norm_after: norm behind the addition (post-norm); "" if there is none.
        only_with: a further module of the blocks that have this sub-layer, where its paths mean another one elsewhere;
            "" if they do not.
    """

    sub_layer: str
    norm_before: str
    output: str
    norm_after: str = ""
    only_with: str = ""


class WindowNames(NamedTuple):
    """Names in a block that attends within windows, such as Swin's.

    Attributes:
        grid: argument of the block with height and width of the grid.
        norm_before: norm of the tokens (batch, tokens, dim) before they are cut into windows.
        attention: module that gets windows (batch x windows, cells, dim) and a mask (windows, cells, cells).
        bias: module that makes the relative position bias, inside `attention`.
        dropout: dropout of the attention output, still in windows.
        output: module between the tokens put together again and the residual connection.
        downsample: attribute of a stage that merges patches behind its blocks.
    """

    grid: str
    norm_before: str
    attention: str
    bias: str
    dropout: str
    output: str
    downsample: str


@dataclass(frozen=True)
class Family:
    """Facts about the backbones of one `model_type`.

    Attributes:
        name: the `model_type` of transformers.
        blocks: path of a block, one per stack of blocks.
        roles: role -> paths.
        op: the roles that make up `op`.
        aliases: (name in older versions, name in transformers 5.23) of path fragments; each stands for itself only.
        prefixes: attributes under which the backbone may sit, besides the class's `base_model_prefix`.
        residual: the sub-layers of a block in the order in which they run; none for convolutional nets without an MLP.
            Parallel sub-layers (Phi) read the same norm.
        norm_first_flag: config flag that is False where the norms stand behind the additions, against `residual`.
        residual_multiplier: config attribute by which summands are scaled before the addition (Granite).
        position_biases: arguments of a block that hold a bias for each pair of positions, added to attention scores.
        prefix_tokens: parameters of the embedding with tokens that stand before the patches.
        patch_heads: classes whose head reads the patches alone although there is a class token.
        final_norm_of_pooled: True if `norm.final` reads the pooled token alone, so that the last hidden states of a
            transformer come without it.
        bias_flags: config flags, False by default in some checkpoint, that give linear layers or norms a bias.
        windows: names in a block that attends within windows; None if attention sees all tokens.
        library: package beside transformers that holds the models; "" for none.
    """

    name: str
    blocks: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]]
    op: tuple[str, ...] = ("linear", "norm", "norm.qk")
    aliases: tuple[tuple[str, str], ...] = ()
    prefixes: tuple[str, ...] = ()
    residual: tuple[ResidualConnection, ...] = ()
    norm_first_flag: str = ""
    residual_multiplier: str = ""
    position_biases: tuple[str, ...] = ()
    prefix_tokens: tuple[str, ...] = ()
    patch_heads: tuple[str, ...] = ()
    final_norm_of_pooled: bool = False
    bias_flags: tuple[str, ...] = ()
    windows: WindowNames | None = None
    library: str = ""

    @property
    def renames(self) -> Renames:
        """The aliases, ready to apply."""
        return renames_of(self.aliases)

    def has(self, role: str) -> bool:
        """Test whether the family declares the role, alone or as a group."""
        return bool(self.paths(role))

    def paths(self, role: str) -> tuple[tuple[str, str], ...]:
        """Return the role's paths as (block or "", path below it).

        Each is there once, in the table's order.
        """
        if role == "block":
            return tuple((block, "") for block in self.blocks)
        # A made-up family lists its linear layers itself because it has no narrower roles.
        if role in ("linear", "op") and role not in self.roles:
            members = LINEAR if role == "linear" else self.op
            return tuple(dict.fromkeys(p for member in members for p in self.paths(member)))
        found: list[tuple[str, str]] = []
        for path in self.roles.get(role, ()):
            if path.startswith("{block}."):
                # Every stack is tried: a path that one lacks (cross-attention in an encoder) matches nothing.
                found += [(block, path.removeprefix("{block}.")) for block in self.blocks]
            else:
                # A made-up family spells the block out, because each of its stacks has paths of its own.
                block = next((block for block in self.blocks if path.startswith(f"{block}.")), "")
                found.append((block, path.removeprefix(f"{block}.") if block else path))
        return tuple(found)


def in_blocks(**roles: str) -> dict[str, tuple[str, ...]]:
    """Roles inside the blocks: `attn_q="self_attn.q_proj"`, alternatives separated by a space."""
    found = {}
    for role, paths in roles.items():
        # Roles are spelt with a dot, which keyword arguments cannot have.
        found[role.replace("_", ".")] = tuple(f"{{block}}.{path}" for path in paths.split())
    return found


def attention(path: str, q: str, k: str, v: str, out: str) -> dict[str, tuple[str, ...]]:
    """Roles of the four projections of an attention module at `path` in a block."""
    return in_blocks(attn_q=f"{path}.{q}", attn_k=f"{path}.{k}", attn_v=f"{path}.{v}", attn_out=out)


def pre_norm(*parts: tuple[str, str, str]) -> tuple[ResidualConnection, ...]:
    """Residual connections with the norm before the sub-layer, from (sub-layer, norm, output)."""
    return tuple(ResidualConnection(sub_layer, norm, output) for sub_layer, norm, output in parts)


def post_norm(*parts: tuple[str, str, str]) -> tuple[ResidualConnection, ...]:
    """Residual connections with the norm behind the addition, from (sub-layer, output, norm)."""
    return tuple(ResidualConnection(sub_layer, "", output, norm) for sub_layer, output, norm in parts)


def families(model_types: str, **facts: Any) -> dict[str, Family]:
    """Return one `Family` with the same facts for each model type.

    The model types are separated by spaces.
    """
    return {name: Family(name=name, **facts) for name in model_types.split()}
