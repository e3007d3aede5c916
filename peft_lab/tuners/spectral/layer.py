"""Layer of the methods that train coefficients in the frozen singular bases of a weight."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_lab.errors import ConfigError
from peft_lab.tuners.config import AdapterConfig
from peft_lab.tuners.layer import WeightLayer
from peft_lab.tuners.mixed_batch import RowAdapters
from peft_lab.tuners.operations import conv2d_rows, embed_scale, matrix_shape
from peft_lab.tuners.spectral import svd
from peft_lab.tuners.spectral.kernels import spectral_conv2d, spectral_delta, spectral_linear
from peft_lab.tuners.spectral.svd import Bases


@dataclass
class SpectralConfig(AdapterConfig):
    """Base of the configs of methods in singular bases."""

    dtype_bound = True

    save_bases: bool = field(
        default=False,
        metadata={"help": "Store the singular bases in the adapter file instead of rebuilding them.", "other": True},
    )


class SpectralLayer(WeightLayer):
    """Frozen weight W = U diag(s) Vh whose adapters train coefficients between U and Vh.

    The bases u (out, r), s (r,), vh (r, in) are float32 and frozen; adapters on the same weight share them, those of
    other layers and methods too, and only with `save_bases` they are part of the state dict. For the stacked weights of
    experts all of these have the experts as their first axis.

    A method names the buffers of saved bases in `other_param_names`, first u, s, vh in this order, and calls
    `hold_bases` from `initial_values`.
    """

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        for part in self.other_param_names:
            setattr(self, part, BufferDict({}, persistent=True))
        self.common_bases = BufferDict(persistent=False)
        #: Adapter -> number of its triplets, which a share of energy gives only with the weight.
        self.ranks: dict[str, int] = {}

    @property
    def shared_bases(self) -> Any:
        """Bases that the adapters share, in buffers, so that they are moved and copied with the layer."""
        return Bases(**self.common_bases) if len(self.common_bases) else None

    def hold_bases(self, adapter: str, config: Any, rank: int | str, selection: str = "principal") -> Bases:
        """Find and keep the bases of a new adapter, of `rank` triplets.

        Equal singular values, whose vectors the weight does not determine, are warned of.

        Raises:
            RuntimeError: the base weights are not there yet.
        """
        # Only an adapter that saves its bases has some of its own; the others share those of the largest rank.
        found = chosen = self.bases_of_weight(rank if selection == "principal" else "full")
        if selection != "principal":
            chosen = found.select(min(int(rank), found.rank), selection)
        if config.save_bases:
            for name, value in zip(self.other_param_names[:3], (chosen.u, chosen.s, chosen.vh), strict=True):
                # Loading an adapter writes into these, so they are no views of what others hold.
                getattr(self, name)[adapter] = value.clone(memory_format=torch.contiguous_format)
        elif self.shared_bases is None or found.rank > self.shared_bases.rank:
            self.common_bases.update(vars(found))
        self.ranks[adapter] = chosen.rank
        close = 0 if found.s.is_meta else svd.degenerate(chosen.s, found.s[..., :1])
        if close:
            warnings.warn(
                f"{close} of {chosen.s.numel()} singular values are equal to their neighbour, so their directions are "
                "not determined by the weight; save the adapter with save_bases=True to be able to load it elsewhere.",
                stacklevel=3,
            )
        return chosen

    def chosen(self, adapter: str) -> tuple[int, str]:
        """Rank and selection of an adapter that saves no bases."""
        return self.ranks[adapter], "principal"

    def bases(self, adapter: str) -> Bases:
        """Frozen singular bases of an adapter."""
        saved = [getattr(self, name) for name in self.other_param_names[:3]]
        if saved and adapter in saved[0]:
            return Bases(*(part[adapter] for part in saved))
        if self.shared_bases.s.is_meta and not self.base_weight.is_meta:
            raise RuntimeError(self._no_weights)
        return self.shared_bases.select(*self.chosen(adapter))

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.ranks.pop(adapter_name, None)

    # Output of a delta --------------------------------------------------------------------------------------------

    def project(self, x: Tensor, bases: Bases, delta: Tensor) -> Tensor:
        """Compute U diag(delta) Vh x for this kind of op.

        `delta` is (r,), or (batch, r) with one row per row of x.
        """
        if self.is_grouped:
            u, vh = bases.u.to(delta.dtype), bases.vh.to(delta.dtype)
            return self.convolve(x, (u * delta.unsqueeze(-2)) @ vh)
        hidden = self.down(x, bases, delta.dtype)
        if delta.dim() == 2:
            delta = delta.reshape(delta.shape[0], *(1,) * (hidden.dim() - 2), -1)
        return self.up(hidden * delta, bases)

    def project_core(self, x: Tensor, bases: Bases, core: Tensor) -> Tensor:
        """Compute U core Vh x for this kind of op.

        `core` is (r, r), or (batch, r, r) with one matrix per row of x.
        """
        if self.is_grouped:
            return self.convolve(x, bases.u.to(core.dtype) @ core @ bases.vh.to(core.dtype))
        hidden = self.down(x, bases, core.dtype)
        # The coordinates of tokens are those of the other side.
        core = core if self.op.op_type == "embedding" else core.mT
        if core.dim() == 3:
            mixed = (hidden.reshape(len(core), -1, hidden.shape[-1]) @ core).reshape(hidden.shape)
        else:
            mixed = hidden @ core
        return self.up(mixed, bases)

    @property
    def is_grouped(self) -> bool:
        """True for grouped convolutions, which mix no channels across groups and so have no factored form."""
        return self.op.op_type == "conv2d" and self.base_layer.groups > 1

    def down(self, x: Tensor, bases: Bases, dtype: torch.dtype) -> Tensor:
        """Coordinates (..., r) of an input in the right singular vectors, the channels last.

        Those of tokens are in the left ones, whose rows are looked up like the embedding itself.
        """
        base = self.base_layer
        if self.op.op_type == "embedding":
            return F.embedding(x, bases.u.to(dtype))
        x, vh = x.to(dtype), bases.vh.to(dtype)
        if self.op.op_type == "conv2d":
            return base._conv_forward(x, vh.reshape(-1, *base.weight.shape[1:]), None).movedim(1, -1)
        return F.linear(x, vh)

    def up(self, hidden: Tensor, bases: Bases) -> Tensor:
        """Output of coordinates (..., r), the channels last."""
        if self.op.op_type == "embedding":
            return hidden @ bases.vh.to(hidden.dtype) * embed_scale(self.base_layer)
        u = bases.u.to(hidden.dtype)
        if self.op.op_type == "conv2d":
            return F.conv2d(hidden.movedim(-1, 1), u[:, :, None, None])
        return F.linear(hidden, u)

    def convolve(self, x: Tensor, delta: Tensor) -> Tensor:
        """Convolution by a delta (out, in * height * width), or by one per row of x (batch, out, ...)."""
        base, x = self.base_layer, x.to(delta.dtype)
        if delta.dim() == 3:
            return conv2d_rows(base, x, delta.reshape(-1, *base.weight.shape))
        return base._conv_forward(x, delta.reshape(base.weight.shape), None)

    def diagonal_output(self, x: Tensor, bases: Bases, delta: Tensor) -> Tensor | None:
        """Output of the base with U diag(delta) Vh on its weight, by the kernels that keep little.

        None where there is no kernel: the base is split over processes, or its op is no Linear, Conv1D or plain
        convolution.
        """
        base, kind = self.base_layer, self.op.op_type
        if self.is_sharded or self.is_grouped:
            return None
        if kind == "conv2d":
            return spectral_conv2d(x, base, bases.u, delta, bases.vh)
        if kind not in ("linear", "conv1d"):
            return None
        if self.op.quantization:
            out: Tensor = base(x)
            return out + spectral_delta(x, bases.u, delta, bases.vh)
        return spectral_linear(x, self.op.matrix(base.weight), base.bias, bases.u, delta, bases.vh)

    # Rows with adapters of their own ------------------------------------------------------------------------------

    def mixed(self, x: Tensor, rows: RowAdapters, *args: Any, **kwargs: Any) -> Tensor:
        values = self._values_by_row(x, rows) if self.row_fields else None
        if values is None:
            return super().mixed(x, rows, *args, **kwargs)
        return self.rows_output(x, values, None, *args, **kwargs)

    def row_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        if config.save_bases:
            raise ConfigError(
                f"Adapters of {self.info.title} saved with save_bases=True have bases of their own and share none with "
                "other rows; load them with PeftModel."
            )
        return super().row_shapes(config)

    def rows_diagonal(
        self, x: Tensor, bases: Bases, delta: Tensor, out: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Output for rows with U diag(delta) Vh of their own, `delta` (batch, r); see `rows_output`."""
        weight = self.base_weight
        linear = self.op.op_type in ("linear", "conv1d") and not self.op.quantization
        if out is None and linear and bases.rank == min(weight.shape) and x.dtype == weight.dtype == torch.float32:
            # The bases span the whole weight, so its own product is not needed beside theirs.
            bias, whole = self.base_layer.bias, self.project(x, bases, delta + bases.s)
            return whole if bias is None else whole + bias
        out = self.base_layer(x, *args, **kwargs) if out is None else out
        return self._add(out, self.project(self._whole(x), bases, delta))

    def _values_by_row(self, x: Tensor, rows: RowAdapters) -> dict[str, Tensor] | None:
        """Row fields of the rows (batch, *shape), with the number that changes nothing where there is no adapter.

        None if the bases of the adapters differ.
        """
        present = [name for name in rows.names if name in self.configs]
        if not present or any(self.configs[name].save_bases for name in present):
            return None
        own = {name: self.row_values(self._parameters_of(name), self.configs[name]) for name in present}
        found = {}
        for field_name, start in self.row_fields.items():
            neutral = torch.full_like(own[present[0]][field_name], start)
            stacked = [own[name][field_name] if name in own else neutral for name in rows.names]
            found[field_name] = torch.stack(stacked)[rows.index(x.shape[0], x.device)]
        return found

    def _parameters_of(self, adapter: str) -> dict[str, Tensor]:
        return {name: getattr(self, name)[adapter] for name in self.row_fields}

    # Bases of the weight ------------------------------------------------------------------------------------------

    def bases_of_weight(self, rank: int | str) -> Bases:
        """Singular bases of the unmerged base weight, up to a rank."""
        wanted, shape = svd.parse_rank(rank), matrix_shape(self.base_layer, self.op)
        if self.base_weight.is_meta:
            return self._shapes_alone(wanted, shape)
        weight, side, shared = self.dense_weight(), min(shape[-2:]), self.shared_bases
        # Shared bases of at least this rank hold the wanted ones; a share of energy needs the whole spectrum.
        if shared is not None and not isinstance(wanted, float) and (wanted or side) <= shared.rank:
            return shared.select(min(wanted or side, side), "principal")
        return svd.bases(self.op.matrix(weight), rank, key=self.fingerprint()["sha256"])

    def _shapes_alone(self, wanted: int | float | None, shape: torch.Size) -> Bases:
        """Bases on the meta device, which tell the number of parameters and compute no values."""
        # Weights that are elsewhere until they run stand on the meta device too, but have values.
        if isinstance(wanted, float) or hasattr(self.base_layer, "_hf_hook"):
            raise RuntimeError(self._no_weights)
        rank = min(wanted or min(shape[-2:]), *shape[-2:])
        u, vh = (*shape[:-1], rank), (*shape[:-2], rank, shape[-1])
        return Bases(*(torch.empty(size, device="meta") for size in (u, (*shape[:-2], rank), vh)))

    @property
    def _no_weights(self) -> str:
        return f"{self.info.title} needs the base weights to build its bases; load the backbone before the adapter."

    def _apply(self, fn: Any, recurse: bool = True) -> SpectralLayer:
        bases = self.shared_bases
        super()._apply(fn, recurse)
        if bases is not None:  # a cast of the model rounds the adapter, but not what it stands on
            self.common_bases.update(vars(bases.to(self.shared_bases.s.device)))
        return self
