"""Stacks of transformer blocks in a model, and their facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from peft_lab.backbones import module_roles
from peft_lab.backbones.family_table import FAMILIES
from peft_lab.backbones.prefix_tokens import prefix_tokens
from peft_lab.backbones.prompt_support import PREFERRED_STACKS, PROMPT_SUPPORT
from peft_lab.backbones.residual_stream import residual_connections
from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.tuners.sequence import window_attention
from peft_lab.tuners.sequence.prompt_state import can_continue

#: Names of the biases for pairs of positions in any family.
_POSITION_BIASES = sorted(set().union(*(family.position_biases for family in FAMILIES.values())))


@dataclass(frozen=True)
class StackInfo:
    """Facts of one stack, the same for all of its blocks.

    Attributes:
        settings: config of the stack.
        widths: width of the hidden states of each block.
        attends: for each block, True if it has attention; a convolution or a recurrence has none.
        causal: True if no block lets a token see later ones.
        norms: norms before (`norm.stem`) and behind (`norm.final`) all blocks, as a module and a name in it, because a
            norm may be wrapped later.
        classes: number of labels of the model.
        prefix_tokens: class and register tokens of a vision transformer, which stand before the patches; 0 for text.
        position_biases: arguments of a block that hold a bias for each pair of positions.
        rotary_in_block: True if each block makes rotary positions from `position_ids` by itself.
    """

    settings: Any
    widths: tuple[int, ...]
    attends: tuple[bool, ...]
    causal: bool
    norms: dict[str, tuple[nn.Module, str]]
    classes: int
    prefix_tokens: int
    position_biases: tuple[str, ...]
    rotary_in_block: bool


def stack_info(model: nn.Module, path: str, blocks: list[str]) -> StackInfo:
    """Collect the facts of the stack at a path of a model."""
    stack: Any = model.get_submodule(path)
    modules = [model.get_submodule(block) for block in blocks]
    widths = []
    for module in modules:
        windowed = window_attention.has_windows(module)
        widths.append(window_attention.width(module) if windowed else stack.config.hidden_size)
    # Attention of transformers declares `is_causal`; where no block does, a block's attention is unknown.
    declared = [_causal_flags(module) for module in modules]
    some_declared = any(declared)
    model_type = stack.config.model_type
    family = FAMILIES.get(model_type)
    return StackInfo(
        settings=stack.config,
        widths=tuple(widths),
        attends=tuple(bool(flags) or not some_declared for flags in declared),
        causal=any(map(any, declared)) if some_declared else _reads_from_the_left(model, stack),
        norms=norms_around(model, path),
        classes=getattr(getattr(model, "config", None), "num_labels", 0),
        prefix_tokens=prefix_tokens(model, path),
        position_biases=tuple(_POSITION_BIASES) if family is None else family.position_biases,
        rotary_in_block=PROMPT_SUPPORT[model_type].rotary_in_block if model_type in PROMPT_SUPPORT else False,
    )


def _causal_flags(block: nn.Module) -> list[bool]:
    return [bool(module.is_causal) for module in block.modules() if hasattr(module, "is_causal")]


def _reads_from_the_left(model: Any, stack: Any) -> bool:
    """Guess whether a stack is causal if its attention declares none."""
    is_text = stack.main_input_name == "input_ids" and not model.config.is_encoder_decoder
    return is_text and can_continue(model)


def norms_around(model: nn.Module, stack: str) -> dict[str, tuple[nn.Module, str]]:
    """Norms around the blocks of a stack, by role.

    They are in the stack or, as DINOv2's, in a module around it. Each is a module and a name in it.
    """
    found = {}
    for role in ("norm.stem", "norm.final"):
        homes = [name.rpartition(".") for name in module_roles.modules_by_role(model, role)]
        around = []
        for home, _, name in homes:
            if not home or f"{stack}.".startswith(f"{home}."):
                around.append((home, name))
        # The innermost module around the blocks holds their norm.
        if around:
            home, name = max(around, key=lambda found: len(found[0]))
            found[role] = (model.get_submodule(home), name)
    return found


def stacks_of(model: nn.Module) -> dict[str, list[str]]:
    """Paths of each stack's blocks, by the path of the stack.

    A stack is the innermost `PreTrainedModel` around its blocks.
    """
    found: dict[str, list[str]] = {}
    for block in module_roles.modules_by_role(model, "block"):
        parts = block.split(".")
        parents = (".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1))
        stack = next((p for p in parents if isinstance(model.get_submodule(p), PreTrainedModel)), "")
        found.setdefault(stack, []).append(block)
    return found


def chosen_stack(model: nn.Module, name: str | None) -> tuple[str, list[str]]:
    """Path of the prompted stack, and paths of its blocks.

    Raises:
        ConfigError: the model has no blocks, or no stack of that name.
    """
    stacks = {path: blocks for path, blocks in stacks_of(model).items() if _is_transformer(model.get_submodule(path))}
    if not stacks:
        raise ConfigError(
            f"{type(model).__name__} has no stack of transformer blocks with hidden_size and num_attention_heads in "
            "its config, so prompts have no place in it; take a method that adapts weights."
        )
    if name is not None:
        found = next((path for path in stacks if path == name or path.endswith(f".{name}")), None)
        if found is None:
            shown = ", ".join(path or "the model itself" for path in stacks)
            raise ConfigError(f'stack="{name}" is none of {shown}.{did_you_mean(name, stacks)}')
        return found, stacks[found]
    # Without a choice the stack that is named like a vision tower or an encoder comes first.
    for word in PREFERRED_STACKS:
        for path in stacks:
            if word in path.lower():
                return path, stacks[path]
    return next(iter(stacks.items()))


def encoder_outputs(model: nn.Module) -> list[str]:
    """Paths of the norms whose outputs are the tokens of the model's text encoders.

    One for each encoder: the norm behind its blocks, or, post-norm, the last one in its last block.

    Raises:
        ConfigError: the model has no text encoder, or none whose output is that of one norm.
    """
    found = []
    for path, blocks in stacks_of(model).items():
        stack: Any = model.get_submodule(path)
        if stack.main_input_name == "input_ids" and not stack_info(model, path, blocks).causal:
            found.append(_output_norm(model, path, blocks))
    if not found or "" in found:
        reason = "has no text encoder" if not found else "has a text encoder whose output is that of no single norm"
        raise ConfigError(f"{type(model).__name__} {reason}: take a method that adapts its weights.")
    return found


def _output_norm(model: nn.Module, path: str, blocks: list[str]) -> str:
    """Path of the norm that gives a stack's output; "" if there is none that does so alone."""
    stack: Any = model.get_submodule(path)
    inside = f"{path}." if path else ""
    final = [name for name in module_roles.modules_by_role(model, "norm.final") if name.startswith(inside)]
    if final:
        return final[-1]
    family = FAMILIES.get(stack.config.model_type)
    # ALBERT runs few blocks many times, so the norm of its last block is not only the last norm.
    if family is None or len(blocks) < getattr(stack.config, "num_hidden_layers", 0):
        return ""
    connections = residual_connections(family, model.get_submodule(blocks[-1]), stack.config)
    norm = connections[-1].norm_after if connections else ""
    return f"{blocks[-1]}.{norm}" if norm else ""


def _is_transformer(stack: nn.Module) -> bool:
    return hasattr(stack.config, "hidden_size") and hasattr(stack.config, "num_attention_heads")
