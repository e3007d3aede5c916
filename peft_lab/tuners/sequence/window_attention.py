"""Prompts in blocks with window attention (Swin).

Every window gets the prompts, and they are averaged over the windows. Tokens of such a block are the cells of a grid,
so prompts cannot stand among them all the way. They go through the norms, the MLP and the residual connections beside
the tokens; hooks take them out before the grid is cut into windows, put them into each window, where bias and shift
mask are zero for them, and bring their mean over the windows back. Where patches are merged between stages, a prompt is
merged as if it were a patch of four cells with this one value.

A context variable, set around the block, holds the state of the hooks, so the block is checkpointed from out here: its
own checkpointing would run it again without. A stage around the blocks is not checkpointed as a whole, because prompts
leave it beside its outputs; each of its blocks is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_lab.backbones.family_table import FAMILIES
from peft_lab.tuners.forward_context import ForwardContext
from peft_lab.tuners.sequence.attention_inputs import extend_bias
from peft_lab.tuners.tokens import insert, parameter_names, split


@dataclass
class Prompts:
    """Prompts of one run of a block.

    Attributes:
        count: their number.
        at: number of tokens before them.
        unused: bool (batch, prompts), the prompts that a row does not have; None if every row has all.
        inside: their hidden states (batch, prompts, dim) while they are not among the tokens.
    """

    count: int
    at: int
    unused: Tensor | None
    inside: Tensor | None = None


#: Names of the modules in a block with windows; the role table has one family of them.
_NAMES = next(family.windows for family in FAMILIES.values() if family.windows is not None)

#: The running block and its prompts, for the hooks.
_RUNNING: ContextVar[tuple[Any, Prompts] | None] = ContextVar("peft_lab_windows", default=None)


def has_windows(block: Any) -> bool:
    """Test whether a block, wrapped or not, reads a grid."""
    return _NAMES.grid in parameter_names(type(getattr(block, "base_layer", block)).forward)


def can_hook(block: Any) -> bool:
    """Test whether a block with windows has the parts that `hook` needs.

    Swin v2 lacks one, because it makes its bias inside of attention.
    """
    attention = getattr(block, _NAMES.attention, None)
    parts = [getattr(attention, _NAMES.bias, None)]
    for name in (_NAMES.norm_before, _NAMES.output, _NAMES.dropout):
        parts.append(getattr(block, name, None))
    return all(isinstance(part, nn.Module) for part in parts)


def hook(block: Any) -> None:
    """Register the hooks in a block by which `run` handles prompts."""
    # In the order in which the block's forward reaches them.
    attention = getattr(block, _NAMES.attention)
    getattr(block, _NAMES.norm_before).register_forward_hook(_take_out)
    attention.register_forward_pre_hook(_into_windows)
    getattr(attention, _NAMES.bias).register_forward_hook(_extend_bias)
    attention.register_forward_hook(_out_of_windows)
    getattr(block, _NAMES.output).register_forward_pre_hook(_put_back)


def stage_of(path: str) -> str:
    """Path of the stage that a block with windows is in."""
    return path.rpartition(".")[0].rpartition(".")[0]


def width(block: Any) -> int:
    """Width of the hidden states of a block with windows."""
    return int(getattr(block, _NAMES.norm_before).normalized_shape[-1])


def run(block: Any, prompts: Prompts, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Call `function(hidden)`, which runs the block on tokens with prompts.

    The call is checkpointed if the block is.
    """

    # What is checkpointed sets the context variable itself, so that a recomputation has it as well.
    def inside(hidden: Tensor) -> Any:
        token = _RUNNING.set((block, Prompts(prompts.count, prompts.at, prompts.unused)))
        checkpointed = _suspend(block)
        try:
            return function(hidden)
        finally:
            _resume(block, checkpointed)
            _RUNNING.reset(token)

    if block.training and getattr(block, "gradient_checkpointing", False):
        return block._gradient_checkpointing_func(inside, hidden)
    return inside(hidden)


def downsample_of(stage: nn.Module) -> tuple[nn.Module, str]:
    """Module that merges patches behind a stage's blocks.

    It is given as a module and a name in it.
    """
    return stage, _NAMES.downsample


def merge(downsample: Any, prompts: Tensor) -> Tensor:
    """Merge prompts (batch, count, dim) for the next stage.

    They become (batch, count, dim of that stage).
    """
    # Each prompt is a square of four equal cells, all squares in one row.
    cells = prompts.repeat_interleave(2, 1)
    merged: Tensor = downsample(torch.cat([cells, cells], 1), (2, cells.shape[1]))
    return merged


def hook_stage(stage: nn.Module) -> None:
    """Leave checkpointing in a stage to its blocks."""
    # A second adapter comes here again.
    if _enter_stage not in stage._forward_pre_hooks.values():
        stage.register_forward_pre_hook(_enter_stage)
        stage.register_forward_hook(_leave_stage, always_call=True)


def _enter_stage(stage: nn.Module, args: Any) -> None:
    """Pre-hook of a stage."""
    context = ForwardContext.current()
    if context is not None:
        context.shared[stage] = _suspend(stage)


def _leave_stage(stage: nn.Module, args: Any, output: Any) -> None:
    """Post-hook of a stage, called after errors too."""
    context = ForwardContext.current()
    if context is not None:
        _resume(stage, context.shared.pop(stage, False))


def _suspend(module: Any) -> bool:
    """Switch a module's checkpointing off; return True if it was on."""
    found = bool(getattr(module, "gradient_checkpointing", False))
    if found:
        module.gradient_checkpointing = False
    return found


def _resume(module: Any, was_on: bool) -> None:
    if was_on:
        module.gradient_checkpointing = True


def _take_out(norm: nn.Module, args: Any, out: Tensor) -> Tensor:
    """Hook of the norm before attention that takes prompts out."""
    found = _RUNNING.get()
    if found is None:
        return out
    tokens, found[1].inside = split(out, found[1].count, found[1].at)
    return tokens


def _into_windows(attention: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook of attention that puts the prompts into every window.

    Windows are (batch x windows, cells, dim), the mask is (windows, cells, cells) or None.
    """
    found = _RUNNING.get()
    if found is None:
        return args
    prompts, (windows, mask, *rest) = found[1], args
    assert prompts.inside is not None
    # Each window of an image gets the prompts of that image.
    batch, cells = len(prompts.inside), windows.shape[1]
    each = len(windows) // batch
    mask = extend_bias(mask, cells, prompts.count, 0)
    # Rows differ in the prompts that they have, so the mask must differ by row instead of by window alone.
    if prompts.unused is not None:
        size = cells + prompts.count
        mask = windows.new_zeros(each, size, size) if mask is None else mask
        mask = mask.repeat(batch, 1, 1)
        unused = prompts.unused.repeat_interleave(each, 0)[:, None]
        mask[..., : prompts.count].masked_fill_(unused, torch.finfo(mask.dtype).min)
    return (insert(windows, prompts.inside.repeat_interleave(each, 0), 0), mask, *rest)


def _extend_bias(module: nn.Module, args: Any, bias: Tensor) -> Tensor:
    """Hook of the relative position bias that adds zeros for the prompts."""
    found = _RUNNING.get()
    extended = bias if found is None else extend_bias(bias, bias.shape[-1], found[1].count, 0)
    assert extended is not None
    return extended


def _out_of_windows(attention: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> Any:
    """Hook of attention that averages the prompts over the windows.

    The block's next step is dropout, which the prompts get here.
    """
    found = _RUNNING.get()
    if found is None:
        return output
    block, prompts = found
    assert prompts.inside is not None
    # Recorded attention weights are those of the tokens alone.
    (tokens, attended), weights = split(output[0], prompts.count, 0), output[1]
    prompts.inside = getattr(block, _NAMES.dropout)(attended).unflatten(0, (len(prompts.inside), -1)).mean(1)
    return tokens.contiguous(), None if weights is None else weights[..., prompts.count :, prompts.count :]


def _put_back(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Pre-hook of the module before the residual connection that puts prompts back."""
    found = _RUNNING.get()
    if found is None:
        return args
    assert found[1].inside is not None
    return (insert(args[0], found[1].inside, found[1].at), *args[1:])


#: All hooks, by which they are found again.
HOOKS = (_take_out, _into_windows, _extend_bias, _out_of_windows, _put_back, _enter_stage, _leave_stage)
