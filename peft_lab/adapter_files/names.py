"""Names of the files in an adapter's folder.

Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_lab.utils import strict_json
from peft_lab.utils.atomic_files import write_text

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL_WEIGHTS = "config.json", "model.safetensors"
#: Fingerprint of the base weights of an adapter of peft's own tuners; ours hold it in their config.
BASE_RECORD = "base_fingerprint.json"
#: How the base of an adapter is pruned, and, where that is not all there is to know, the masks of its weights.
PRUNING, PRUNING_MASKS = "pruning.json", "pruning.safetensors"
#: Entry of adapter_config.json of peft's own tuners that says so to those who load it without this package.
PRUNED_BASE = "pruned_base"
#: Entry of peft's wrapper of an embedding whose rows are trained, behind the path of the embedding.
TRAINED_TOKENS = "token_adapter.trainable_tokens_delta"

#: peft's value of `target_modules` for an adapter without adapted modules (`peft.utils.constants`).
_NO_TARGETS = "dummy-target-modules"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file in one step.

    A reader sees all of it or none, and null for a number that is not finite.
    """
    write_text(path, strict_json.dumps(values, indent=2) + "\n")


def is_head_alone(config: Mapping[str, Any]) -> bool:
    """Test whether config values are those of a head saved alone."""
    return config.get("target_modules") == _NO_TARGETS
