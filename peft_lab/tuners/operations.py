"""Base operations that an adapter layer can wrap.

Each is described alike: a weight matrix (out, in) and a channel axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_lab.backbones.quantized_weight import quantization, weight_shape
from peft_lab.backbones.sharded_weights import whole_shape
from peft_lab.errors import ConfigError

_TORCH_NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


class StandIn(nn.Module):
    """Wrapper of a module, its `base_layer`, that shows the module's attributes.

    Backbones read attributes of the module they think is there (weight, stride, eps, normalized_shape, ...).
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # By way of __dict__, because self.base_layer would come back here while there is none yet.
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name == "base_layer":
                raise
            return getattr(base, name)


class ExpertWeight(nn.Module):
    """One stacked weight (experts, ., .) of an experts module, seen as a module with a `weight`."""

    def __init__(self, experts: nn.Module, parameter: str) -> None:
        super().__init__()
        # Not a submodule, because the experts already stand in the model and in its state dict.
        vars(self)["experts"] = experts
        self.parameter = parameter

    @property
    def weight(self) -> Tensor:
        """The parameter of the experts module."""
        found: Tensor = getattr(self.experts, self.parameter)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        # A merged weight takes the parameter's place in the experts module.
        if name == "weight":
            setattr(self.experts, self.parameter, value)
        else:
            super().__setattr__(name, value)


@dataclass(frozen=True)
class Operation:
    """Description of the operation that a wrapped module computes.

    Attributes:
        op_type: "linear", "conv1d", "conv2d", "embedding", "norm" or "experts"; the capability a method must declare to
            adapt it.
        channels: number of output channels.
        channel_dim: axis of the output that holds the channels (-1, or 1 for images).
        takes_bias: True if the module's forward adds a `bias`, present or not. RMSNorm's does not.
        experts: number of experts in a stacked weight; 0 for a weight of its own.
        transposed: True if a stacked weight is (experts, in, out).
        quantization: name of the form in which the weight is quantised, "" for a plain weight.
    """

    op_type: str
    channels: int
    channel_dim: int = -1
    takes_bias: bool = True
    experts: int = 0
    transposed: bool = False
    quantization: str = ""

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """Shape of values by channel: (channels,), for experts (experts, channels)."""
        return (self.experts, self.channels) if self.experts else (self.channels,)

    def matrix(self, weight: Tensor) -> Tensor:
        """View a base weight as its matrix (out, in), without a copy.

        An embedding's is (tokens, dim), that of experts (experts, out, in).
        """
        if self.transposed:
            return weight.mT
        # transformers' Conv1D stores (in, out).
        if self.op_type == "conv1d":
            return weight.T
        return weight.flatten(1) if self.op_type == "conv2d" else weight

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Bring a matrix (out, in) into a base weight's layout.

        The inverse of `matrix`, for a base weight of the given shape.
        """
        if self.transposed:
            return matrix.mT
        return matrix.T if self.op_type == "conv1d" else matrix.reshape(shape)

    def scale_shape(self, ndim: int) -> tuple[int, ...]:
        """Shape that broadcasts channel values over a base weight.

        The vector has one value per output channel, the weight `ndim` axes.
        """
        if self.experts:
            return (self.experts, 1, -1) if self.transposed else (self.experts, -1, 1)
        return (1, -1) if self.op_type == "conv1d" else (-1, *(1,) * (ndim - 1))


def operation(module: nn.Module, name: str) -> Operation:
    """Recognise a module's operation; `name` is its path, for the message.

    Raises:
        ConfigError: the module is no operation that an adapter can wrap exactly, with the reason.
    """
    form = quantization(module)
    if form and hasattr(module, "out_features"):
        return Operation("linear", int(module.out_features), quantization=form)  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ConfigError(f'Module "{name}" ({type(module).__name__}) has no weight to adapt; choose other modules.')
    if form or not weight.is_floating_point():
        raise ConfigError(
            f'Module "{name}", a {type(module).__name__}, has a quantised weight ({form or weight.dtype}), and only '
            "linear layers quantised by a library that peft knows can be adapted; choose other modules, or load the "
            "backbone in float32, bfloat16 or float16."
        )
    found = _stacked(module, name) if isinstance(module, ExpertWeight) else _recognise(module, weight)
    if found is None:
        raise ConfigError(
            f'Module "{name}" is a {type(module).__name__}, not a Linear, Conv1D, Conv2d, Embedding or norm whose '
            "forward is known; choose other modules with target_modules."
        )
    return found


def _stacked(module: ExpertWeight, name: str) -> Operation:
    """Describe a stacked weight of experts.

    Raises:
        ConfigError: its class does not tell the output axis, as those do whose forward transformers can replace.
    """
    transposed = getattr(module.experts, "is_transposed", None)
    if transposed is None:
        raise ConfigError(
            f'"{name}" cannot be adapted: {type(module.experts).__name__} does not say which axis of its weights is '
            "the output (is_transposed); leave it out of target_parameters."
        )
    out = module.weight.shape[2 if transposed else 1]
    return Operation("experts", out, takes_bias=False, experts=len(module.weight), transposed=transposed)


def _recognise(module: nn.Module, weight: Tensor) -> Operation | None:
    # Compared by the forward itself: a subclass that overrides it may compute anything else.
    forward, shape = type(module).forward, whole_shape(weight)
    if forward is nn.Linear.forward:
        return Operation("linear", shape[0])
    if forward is Conv1D.forward:
        return Operation("conv1d", shape[1])
    if forward is nn.Conv2d.forward:
        return Operation("conv2d", shape[0], channel_dim=1)
    # max_norm changes the weight at every look-up.
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return Operation("embedding", shape[1], takes_bias=False)
    if len(shape) == 1 and (isinstance(module, _TORCH_NORMS) or type(module).__name__.endswith("Norm")):
        images = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm)
        first = images or getattr(module, "data_format", None) == "channels_first"
        return Operation("norm", shape[0], 1 if first else -1, takes_bias=isinstance(module, _TORCH_NORMS))
    return None


def features(module: Any, op: Operation) -> tuple[int, int]:
    """Numbers of input and output features of a base module, as peft's layers name them.

    Channels of a convolution, tokens and width of an embedding, channels of a norm twice.
    """
    if op.op_type == "experts":
        return int(op.matrix(module.weight).shape[2]), op.channels
    if op.op_type == "conv2d":
        return int(module.in_channels), op.channels
    if op.op_type == "norm":
        return op.channels, op.channels
    if op.quantization:
        return int(module.in_features), op.channels
    return int(whole_shape(module.weight)[1 if op.op_type == "linear" else 0]), op.channels


def matrix_shape(module: nn.Module, op: Operation) -> torch.Size:
    """Shape of a base module's `Operation.matrix`, also where its weight is packed."""
    # On the meta device a tensor has a shape and no values.
    return op.matrix(torch.empty(weight_shape(module), device="meta")).shape


def apply_matrix(module: Any, op: Operation, x: Tensor, matrix: Tensor) -> Tensor:
    """Run the base operation with another matrix (out, in) and no bias.

    This gives the summand of a delta to the output.
    """
    if op.op_type == "embedding":
        return F.embedding(x, matrix) * embed_scale(module)
    if op.op_type == "conv2d":
        return module._conv_forward(x, matrix.reshape(module.weight.shape), None)
    return F.linear(x, matrix)


def conv2d_rows(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Run a convolution with a weight per row, without bias.

    `x` is (batch, ...) and `weight` (batch, out, ...).
    """
    # F.conv2d pads with zeros alone, so any other padding is done before it, as in nn.Conv2d.
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
    # Rows with their own weights are groups of one long image of batch * channels.
    folded, groups = x.reshape(1, -1, *x.shape[2:]), module.groups * x.shape[0]
    out = F.conv2d(folded, weight.flatten(0, 1), None, module.stride, padding, module.dilation, groups)
    return out.reshape(x.shape[0], -1, *out.shape[2:])


def embed_scale(module: Any) -> Tensor | float:
    """Factor that scaled embeddings (Gemma 3, M2M) apply; 1.0 for plain ones."""
    return getattr(module, "embed_scale", 1.0)


def norm_offset(module: Any) -> float:
    """Offset of a norm's weight: 0.0, or 1.0 for norms like Gemma's.

    A norm multiplies by (offset + weight). The offset is found by running the norm.

    Raises:
        ConfigError: the norm does neither, so a scale cannot be folded into its weight.
    """
    if isinstance(module, _TORCH_NORMS):
        return 0.0
    weight = module.weight
    probe = torch.linspace(-1.0, 2.0, weight.numel(), device=weight.device, dtype=weight.dtype)[None]
    # With a weight of minus the offset, and without its bias, the output is zero whatever the input.
    bias = getattr(module, "bias", None)
    values = {} if bias is None else {"bias": torch.zeros_like(bias)}
    for offset in (0.0, 1.0):
        values["weight"] = torch.full_like(weight, -offset)
        out = torch.func.functional_call(module, values, (probe,))
        if bool((out == 0).all()):
            return offset
    raise ConfigError(f"{type(module).__name__} is not linear in its weight, so a scale cannot be merged into it.")
