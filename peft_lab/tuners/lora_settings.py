"""Settings of peft's LoRA, for whoever reads its factors: variants, rank and scaling of a module."""

from __future__ import annotations

import math
from typing import Any

from peft.utils.other import get_pattern_key

#: Settings that change more than y = W x + scaling * B A x.
_VARIANTS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config", "velora_config"),
    *("monteclora_config", "layer_replication", "target_parameters", "trainable_token_indices", "megatron_config"),
)
#: Starts that leave the base weight as it is; the others put a part of it into the adapter.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def lora_variant(config: Any) -> str:
    """Name of the setting by which a LoRA adapter is more than two factors; "" without one."""
    return next((setting for setting in _VARIANTS if getattr(config, setting, None)), "")


def changed_base(config: Any) -> str:
    """Name of the setting by which a LoRA adapter changes the base weights or biases; "" without one."""
    if config.bias != "none":
        return "bias"
    return "init_lora_weights" if config.init_lora_weights not in _STARTS else ""


def lora_rank(config: Any, module: str) -> int:
    """Rank of the factors at a module path, which patterns may set."""
    rank: int = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    return rank


def lora_scaling(config: Any, module: str) -> float:
    """Factor of B A at a module path: alpha / r, with rsLoRA alpha / sqrt(r)."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    rank = lora_rank(config, module)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
