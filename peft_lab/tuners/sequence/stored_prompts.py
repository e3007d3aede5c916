"""Stored prompts, learned or initialised from training data.

The stored values are the prompts, the same for every row, or a projection or a choice makes prompts from them.

With `domain_components` the first block's prompts come from the training data (BayesPrompt): they start at means of
particles, or with `domain_draws` are such means for good. Then a prompt is in training the mean of a few of its
particles, sampled anew for every row and forward, and in evaluation the mean of all; the particles are saved and not
trained. Samples come from torch's generator, as dropout's do: a run that is repeated or resumed, and a forward that
checkpointing repeats, sample the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from peft_lab.errors import ConfigError
from peft_lab.tuners.mixed_batch import RowAdapters
from peft_lab.tuners.sequence.layer import SequenceLayer
from peft_lab.tuners.sequence.prompt_state import PromptState
from peft_lab.tuners.sequence.tuner import SequenceConfig

#: Particles that prompts start from, shared out among them; particles of each prompt that is sampled from them.
PARTICLES, PARTICLES_DRAWN = 64, 16
_NOT_READ = (
    'Training begins without domain_components={} of method "{}" having read any data, so the prompts keep their usual '
    "start: train by peft_lab.train, add the callback peft_lab.ReadTrainingData, or call peft_lab.domain_prompts first."
)
_NO_EXPORT = (
    'Method "{0}" cannot be exported, because it looks at its values in each call; run the model with its adapter.'
)
_NOTHING_TO_DRAW = (
    'Method "{}" has read no training data to draw prompts from: train by peft_lab.train, add the callback '
    "peft_lab.ReadTrainingData to the Trainer, or call peft_lab.domain_prompts(model, batches) first."
)


@dataclass
class StaticConfig(SequenceConfig):
    """Base of the configs of stored prompts.

    They are at the input (`deep=False`), or new ones before every block.

    Raises:
        ConfigError: one of these numbers below 1 or without `domain_components`, or more draws than particles.
    """

    domain_components: int | None = field(
        default=None,
        metadata={
            "help": "Start the first block's prompts at particles of a mixture of so many Gaussians, fitted to the "
            "training data; nothing means the method's own start."
        },
    )
    domain_dimensions: int | None = field(
        default=None,
        metadata={"help": "Principal directions of the data with full covariances there; nothing means at most 64."},
    )
    domain_particles: int | None = field(
        default=None,
        metadata={
            "help": "Particles of each prompt there; nothing means 64 shared out among the prompts, or 16 each with "
            "domain_draws."
        },
    )
    domain_draws: int | None = field(
        default=None,
        metadata={
            "help": "Do not train those prompts: each is the mean of so many of its particles, sampled for each row in "
            "training, and of all in evaluation."
        },
    )

    def check(self) -> None:
        super().check()
        # All further fields refine domain_components and mean nothing without it.
        further = ("domain_dimensions", "domain_particles", "domain_draws")
        for name in ("domain_components", *further):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
            if value is not None and self.domain_components is None:
                raise ConfigError(f"{name}={value} goes with domain_components; give both.")
        if self.domain_draws is not None and self.domain_draws > self.domain_share(1):
            raise ConfigError(
                f"domain_draws={self.domain_draws} must be at most domain_particles={self.domain_share(1)}."
            )

    def domain_share(self, prompts: int) -> int:
        """Number of particles of each of `prompts` prompts."""
        usual = max(PARTICLES // prompts, 1) if self.domain_draws is None else PARTICLES_DRAWN
        return self.domain_particles or usual

    def prompted_block_indices(self, num_blocks: int) -> list[int]:
        """Indices of the blocks that write prompts, of a stack of `num_blocks`."""
        chosen = [depth for depth in range(num_blocks) if self.may_write(depth)]
        return chosen if getattr(self, "deep", True) else chosen[:1]


class StoredPrompts(SequenceLayer):
    """Block before which stored prompts are written.

    A method supplies `initial_values`, perhaps `make_prompts`. The first of `adapter_layer_names` holds the stored
    values (prompts, width), or their particles (prompts, particles, width).

    Attributes:
        awaiting_data: adapters whose initial values here come from the training data, until these are read.
    """

    awaiting_data: set[str]
    #: True if every row with the same adapter gets the same prompts, so that a mixed batch gathers them from a table.
    same_for_all_rows: ClassVar[bool] = True

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.awaiting_data = set()

    # What a method supplies -------------------------------------------------------------------------------------

    def make_prompts(self, adapter: str, values: Tensor, state: PromptState) -> Tensor:
        """Make prompts from stored values.

        Both are (prompts, width) or (batch, prompts, width).
        """
        return values

    # What is the same for all -----------------------------------------------------------------------------------

    @property
    def stored_values(self) -> nn.ParameterDict:
        """Stored values of each adapter."""
        found: nn.ParameterDict = getattr(self, self.adapter_layer_names[0])
        return found

    def prompts(self, adapter: str, tokens: Tensor, state: PromptState) -> Tensor | None:
        values = self.values(adapter, tokens.shape[0])
        if values is None:
            return None
        return self.make_prompts(adapter, values, state).expand(tokens.shape[0], -1, -1)

    def values(self, adapter: str, rows: int | None = None) -> Tensor | None:
        """Stored values (..., width) of an adapter; None without any here.

        In training, prompts that are sampled from particles are (rows, ..., width) if `rows` is given.

        Raises:
            ConfigError: prompts are sampled from particles, and there are none yet.
        """
        found = self.stored_values.get(adapter)
        if found is None or not self.draws_particles(adapter):
            return found
        if torch.compiler.is_exporting():
            raise ConfigError(_NO_EXPORT.format(self.info.name))
        # Particles are zero until the training data or an adapter file gives them.
        if not bool(found.any()):
            raise ConfigError(_NOTHING_TO_DRAW.format(self.info.name))
        if rows is None or not self.training:
            return found.mean(-2)
        # The largest of random numbers are a sample without replacement, for all rows and prompts at once.
        draws = self.configs[adapter].domain_draws
        chosen = torch.rand(rows, *found.shape[:-1], device=found.device).topk(draws).indices
        weights = found.new_zeros(chosen.shape[:-1] + found.shape[-2:-1]).scatter(-1, chosen, 1 / draws)
        return torch.einsum("r...p,...pd->r...d", weights, found)

    def _write_rows(self, rows: RowAdapters, tokens: Tensor, state: PromptState) -> None:
        """Write the prompts of all rows by one gather.

        Adapters may have different numbers of prompts.
        """
        if not self.same_for_all_rows:
            super()._write_rows(rows, tokens, state)
            return
        found: dict[str, Tensor] = {}
        for name in rows.names:
            values = self.values(name) if name in self.configs else None
            if values is not None:
                found[name] = self.make_prompts(name, values, state).to(tokens.dtype)
        if not found:
            return
        # One table entry per name, empty for adapters without prompts here, by which the rows are indexed.
        empty = tokens.new_zeros(0, tokens.shape[-1])
        parts = [found.get(name, empty) for name in rows.names]
        table = pad_sequence(parts, batch_first=True, padding_side="left")
        counts = torch.tensor([len(part) for part in parts], device=tokens.device)
        writes = torch.tensor([name in found for name in rows.names], device=tokens.device)
        index = rows.index(tokens.shape[0], tokens.device)
        state.merge_rows(table[index], counts[index], writes[index])

    def uniform(self, count: int, width: int) -> Tensor:
        """Start values (count, width) by Xavier's rule for patch projections."""
        # Without patches the fan-in is the width of the hidden states.
        patch = getattr(self.stack.settings, "patch_size", None)
        pixels = self.width
        if patch:
            pixels = 3 * math.prod(patch if isinstance(patch, list | tuple) else (patch, patch))
        bound = math.sqrt(6 / (pixels + width))
        return torch.empty(count, width).uniform_(-bound, bound)

    # First values from the training data ------------------------------------------------------------------------

    def initialises_from_data(self, adapter: str) -> bool:
        """Test whether an adapter's prompts here are initialised from training data."""
        config = self.configs.get(adapter)
        if config is None or config.domain_components is None:
            return False
        return config.prompted_block_indices(self.num_blocks)[:1] == [self.depth]

    def draws_particles(self, adapter: str) -> bool:
        """Test whether an adapter's prompts here are means of stored particles."""
        return self.initialises_from_data(adapter) and self.configs[adapter].domain_draws is not None

    def update_layer(self, adapter: str, config: Any) -> None:
        super().update_layer(adapter, config)
        if not self.initialises_from_data(adapter):
            return
        # A loaded adapter brings its values along, and they end the wait.
        self.awaiting_data.add(adapter)
        # Particles take the place of the trained values; frozen ones are named to peft, or it would train them.
        if config.domain_draws is not None:
            shape = self.stored_values[adapter].shape
            count = config.domain_share(shape[:-1].numel())
            empty = self.stored_values[adapter].new_zeros(*shape[:-1], count, shape[-1])
            self.stored_values[adapter] = nn.Parameter(empty, requires_grad=False)
            self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter: self.adapter_layer_names[:1]}

    def delete_adapter(self, adapter_name: str) -> None:
        self.awaiting_data.discard(adapter_name)
        super().delete_adapter(adapter_name)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint, or an adapter that is trained on, brings trained values, which the data must not overwrite.
        stored = self.adapter_layer_names[0]
        self.awaiting_data -= {name for name in self.awaiting_data if f"{prefix}{stored}.{name}" in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _write(self, active: list[str], rows: RowAdapters | None, tokens: Tensor, state: PromptState) -> None:
        if self.training and torch.is_grad_enabled() and not self.awaiting_data.isdisjoint(active):
            self.warn_data_not_read(active[0])
        super()._write(active, rows, tokens, state)

    def warn_data_not_read(self, adapter: str) -> None:
        """Warn that training begins before the data were read.

        From now on the present values stand.
        """
        if self.draws_particles(adapter):
            return  # missing particles are refused, and present ones need no data
        self.awaiting_data.discard(adapter)
        warnings.warn(_NOT_READ.format(self.configs[adapter].domain_components, self.info.name), stacklevel=2)
