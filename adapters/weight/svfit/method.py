"""SVFit: train only singular values of the pretrained weights.

Source: Sun et al. 2024, SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values,
arXiv:2409.05926.

With the singular value decomposition W = U diag(sigma) Vh of a frozen weight, SVFit trains the leading r singular
values (by `selection` the smallest, or some of both) and nothing else. Here in additive form, y = W x + U_r diag(delta)
Vh_r x with delta = 0 at the start: the model begins bit-exactly as the base, and weight decay leads back to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_lab.adapters.weight.svfit import svd
from peft_lab.adapters.weight.svfit.kernels import spectral_conv2d, spectral_delta, spectral_linear
from peft_lab.errors import ConfigError
from peft_lab.tuners import AdapterConfig, MethodInfo, RowAdapters, WeightLayer, conv2d_rows, embed_scale, register

METHOD = MethodInfo(
    name="svfit",
    title="SVFit",
    paper="2409.05926",
    place="weight",
    config="SVFitConfig",
    roles=("attn.q", "attn.v"),
    capabilities=("linear", "conv1d", "conv2d", "embedding", "experts", "merge", "mixed_batch", "identity_start"),
    learning_rate=3e-2,
    budget=(1.22, 1.25),
)


@dataclass
class SVFitConfig(AdapterConfig):
    """Configuration of SVFit.

    Trainable parameters: the sum of the ranks of the adapted modules.

    Raises:
        ConfigError: a rank that is no positive integer, "full" or "energy:<share>".
    """

    dtype_bound = True
    exports_lora = True

    rank: int | str = field(
        default="full",
        metadata={"help": 'Singular values to train: an int, "full", or "energy:0.99" of the squared sum.', "other": 3},
    )
    selection: Literal["principal", "minor", "mixed"] = field(
        default="principal",
        metadata={
            "help": "Which singular values: the largest, the smallest (`minor`), or half of each (`mixed`).",
            "other": "minor",
            "with": {"rank": 3},
        },
    )
    parametrization: Literal["additive", "relative"] = field(
        default="additive",
        metadata={"help": "Train delta (additive), or s with delta = sigma * s (relative).", "other": "relative"},
    )
    save_bases: bool = field(
        default=False,
        metadata={"help": "Store the singular bases in the adapter file instead of rebuilding them.", "other": True},
    )

    def check(self) -> None:
        if not isinstance(svd.parse_rank(self.rank), int) and self.selection != "principal":
            raise ConfigError(f'selection="{self.selection}" needs a number as rank, not "{self.rank}".')


class SVFitLayer(WeightLayer):
    """Frozen weight with trainable singular values.

    `svfit_delta[adapter]` is float32 (r,). The bases u (out, r), s (r,), vh (r, in) are float32 and frozen; adapters on
    the same weight share them, and only with `save_bases` they are part of the state dict. For the stacked weights of
    experts all of these have the experts as their first axis.
    """

    adapter_layer_names = ("svfit_delta",)
    other_param_names = ("svfit_u", "svfit_s", "svfit_vh")
    row_fields = MappingProxyType({"svfit_delta": 0.0})
    linear = True
    decayed_vectors = ("svfit_delta",)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        for part in self.other_param_names:
            setattr(self, part, BufferDict({}, persistent=True))
        self.common_bases = BufferDict(persistent=False)

    @property
    def _shared(self) -> Any:
        """Bases that the adapters share, in buffers, so that they are moved and copied with the layer."""
        return svd.Bases(**self.common_bases) if len(self.common_bases) else None

    @_shared.setter
    def _shared(self, bases: svd.Bases) -> None:
        self.common_bases.update(vars(bases))

    def initial_values(self, adapter: str, config: SVFitConfig) -> dict[str, Tensor]:
        # Only an adapter that saves its bases has some of its own; the others share those of the largest rank.
        found = bases = self._bases_of_weight(config.rank if config.selection == "principal" else "full")
        if config.selection != "principal":
            bases = found.select(min(int(config.rank), found.rank), config.selection)
        if config.save_bases:
            for name in ("u", "s", "vh"):
                getattr(self, f"svfit_{name}")[adapter] = getattr(bases, name).contiguous()
        elif self._shared is None or found.rank > self._shared.rank:
            self._shared = found
        close = svd.degenerate(bases.s, found.s[..., :1])
        if close:
            warnings.warn(
                f"{close} of {bases.s.numel()} singular values are equal to their neighbour, so their directions are "
                "not determined by the weight; save the adapter with save_bases=True to be able to load it elsewhere.",
                stacklevel=2,
            )
        return {"svfit_delta": torch.zeros(bases.s.shape)}

    def bases(self, adapter: str) -> svd.Bases:
        """Frozen singular bases of an adapter, those that it trains the values of."""
        if adapter in self.svfit_u:
            return svd.Bases(self.svfit_u[adapter], self.svfit_s[adapter], self.svfit_vh[adapter])
        return self._shared.select(self.svfit_delta[adapter].shape[-1], self.configs[adapter].selection)

    def _spread(self, delta: Tensor, config: SVFitConfig) -> Tensor:
        """Change (r,) of an adapter's singular values as one of all that the shared bases have."""
        first = svd.leading(len(delta), config.selection)
        return torch.cat([delta[:first], delta.new_zeros(self._shared.rank - len(delta)), delta[first:]])

    def delta(self, adapter: str) -> Tensor:
        """Change of the singular values (r,)."""
        value = self.svfit_delta[adapter]
        relative = self.configs[adapter].parametrization == "relative"
        return value * self.bases(adapter).s.to(value.dtype) if relative else value

    def delta_weight(self, adapter: str) -> Tensor:
        bases, delta = self.bases(adapter), self.delta(adapter)
        return (bases.u.to(delta.dtype) * delta.unsqueeze(-2)) @ bases.vh.to(delta.dtype)

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        bases, delta = self.bases(adapter), self.delta(adapter).detach()
        return bases.u.to(delta.dtype) * delta.unsqueeze(-2), bases.vh.to(delta.dtype)

    def delta_output(self, adapter: str, x: Tensor) -> Tensor:
        return self._project(x, self.bases(adapter), self.delta(adapter))

    def adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        # The kernels take one adapter on these ops; several adapters and embeddings take the general form.
        base, kind = self.base_layer, self.op.op_type
        plain_conv = kind == "conv2d" and base.groups == 1
        if len(adapters) > 1 or self.is_sharded or not (plain_conv or kind in ("linear", "conv1d")):
            return super().adapted(x, adapters, *args, **kwargs)
        bases, delta = self.bases(adapters[0]), self.delta(adapters[0])
        if plain_conv:
            return spectral_conv2d(x, base, bases.u, delta, bases.vh)
        if self.op.quantization:
            return base(x) + spectral_delta(x, bases.u, delta, bases.vh)
        return spectral_linear(x, self.op.matrix(base.weight), base.bias, bases.u, delta, bases.vh)

    def mixed(self, x: Tensor, rows: RowAdapters, *args: Any, **kwargs: Any) -> Tensor:
        per_row = self._per_row(x, rows)
        if per_row is None:
            return super().mixed(x, rows, *args, **kwargs)
        return self.rows_output(x, {"svfit_delta": per_row}, None, *args, **kwargs)

    def row_shapes(self, config: SVFitConfig) -> dict[str, tuple[int, ...]]:
        if config.save_bases:
            raise ConfigError(
                "An SVFit adapter saved with save_bases=True has bases of its own and shares none with other rows; "
                "load it with PeftModel."
            )
        return super().row_shapes(config)

    def row_values(self, values: Mapping[str, Tensor], config: SVFitConfig) -> dict[str, Tensor]:
        # Rows of both parametrizations meet in one batch, so all are brought to the additive one.
        value = values["svfit_delta"]
        relative = config.parametrization == "relative"
        value = value * self._shared.select(len(value), config.selection).s.to(value) if relative else value
        return {"svfit_delta": self._spread(value, config)}

    def rows_output(
        self, x: Tensor, values: Mapping[str, Tensor], out: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        delta, base = values["svfit_delta"], self.base_layer
        bases, weight = self._shared.select(delta.shape[1], "principal"), self.base_weight
        linear = self.op.op_type in ("linear", "conv1d") and not self.op.quantization
        if out is None and linear and bases.rank == min(weight.shape) and x.dtype == weight.dtype == torch.float32:
            # The bases span the whole weight, so its own product is not needed beside theirs.
            out = self._project(x, bases, delta + bases.s)
            return out if base.bias is None else out + base.bias
        return super().rows_output(x, values, out, *args, **kwargs)

    def rows_delta(self, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        delta = values["svfit_delta"]
        return self._project(x, self._shared.select(delta.shape[1], "principal"), delta)

    def _per_row(self, x: Tensor, rows: RowAdapters) -> Tensor | None:
        """Change of singular values by row (batch, r), zero without an adapter.

        None if the bases of the adapters differ.
        """
        present = [name for name in rows.names if name in self.configs]
        if not present or any(name in self.svfit_u for name in present):
            return None
        zero = self.svfit_delta[present[0]].new_zeros(self._shared.rank)
        # Shared bases hold the triplets of all adapters, so a change of some of them is zero for the others.
        spread = {name: self._spread(self.delta(name), self.configs[name]) for name in present}
        deltas = [spread.get(name, zero) for name in rows.names]
        return torch.stack(deltas)[rows.index(x.shape[0], x.device)]

    def _project(self, x: Tensor, bases: svd.Bases, delta: Tensor) -> Tensor:
        """Compute U diag(delta) Vh x for this kind of op.

        `delta` is (r,), or (batch, r) with one row per row of x.
        """
        base, kind = self.base_layer, self.op.op_type
        u, vh = bases.u.to(delta.dtype), bases.vh.to(delta.dtype)
        if kind == "conv2d" and base.groups > 1:
            return self._grouped(x, u, vh, delta)
        spread = delta.reshape(delta.shape[0], *(1,) * (x.dim() - 2), -1) if delta.dim() == 2 and x.dim() > 1 else delta
        # The rows of U belong to tokens, so they are looked up like the embedding itself.
        if kind == "embedding":
            if delta.dim() == 2:
                spread = delta.reshape(delta.shape[0], *(1,) * (x.dim() - 1), -1)
            return (F.embedding(x, u) * spread) @ vh * embed_scale(base)
        x = x.to(delta.dtype)
        if kind == "conv2d":
            hidden = base._conv_forward(x, vh.reshape(-1, *base.weight.shape[1:]), None)
            per_channel = delta.reshape(-1, delta.shape[-1], 1, 1)
            return F.conv2d(hidden * per_channel, u[:, :, None, None])
        return F.linear(F.linear(x, vh) * spread, u)

    def _grouped(self, x: Tensor, u: Tensor, vh: Tensor, delta: Tensor) -> Tensor:
        """Apply the delta as a weight, for grouped convolutions.

        These mix no channels across groups, so there is no factored form.
        """
        base = self.base_layer
        x = x.to(delta.dtype)
        if delta.dim() == 1:
            return base._conv_forward(x, ((u * delta) @ vh).reshape(base.weight.shape), None)
        weight = ((u * delta[:, None, :]) @ vh).reshape(-1, *base.weight.shape)
        return conv2d_rows(base, x, weight)

    def _bases_of_weight(self, rank: int | str) -> svd.Bases:
        """Singular bases of the unmerged base weight, up to a rank."""
        if self.base_weight.is_meta:
            raise RuntimeError("SVFit needs the base weights to build its bases; load the backbone before the adapter.")
        weight = self.dense_weight()
        wanted, side = svd.parse_rank(rank), min(self.op.matrix(weight).shape[-2:])
        # Shared bases of at least this rank hold the wanted ones; a share of energy needs the whole spectrum.
        if self._shared is not None and not isinstance(wanted, float) and (wanted or side) <= self._shared.rank:
            return self._shared.select(min(wanted or side, side), "principal")
        return svd.bases(self.op.matrix(weight), rank, key=self.fingerprint()["sha256"])

    def _apply(self, fn: Any, recurse: bool = True) -> SVFitLayer:
        bases = self._shared
        super()._apply(fn, recurse)
        if bases is not None:  # a cast of the model rounds the adapter, but not what it stands on
            self._shared = bases.to(self._shared.s.device)
        return self


register(METHOD, SVFitConfig, SVFitLayer)
