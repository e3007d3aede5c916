"""The tuner of methods that store prompts: reads the training data for prompts that take their values from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft_lab.registry import MethodInfo
from peft_lab.tuners.registration import register
from peft_lab.tuners.sequence.init_from_data import domain_prompts
from peft_lab.tuners.sequence.stored_prompts import StoredPrompts
from peft_lab.tuners.sequence.tuner import SequenceTuner


class StaticTuner(SequenceTuner):
    """Puts `StoredPrompts` around the blocks of a stack, and reads the training data for prompts that wait for them."""

    def read_data(self, batches: Iterable[Mapping[str, Any]], epoch: int) -> None:
        """Read the training data before the first epoch (`peft_lab.ReadTrainingData`), if prompts wait for them."""
        layers = [module for module in self.model.modules() if isinstance(module, StoredPrompts)]
        if epoch == 0 and any(not layer.awaiting_data.isdisjoint(layer.active_adapters) for layer in layers):
            domain_prompts(self.model, batches)


def register_static(info: MethodInfo, config_cls: Any, layer_cls: Any) -> None:
    """`peft_lab.tuners.register` for a method of stored prompts."""
    register(info, config_cls, layer_cls, StaticTuner)
