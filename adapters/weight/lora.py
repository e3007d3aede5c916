"""LoRA: low-rank adaptation of frozen weights, as peft has it.

Source: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.

This file only describes peft's method, so that it stands beside the others. `LoraRows` adds rows of one batch with
different adapters, without a loop over the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from peft_lab.errors import ConfigError
from peft_lab.tuners import (
    MethodInfo,
    changed_base,
    conv2d_rows,
    embed_scale,
    lora_rank,
    lora_scaling,
    lora_variant,
    matrix_shape,
    operation,
)

METHOD = MethodInfo(
    name="lora",
    title="LoRA",
    paper="2106.09685",
    place="weight",
    config="LoraConfig",
    roles=("attn.q", "attn.v"),
    capabilities=("linear", "conv1d", "conv2d", "embedding", "experts", "merge", "mixed_batch", "identity_start"),
    learning_rate=3e-3,
    budget=(1.0, 1.12),
)


class LoraRows:
    """LoRA with an A and B for each row.

    The output is y = W x + B A x.

    The scaling is taken into B.

    Raises:
        ConfigError: a convolution with groups, or a module that is no Linear, Conv1D, Conv2d or Embedding.
    """

    row_fields = MappingProxyType({"A": 0.0, "B": 0.0})

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        self.base_layer: Any = base_layer
        self.name, self.op = name, operation(base_layer, name)
        if not METHOD.can(self.op.op_type) or getattr(base_layer, "groups", 1) != 1:
            raise ConfigError(f'LoRA on "{name}" cannot differ by row: it is a norm or a convolution with groups.')
        embedding = self.op.op_type == "embedding"
        self._files = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")

    def row_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of A and B in the adapter's file; see `peft_lab.tuners.mixed_batch.RowLayer`.

        Raises:
            ConfigError: a variant of LoRA, a bias, or a start that changes the base weights.
        """
        if setting := lora_variant(config):
            raise ConfigError(f"A LoRA adapter with {setting} cannot differ by row; load it with PeftModel.")
        if setting := changed_base(config):
            raise ConfigError(
                f"A LoRA adapter with {setting}={getattr(config, setting)!r} changes the base weights or biases, "
                "which all rows share; load it with PeftModel."
            )
        rank, shape = lora_rank(config, self.name), matrix_shape(self.base_layer, self.op)
        down, up = self._files
        if self.op.op_type == "embedding":
            return {down: (rank, shape[0]), up: (shape[1], rank)}
        if self.op.op_type == "conv2d":
            return {down: (rank, *self.base_layer.weight.shape[1:]), up: (shape[0], rank, 1, 1)}
        return {down: (rank, shape[1]), up: (shape[0], rank)}

    def row_values(self, values: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Convert the file's A and B to `row_fields`, B scaled and flat."""
        scaling = lora_scaling(config, self.name)
        down, up = (values[name] for name in self._files)
        # Scaled in float32, so that a power of two stays exact and anything else rounds once.
        return {"A": down, "B": (up.float() * scaling).to(up.dtype).flatten(1)}

    def rows_output(
        self, x: Tensor, values: Mapping[str, Tensor], out: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Output with an A and B for each row; see `RowLayer`."""
        base, kind, down, up = self.base_layer, self.op.op_type, values["A"], values["B"]
        out = base(x, *args, **kwargs) if out is None else out
        # A convolution by A, then by the 1x1 kernel B: a matrix product at each position.
        if kind == "conv2d":
            hidden = conv2d_rows(base, x.to(down.dtype), down)
            return out + (up @ hidden.flatten(2)).reshape(out.shape).to(out.dtype)
        # B A e_t for a one-hot e_t is column t of A, looked up instead of multiplied.
        if kind == "embedding":
            tokens = x.reshape(x.shape[0], 1, -1).expand(-1, down.shape[1], -1)
            hidden = torch.gather(down, 2, tokens).transpose(1, 2) * embed_scale(base)
        else:
            hidden = x.reshape(x.shape[0], -1, x.shape[-1]).to(down.dtype) @ down.transpose(1, 2)
        return out + (hidden @ up.transpose(1, 2)).reshape(out.shape).to(out.dtype)


ROWS = LoraRows
