"""Mode of the frozen backbone while its adapter is trained.

`model.train()` switches dropout and drop path on in every module. For an adapter with `backbone_eval` the modules that
it does not train are put back into evaluation mode at each forward, whoever called `train()`: a loop, Trainer,
accelerate. The adapter's own layers and a trained head, with the dropout before it, stay in training mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from peft_lab.backbones.frozen_norms import set_frozen_norms
from peft_lab.tuners.forward_context import EVALUATED, ForwardContext
from peft_lab.tuners.layer import AdapterLayer


def set_backbone_mode(context: ForwardContext) -> None:
    """Set the mode of a model's frozen modules to that of its active adapter.

    A model in evaluation mode stays as it is.
    """
    model = context.model
    if not model.training:
        return
    evaluated = context.shared[EVALUATED] = _is_evaluated(model)
    for module in frozen_modules(model):
        # A module is checkpointed in training mode alone, so such a one is switched inside of its checkpoint.
        module.training = not evaluated or bool(getattr(module, "gradient_checkpointing", False))
    set_frozen_norms(model)


def frozen_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model that no adapter trains.

    Beside a trained head these are the modules of the backbone alone.
    """
    trained_head = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    backbone = getattr(model, "base_model", model) if trained_head else model
    yield from _frozen(backbone if isinstance(backbone, nn.Module) else model)


def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return
    # Of an adapter's layer only the wrapped module is frozen, not the dropout of its own.
    if isinstance(module, BaseTunerLayer):
        yield from _frozen(module.get_base_layer())
        return
    if not any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        yield module
    for child in module.children():
        yield from _frozen(child)


def _is_evaluated(model: nn.Module) -> bool:
    """Test whether an active adapter wants the backbone in evaluation mode."""
    layer: Any
    for layer in model.modules():
        names = layer.active_adapters if isinstance(layer, AdapterLayer) else ()
        if any(layer.configs[name].backbone_eval for name in names if name in layer.configs):
            return True
    return False
