"""Prompts chosen by what is known of a row: its domain, its source, its resolution, the mode it is to be read in.

An adapter has a few sets of prompts, and each row of a batch names one by `prompt_ids`, an argument of the model's
forward; where a call cannot take it (`generate`), `peft_lab.call.prompt_inputs` gives it around the call. Prefix
Conditioning, the resolution prefix of Tiny Time Mixers and the mode tokens of UL2 are this.

Source: Saito et al. 2022, Prefix Conditioning Unifies Language and Label Supervision, arXiv:2206.01125. Written from
the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_lab.call import Call
from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo
from peft_lab.static_prompts import StaticConfig, StoredPrompts, register_static

METHOD = MethodInfo(
    name="metadata_prompt",
    title="Prompts by metadata",
    paper="2206.01125",
    kind="sequence",
    config="MetadataPromptConfig",
    roles=("block",),
    capabilities=("mixed_batch",),
    learning_rate=1e-2,
    budget=(1.1, 1.2),
)


@dataclass
class MetadataPromptConfig(StaticConfig):
    """Configuration of prompts by metadata. Trainable: modes x prompts x width for each block that writes prompts.

    Raises:
        ConfigError: a number below 1, or a default that is none of the modes.
    """

    num_modes: int = field(default=2, metadata={"help": "Sets of prompts, one for each kind of row.", "other": 3})
    num_prompts: int = field(default=1, metadata={"help": "Prompts of each set.", "other": 3})
    deep: bool = field(default=False, metadata={"help": "New prompts before every block.", "other": True})
    default_mode: int | None = field(
        default=0, metadata={"help": "The set for calls without prompt_ids; null makes them an error.", "other": 1}
    )

    def check(self) -> None:
        super().check()
        for name in ("num_modes", "num_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.default_mode is not None and not 0 <= self.default_mode < self.num_modes:
            raise ConfigError(f"default_mode={self.default_mode} must be from 0 to {self.num_modes - 1}.")


class MetadataPromptLayer(StoredPrompts):
    """A block before which each row's own set of prompts, of a table (modes, prompts, width), is written."""

    adapter_layer_names = ("metadata_prompt_table",)

    def initial_values(self, adapter: str, config: MetadataPromptConfig) -> dict[str, Tensor]:
        if self.depth not in config.writing(self.depths):
            return {}
        table = torch.empty(config.num_modes, config.num_prompts, self.width)
        return {"metadata_prompt_table": table.uniform_(-0.5, 0.5)}

    def prompts(self, adapter: str, tokens: Tensor, call: Call) -> Tensor | None:
        config, ids, table = self.configs.get(adapter), call.prompt_ids, self.values(adapter, len(tokens))
        if config is None or table is None:
            return None
        table = table.expand(len(tokens), -1, -1, -1)
        if ids is None:
            if config.default_mode is None:
                raise ConfigError('A call without prompt_ids, which method "metadata_prompt" needs: pass one per row.')
            return table[:, config.default_mode]
        if ids.shape != tokens.shape[:1] or ids.is_floating_point():
            raise ConfigError(
                f"prompt_ids has shape {list(ids.shape)} and dtype {ids.dtype}, expected one integer for each of "
                f"{len(tokens)} rows."
            )
        if bool(((ids < 0) | (ids >= config.num_modes)).any()):
            raise ConfigError(f"prompt_ids={ids.tolist()} must be from 0 to {config.num_modes - 1}.")
        return table[torch.arange(len(tokens), device=table.device), ids.to(table.device)]


register_static(METHOD, MetadataPromptConfig, MetadataPromptLayer)
