"""LoRA, as peft has it: this file only describes it, so that it stands beside the other methods."""

from __future__ import annotations

from peft_lab.registry import MethodInfo

METHOD = MethodInfo(
    name="lora",
    title="LoRA",
    paper="2106.09685",
    kind="weight",
    config="LoraConfig",
    roles=("attn.q", "attn.v"),
    capabilities=("linear", "conv1d", "conv2d", "embedding", "merge", "mixed_batch", "identity_start"),
    learning_rate=1e-3,
    budget=(1.0, 1.12),
)
