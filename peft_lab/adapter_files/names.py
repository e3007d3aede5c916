"""Names of the files in an adapter's folder.

Imports nothing heavy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_lab.utils import strict_json

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL_WEIGHTS = "config.json", "model.safetensors"
#: Fingerprint of the base weights of an adapter of peft's own tuners; ours hold it in their config.
BASE_RECORD = "base_fingerprint.json"

#: peft's value of `target_modules` for an adapter without adapted modules (`peft.utils.constants`).
_NO_TARGETS = "dummy-target-modules"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file in one step.

    A reader sees all of it or none, and null for a number that is not finite.
    """
    partial = path.with_suffix(".partial")
    partial.write_text(strict_json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def is_head_alone(config: Mapping[str, Any]) -> bool:
    """Test whether config values are those of a head saved alone."""
    return config.get("target_modules") == _NO_TARGETS
