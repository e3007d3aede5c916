"""Full fine-tuning: train every weight of the model.

A baseline, not an adapter: a whole model is saved.
"""

from __future__ import annotations

from peft_lab.registry import MethodInfo

METHOD = MethodInfo(
    name="full",
    title="Full fine-tuning",
    paper="",
    place="baseline",
    learning_rate=3e-4,
)
