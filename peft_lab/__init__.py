"""peft-lab: parameter-efficient fine-tuning methods as native peft tuners, trained by Trainer, compared honestly.

`import peft_lab` makes every method known to peft. It does not import torch itself: if peft is already loaded the
methods are registered at once, otherwise in the moment peft is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peft_lab._activate import activate
from peft_lab.errors import AdapterMismatchError, ConfigError, PeftLabError, TaskError
from peft_lab.registry import methods

if TYPE_CHECKING:
    from peft_lab.alternating import AlternatingActivation
    from peft_lab.call import prompt_inputs
    from peft_lab.domain_start import domain_prompts
    from peft_lab.inference import evaluate, predict
    from peft_lab.loading import load_adapter
    from peft_lab.reading import ReadTrainingData, read_training_data
    from peft_lab.share.hub import push
    from peft_lab.share.lora import to_lora
    from peft_lab.task import tasks
    from peft_lab.tenants import Tenants, load_many
    from peft_lab.training import train

__version__ = "0.1.0"

__all__ = [
    "AdapterMismatchError",
    "AlternatingActivation",
    "ConfigError",
    "PeftLabError",
    "ReadTrainingData",
    "TaskError",
    "Tenants",
    "domain_prompts",
    "evaluate",
    "load_adapter",
    "load_many",
    "methods",
    "predict",
    "prompt_inputs",
    "push",
    "read_training_data",
    "tasks",
    "to_lora",
    "train",
]

#: Public names whose modules import torch or datasets, resolved on first use.
_LAZY = {
    "AlternatingActivation": "alternating",
    "ReadTrainingData": "reading",
    "Tenants": "tenants",
    "domain_prompts": "domain_start",
    "evaluate": "inference",
    "load_adapter": "loading",
    "load_many": "tenants",
    "predict": "inference",
    "prompt_inputs": "call",
    "push": "share.hub",
    "read_training_data": "reading",
    "tasks": "task",
    "to_lora": "share.lora",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"peft_lab.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'peft_lab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


activate()
