"""Shared tuner of all methods, peft's `BaseTuner` with more checks.

It adds targets by role, a check of the base and vectorised mixed batches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from accelerate import init_empty_weights
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

import peft_lab.backbones.module_roles as roles
from peft_lab.adapter_files import base_fingerprint, module_matching
from peft_lab.adapter_files.completeness import check_complete
from peft_lab.backbones.experts import expert_parameter, names_of_experts
from peft_lab.backbones.frozen_norms import has_running_norms, set_frozen_norms
from peft_lab.backbones.heads import PEFT_HEADS
from peft_lab.backbones.names import PEFT_PREFIX
from peft_lab.backbones.quantized_weight import keep_layout
from peft_lab.backbones.sharded_weights import whole_shape
from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.tuners.active_adapters import KeepsTrainability
from peft_lab.tuners.adapter_names import check_adapter_name, check_base_names
from peft_lab.tuners.backbone_mode import set_backbone_mode
from peft_lab.tuners.base_record import find_fingerprint, layer_fingerprints
from peft_lab.tuners.expert_layer import ExpertsLayer, add_to_experts, tell_left_out
from peft_lab.tuners.forward_context import WrappedForward, before_forward, unwrap_forwards, wrap_forward, wrap_model
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.merging import MergingTuner
from peft_lab.tuners.mixed_batch import BASE, batch_sizes, check_count, mixed_batch
from peft_lab.tuners.rank_check import tell_rank
from peft_lab.tuners.saved_module import adopt_saved_modules, check_trainable
from peft_lab.tuners.trained_tokens import (
    adopt_trained_tokens,
    check_rows,
    check_trained_tokens,
    renamed_rows,
)
from peft_lab.tuners.weighted_adapter import add_weighted_adapter

_LOG = logging.getLogger("peft_lab")
#: What peft puts into `modules_to_save` for text classification, whatever the model's head is called.
_PEFT_HEADS = list(PEFT_HEADS["SEQ_CLS"])


class AdapterTuner(MergingTuner):
    """Tuner that puts a method's layers into a model.

    `peft_lab.tuners.register` derives one subclass per method.
    """

    tuner_layer_cls: type[AdapterLayer]
    target_module_mapping = {}  # noqa: RUF012 - peft's own declaration; targets come from roles here

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check name and base, add the adapter and record the base's fingerprints."""
        config: Any = self.peft_config[adapter_name]
        try:
            check_adapter_name(adapter_name, model, self.prefix, self.tuner_layer_cls)
            check_base_names(model, self.prefix)
        except ConfigError:
            self._forget(adapter_name)
            raise
        vars(config).pop("read_alone", None)
        keep_layout(model)
        # peft sets `requires_grad` of all adapters on the way, which is not what counts once they are enabled again.
        disabled = [m for m in model.modules() if isinstance(m, KeepsTrainability) and m.disable_adapters]
        before = [module.trained_before for module in disabled]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # peft copies a head that is saved whole, with the layers inside of it and all that they refer to.
        for layer in model.modules():
            if isinstance(layer, self.tuner_layer_cls):
                layer.owners = self._owners()
        adopt_saved_modules(model)
        adopt_trained_tokens(model)
        for module, trained in zip(disabled, before, strict=True):
            module.trained_before = trained
        if disabled:
            self._enable_adapter_layers(False)
        # peft calls it for the first adapter alone, but another one may need hooks that the first does not.
        self._post_injection_hook(model, config, adapter_name)
        self._keep_out_of_broadcasts(model)
        # not a hook on each norm: what a method folds into a norm, it cannot where the norm itself has hooks
        if has_running_norms(model):
            before_forward(model, set_frozen_norms)
        if config.backbone_eval:
            wrap_forward(model, opens=True).prepare = set_backbone_mode
        if config.row_inputs():
            for wrapper in wrap_model(model):
                wrapper.declared[adapter_name] = config.row_inputs()
        # A loaded adapter keeps the record of the base that it was trained on.
        if config.fingerprints:
            config.recorded_fingerprints = config.fingerprints
            return
        tell_rank(model, config, self.info)
        if self.info.place in ("weight", "feature"):
            tell_left_out(model, self.info, adapter_name)
        config.recorded_fingerprints = self.record_base(model, adapter_name)

    def record_base(self, model: nn.Module, adapter_name: str) -> dict[str, dict[str, Any]]:
        """Fingerprints of the base modules that an adapter belongs to, by path: those that carry it."""
        return layer_fingerprints(model, adapter_name)

    def _forget(self, adapter_name: str) -> None:
        """Remove the config of a refused adapter."""
        self.peft_config.pop(adapter_name, None)
        # transformers notes that there is an adapter before it puts it on.
        if not getattr(self.model, "peft_config", None) and "_hf_peft_config_loaded" in vars(self.model):
            del self.model._hf_peft_config_loaded

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        loaded = peft_config.fingerprints is not None
        layers = peft_config.layers_to_transform
        if peft_config.target_modules is None:
            peft_config.target_modules = roles.target_modules(self.model, self.info.roles, layers=layers)
        elif isinstance(peft_config.target_modules, str) and layers is not None and not loaded:
            raise ConfigError(
                f"layers_to_transform={layers} does not go with the regex target_modules="
                f"{peft_config.target_modules!r}: let the regex choose the blocks, or give names."
            )
        else:
            peft_config.target_modules = roles.rename_targets(self.model, peft_config.target_modules)
        if peft_config.target_parameters and not loaded:
            peft_config.target_parameters = names_of_experts(self.model, peft_config.target_parameters)
        # A new adapter also trains the model's task head, under the name that it has in this model.
        if not loaded and peft_config.modules_to_save in (None, _PEFT_HEADS):
            heads = _heads(self.model, peft_config.task_type)
            peft_config.modules_to_save = sorted({*heads, *(peft_config.modules_to_save or [])}) or None
        if peft_config.fingerprints:
            self._find_modules(peft_config)
        return peft_config

    def _find_modules(self, config: Any) -> None:
        """Translate a loaded config to this model's module names."""
        recorded = config.fingerprints
        found = module_matching.match_modules(self.model, recorded)
        layer = self.tuner_layer_cls
        module_matching.check_fusable(found, self.info.name, layer.adapter_layer_names, layer.per_channel)
        config.found, config.fingerprints = found, found.records(self.model, recorded)
        stacked = [path for path in found.modules if expert_parameter(self.model, path) is not None]
        config.target_parameters = stacked or None
        modules = [path for path in found.modules if path not in stacked]
        # The names of the file may not reach modules that are called otherwise here; a regex of the found ones does.
        if not found.missing and not all(check_target_module_exists(config, name) for name in modules):
            config.target_modules, config.exclude_modules = module_matching.regex(modules), None
        heads = config.modules_to_save or []
        config.lost_heads = lost = module_matching.missing_modules(self.model, heads)
        # peft lists both of its usual heads where a model has one.
        if lost and not (len(lost) < len(heads) and set(lost) <= set(_PEFT_HEADS)):
            _LOG.warning("%s has no %s: that part of the adapter is left out.", type(self.model).__name__, lost[0])

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        # Before anything is injected, so that a refused adapter leaves the model as it was.
        check_trained_tokens(model, peft_config)
        check_trainable(model, peft_config.modules_to_save or [])
        if not peft_config.fingerprints:
            return
        largest = max((max(whole_shape(parameter), default=1) for parameter in model.parameters()), default=1)
        peft_config.check_sizes(largest)
        recorded = peft_config.fingerprints
        # Weights on the meta device have no values to compare.
        found = {name: find_fingerprint(model, name) for name in recorded}
        offloaded = {name for name, entry in found.items() if entry == {}}
        bound = peft_config.dtype_bound and not getattr(peft_config, "save_bases", False)
        base_fingerprint.check({k: v for k, v in recorded.items() if k not in offloaded}, found, dtype_bound=bound)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        # A stacked weight that carries an adapter looks like a module, but it is named in `target_parameters` alone.
        if isinstance(parent, ExpertsLayer):
            return
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise ConfigError(f'Module "{current_key}" already carries {type(target).__name__}; remove that one first.')
        # A wrapper's forward would never run there, so its adapter would change nothing.
        if isinstance(parent, nn.MultiheadAttention):
            raise ConfigError(f'Module "{current_key}" is read by nn.MultiheadAttention without being called.')
        layer = self.new_layer(target, current_key)
        layer.update_layer(adapter_name, peft_config)
        # A second adapter is added inactive, as peft does, and must not be trained meanwhile.
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            return add_to_experts(self, peft_config, model, adapter_name)

    def new_layer(self, target: nn.Module, path: str) -> AdapterLayer:
        """Make the layer that replaces a base module."""
        layer = self.layer_class(path)(target, path)
        layer.owners = self._owners()
        return layer

    def layer_class(self, path: str) -> type[AdapterLayer]:
        """Class of the layer around the module at a path, for methods whose layers are of several sorts."""
        return self.tuner_layer_cls

    @staticmethod
    def _keep_out_of_broadcasts(model: Any) -> None:
        """Tell DistributedDataParallel not to send what every process derives from the base at each step."""
        names = []
        for path, layer in model.named_modules():
            if isinstance(layer, AdapterLayer):
                names += [f"{path}.{name}" for name in layer.derived_buffers()]
        # It reads this attribute of the module that it wraps: the model itself, or peft's around it.
        model._ddp_params_and_buffers_to_ignore = [*names, *(PEFT_PREFIX + name for name in names)]

    def _owners(self) -> dict[Any, AdapterLayer]:
        """Owners of shared parameters, one mapping for all layers of this method."""
        # In __dict__, because peft's tuner is a module that looks up missing attributes in the model.
        if "shared_owners" not in self.__dict__:
            layers = (module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls))
            first = next(layers, None)
            self.__dict__["shared_owners"] = {} if first is None else first.owners
        found: dict[Any, AdapterLayer] = self.__dict__["shared_owners"]
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        found, lost = getattr(config, "found", module_matching.ModuleMatch()), getattr(config, "lost_heads", [])
        kept = {key: value for key, value in state_dict.items() if not module_matching.is_saved_module(key, lost)}
        locate = partial(_locate, prefix=cls.prefix)
        kept = renamed_rows(model, adapter_name, kept)
        renamed = module_matching.convert_state(kept, found, locate, cls.tuner_layer_cls.per_channel)
        # A file without fingerprints tells nothing of its modules; then families' usual renamings must do.
        if not found.modules:
            rename = roles.renamer(model)
            renamed = {_rename_key(rename, key, cls.prefix): value for key, value in renamed.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)
        _check_keys(model, cls.prefix, adapter_name, remapped)
        return remapped

    def __getattr__(self, name: str) -> Any:
        # peft's prompt learning keeps these on its model, and looks for them there whatever the method is.
        if name in ("prompt_encoder", "prompt_tokens"):
            raise AttributeError(f'Method "{self.info.name}" is no prompt learning of peft and has no {name}.')
        return super().__getattr__(name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if not self.info.can("mixed_batch"):
            raise ConfigError(f'Method "{self.info.name}" does not serve rows of one batch with different adapters.')
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode; please call `model.eval()` first."
            )
        self._check_row_names(names, args, kwargs)
        with mixed_batch(names):
            yield

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        unwrap_forwards(self.model)
        self.model.__dict__.pop("_ddp_params_and_buffers_to_ignore", None)
        return model

    def _check_row_names(self, names: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for name, rows in batch_sizes(self.model, args, kwargs).items():
            check_count(names, rows, name)
        unknown = sorted({*names} - {BASE} - set(self.peft_config))
        if unknown:
            raise ConfigError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, which become trainable unless in `inference_mode`."""
        self._check_known(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train or freeze adapters."""
        self._check_known(adapter_names)
        super().set_requires_grad(adapter_names, requires_grad)

    def _check_known(self, adapter_names: str | Sequence[str]) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name not in self.peft_config:
                raise ConfigError(f'There is no adapter "{name}".{did_you_mean(name, self.peft_config)}')

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the row inputs that it declares.

        If no other is active, the first by name becomes so; it is trained unless it was loaded frozen.
        """
        active = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        # Layers and heads do not know the adapters that they have no part of, so all are told here.
        if active == [adapter_name] and self.peft_config:
            successor = min(self.peft_config)
            self.set_adapter([successor], inference_mode=self.peft_config[successor].inference_mode)
        for module in self.model.modules():
            wrapper = module.__dict__.get("forward")
            if isinstance(wrapper, WrappedForward):
                wrapper.declared.pop(adapter_name, None)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for module in self.model.modules():
            if isinstance(module, AdapterLayer) and adapter_name in module.configs:
                module.cast_adapter(adapter_name, None if autocast_adapter_dtype else module.base_dtype)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear", **kw: Any
    ) -> None:
        """Add an adapter whose change of each module is the weighted sum of the changes of others.

        The arguments are those of peft's LoRA. It is exact, and so there are no other ways to combine adapters. The new
        adapter is neither active nor trained.

        Raises:
            ConfigError: the method's changes do not add up to one adapter, the adapters differ in their shape, modules
                or settings, there is not one finite weight for each, or the arguments ask for an approximation.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, kw)


class BlockTuner(AdapterTuner):
    """Tuner whose layers wrap whole blocks instead of single operations."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # peft's own looks for the weight of the module; the layer has already put its parameters on the right device
        setattr(parent, child_name, new_module)


def _heads(model: nn.Module, task_type: str | None) -> list[str]:
    """Task heads by name, also those wrapped by earlier adapters."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    found = roles.head_modules(model, task_type)
    heads = []
    for head in found:
        # The wrapper is what peft looks for; the head itself is a module inside of it.
        around = [name for name in wrapped if f"{head}.".startswith(f"{name}.")]
        heads.append(around[0] if around else head)
    return heads


def _locate(key: str, prefix: str) -> tuple[str, str] | None:
    """Split the key of an adapter file into module and parameter names."""
    head, mark, tail = key.rpartition(f".{prefix}")
    return (head.removeprefix(PEFT_PREFIX), f"{prefix}{tail}") if mark else None


def _rename_key(rename: Callable[[str], str], key: str, prefix: str) -> str:
    head, mark, tail = key.rpartition(f".{prefix}")
    if not mark:
        return key
    wrapper = PEFT_PREFIX if head.startswith(PEFT_PREFIX) else ""
    return wrapper + rename(head.removeprefix(wrapper)) + mark + tail


def _check_keys(model: nn.Module, prefix: str, adapter: str, state: dict[str, Tensor]) -> None:
    """Check that an adapter file holds exactly the adapter's parameters.

    peft itself only warns of missing ones.

    Raises:
        ConfigError: an entry is missing, unknown, of another shape or dtype, or not finite.
    """
    known = model.state_dict()
    ours = {key for key in known if key.endswith(f".{adapter}") and f".{prefix}" in key}
    heads = [f"{n}." for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    # The model itself can be its own embedding; its name is empty, and every key would start with it.
    resized = _embeddings(model)
    embeddings = [f"{n}." for n, m in model.named_modules() if n and m in resized]
    # Heads and embeddings that are saved whole are checked by peft; an adapter inside of them is ours again.
    given = {k for k in state if not k.startswith((*heads, *embeddings)) or f".{prefix}" in k}
    rows, given_rows = check_rows(model, adapter, state)
    ours, given = ours | rows, given | given_rows
    check_complete(ours, given)
    for key in sorted(ours):
        if known[key].shape != state[key].shape:
            raise ConfigError(
                f'Adapter entry "{key}" has shape {list(state[key].shape)}, expected {list(known[key].shape)}.'
            )
        if not known[key].is_floating_point() and known[key].dtype != state[key].dtype:
            raise ConfigError(f'Adapter entry "{key}" holds {state[key].dtype}, expected {known[key].dtype}.')
    for key, value in state.items():
        # Integers: a table of indices, or the number of batches that a norm among the modules to save has seen.
        whole = key in known and value.dtype == known[key].dtype and not value.is_floating_point()
        if not whole and not (value.is_floating_point() and bool(value.isfinite().all())):
            raise ConfigError(f'Adapter entry "{key}" holds values that are not finite numbers; train it again.')
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer) and adapter in module.configs:
            names = (*module.adapter_layer_names, *module.other_param_names)
            keys = {name: f"{path}.{name}.{adapter}" for name in names}
            module.check_values(adapter, {name: state[key] for name, key in keys.items() if key in state})


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Embedding layers of a model.

    peft itself adds them to an adapter file when they were resized or adapted.
    """
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name)())
        except (AttributeError, NotImplementedError):  # transformers' answer of models without token embeddings
            continue
    return [module for module in found if module is not None]
