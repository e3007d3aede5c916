"""Building blocks of a method with prompts in the sequence.

Method authors import from here.
"""

from __future__ import annotations

from peft_lab.tuners.sequence.key_values import projections
from peft_lab.tuners.sequence.layer import SequenceLayer
from peft_lab.tuners.sequence.prompt_state import PromptState
from peft_lab.tuners.sequence.stack import StackInfo, chosen_stack, encoder_outputs
from peft_lab.tuners.sequence.stored_prompts import StaticConfig, StoredPrompts
from peft_lab.tuners.sequence.stored_tuner import StaticTuner, register_static
from peft_lab.tuners.sequence.tuner import SequenceConfig, SequenceTuner, register_sequence

__all__ = [
    "PromptState",
    "SequenceConfig",
    "SequenceLayer",
    "SequenceTuner",
    "StackInfo",
    "StaticConfig",
    "StaticTuner",
    "StoredPrompts",
    "chosen_stack",
    "encoder_outputs",
    "projections",
    "register_sequence",
    "register_static",
]
