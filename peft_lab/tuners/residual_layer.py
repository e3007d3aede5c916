"""Branches on the residual stream of transformer blocks, parallel or serial.

A parallel branch reads the stream before a sub-layer (attention or MLP) and is added behind it. In a pre-norm block, x
+ mlp(norm(x)) becomes x + mlp(norm(x)) + branch(x); in a post-norm block, norm(x + mlp(x)) becomes norm(x + mlp(x) +
branch(x)). A serial branch reads the output z of the sub-layer, z + branch(z), before the addition to the stream. All
these points lie inside the block's own forward, so hooks on its modules read and write them; `Family.residual` says
which modules these are. The stream of a call is kept in its `ForwardContext`, never on a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from peft_lab.backbones.family import ResidualConnection
from peft_lab.backbones.family_table import FAMILIES
from peft_lab.backbones.residual_stream import residual_connections
from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo
from peft_lab.tuners.forward_context import ForwardContext, on_rows, wrap_model
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.mixed_batch import BASE, current_row_adapters
from peft_lab.tuners.registration import register
from peft_lab.tuners.tuner import BlockTuner

#: What a branch reads: the stream before the sub-layer (parallel), its output (serial), or "" for no branch there.
BranchSource = Literal["stream", "output", ""]


class ResidualBranches(AdapterLayer):
    """Block with branches beside or behind some of its sub-layers.

    A method supplies `branch`, and `branch_source` if its branches are not all parallel ones.

    Attributes:
        summand_scale: number by which the block multiplies every summand before the addition, mostly 1.
        hooked: those of `sub_layers` that this block has, in the order in which they run.
        block_numbers: number of the block in its stack; with stages, that of the stage before it.
    """

    #: Sub-layers that get a branch: "attention", "cross_attention", "mlp". A block lacks those that its family lacks.
    sub_layers: ClassVar[tuple[str, ...]] = ("mlp",)
    summand_scale: float = 1.0
    hooked: tuple[str, ...] = ()
    block_numbers: tuple[int, ...] = ()

    def branch(self, adapter: str, sub_layer: str, x: Tensor) -> Tensor:
        """Summand (rows, tokens, width) of an adapter behind a sub-layer.

        `x` has the same shape: the stream before the sub-layer, or its output, as `branch_source` says.
        """
        raise NotImplementedError

    def branch_source(self, adapter: str, sub_layer: str) -> BranchSource:
        """Source of an adapter's branch at a sub-layer; "" where it has none."""
        return "stream"

    def branch_beside(self, adapter: str, sub_layer: str, stream: Tensor, output: Tensor) -> Tensor:
        """Summand of an adapter that also reads the sub-layer's own, `output`, of the same shape."""
        return self.branch(adapter, sub_layer, stream)

    def hook_sub_layers(self, model: nn.Module, path: str) -> None:
        """Register the hooks in the block at a path of the model.

        Raises:
            ConfigError: the family is not known, or the block has none of the sub-layers.
        """
        block, connections = self.base_layer, _connections_of(model, path, self)
        for index, connection in enumerate(connections):
            name = connection.sub_layer
            if name not in self.sub_layers or not _has_norm(connection):
                continue
            self.hooked = (*self.hooked, name)
            # Pre-norm: the stream is the input of the norm before the sub-layer.
            if connection.norm_before:
                block.get_submodule(connection.norm_before).register_forward_pre_hook(
                    _ReadInput(self, name), with_kwargs=True
                )
            elif index == 0:
                # The block's own input would do, but checkpointing recomputes what lies inside the block alone.
                first = block.get_submodule(connection.output.partition(".")[0])
                first.register_forward_pre_hook(_ReadInput(self, name), with_kwargs=True)
            else:
                # Post-norm: the stream is the output of the norm behind the sub-layer before. Cross-attention may be
                # left out in a call, so the norm before it is read too, and the last one that runs counts.
                for before in _norms_before(connections[:index]):
                    block.get_submodule(before).register_forward_hook(_ReadOutput(self, name))
            block.get_submodule(connection.output).register_forward_hook(_AddBranch(self, name))

    def adapters_with_rows(self, size: int, device: torch.device) -> Iterator[tuple[str, Tensor | None]]:
        """Acting adapters, each with its row numbers, int64, or None for all."""
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
        """Keep the stream before a sub-layer for its branch."""
        context = ForwardContext.current()
        if context is None:
            return
        context.shared[self, sub_layer] = stream
        if sub_layer == self.hooked[0]:
            context.shared[self, "ran"] = set()
        # A block that is recomputed has the adapters of its first run, whichever are active by then. OPT's MLP sees
        # the tokens of all rows in one dimension, so the rows of an adapter are found for each size anew.
        found, size = context.shared.setdefault((self, "adapters"), []), stream.shape[0]
        # By equality, because a size that torch.export leaves open has no hash.
        if not any(known == size for known, _ in found):
            found.append((size, list(self.adapters_with_rows(size, stream.device))))

    def add_branch(self, sub_layer: str, output: Tensor) -> Tensor:
        """Add the branches of the acting adapters to a sub-layer's output.

        Serial branches of several adapters read the sub-layer's own output, so their order is of no account.
        """
        context = ForwardContext.current()
        # The same dropout may stand behind another sub-layer too: there is no stream to read there.
        stream = None if context is None else context.shared.pop((self, sub_layer), None)
        if context is None or stream is None:
            return output
        context.shared[self, "ran"].add(sub_layer)
        total, beside = output, self._scaled(output, stream)
        found = context.shared[self, "adapters"]
        for name, rows in next(adapters for size, adapters in found if size == stream.shape[0]):
            source = self.branch_source(name, sub_layer)
            if not source:
                continue
            serial = source == "output"
            x = output.reshape(stream.shape) if serial else stream
            # The block multiplies the sum by `summand_scale`, which a parallel branch must not get: divided out here.
            factor = 1.0 if serial else self.summand_scale
            if rows is None:
                added = self.branch_beside(name, sub_layer, x, beside)
                total = total + (added / factor).to(output.dtype).reshape(output.shape)
            else:
                with on_rows(stream.shape[0], rows):
                    added = self.branch_beside(name, sub_layer, x[rows], beside[rows])
                total = total.index_add(0, rows, (added / factor).to(output.dtype))
        return total

    def has_run(self, sub_layer: str) -> bool:
        """Test whether a hooked sub-layer has run in this call of the block.

        Cross-attention may be left out.
        """
        context = ForwardContext.current()
        return context is not None and sub_layer in context.shared.get((self, "ran"), ())

    def _scaled(self, output: Tensor, stream: Tensor) -> Tensor:
        """Sub-layer's output as it is added to the stream, in its shape."""
        return (output if self.summand_scale == 1 else output * self.summand_scale).reshape(stream.shape)


class ResidualLayer(ResidualBranches):
    """Base of methods with branches beside or behind sub-layers, such as bottleneck adapters.

    A method supplies `initial_values` and `branch`.

    Attributes:
        width: width of the residual stream.
    """

    width: int

    general_forms: ClassVar[dict[str, str]] = {"mixed": "branch"}

    def read_base(self, name: str) -> None:
        """Accept any block; its residual connections are read when it is hooked."""

    # torch.compile takes the hooks of one block for those of all blocks of its class, and branches would be lost.
    @torch.compiler.disable
    def forward(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """Run the block, whose hooks add the branches."""
        # Without a context the hooks would add none in silence.
        acts = any(name in self.configs for name in self.active_adapters) and not self.disable_adapters
        if acts and ForwardContext.current() is None:
            raise ConfigError("A block with residual branches was called without its backbone; call the whole model.")
        return self.base_layer(*args, **kwargs)


class ResidualTuner(BlockTuner):
    """Tuner that wraps blocks in `ResidualLayer`s."""

    def new_layer(self, target: nn.Module, path: str) -> AdapterLayer:
        layer = super().new_layer(target, path)
        if isinstance(layer, ResidualBranches):
            layer.hook_sub_layers(self.model, path)
        return layer

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        wrap_model(model)

    def unload(self) -> Any:
        """Return the base model without wrapped blocks and without hooks."""
        model = super().unload()
        remove_stream_hooks(model)
        return model


def register_residual(info: MethodInfo, config_cls: Any, layer_cls: Any) -> None:
    """`peft_lab.tuners.register` for a method with residual branches."""
    register(info, config_cls, layer_cls, ResidualTuner)


class _StreamHook:
    """Hook inside a block, recognised by its class for removal."""

    def __init__(self, layer: ResidualBranches, sub_layer: str) -> None:
        self.layer, self.sub_layer = layer, sub_layer


class _ReadInput(_StreamHook):
    """Pre-hook of a module whose input is the stream."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer.read_stream(self.sub_layer, args[0] if args else kwargs["hidden_states"])


class _ReadOutput(_StreamHook):
    """Hook of a norm whose output is the stream."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.layer.read_stream(self.sub_layer, output)


class _AddBranch(_StreamHook):
    """Hook of the module whose output is added to the stream."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.layer.add_branch(self.sub_layer, output)


def remove_stream_hooks(model: nn.Module) -> None:
    """Remove the hooks of residual branches from a model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _StreamHook):
                    del cast(Any, hooks)[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _norms_before(connections: tuple[ResidualConnection, ...]) -> list[str]:
    """Return the norms whose output may be the stream behind some post-norm sub-layers."""
    found = []
    for connection in reversed(connections):
        found.append(connection.norm_after)
        if connection.sub_layer != "cross_attention":
            break
    return found


def _has_norm(connection: ResidualConnection) -> bool:
    """Test whether a norm reads or writes the stream.

    In convolutional blocks, which have another layout, none does.
    """
    return bool(connection.norm_before or connection.norm_after)


def _connections_of(model: nn.Module, path: str, layer: ResidualBranches) -> tuple[ResidualConnection, ...]:
    """Residual connections of the block at a path.

    The layer's width and scale are set by them.

    Raises:
        ConfigError: there is no place for a branch in the block.
    """
    # The config that describes the block is that of the innermost model around it whose family is known.
    steps = path.split(".")
    config: Any = None
    for end in range(len(steps) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(steps[:end])), "config", None)
        if getattr(config, "model_type", None) in FAMILIES:
            layer.block_numbers = tuple(int(step) for step in steps[end:] if step.isdigit())
            break
        config = None
    found: tuple[ResidualConnection, ...] = ()
    if config is not None:
        found = residual_connections(FAMILIES[config.model_type], layer.base_layer, config)
    wanted = [c for c in found if c.sub_layer in layer.sub_layers and _has_norm(c)]
    if config is None or not wanted:
        raise ConfigError(
            f'Method "{layer.info.name}" has no place for its branch beside {" or ".join(layer.sub_layers)} of '
            f'{type(layer.base_layer).__name__} ("{path}").'
        )
    multiplier = FAMILIES[config.model_type].residual_multiplier
    layer.summand_scale = getattr(config, multiplier) if multiplier else 1.0
    if isinstance(layer, ResidualLayer):
        norms = [layer.base_layer.get_submodule(c.norm_before or c.norm_after) for c in wanted]
        # The first block of ModernBERT has an identity in the place of its first norm.
        layer.width = next(norm.weight.numel() for norm in norms if hasattr(norm, "weight"))
    return found
