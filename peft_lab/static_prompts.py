"""Prompts that are parameters and depend on no input: the same for every sample of a batch that has one adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from peft_lab.call import Call
from peft_lab.rows import Rows
from peft_lab.sequence import SequenceLayer
from peft_lab.sequence_tuner import SequenceConfig


@dataclass
class StaticConfig(SequenceConfig):
    """Base of the configs of prompts that stand at the input (`deep=False`) or anew before every block."""

    def writing(self, depths: int) -> list[int]:
        """Indices of the blocks that write prompts, of `depths` blocks."""
        chosen = [depth for depth in range(depths) if self.writes(depth)]
        return chosen if getattr(self, "deep", True) else chosen[:1]


class StaticPrompts(SequenceLayer):
    """A block before which stored prompts are written. A method supplies `initial_values`.

    The first of `adapter_layer_names` holds the prompts (slots, width).
    """

    def uniform(self, count: int, width: int) -> Tensor:
        """Start values (count, width) as Xavier's rule draws them for a projection of patches."""
        patch = getattr(self.settings, "patch_size", None)
        pixels = 3 * math.prod(patch if isinstance(patch, list | tuple) else (patch, patch)) if patch else self.width
        bound = math.sqrt(6 / (pixels + width))
        return torch.empty(count, width).uniform_(-bound, bound)

    def stored(self, adapter: str, call: Call) -> Tensor | None:
        """The prompts of one adapter (slots, width), None if it writes none here."""
        prompts = getattr(self, self.adapter_layer_names[0])
        return prompts.get(adapter)

    def prompts(self, adapter: str, tokens: Tensor, call: Call) -> Tensor | None:
        found = self.stored(adapter, call)
        return None if found is None else found.expand(tokens.shape[0], -1, -1)

    def _write_rows(self, rows: Rows, tokens: Tensor, call: Call) -> None:
        """Prompts of all rows in one gather from those of the adapters, whatever their numbers."""
        found: dict[str, Any] = {name: self.stored(name, call) for name in rows.names if name in self.configs}
        if all(prompts is None for prompts in found.values()):
            return
        empty = tokens.new_zeros(0, tokens.shape[-1])
        parts = [empty if found.get(name) is None else found[name].to(tokens.dtype) for name in rows.names]
        bank = pad_sequence(parts, batch_first=True, padding_side="left")
        counts = torch.tensor([len(part) for part in parts], device=tokens.device)
        writes = torch.tensor([found.get(name) is not None for name in rows.names], device=tokens.device)
        index = rows.index(tokens.shape[0], tokens.device)
        self._merge(call, bank[index], counts[index], writes[index])
