"""Tuner of stored prompts, which can initialise them from training data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft_lab.registry import MethodInfo
from peft_lab.tuners.registration import register
from peft_lab.tuners.sequence.init_from_data import domain_prompts
from peft_lab.tuners.sequence.stored_prompts import StoredPrompts
from peft_lab.tuners.sequence.tuner import SequenceTuner


class StaticTuner(SequenceTuner):
    """Tuner that wraps the blocks of a stack in `StoredPrompts`.

    It reads the training data for prompts that are initialised from them.
    """

    def wants_data(self) -> bool:
        """Test whether prompts of an active adapter wait for their start values."""
        layers = [module for module in self.model.modules() if isinstance(module, StoredPrompts)]
        return any(not layer.awaiting_data.isdisjoint(layer.active_adapters) for layer in layers)

    def read_data(self, batches: Iterable[Mapping[str, Any]], epoch: int) -> None:
        """Initialise waiting prompts from the training data before the first epoch.

        `peft_lab.ReadTrainingData` calls this.
        """
        if epoch == 0:
            domain_prompts(self.model, batches)


def register_static(info: MethodInfo, config_cls: Any, layer_cls: Any) -> None:
    """`peft_lab.tuners.register` for a method of stored prompts."""
    register(info, config_cls, layer_cls, StaticTuner)
