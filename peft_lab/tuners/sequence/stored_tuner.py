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

    def read_data(self, batches: Iterable[Mapping[str, Any]], epoch: int) -> None:
        """Initialise waiting prompts from the training data before the first epoch.

        `peft_lab.ReadTrainingData` calls this.
        """
        if epoch > 0:
            return
        # A pass over the data is costly, so it is made for an active adapter alone.
        for module in self.model.modules():
            if isinstance(module, StoredPrompts) and not module.awaiting_data.isdisjoint(module.active_adapters):
                domain_prompts(self.model, batches)
                return


def register_static(info: MethodInfo, config_cls: Any, layer_cls: Any) -> None:
    """`peft_lab.tuners.register` for a method of stored prompts."""
    register(info, config_cls, layer_cls, StaticTuner)
