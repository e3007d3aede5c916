"""Linear probe: only the task head is trained, on the features of the frozen backbone. A baseline, not an adapter."""

from __future__ import annotations

from peft_lab.registry import MethodInfo

METHOD = MethodInfo(
    name="head",
    title="Linear probe",
    paper="",
    kind="baseline",
    roles=("head",),
    learning_rate=1e-2,
)
