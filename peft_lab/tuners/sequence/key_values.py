"""Trained keys and values in front of those of a text, in the attention of each block (prefix tuning).

Source: Li and Liang 2021, Prefix-Tuning, arXiv:2101.00190; Liu et al. 2021, P-Tuning v2, arXiv:2110.07602.

A block gets a place in its sequence for each of them, as it does for prompts that are tokens: so masks, padding, KV
caches, decoding and mixed batches are the same. What the block's projections make of these places is replaced by the
trained keys and values, by hooks inside the block, and what comes out of the block there is dropped. As in the papers'
code and in peft, the keys are not rotated, and a text with positions begins behind them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_lab.backbones.family_table import FAMILIES
from peft_lab.errors import ConfigError
from peft_lab.tuners.forward_context import ForwardContext
from peft_lab.tuners.mixed_batch import RowAdapters
from peft_lab.tuners.tensor_parallel import is_split, own_channels
from peft_lab.tuners.tokens import parameter_names

#: Part of `ForwardContext.shared` keys, beside the layer, for the places of keys and values in a call.
_PLACES = "key_values"


class Projection(NamedTuple):
    """Module of a block that makes keys or values.

    Attributes:
        path: path of the module in the block.
        start: index of the first key or value channel in its output.
        width: number of these channels; with grouped queries fewer than the hidden states have.
    """

    path: str
    start: int
    width: int


class _Place(NamedTuple):
    """Places of one adapter's keys in a call: rows, int64, or None for all, and their range in the sequence."""

    adapter: str
    rows: Tensor | None
    start: int
    end: int


def projections(block: nn.Module, model_type: str) -> tuple[Projection, Projection]:
    """Find the modules of a block that make its keys and its values.

    Raises:
        ConfigError: the attention of such a block is not known to read keys and values that stand by themselves.
    """
    family = FAMILIES.get(model_type)
    # Attention that projects distances by the same matrices, or cuts its keys into windows, has no place for others.
    if family is not None and family.windows is None and "relative_pos" not in family.position_biases:
        fused, outputs = _paths(block, family.roles, "attn.qkv"), _paths(block, family.roles, "attn.out", "cross.out")
        if fused and outputs:
            # What goes into the output projection has the width of the queries.
            out: Any = block.get_submodule(outputs[0])
            queries = out.nx if hasattr(out, "nx") else out.in_features
            width = (_channels(block, fused[0]) - queries) // 2
            return Projection(fused[0], queries, width), Projection(fused[0], queries + width, width)
        keys, values = (_paths(block, family.roles, f"attn.{part}", f"cross.{part}") for part in "kv")
        if keys and values:
            width = _channels(block, keys[0])
            return Projection(keys[0], 0, width), Projection(values[0], 0, width)
    raise ConfigError(
        f'Model type "{model_type}" has no place for trained keys and values in {type(block).__name__}; leave out '
        "key_values, which gives prompts that are tokens."
    )


def _paths(block: nn.Module, roles: Any, role: str, but: str = "") -> list[str]:
    """Paths in a block of the modules with a role, without those of another one."""
    found = []
    for name, _ in block.named_modules():
        if _has(name, roles.get(role, ())) and not _has(name, roles.get(but, ())):
            found.append(name)
    return found


def _has(name: str, patterns: Sequence[str]) -> bool:
    inside = [
        re.escape(p.removeprefix("{block}.")).replace(r"\*", r"\d+") for p in patterns if p.startswith("{block}.")
    ]
    return any(re.fullmatch(pattern, name) for pattern in inside)


def _channels(block: nn.Module, path: str) -> int:
    """Number of output channels of a linear layer, GPT-2's included."""
    module: Any = block.get_submodule(path)
    return int(module.nf if hasattr(module, "nf") else module.out_features)


def hook(layer: Any) -> None:
    """Register the hooks in a layer's block that write trained keys and values, once."""
    block, model_type = layer.base_layer, layer.stack.settings.model_type
    keys, values = projections(block, model_type)
    # A norm of each head's keys stands between the projection and the attention, and would change trained ones.
    norms = [n for n in _paths(block, FAMILIES[model_type].roles, "norm.qk") if n.rpartition(".")[2].startswith("k")]
    # Tensor parallelism gives a process whole heads, which stand for other channels in a fused projection.
    if is_split(block.get_submodule(keys.path)) and (norms or keys.start):
        raise ConfigError(
            f'Trained keys of "{model_type}" do not go with tensor parallelism; leave out key_values or tp_plan.'
        )
    for number, (path, start, width) in enumerate(((norms[0], 0, keys.width) if norms else keys, values)):
        module = block.get_submodule(path)
        known = [h for h in module._forward_hooks.values() if isinstance(h, WriteKeyValues) and h.number == number]
        if not known:
            module.register_forward_hook(WriteKeyValues(layer, number, start, width))


class WriteKeyValues:
    """Hook of a projection that puts a layer's trained keys, or values, in their places.

    Attributes:
        layer: the layer around the block.
        number: 0 for keys, 1 for values.
        channels: the channels of the output that hold them.
    """

    def __init__(self, layer: Any, number: int, start: int, width: int) -> None:
        self.layer, self.number, self.channels = layer, number, slice(start, start + width)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        context = ForwardContext.current()
        places = () if context is None else context.shared.get((self.layer, _PLACES), ())
        if not places:
            return output
        output = output.clone()
        # A norm of keys gets them by heads, some before and some behind the exchange of heads and tokens.
        by_token = output.transpose(1, 2) if output.ndim == 4 and _heads_first(args[0]) else output
        for adapter, rows, start, end in places:
            new = self.layer.key_values(adapter)[self.number].to(output.dtype)
            new = own_channels(module, new, output) if output.ndim == 3 else new
            if output.ndim == 4:
                by_token[slice(None) if rows is None else rows, start:end] = new.unflatten(-1, by_token.shape[2:])
            else:
                by_token[slice(None) if rows is None else rows, start:end, self.channels] = new
        return output


def _heads_first(keys: Tensor) -> bool:
    """Test whether keys (batch, ..., ..., channels) have their heads before the tokens.

    Both come from one projection, in which the channels of all heads of a token lie together.
    """
    return keys.stride(1) < keys.stride(2) or keys.shape[1] == 1


def place(layer: Any, active: Sequence[str], rows: RowAdapters | None, state: Any, at: int) -> None:
    """Record where a call's trained keys and values stand, before the block of a layer runs."""
    count, size, device = state.states.shape[1], state.states.shape[0], state.states.device
    places = []
    for name in active if rows is None else rows.names:
        config = layer.configs.get(name)
        # Prompts stand at the right of those that a row does not have.
        if config is not None and config.key_value_tokens and config.may_write(layer.depth):
            index = None if rows is None else rows.of_adapter(name, size, device)
            places.append(_Place(name, index, at + count - config.key_value_tokens, at + count))
    state.context.shared[layer, _PLACES] = places


def drop(layer: Any, active: Sequence[str], rows: RowAdapters | None, state: Any) -> None:
    """Take out of the state what a block made of the places of trained keys, which goes into no other block."""
    gone = []
    for name in active if rows is None else rows.names:
        if name in layer.configs and layer.configs[name].key_value_tokens:
            gone.append(name)
    if not gone or state.states is None:
        return
    if rows is None:
        state.states = state.unused = None
        return
    unused = torch.zeros_like(state.states[..., 0], dtype=torch.bool) if state.unused is None else state.unused.clone()
    for name in gone:
        unused[rows.of_adapter(name, len(unused), unused.device)] = True
    state.unused = unused


def shift_positions(stack: nn.Module, state: Any, kwargs: dict[str, Any]) -> None:
    """Let a text with positions begin behind the trained keys.

    Raises:
        ConfigError: the table of positions is too short for both.
    """
    if "position_ids" not in parameter_names(type(stack).forward):
        return
    table, layer = None, None
    for name, module in stack.named_modules():
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe")):
            table = module
        if hasattr(module, "text_shift"):
            layer = module
            break
    given = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
    shift = 0 if layer is None else layer.text_shift(given.shape[0], given.device)
    if isinstance(shift, int) and not shift:
        return
    ids = kwargs.get("position_ids")
    if ids is None:
        counted = state.mask is not None and state.mask.shape[1] == given.shape[1]
        ids = torch.arange(given.shape[1], device=given.device)[None]
        ids = (state.mask.cumsum(1) - 1).clamp(min=0) if counted else ids
        # A table with an entry for padding counts from the one behind it.
        ids = ids + (table.padding_idx + 1 if table is not None and table.padding_idx is not None else 0)
    kwargs["position_ids"] = ids = ids + shift
    if table is not None and int(ids.max()) >= table.num_embeddings:
        raise ConfigError(
            f"A text of {int((ids - shift).max()) + 1} positions and trained keys in front of it do not fit into the "
            f"{table.num_embeddings} positions of {type(stack).__name__}: cut the text, or take fewer tokens."
        )
