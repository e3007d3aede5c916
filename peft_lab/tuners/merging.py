"""Merging of adapters into base weights, and back.

A merged weight is always the unmerged one with all merged adapters folded in, rounded to the base's dtype once.
`MergeableLayer` merges one layer. `MergingTuner` merges a model, and checks all layers before the first one changes.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_lab.adapter_files.base_fingerprint import reference_weight
from peft_lab.backbones.family_table import declared_names
from peft_lab.backbones.quantized_weight import dense_weight, quantization
from peft_lab.backbones.sharded_weights import holds_shards, is_sharded, whole_weight
from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo
from peft_lab.tuners.expert_layer import ExpertsLayer
from peft_lab.tuners.merge_refusals import SHARDED_MERGE, check_mergeable
from peft_lab.tuners.operations import StandIn
from peft_lab.tuners.trained_tokens import TokenLayer

#: A flag of a model's config, to be set when the merged model stands alone.
Flag = tuple[Any, str]
#: Entry of a layer's metadata in a state dict: the adapters that are merged into its weight.
_MERGED = "merged_adapters"
#: What peft's wrappers of whole trained modules put into a path.
_WRAPPERS = re.compile(r"\.(modules_to_save\.[^.]+|original_module)(?=\.|$)")


class MergeableLayer(StandIn, BaseTunerLayer):
    """Layer whose adapters can be folded into its base module.

    Attributes:
        unmerged_weight: base weight before the first merge, None without one. A buffer, so that it moves and is copied
            with the layer; not part of the state dict.
        unmerged_bias: the bias likewise; also None if the base has none.
    """

    info: ClassVar[MethodInfo]
    #: True if the adapters' effects are summands, so that any of them can be merged while the others are not.
    additive: ClassVar[bool] = False
    base_layer: Any
    configs: dict[str, Any]
    unmerged_weight: Tensor | None
    unmerged_bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []
        self._keep(None, None)

    def folded(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Base weight and bias with one adapter merged, float32 or wider.

        It is differentiable in the adapter's parameters: experts are trained through it.
        """
        raise NotImplementedError

    @property
    def base_weight(self) -> Tensor:
        """Unmerged weight that tells device, dtype and identity of the base."""
        weight = reference_weight(self.base_layer) if self.unmerged_weight is None else self.unmerged_weight
        assert weight is not None, "a base module has weights"
        return weight

    @property
    def is_sharded(self) -> bool:
        """True if this process holds only a part of the base weight now."""
        return is_sharded(self.base_weight)

    @property
    def base_dtype(self) -> torch.dtype:
        """Dtype of the base weight's values, float32 where they are packed."""
        dtype = self.base_weight.dtype
        return dtype if dtype.is_floating_point else torch.float32

    def dense_weight(self) -> Tensor:
        """Unmerged base weight as its values: dequantised to float32 where it is quantised.

        A sharded one is gathered, so that all processes have to ask for it.

        Raises:
            ConfigError: the library of a quantised weight gives no values.
        """
        unmerged = self.unmerged_weight
        return whole_weight(dense_weight(self.base_layer) if unmerged is None else unmerged)

    @property
    def creates_bias(self) -> bool:
        """True if the merged base has a bias that it does not have alone."""
        return self.merged and self.unmerged_bias is None and getattr(self.base_layer, "bias", None) is not None

    def merged_values(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, in the base's dtypes, with the named adapters and none else folded in.

        Raises:
            ConfigError: they are not finite in these dtypes, or the base is sharded or quantised.
        """
        if self.is_sharded:
            raise ConfigError(SHARDED_MERGE)
        form = quantization(self.base_layer)
        if form:
            raise ConfigError(
                f"The base weights are quantised ({form}), and a merged weight would be rounded to that again; "
                "`peft-lab merge` and peft_lab.merge take their values as they are, or put the adapter on the base "
                "without quantisation and merge it there."
            )
        weight, bias = self.base_weight, self.unmerged_bias if self.merged else getattr(self.base_layer, "bias", None)
        # Weights made in inference mode could not be trained on later.
        with torch.inference_mode(False), torch.no_grad():
            wide, wide_bias = _wide(weight), None if bias is None else _wide(bias)
            for name in names:
                wide, wide_bias = self.folded(name, wide, wide_bias)
            merged = wide.to(weight.dtype)
            merged_bias = None if wide_bias is None else wide_bias.to(weight.dtype if bias is None else bias.dtype)
        # What is checked is what is written: a value may be finite in float32 and overflow in float16.
        if not (merged.isfinite().all() and (merged_bias is None or merged_bias.isfinite().all())):
            raise ConfigError(
                f"Merging {', '.join(names)} gives NaNs or infinite numbers in the weights of a "
                f"{type(self.base_layer).__name__} in {str(weight.dtype).removeprefix('torch.')}; load the base in a "
                "wider dtype, or train the adapter again."
            )
        return merged, merged_bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold active adapters into the base weight.

        The unmerged weight is kept, so that `unmerge` is exact. The merged one is always checked, whether
        `safe_merge` is set or not.

        Raises:
            NotImplementedError: the method cannot be merged.
            ConfigError: an adapter is not active, comes after one that stays unmerged, or the merged weight is not
                finite.
        """
        wanted = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.configs]
        check_mergeable(self.info, [self.configs[name] for name in wanted])
        names = self.in_order(wanted)
        if names == self.merged_adapters:
            return
        weight, bias = self.merged_values(names)
        base = self.base_layer
        if not self.merged:
            self._keep(base.weight, getattr(base, "bias", None))
        with torch.inference_mode(False):
            base.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                base.bias = nn.Parameter(bias, requires_grad=False)
        self.merged_adapters[:] = names

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Adapters that are merged once `names` are too, in the order of the active ones.

        Raises:
            ConfigError: the layer would no longer compute what it computes now.
        """
        order = [name for name in self.active_adapters if name in self.configs]
        wanted = {*self.merged_adapters, *names}
        if inactive := sorted(wanted.difference(order)):
            raise ConfigError(
                f'Adapter "{inactive[0]}" is not active, so merging it would change what the model answers; call '
                "set_adapter first, or merge_and_unload with its name."
            )
        merged = [name for name in order if name in wanted]
        if not self._goes_with(merged, order):
            raise ConfigError(
                f'Method "{self.info.name}" acts in the order of the active adapters ({", ".join(order)}), so '
                f'"{merged[-1]}" can be merged only together with those before it.'
            )
        return merged

    def _goes_with(self, merged: Sequence[str], active: Sequence[str]) -> bool:
        """Test whether the active adapters are the merged ones and then the others."""
        return {*merged} <= {*active} if self.additive else [*merged] == [*active[: len(merged)]]

    def unmerge(self) -> None:
        """Put the unmerged base weight back, bit for bit."""
        if not self.merged:
            return
        base = self.base_layer
        base.weight = _parameter(self.unmerged_weight)
        if hasattr(base, "bias"):
            base.bias = None if self.unmerged_bias is None else _parameter(self.unmerged_bias)
        self._keep(None, None)
        self.merged_adapters.clear()

    def _keep(self, weight: Tensor | None, bias: Tensor | None) -> None:
        # Put in by hand, because an assigned parameter would be one of the layer's own, which exporters write.
        for name, value in (("unmerged_weight", weight), ("unmerged_bias", bias)):
            self._buffers[name] = value
            self._non_persistent_buffers_set.add(name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters; a merge that does not go with them is undone."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if not self._goes_with(self.merged_adapters, [name for name in names if name in self.configs]):
            self.unmerge()
        super().set_adapter(adapter_names, inference_mode)

    # A state dict of a merged layer holds the merged weight, as in peft; its metadata tell so.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][_MERGED] = [*self.merged_adapters]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        saved = local_metadata.get(_MERGED, [])
        if saved and saved != self.merged_adapters:
            raise ConfigError(
                f'The state of "{prefix[:-1]}" has {", ".join(saved)} merged into its weights, and this model has not; '
                "save it after unmerge_adapter, or call merge_adapter before loading."
            )
        # Values that are loaded belong to unmerged weights, and what was merged before would be out of date.
        if not saved and any(key.startswith(prefix) for key in state_dict):
            self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class MergingTuner(BaseTuner):
    """Tuner that merges a whole model or refuses before anything changes."""

    info: ClassVar[MethodInfo]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge active adapters; the others go on acting unmerged.

        Raises:
            NotImplementedError: the method cannot be merged.
            ConfigError: an adapter cannot, or the architecture has no place for a bias that merging creates.
        """
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        flags = self._check_merge(adapter_names, unload=True) if merge else self._flags(self._created_biases())
        # The merged model is that with these adapters active, their heads included.
        if merge and adapter_names is not None:
            self.set_adapter(adapter_names)
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        # A head that was saved whole comes out of its wrapper with what earlier adapters have put inside of it.
        while any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in self.model.modules()):
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for config, flag in flags:
            setattr(config, flag, True)
        return model

    def _check_merge_allowed(self) -> None:
        check_mergeable(self.info, [self.peft_config[name] for name in self.active_adapters])
        super()._check_merge_allowed()

    def _check_merge(self, adapter_names: list[str] | None, unload: bool = False) -> list[Flag]:
        """Check that adapters can be merged into the whole model, which is not changed.

        Every merged weight is computed once and thrown away: twice the work, but not twice the memory.

        Returns:
            Flags of the model's config that make room for biases that merging creates.

        Raises:
            NotImplementedError: the method cannot be merged.
            ConfigError: naming the adapter or the module that cannot.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        names = self.active_adapters if adapter_names is None else adapter_names
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ConfigError(f'There is no adapter "{unknown[0]}" to merge; there are: {", ".join(self.peft_config)}.')
        check_mergeable(self.info, [self.peft_config[name] for name in names])
        if holds_shards(self.model):
            raise ConfigError(SHARDED_MERGE)
        created, merged = [], []
        places = Counter(id(module) for _, module in self.model.named_modules(remove_duplicate=False))
        for path, module in self.model.named_modules():
            # An adapter that is merged by name may be inactive now, and so may its head.
            if isinstance(module, AuxiliaryTrainingWrapper) and unload and adapter_names is not None:
                module.check_set_adapter(adapter_names)
            if isinstance(module, TokenLayer):
                module.check_finite(names)
            if not isinstance(module, MergeableLayer):
                continue
            wanted = [name for name in names if name in module.configs]
            if not (unload and adapter_names is not None):
                wanted = module.in_order(wanted)
            if not wanted:
                continue
            if places[id(module.base_layer)] > places[id(module)]:
                raise ConfigError(
                    f'The base module of "{path}" stands at another place of the model too, without an adapter there, '
                    "and merging would change both; keep the adapter as it is."
                )
            with onload_layer(module):
                _, bias = module.merged_values(wanted)
                had = module.unmerged_bias if module.merged else getattr(module.base_layer, "bias", None)
            merged.append(path)
            if bias is not None and had is None:
                created.append(path)
        self._check_ties(merged)
        return self._flags(created)

    def _created_biases(self) -> list[str]:
        """Paths of the layers whose merged base has a bias that the base alone has not."""
        layers = [(path, m) for path, m in self.model.named_modules() if isinstance(m, MergeableLayer)]
        return [path for path, layer in layers if layer.creates_bias]

    def _flags(self, created: list[str]) -> list[Flag]:
        """Flags by which the architecture has a place for the biases of these modules.

        Raises:
            ConfigError: it has no place for one of them.
        """
        flags: list[Flag] = []
        for start, model in self._outer_models() if created else ():
            inside = {f"{p.removeprefix(start)}.bias" for p in map(_entered, created) if p.startswith(start)}
            flags += bias_flags(model, inside) if inside else []
        return flags

    def _check_ties(self, merged: list[str]) -> None:
        """Check that a reload finds the weights that these modules are tied to.

        Raises:
            ConfigError: several others have a module's weight, and a saved model has it under its name alone.
        """
        for start, model in self._outer_models():
            others = Counter(getattr(model, "all_tied_weights_keys", {}).values())
            for path in map(_entered, merged):
                count = others[f"{path.removeprefix(start)}.weight"]
                if count > 1 and path.startswith(start):
                    raise ConfigError(
                        f'{count} other modules have the weight of "{path}", and only under its name it is saved, so '
                        "they would have the merged one when the model is loaded again; keep the adapter as it is."
                    )

    def _outer_models(self) -> Iterator[tuple[str, PreTrainedModel]]:
        """Each transformers model that lies in no other one, with the start of its modules' paths."""
        outer: list[str] = []
        for path, module in self.model.named_modules():
            start = f"{path}." if path else ""
            # Those inside of another one are saved and loaded with it.
            if isinstance(module, PreTrainedModel) and not start.startswith(tuple(outer)):
                outer.append(start)
                yield start, module

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # peft would look for the one weight of a head, which may be a module of several layers, or of experts. A base
        # that comes back needs nothing set, and a quantised one may have no weight under that name.
        whole = isinstance(child, AuxiliaryTrainingWrapper | ExpertsLayer)
        if whole or getattr(child, "base_layer", None) is new_module:
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        # peft writes the base of adapted embeddings into the adapter's file; a merged one would be adapted twice.
        for path, module in model.named_modules():
            if isinstance(module, MergeableLayer) and module.merged:
                state_dict[f"{path}.base_layer.weight"] = module.base_weight
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, *args, **kwargs)


def bias_flags(model: PreTrainedModel, created: set[str]) -> list[Flag]:
    """Config flags with which a model's class has parameters of these new names.

    A flag is taken only if the class then has no parameter that the merged model lacks.

    Raises:
        ConfigError: the class has no place for one of the names, which a reload would drop.
    """
    known = _parameter_names(model, model.config)
    # A copy, because the model must keep its config if a bias has no place.
    config = copy.deepcopy(model.config)
    flags: list[Flag] = []
    for flag in declared_names(config.model_type, "bias_flags"):
        if created <= known or getattr(config, flag, None) is not False:
            continue
        setattr(config, flag, True)
        names = _parameter_names(model, config)
        # The flag may also ask for biases that merging does not create.
        if names - known <= created:
            flags.append((model.config, flag))
            known = names
        else:
            setattr(config, flag, False)
    if left := sorted(created - known):
        raise ConfigError(
            f"{type(model).__name__} has no place for {len(left)} merged biases (the first is "
            f'"{left[0]}"), so they would be lost when the merged model is loaded again; keep the adapter as it is, or '
            "train it without shifts."
        )
    return flags


def _parameter_names(model: PreTrainedModel, config: Any) -> set[str]:
    """Names of the state dict of the model's class with a config."""
    # On the meta device the second model takes no memory.
    with torch.device("meta"):
        return {*type(model)(copy.deepcopy(config)).state_dict()}


def _entered(path: str) -> str:
    """Path of a module once peft's wrappers of whole trained modules are gone."""
    return _WRAPPERS.sub("", path)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _parameter(kept: Tensor | None) -> nn.Parameter:
    """The kept parameter itself, or one of its values if the layer was moved meanwhile."""
    assert kept is not None, "a merged layer keeps its weight"
    with torch.inference_mode(False):
        return kept if isinstance(kept, nn.Parameter) else nn.Parameter(kept.detach(), kept.requires_grad)
