"""Branches on the residual stream: read before a sub-layer (attention or MLP), added behind it.

In a pre-norm block, x + mlp(norm(x)) becomes x + mlp(norm(x)) + branch(x); in a post-norm block, norm(x + mlp(x))
becomes norm(x + mlp(x) + branch(x)). Both points lie inside the block's own forward, so hooks on its modules read and
write them. The stream of a call is kept in its `ForwardContext`, never on a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peft_lab.errors import ConfigError
from peft_lab.tuners.forward_context import ForwardContext, on_rows
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.mixed_batch import BASE, current_row_adapters

#: Names of the norm before the MLP, and of the module whose output is added to the stream behind it.
_NORMS = ("layernorm_after", "layer_norm2", "norm2")
_SUMMANDS = ("drop_path", "layer_scale2", "mlp")


class ResidualBranches(AdapterLayer):
    """A block with branches beside some of its sub-layers. A method supplies `branch`."""

    #: Sub-layers that get a branch: "attention", "mlp".
    sub_layers: ClassVar[tuple[str, ...]] = ("mlp",)

    def branch(self, adapter: str, sub_layer: str, stream: Tensor) -> Tensor:
        """Summand (rows, tokens, width) that an adapter adds behind a sub-layer to the stream of the same shape."""
        raise NotImplementedError

    def hook_sub_layers(self, name: str) -> None:
        """Put the hooks into the block, which stands at the path `name`.

        Raises:
            ConfigError: the block has no place for a branch beside one of the sub-layers.
        """
        block = self.base_layer
        norm, output = (next((p for p in names if hasattr(block, p)), None) for names in (_NORMS, _SUMMANDS))
        attention = [module for module in block.children() if hasattr(module, "q_proj")]
        if len(attention) != 1 or norm is None or output is None:
            raise ConfigError(
                f'Method "{self.info.name}" has no place for its branch between attention and MLP of '
                f'{type(block).__name__} ("{name}").'
            )
        getattr(block, norm).register_forward_pre_hook(_ReadInput(self, "mlp"))
        getattr(block, output).register_forward_hook(_AddBranch(self, "mlp"))

    def adapters_with_rows(self, size: int, device: torch.device) -> Iterator[tuple[str, Tensor | None]]:
        """The adapters that act here, each with the numbers of its rows, int64; None for all rows."""
        if self.disable_adapters:
            return
        rows = current_row_adapters()
        if rows is None:
            for name in self.active_adapters:
                if name in self.configs:
                    yield name, None
            return
        for name in rows.names:
            if name != BASE and name in self.configs:
                yield name, rows.of_adapter(name, size, device)

    def read_stream(self, sub_layer: str, stream: Tensor) -> None:
        """Keep the stream before a sub-layer for the branch that is added behind it."""
        context = ForwardContext.current()
        if context is None:
            return
        context.shared[self, sub_layer] = stream
        # A block that is recomputed has the adapters of its first run, whichever are active by then.
        if (self, "adapters") not in context.shared:
            context.shared[self, "adapters"] = list(self.adapters_with_rows(len(stream), stream.device))

    def add_branch(self, sub_layer: str, output: Tensor) -> Tensor:
        """The output of a sub-layer with the branches of the adapters that act here."""
        context = ForwardContext.current()
        # The same dropout may stand behind attention too: there is no stream to read there.
        stream = None if context is None else context.shared.pop((self, sub_layer), None)
        if context is None or stream is None:
            return output
        for name, rows in context.shared[self, "adapters"]:
            if rows is None:
                output = output + self.branch(name, sub_layer, stream).to(output.dtype)
            else:
                with on_rows(len(stream), rows):
                    added = self.branch(name, sub_layer, stream[rows]).to(output.dtype)
                output = output.index_add(0, rows, added)
        return output


class _StreamHook:
    """A hook inside a block, found again by its class when the adapter is taken out."""

    def __init__(self, layer: ResidualBranches, sub_layer: str) -> None:
        self.layer, self.sub_layer = layer, sub_layer


class _ReadInput(_StreamHook):
    """Pre-hook of the norm before a sub-layer: its input is the stream."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.layer.read_stream(self.sub_layer, args[0])


class _AddBranch(_StreamHook):
    """Hook of the module whose output is added to the stream."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.layer.add_branch(self.sub_layer, output)


def remove_stream_hooks(model: nn.Module) -> None:
    """Take the hooks of residual branches out of a model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _StreamHook)]:
                del cast(Any, hooks)[key]
