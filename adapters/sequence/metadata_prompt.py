"""Prompts by metadata (Prefix Conditioning): prompts chosen by a row's metadata.

Source: Saito et al. 2022, Prefix Conditioning Unifies Language and Label Supervision, arXiv:2206.01125. Written from
the paper.

Metadata are the domain of a row, its source, its resolution or the mode to read it in. An adapter has a few sets of
prompts, and each row of a batch names one by `prompt_ids`, an argument of the model's forward; where a call cannot take
it (`generate`), `peft_lab.row_inputs` gives it around the call. A task file that names a column of such values,
`columns: {prompt_ids: domain, ...}`, has it given in training, evaluation and prediction: the adapter keeps the values
in the order of its sets, as `prompt_values`.

Prefix Conditioning, the resolution prefix of Tiny Time Mixers and the mode tokens of UL2 are of this kind.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.tuners import MethodInfo, RowInput, shorten
from peft_lab.tuners.sequence import PromptState, StaticConfig, StoredPrompts, register_static

logger = logging.getLogger("peft_lab")

_NO_IDS = (
    "Training without prompt_ids, so every row takes set {} of {} sets of prompts. A Trainer hands the column on with "
    "remove_unused_columns=False."
)

METHOD = MethodInfo(
    name="metadata_prompt",
    title="Prompts by metadata",
    paper="2206.01125",
    place="sequence",
    config="MetadataPromptConfig",
    roles=("block",),
    capabilities=("mixed_batch",),
    learning_rate=1e-2,
    budget=(1.1, 1.2),
)


@dataclass
class MetadataPromptConfig(StaticConfig):
    """Configuration of prompts by metadata.

    Trainable: modes x prompts x width for each block that writes prompts.

    Raises:
        ConfigError: a number below 1, a default that is none of the modes, or fewer modes than values.
    """

    num_modes: int | None = field(
        default=None,
        metadata={
            "help": "Sets of prompts, one for each kind of row; nothing means one per value, else 2.",
            "other": 3,
        },
    )
    prompt_values: list[str] | None = field(
        default=None,
        metadata={
            "help": "Values of the task's column prompt_ids in the order of the sets; filled in from the task.",
            "other": ["a", "b", "c"],
        },
    )
    num_prompts: int = field(default=1, metadata={"help": "Prompts of each set.", "other": 3})
    deep: bool = field(default=False, metadata={"help": "New prompts before every block.", "other": True})
    default_mode: int | None = field(
        default=0,
        metadata={
            "help": "The set for calls without prompt_ids and for unknown values; null makes them an error.",
            "other": 1,
        },
    )

    def check(self) -> None:
        super().check()
        values = self.prompt_values or []
        if self.prompt_values is not None and (not values or len(set(values)) < len(values)):
            raise ConfigError(f"prompt_values={shorten(values)} must be different values, at least one.")
        for name in ("num_modes", "num_prompts"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ConfigError(f"{name}={count} must be at least 1.")
        if self.modes < len(values):
            raise ConfigError(
                f"num_modes={self.num_modes} is too few for {len(values)} prompt_values, {shorten(values)}; "
                "leave it out."
            )
        if self.default_mode is not None and not 0 <= self.default_mode < self.modes:
            raise ConfigError(f"default_mode={self.default_mode} must be from 0 to {self.modes - 1}.")

    def row_inputs(self) -> tuple[RowInput, ...]:
        return (RowInput("prompt_ids", "int64"),)

    @property
    def modes(self) -> int:
        """Number of sets of prompts."""
        return self.num_modes or len(self.prompt_values or ()) or 2

    def ids_of_values(self, values: Sequence[str | None]) -> list[int]:
        """Index of the set of prompts of each value.

        `default_mode` for None, and with a warning for an unknown value.

        Raises:
            ConfigError: there is no default, and a value is None or unknown.
        """
        known = {value: mode for mode, value in enumerate(self.prompt_values or ())}
        # Unknown values are named once, whatever the number of their rows.
        strange = sorted({value for value in values if value is not None} - known.keys())
        shown = f"{', '.join(strange[:5])}{', ...' if len(strange) > 5 else ''}" if strange else "none"
        if self.default_mode is None and (strange or None in values):
            raise ConfigError(
                f"A row's value for prompt_ids is {shown}, and default_mode is null; known: {', '.join(known)}."
                f"{did_you_mean(shown, known)}"
            )
        if strange:
            logger.warning("Unknown values for prompt_ids (%s) take the prompts of set %s.", shown, self.default_mode)
        fallback = self.default_mode or 0
        ids = []
        for value in values:
            ids.append(fallback if value is None else known.get(value, fallback))
        return ids


class MetadataPromptLayer(StoredPrompts):
    """Block before which each row's own set of prompts is written.

    The sets are the table (modes, prompts, width) of the adapter.
    """

    adapter_layer_names = ("metadata_prompt_table",)
    same_for_all_rows = False

    def initial_values(self, adapter: str, config: MetadataPromptConfig) -> dict[str, Tensor]:
        if self.depth not in config.prompted_block_indices(self.num_blocks):
            return {}
        table = torch.empty(config.modes, config.num_prompts, self.width)
        return {"metadata_prompt_table": table.uniform_(-0.5, 0.5)}

    def make_prompts(self, adapter: str, values: Tensor, state: PromptState) -> Tensor:
        config, ids = self.configs[adapter], state.row_input("prompt_ids")
        # Values that are sampled by row have the rows as their first dimension already.
        rows = state.batch if state.rows is None else len(state.rows)
        table = values.expand(rows, -1, -1, -1)
        if ids is None:
            if config.default_mode is None:
                raise ConfigError('A call without prompt_ids, which method "metadata_prompt" needs: pass one per row.')
            if self.training and torch.is_grad_enabled() and config.modes > 1:
                warnings.warn(_NO_IDS.format(config.default_mode, config.modes), stacklevel=2)
            return table[:, config.default_mode]
        if bool(((ids < 0) | (ids >= config.modes)).any()):
            raise ConfigError(f"prompt_ids={ids.tolist()} must be from 0 to {config.modes - 1}.")
        # Of each row's table, the set that the row names.
        return table[torch.arange(rows, device=table.device), ids.to(table.device)]


register_static(METHOD, MetadataPromptConfig, MetadataPromptLayer)
