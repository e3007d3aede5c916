"""Linear probe: train only the task head on a frozen backbone's features.

A baseline. It is saved as a LoRA adapter without LoRA layers, so its file holds the head alone and peft loads it.
"""

from __future__ import annotations

from peft_lab.registry import MethodInfo

METHOD = MethodInfo(
    name="head",
    title="Linear probe",
    paper="",
    place="baseline",
    roles=("head",),
    learning_rate=3e-2,
)
