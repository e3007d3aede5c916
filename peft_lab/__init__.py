"""Parameter-efficient fine-tuning methods as native peft tuners.

`import peft_lab` makes every method known to peft. It does not import torch itself: if peft is already loaded the
methods are registered at once, otherwise in the moment peft is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peft_lab._register_on_import import register_with_peft
from peft_lab.errors import AdapterMismatchError, ConfigError, DivergedError, PeftLabError, TaskError, did_you_mean
from peft_lab.registry import list_kinds, list_methods, list_recipes

if TYPE_CHECKING:
    from peft_lab.comparison.run.recommend import recommend
    from peft_lab.comparison.run.runner import compare
    from peft_lab.data.task_registry import list_tasks
    from peft_lab.export.merge import merge
    from peft_lab.export.to_lora import to_lora
    from peft_lab.hub.push import push
    from peft_lab.loading.load_adapter import load_adapter
    from peft_lab.serve.tenants import Tenants, load_many
    from peft_lab.training.callbacks.bilevel import AlternatingActivation
    from peft_lab.training.evaluate import evaluate, predict
    from peft_lab.training.read_training_data import ReadTrainingData, read_training_data
    from peft_lab.training.run import train
    from peft_lab.tuners.forward_context import row_inputs
    from peft_lab.tuners.sequence.init_from_data import domain_prompts

__version__ = "0.1.0"

__all__ = [
    "AdapterMismatchError",
    "AlternatingActivation",
    "ConfigError",
    "DivergedError",
    "PeftLabError",
    "ReadTrainingData",
    "TaskError",
    "Tenants",
    "compare",
    "domain_prompts",
    "evaluate",
    "list_kinds",
    "list_methods",
    "list_recipes",
    "list_tasks",
    "load_adapter",
    "load_many",
    "merge",
    "predict",
    "push",
    "read_training_data",
    "recommend",
    "row_inputs",
    "to_lora",
    "train",
]

#: Public names whose modules import torch or datasets, resolved on first use.
_LAZY = {
    "AlternatingActivation": "training.callbacks.bilevel",
    "ReadTrainingData": "training.read_training_data",
    "Tenants": "serve.tenants",
    "compare": "comparison.run.runner",
    "domain_prompts": "tuners.sequence.init_from_data",
    "evaluate": "training.evaluate",
    "list_tasks": "data.task_registry",
    "load_adapter": "loading.load_adapter",
    "load_many": "serve.tenants",
    "merge": "export.merge",
    "predict": "training.evaluate",
    "row_inputs": "tuners.forward_context",
    "push": "hub.push",
    "read_training_data": "training.read_training_data",
    "recommend": "comparison.run.recommend",
    "to_lora": "export.to_lora",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"peft_lab.{_LAZY[name]}"), name)
    if name.endswith("Config"):
        return getattr(importlib.import_module("peft_lab.adapters"), name)
    raise AttributeError(f"module 'peft_lab' has no attribute {name!r}.{did_you_mean(name, __all__)}")


def __dir__() -> list[str]:
    configs = importlib.import_module("peft_lab.adapters").__all__
    return sorted([*globals(), *_LAZY, *configs])


register_with_peft()
