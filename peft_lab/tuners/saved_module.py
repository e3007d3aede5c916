"""Modules to save, such as task heads, of several adapters on one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_lab.backbones.quantized_weight import quantization
from peft_lab.errors import ConfigError
from peft_lab.tuners.active_adapters import KeepsTrainability
from peft_lab.tuners.mixed_batch import BASE, current_row_adapters


class SavedModule(KeepsTrainability, ModulesToSaveWrapper):
    """peft's wrapper of a module to save, for adapters of which some have none.

    Rows and active adapters without a module of their own here have the base's.
    """

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        # peft refuses an empty list, which is what is left when the last adapter is deleted.
        return super().check_set_adapter(adapter_name) if adapter_name else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        super().set_adapter([name for name in names if name in self.modules_to_save], inference_mode)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Remove an adapter; those that are active now are so here too."""
        self._adapters.discard(adapter_name)
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        if adapter_name in self.active_adapters:
            self._active_adapter = []
        left = [name for name in new_active_adapters or () if name in self.modules_to_save]
        if left and left != self.active_adapters:
            self.set_adapter(left)

    def forward(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """Run the module of the active adapter, or each row's own."""
        rows = current_row_adapters()
        if rows is None or self.disable_adapters:
            if adapter_names is not None:
                kwargs["adapter_names"] = adapter_names
            return super().forward(*args, **kwargs)
        if not args or not isinstance(args[0], Tensor):
            raise ConfigError("A saved module whose input is no positional tensor cannot differ by row of the batch.")
        # Beams and windows of a row lie next to each other.
        index = rows.index(len(args[0]), args[0].device).tolist()
        present = [name if name in self.modules_to_save else BASE for name in rows.names]
        names = [present[i] for i in index]
        if len({*names}) > 1:
            return self._mixed_batch_forward(*args, adapter_names=names, **kwargs)
        module: nn.Module = self.original_module if names[0] == BASE else self.modules_to_save[names[0]]
        return module(*args, **kwargs)


def adopt_saved_modules(model: nn.Module) -> None:
    """Make `SavedModule`s of all modules that peft has wrapped to save them."""
    for module in model.modules():
        # peft makes them itself and offers no way to choose the class.
        if type(module) is ModulesToSaveWrapper:
            module.__class__ = SavedModule


def check_trainable(model: nn.Module, names: Sequence[str]) -> None:
    """Check that modules which are trained in full can be.

    `names` are paths or their ends, as in `modules_to_save`.

    Raises:
        ConfigError: naming one with a quantised weight.
    """
    ends = tuple(f".{name}" for name in names)
    for path, module in model.named_modules():
        if not f".{path}".endswith(ends):
            continue
        form = next(filter(None, map(quantization, module.modules())), "")
        if form:
            raise ConfigError(
                f'modules_to_save names "{path}", whose weight is quantised ({form}) and cannot be trained; leave it '
                "out there, or load the backbone so that this module stays unquantised."
            )
