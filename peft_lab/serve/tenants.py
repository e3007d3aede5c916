"""Many adapters on one base, one for each row of a batch.

Parameters of adapters that are alike lie in one bank, so a layer fetches those of all rows at once. Each request works
on the snapshot of banks that it began with; `add` and `remove` publish the next one and never wait for a request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_lab import registry
from peft_lab.adapter_files import base_fingerprint, module_matching
from peft_lab.backbones.quantized_weight import keep_layout, stored_weight
from peft_lab.errors import AdapterMismatchError, ConfigError, did_you_mean
from peft_lab.loading.load_adapter import most_bytes
from peft_lab.loading.pruned_base import prune_for
from peft_lab.serve.adapter_file import AdapterFile, check_shapes, read_adapter, row_layer_class
from peft_lab.serve.parameter_banks import ParameterBank, RowLayout, Values
from peft_lab.serve.request import HEADS, MethodAtModule, PerRowHead, Request, ServedModule, Snapshot
from peft_lab.tuners.forward_context import before_forward, remove_before
from peft_lab.tuners.mixed_batch import BASE, RowLayer, batch_sizes


def load_many(model: nn.Module, adapters: Mapping[str, str | Path] | None = None) -> Tenants:
    """Put many adapters on one base, to serve mixed batches.

    ```python
    tenants = peft_lab.load_many(model, {"alice": "runs/alice", "bob": "someone/adapter-on-the-hub"})
    logits = tenants(**batch, adapter_names=["alice", "bob", "__base__"]).logits
    ```

    The model itself stays what it was: called without names it is the base. Adapters that were trained on a pruned base
    prune it, in place and for good, and all of them must have the same one.

    Args:
        model: the base, without adapters, in evaluation mode, on the device and in the dtype to serve in.
        adapters: name -> folder or Hub id.

    Raises:
        ConfigError: an adapter cannot be read, or its method or configuration cannot be served by row.
        AdapterMismatchError: an adapter belongs to another base.
    """
    tenants = Tenants(model)
    try:
        for name, adapter in (adapters or {}).items():
            tenants.add(name, adapter)
    # after an interrupt too, because the caller's model must not stay wrapped
    except BaseException:
        tenants.unload()
        raise
    return tenants


class Tenants:
    """Many adapters on one base.

    Every method may be called from any thread at any time.

    Attributes:
        model: the base.
    """

    def __init__(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            if isinstance(module, BaseTunerLayer | ServedModule):
                raise ConfigError(
                    f'Module "{path}" of the model already carries {type(module).__name__}; pass a base without '
                    "adapters, or add to the tenants that it has."
                )
        keep_layout(model)
        self.model = model
        self._find_module = module_matching.module_finder(model)
        self._lock = threading.Lock()
        self._snapshot = Snapshot()
        self._request: ContextVar[Request | None] = ContextVar("peft_lab_request", default=None)
        self._layers: dict[tuple[str, str], RowLayer | PerRowHead] = {}
        self._shapes: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
        self._served_modules: dict[str, ServedModule] = {}
        # around the model's own forward, because within `rows` the model is called without passing through `__call__`
        before_forward(model, self._check_batch)

    # Requests ---------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """Output of the model for a batch, without gradients.

        Args:
            args, kwargs: as for the model.
            adapter_names: one name per row, "__base__" for rows without an adapter.

        Raises:
            ConfigError: an unknown name, or not one name per row.
        """
        with torch.no_grad(), self.rows(adapter_names):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """Generate with an adapter for each prompt.

        Beams and returned sequences have the adapter of their prompt.

        Args:
            args, kwargs: as for `model.generate`.
            adapter_names: one name per prompt, "__base__" for prompts without an adapter.

        Raises:
            ConfigError: as for a call.
        """
        model: Any = self.model
        request = Request(self._snapshot, adapter_names)
        for rows in batch_sizes(model, args, kwargs).values():
            request.check(rows)
        request.exact = False  # beams and returned sequences repeat the rows
        with self._using(request):
            return model.generate(*args, **kwargs)

    @contextmanager
    def rows(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """Use these adapters, one per row, within the block.

        Other threads are not affected.

        Raises:
            ConfigError: an unknown name.
        """
        with self._using(Request(self._snapshot, adapter_names)):
            yield

    @contextmanager
    def _using(self, request: Request) -> Iterator[None]:
        if self.model.training:
            raise ConfigError("Rows with different adapters are for inference; call model.eval() first.")
        # The banks stay where they were made, for a request under way must find its own.
        device = self._device()
        for bank in request.snapshot.banks.values():
            if bank.rows.device != device:
                raise ConfigError(
                    f"The base was moved to {device} after its adapters were loaded to {bank.rows.device}; move it "
                    "before load_many."
                )
        token = self._request.set(request)
        try:
            yield
        finally:
            self._request.reset(token)

    def _check_batch(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        request = self._request.get()
        if request is None:
            return
        for rows in batch_sizes(model, (), arguments).values():
            request.check(rows)

    # Adapters ---------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, in the order they were added."""
        return list(self._snapshot.layouts)

    def __len__(self) -> int:
        return len(self._snapshot.layouts)

    def __contains__(self, name: object) -> bool:
        return name in self._snapshot.layouts

    def add(self, name: str, adapter: str | Path) -> None:
        """Load one more adapter, for requests that begin later.

        Raises:
            ConfigError: the name is taken or reserved, or as for `load_many`.
            AdapterMismatchError: the adapter belongs to another base.
        """
        if not isinstance(name, str) or not name or name == BASE:
            raise ConfigError(f'An adapter cannot be called {name!r}: names are text, and "{BASE}" means no adapter.')
        # before reading too, so that a name that is taken costs no download
        self._check_free(name)
        # reading is slow, so it happens before the lock is taken
        file = read_adapter(adapter, most_bytes(self.model))
        with self._lock, torch.no_grad():
            self._check_free(name)  # again, because another thread may have taken the name meanwhile
            prune_for(self.model, file.pruning, str(adapter), occupied=bool(self._snapshot.layouts))
            parts = {file.info.name: self._checked_rows(file), HEADS: self._checked_heads(file)}
            snapshot = self._snapshot
            banks = dict(snapshot.banks)
            known = {layout.signature(): layout for layout in banks}
            layouts = []
            for owner, values in parts.items():
                if not values:
                    continue
                # an adapter like an earlier one shares its bank
                layout = RowLayout.of(owner, values)
                layout = known.get(layout.signature(), layout)
                bank = banks.get(layout) or ParameterBank.empty(layout, self._device())
                banks[layout] = bank.with_adapter(name, layout.row(values))
                layouts.append(layout)
            self._publish({**snapshot.layouts, name: tuple(layouts)}, banks)

    def remove(self, name: str) -> None:
        """Remove an adapter.

        Requests that are under way still use it; its memory goes with the last of them.

        Raises:
            ConfigError: there is none of that name.
        """
        with self._lock:
            snapshot = self._snapshot
            self._check_known(name, snapshot)
            banks = dict(snapshot.banks)
            for layout in snapshot.layouts[name]:
                bank = banks[layout].without_adapter(name)
                # a bank without an adapter would keep its memory, and its layers at every module
                if bank.row_of:
                    banks[layout] = bank
                else:
                    del banks[layout]
            remaining = {other: layouts for other, layouts in snapshot.layouts.items() if other != name}
            self._publish(remaining, banks)

    def nbytes(self, name: str | None = None) -> int:
        """Bytes of one adapter's parameters and heads.

        Without a name they are those of all banks, unused rows included.

        Raises:
            ConfigError: there is no adapter of that name.
        """
        # read once, because another thread may publish the next snapshot in between
        snapshot = self._snapshot
        if name is None:
            return sum(bank.rows.nbytes for bank in snapshot.banks.values())
        self._check_known(name, snapshot)
        return sum(layout.width * layout.dtype.itemsize for layout in snapshot.layouts[name])

    def unload(self) -> nn.Module:
        """Restore the model and return it; no request may be under way."""
        with self._lock:
            remove_before(self.model, self._check_batch)
            for path, module in self._served_modules.items():
                self.model.set_submodule(path, module.base_layer)
            self._served_modules.clear()
            self._snapshot = Snapshot()
        return self.model

    # Checks of an adapter -----------------------------------------------------------------------------------------

    def _check_free(self, name: str) -> None:
        if name in self._snapshot.layouts:
            raise ConfigError(f'There already is an adapter "{name}"; remove it first, or choose another name.')

    @staticmethod
    def _check_known(name: str, snapshot: Snapshot) -> None:
        if name not in snapshot.layouts:
            raise ConfigError(f'There is no adapter "{name}".{did_you_mean(name, snapshot.layouts)}')

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _name_in_base(self, path: str) -> str:
        """Name in this model of a module of the adapter."""
        return self._find_module(path) or path

    def _checked_rows(self, file: AdapterFile) -> Values:
        """Rows of an adapter by module, checked against this base."""
        values = {self._name_in_base(path): tensors for path, tensors in file.values.items()}
        recorded = getattr(file.config, "fingerprints", None)
        if recorded:
            recorded = {self._name_in_base(path): entry for path, entry in recorded.items()}
            found = {path: self._fingerprint(path) for path in recorded}
            base_fingerprint.check(recorded, found, dtype_bound=file.config.dtype_bound)
            for path in (*recorded, *values):
                if path not in recorded or path not in values:
                    raise ConfigError(f'The adapter file and its config differ in module "{path}"; it was cut short.')
        rows: dict[str, dict[str, Tensor]] = {}
        shape_key = file.shape_key()
        for path, tensors in values.items():
            layer: Any = self._layer(path, file.info.name, row_layer_class(file.info.name))
            key = (path, shape_key)  # the shapes of many adapters of one configuration are computed once
            if key not in self._shapes:
                self._shapes[key] = layer.row_shapes(file.config)
            check_shapes(path, tensors, self._shapes[key])
            device = stored_weight(layer.base_layer).device  # type: ignore[union-attr]
            rows[path] = layer.row_values({name: value.to(device) for name, value in tensors.items()}, file.config)
        return rows

    def _checked_heads(self, file: AdapterFile) -> Values:
        """Heads of an adapter by module, checked against this base."""
        saved = file.heads()
        heads = {self._name_in_base(path): tensors for path, tensors in saved.items()}
        for key, value in file.others.items():
            path, _, name = key.rpartition(".")
            if path in saved:
                continue
            # the file may hold copies of the base, such as embeddings; they must be what all rows share
            own = getattr(self._base_module(self._name_in_base(path.removesuffix(".base_layer"))), name, None)
            if not isinstance(own, Tensor) or own.shape != value.shape or not torch.equal(own.to(value), value):
                raise ConfigError(
                    f'The adapter file has an entry "{key}" that is neither of its method nor a module to save, and '
                    "not what the base has there; all rows share the base."
                )
        labels = getattr(getattr(self.model, "config", None), "num_labels", None)
        for path, tensors in heads.items():
            base: Any = self._layer(path, HEADS, PerRowHead).base_layer
            expected = {name: tuple(value.shape) for name, value in base.named_parameters(recurse=False)}
            # an adapter may have been trained for other labels, so its classifier may have other outputs
            outputs = tensors["weight"].shape[0] if "weight" in tensors else 0
            if isinstance(base, nn.Linear) and labels == base.out_features and outputs:
                expected = {name: (outputs, *shape[1:]) for name, shape in expected.items()}
            check_shapes(path, tensors, expected)
        return heads

    def _layer(self, path: str, owner: str, make: Callable[[nn.Module, str], Any]) -> Any:
        if (path, owner) not in self._layers:
            base = self._base_module(path)
            if base is None:
                raise AdapterMismatchError(
                    f'The base has no module "{path}", which the adapter changes; load the model class and backbone '
                    "it was trained on."
                )
            self._layers[path, owner] = make(base, path)
        return self._layers[path, owner]

    def _base_module(self, path: str) -> Any:
        """Base module of a path; None if there is none."""
        if path in self._served_modules:
            return self._served_modules[path].base_layer
        try:
            return self.model.get_submodule(path)
        except AttributeError:
            return None

    def _fingerprint(self, path: str) -> dict[str, Any] | None:
        module = self._base_module(path)
        weight = None if module is None else stored_weight(module)
        return None if weight is None else base_fingerprint.module_fingerprint(module, weight)

    def _publish(self, layouts: Mapping[str, tuple[RowLayout, ...]], banks: Mapping[RowLayout, ParameterBank]) -> None:
        """Replace the snapshot that requests begin with."""
        snapshot = self._snapshot
        # one more row in a known bank changes nothing at the modules
        modules = snapshot.modules if banks.keys() == snapshot.banks.keys() else self._modules(banks)
        # modules are wrapped before the snapshot that needs them is published to other threads
        for path in modules:
            if path not in self._served_modules:
                served = ServedModule(self.model.get_submodule(path), path, self._request)
                # a new module begins in training mode, whatever that of the model is
                self._served_modules[path] = served.train(self.model.training)
                self.model.set_submodule(path, served)
        self._snapshot = Snapshot(layouts, banks, modules)

    def _modules(self, banks: Mapping[RowLayout, ParameterBank]) -> dict[str, tuple[MethodAtModule, ...]]:
        """Methods at each module that a bank holds parameters for."""
        found: dict[str, dict[str, list[RowLayout]]] = {}
        for layout in sorted(banks, key=_order):
            for path in layout.modules:
                found.setdefault(path, {}).setdefault(layout.owner, []).append(layout)
        modules: dict[str, tuple[MethodAtModule, ...]] = {}
        for path, owners in found.items():
            for owner, layouts in owners.items():
                method = MethodAtModule(self._layers[path, owner], tuple(layouts))
                modules[path] = (*modules.get(path, ()), method)
        return modules


def _order(layout: RowLayout) -> int:
    """Sort key: weight deltas, then output transforms, then heads."""
    return 2 if layout.owner == HEADS else int(registry.method(layout.owner).place == "feature")
