"""Base classes of adapter layers.

They hold what all methods have in common: active adapters, dtype, disabling, merging, mixed batches and shared
parameters.

`WeightLayer` is for methods that add a delta to a weight, `FeatureLayer` for methods that transform an op's output.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_lab.adapter_files.base_fingerprint import module_fingerprint
from peft_lab.backbones.quantized_weight import weight_shape
from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo
from peft_lab.tuners.active_adapters import LayerAdapters
from peft_lab.tuners.config import AdapterConfig
from peft_lab.tuners.forward_context import ForwardContext, on_rows
from peft_lab.tuners.merging import MergeableLayer
from peft_lab.tuners.mixed_batch import BASE, RowAdapters, check_count, current_row_adapters
from peft_lab.tuners.operations import Operation, apply_matrix, features, operation
from peft_lab.tuners.tensor_parallel import own_channels, whole_channels


class AdapterLayer(MergeableLayer, LayerAdapters):
    """Wrapped base module with any number of named adapters.

    A subclass names its parameters in `adapter_layer_names` (each starts with the method's prefix), gives their start
    values in `initial_values`, and computes `adapted`, `mixed` and `folded`.
    """

    info: ClassVar[MethodInfo]
    config_cls: ClassVar[type[AdapterConfig]]
    #: The adapter's tensors that a row of a batch has of its own, each with the number that changes nothing; a method
    #: that names them supplies `rows_delta` or `rows_transform`, and `peft_lab.load_many` serves it.
    row_fields: ClassVar[Mapping[str, float]] = {}
    #: Those with one value per output channel, likewise; if all are, an adapter can move in and out of a fused layer.
    per_channel: ClassVar[Mapping[str, float]] = {}
    #: True if the change of the op's output is linear in the distance of `row_fields` from those numbers; then
    #: `add_weighted_adapter` is exact.
    linear: ClassVar[bool] = False
    #: Parameters of one dimension that weight decay takes back to the base, because that is their value zero. Other
    #: vectors (scales, whose neutral value is one, and biases) get none.
    decayed_vectors: ClassVar[tuple[str, ...]] = ()
    #: Arrays of `other_param_names` that come from training rows: running statistics, choices, fitted values. Where
    #: there are several processes, those of the first count.
    data_param_names: tuple[str, ...] = ()
    #: True if the call of the whole model reads its parameters before the layer itself runs. FSDP2 has gathered them
    #: only for the layer.
    reads_before_forward: ClassVar[bool] = False
    base_layer: Any

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.configs: dict[str, Any] = {}
        #: (adapter, share key) -> layer that stores the shared parameters; the tuner gives all its layers one mapping.
        self.owners: dict[tuple[str, Hashable], AdapterLayer] = {}
        for parameter in self.adapter_layer_names:
            setattr(self, parameter, nn.ParameterDict())
        self.read_base(name)

    def read_base(self, name: str) -> None:
        """Read kind and sizes of the base module at path `name`.

        Raises:
            ConfigError: the method cannot adapt such a module.
        """
        self.op: Operation = operation(self.base_layer, name)
        if not self.info.can(self.op.op_type):
            op_types = ("linear", "conv1d", "conv2d", "embedding", "norm", "experts")
            able = ", ".join(op_type for op_type in op_types if self.info.can(op_type))
            found = type(self.base_layer).__name__
            raise ConfigError(f'Method "{self.info.name}" cannot adapt "{name}", a {found}; it adapts: {able}.')
        self.in_features, self.out_features = features(self.base_layer, self.op)

    # What a method supplies -------------------------------------------------------------------------------------

    def initial_values(self, adapter: str, config: Any) -> dict[str, Tensor]:
        """Start values of an adapter's parameters by name, stored as float32."""
        raise NotImplementedError

    @property
    def adds_loss(self) -> bool:
        """True if it adds terms to the loss of a training step (`peft_lab.tuners.loss_terms`)."""
        return False

    def shared_values(self, adapter: str, config: Any) -> dict[str, Tensor]:
        """Start values of the parameters shared under one `share_key`, by name.

        They are made and stored once, at the first of these layers; `parameter` finds them from every one.
        """
        return {}

    def share_key(self, config: Any) -> Hashable:
        """Key of the layers that share `shared_values` with this one.

        None for all layers of the adapter.
        """
        return None

    def shared_groups(self, adapter: str, config: Any) -> Mapping[Hashable, Callable[[], dict[str, Tensor]]]:
        """Groups of shared parameters: key of the layers that share them -> function that makes their start values.

        There is one, `shared_values` under `share_key`, unless a method shares some more widely than others: then they
        are nested and stand from the narrowest to the widest, whose first layer may store them all.
        """
        return {self.share_key(config): partial(self.shared_values, adapter, config)}

    def adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Base module's output with the named adapters on it."""
        raise NotImplementedError

    def mixed(self, x: Tensor, rows: RowAdapters, *args: Any, **kwargs: Any) -> Tensor:
        """Output for a batch whose rows have adapters of their own."""
        raise NotImplementedError

    def rows_output(
        self, x: Tensor, values: Mapping[str, Tensor], out: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Output for rows with `row_fields` of their own.

        See `peft_lab.tuners.mixed_batch.RowLayer`.
        """
        raise NotImplementedError

    def check_values(self, adapter: str, values: Mapping[str, Tensor]) -> None:
        """Raise `ConfigError` if an adapter file's tensors, by name, are invalid."""

    # What is the same for all -----------------------------------------------------------------------------------

    #: Function of the shared layer -> the one that a method must write for it to work; without an entry, itself.
    general_forms: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def missing_code(cls, function: str) -> str:
        """Name of the function that a method must still write for `function`.

        "" if none is missing.
        """
        # The shared class whose general forms the method's layer inherits.
        general = next(base for base in cls.__mro__ if "general_forms" in vars(base))
        needed = cls.general_forms.get(function, function)
        for name in (function, needed):
            if getattr(cls, name, None) is not getattr(general, name, None):
                return ""
        return needed

    def row_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of an adapter's tensors in its file, by name."""
        return {name: tuple(value.shape) for name, value in self.initial_values("", config).items()}

    def row_values(self, values: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Convert the tensors of an adapter's file to `row_fields`."""
        return dict(values)

    def update_layer(self, adapter: str, config: AdapterConfig) -> None:
        """Add an adapter to this layer."""
        self.configs[adapter] = config
        device = self.base_weight.device
        values = self.initial_values(adapter, config)
        # The first layer of a share key stores the shared parameters, so that they are saved and trained once.
        for key, make in self.shared_groups(adapter, config).items():
            if self.owners.get((adapter, key), self) is self:
                made = make()
                if made:
                    self.owners[adapter, key] = self
                values = {**values, **made}
        for name, value in values.items():
            # contiguous, as FSDP2 asks for
            value = value.to(device=device, dtype=torch.float32).contiguous()
            getattr(self, name)[adapter] = nn.Parameter(value)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def parameter(self, adapter: str, name: str) -> nn.Parameter | None:
        """Parameter of an adapter by name, stored here or shared.

        A shared parameter is stored at one layer for several; None if there is no such parameter.
        """
        own: nn.ParameterDict = getattr(self, name)
        if adapter in own:
            return own[adapter]
        for key in self.shared_groups(adapter, self.configs[adapter]):
            stored: nn.ParameterDict = getattr(self.owners.get((adapter, key)), name, own)
            if adapter in stored:
                return stored[adapter]
        return None

    def row_input(self, name: str, x: Tensor) -> Tensor | None:
        """Value of a declared row input for each row of `x`.

        It is that of the running call.

        Raises:
            ConfigError: the layer was called outside of its model, or the input is missing and has no default.
        """
        context = ForwardContext.current()
        if context is None:
            raise ConfigError(f"A layer that reads {name} was called without its model; call the whole model.")
        return context.row_input(name, x.shape[0])

    def forward(self, x: Tensor, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Tensor:
        """Base output with the active adapters.

        `adapter_names` gives one adapter per row instead.
        """
        if self.disable_adapters:
            # A merged weight still holds the adapter, so the base alone needs it unmerged, as in peft.
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            check_count(adapter_names, x.shape[0])
        rows = current_row_adapters() if adapter_names is None else RowAdapters.of(adapter_names)
        if rows is not None:
            if self.merged:
                raise ValueError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
                )
            return self.mixed(x, rows, *args, **kwargs)
        # An active adapter may have no part in this layer.
        active = [name for name in self.active_adapters if name in self.configs and name not in self.merged_adapters]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        return self.adapted(x, active, *args, **kwargs)

    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint of the base weight without anything merged into it."""
        return module_fingerprint(self.base_layer, self.base_weight)

    def derived_buffers(self) -> list[str]:
        """Names of the buffers that adapters fill once: outside of the state dict, or their frozen values.

        Those of the base module are left out.
        """
        frozen = tuple(f"{name}." for name in self.other_param_names)
        found = [name for name, _ in self.named_buffers() if name.startswith(frozen)]
        for path, module in self.named_modules():
            if not path.startswith("base_layer"):
                found += [f"{path}.{name}".lstrip(".") for name in module._non_persistent_buffers_set]
        return sorted({*found})

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer."""
        config = self.configs.get(adapter_name)
        if config is not None:
            for key in self.shared_groups(adapter_name, config):
                self.owners.pop((adapter_name, key), None)
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # peft's own also casts to the base dtype; trainable parameters stay float32 here.
        self.move_adapter(adapter_name, device if device is not None else self.base_weight.device)

    def __repr__(self) -> str:
        return f"{self.info.name}." + super().__repr__()


class WeightLayer(AdapterLayer):
    """Base of methods with a weight delta: `base(x) + delta(x)`.

    A method supplies `delta_weight`; it may override `delta_output` where a cheaper contraction exists, and
    `mixed_delta` to serve all rows of a batch at once.
    """

    general_forms: ClassVar[Mapping[str, str]] = {"folded": "delta_weight", "mixed": "delta_weight"}
    additive = True

    def delta_weight(self, adapter: str) -> Tensor:
        """Delta as a float32 matrix (out, in), for embeddings (tokens, dim), for experts (experts, out, in)."""
        raise NotImplementedError

    def delta_output(self, adapter: str, x: Tensor) -> Tensor:
        """Summand of the delta to the base output for input `x`."""
        matrix = self.delta_weight(adapter)
        x = x.to(matrix.dtype) if x.is_floating_point() else x
        return apply_matrix(self.base_layer, self.op, x, matrix)

    def mixed_delta(self, x: Tensor, rows: RowAdapters) -> Tensor:
        """Summand of the rows' own deltas to the base output.

        This general form runs once per adapter.
        """
        # The shape of the output is known from the first adapter; rows without one keep zero.
        out: Tensor | None = None
        for name in rows.names:
            if name == BASE or name not in self.configs:
                continue
            index = rows.of_adapter(name, x.shape[0], x.device)
            with on_rows(x.shape[0], index):
                part = self.delta_output(name, x[index])
            out = part.new_zeros((x.shape[0], *part.shape[1:])) if out is None else out
            out = out.index_add(0, index, part)
        return torch.zeros((), device=x.device) if out is None else out

    def rows_delta(self, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Summand of each row's `row_fields`, (rows, *shape), to the base output."""
        raise NotImplementedError

    def rows_output(
        self, x: Tensor, values: Mapping[str, Tensor], out: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        out = self.base_layer(x, *args, **kwargs) if out is None else out
        return self._add(out, self.rows_delta(self._whole(x), values))

    def adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        out, x = self.base_layer(x, *args, **kwargs), self._whole(x)
        for name in adapters:
            out = self._add(out, self.delta_output(name, x))
        return out

    def mixed(self, x: Tensor, rows: RowAdapters, *args: Any, **kwargs: Any) -> Tensor:
        return self._add(self.base_layer(x, *args, **kwargs), self.mixed_delta(self._whole(x), rows))

    def _whole(self, x: Tensor) -> Tensor:
        """Whole input, of which tensor parallelism gives an op that is split by its inputs a part."""
        return whole_channels(self.base_layer, x, self.in_features)

    def _add(self, out: Tensor, delta: Tensor) -> Tensor:
        return out + own_channels(self.base_layer, delta, out).to(out.dtype)

    def folded(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = self.delta_weight(adapter).to(weight.dtype)
        return weight + self.op.weight(delta, weight.shape), bias

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Delta in the layout of the base weight.

        The name is peft's, whose conversion to LoRA calls it.
        """
        return self.op.weight(self.delta_weight(adapter), weight_shape(self.base_layer))

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor] | None:
        """Exact factors B (out, r) and A (r, in) of `delta_weight`.

        None if only a decomposition gives them.
        """
        return None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.config_cls.exports_lora and self.op.op_type in ("linear", "conv1d")


class FeatureLayer(AdapterLayer):
    """Base of the methods that transform the output of an op: `transform(base(x))`.

    A method supplies `transform`; it may override `transform_rows` to serve all rows of a mixed batch at once.
    """

    general_forms: ClassVar[Mapping[str, str]] = {"mixed": "transform"}

    def transform(self, adapter: str, out: Tensor) -> Tensor:
        """Transform the op's output by one adapter."""
        raise NotImplementedError

    def transform_rows(self, rows: RowAdapters, out: Tensor) -> Tensor:
        """Transform the op's output by each row's own adapter.

        This general form runs once per adapter.
        """
        changed = out
        for name in rows.names:
            if name == BASE or name not in self.configs:
                continue
            index = rows.of_adapter(name, out.shape[0], out.device)
            with on_rows(len(out), index):
                changed = changed.index_copy(0, index, self.transform(name, out[index]).to(out.dtype))
        return changed

    def rows_transform(self, values: Mapping[str, Tensor], out: Tensor) -> Tensor:
        """Transform the op's output by each row's `row_fields`, (rows, *shape)."""
        raise NotImplementedError

    def rows_output(
        self, x: Tensor, values: Mapping[str, Tensor], out: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        return self.rows_transform(values, self.base_layer(x, *args, **kwargs) if out is None else out)

    def adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        out = self.base_layer(x, *args, **kwargs)
        changed = self._whole(out)
        for name in adapters:
            changed = self.transform(name, changed)
        return own_channels(self.base_layer, changed, out)

    def mixed(self, x: Tensor, rows: RowAdapters, *args: Any, **kwargs: Any) -> Tensor:
        out = self.base_layer(x, *args, **kwargs)
        return own_channels(self.base_layer, self.transform_rows(rows, self._whole(out)), out)

    def _whole(self, out: Tensor) -> Tensor:
        """Output that the method needs: with tensor parallelism whole, unless it acts on each channel alone."""
        alone = {*self.per_channel} == {*self.adapter_layer_names}
        return out if alone else whole_channels(self.base_layer, out, self.out_features)

    def own_values(self, values: Tensor, out: Tensor) -> Tensor:
        """Values per channel (..., channels) of the channels that `out` has.

        With tensor parallelism it has a part of them.
        """
        return own_channels(self.base_layer, values, out)
