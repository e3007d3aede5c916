"""Full fine-tuning: every weight is trained. A baseline, not an adapter: what is saved is a whole model."""

from __future__ import annotations

from peft_lab.registry import MethodInfo

METHOD = MethodInfo(
    name="full",
    title="Full fine-tuning",
    paper="",
    place="baseline",
    learning_rate=5e-5,
)
