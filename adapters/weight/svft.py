"""SVFT: train a sparse matrix between the singular bases of a weight.

Source: Lingam et al. 2024, SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors, arXiv:2405.19597.

With the singular value decomposition W = U diag(sigma) Vh of a frozen weight, W' = U (diag(sigma) + M) Vh, and the
entries of M on a fixed pattern are trained: the diagonal (`plain`), a band, entries at random, or those whose left and
right singular vectors are most alike (`top_k`). Here in additive form, W + U M Vh with M = 0 at the start, so that the
model begins bit-exactly as the base also where a smaller `rank` keeps M to the leading triplets.

The released code differs from the paper: M = s * sigmoid(g) with one trained gate g per weight, which `author_gate`
gives (s and g start at zero; there s starts at random by accident, so that the model does not begin as the base).
Readings: random entries are drawn without replacement, and `top_k` compares vectors up to their sign, which is free.

`peft_lab.load_many` serves the diagonal and bands, whose diagonals are rows of one bank. Entries at random or of
`top_k` have places of their own in each adapter; a bank would hold r * r numbers for each, so they are left to peft's
`adapter_names`, which takes one adapter after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_lab.errors import ConfigError
from peft_lab.tuners import MethodInfo, RowAdapters, register
from peft_lab.tuners.spectral import Bases, SpectralConfig, SpectralLayer, parse_rank

METHOD = MethodInfo(
    name="svft",
    title="SVFT",
    paper="2405.19597",
    place="weight",
    config="SVFTConfig",
    roles=("attn.q", "attn.v"),
    capabilities=("linear", "conv1d", "conv2d", "embedding", "merge", "mixed_batch", "identity_start"),
    learning_rate=3e-2,
    budget=(1.22, 1.25),
)


@dataclass
class SVFTConfig(SpectralConfig):
    """Configuration of SVFT.

    Trainable parameters for each adapted weight of smaller side n: n (plain), n (2 d + 1) - d (d + 1) with d
    off-diagonals (banded, and by default random and top_k), and one more with the authors' gate.

    Raises:
        ConfigError: a size out of range, or one that the pattern does not read.
    """

    exports_lora = True

    pattern: Literal["plain", "banded", "random", "top_k"] = field(
        default="plain", metadata={"help": "Which entries of M are trained.", "other": "banded"}
    )
    off_diagonals: int = field(
        default=2,
        metadata={
            "help": "Off-diagonals on each side of a band; random and top_k take as many entries as the band has.",
            "other": 1,
            "with": {"pattern": "banded"},
        },
    )
    entries: int | None = field(
        default=None,
        metadata={
            "help": "Number of entries of M with random and top_k.",
            "other": 7,
            "with": {"pattern": "random"},
            "most": 2**24,
        },
    )
    random_seed: int = field(
        default=0, metadata={"help": "Seed of the random entries.", "other": 1, "with": {"pattern": "random"}}
    )
    rank: int | str = field(
        default="full",
        metadata={"help": 'Leading triplets that M mixes: an int, "full", or "energy:0.99".', "other": 3},
    )
    author_gate: bool = field(
        default=False, metadata={"help": "M = s * sigmoid(g) with one trained gate, as released.", "other": True}
    )

    def check(self) -> None:
        parse_rank(self.rank)
        if self.off_diagonals < 0:
            raise ConfigError(f"off_diagonals={self.off_diagonals} must not be negative.")
        if self.entries is not None and self.pattern not in ("random", "top_k"):
            raise ConfigError(
                f'entries={self.entries} is for pattern="random" and "top_k"; "{self.pattern}" has a fixed number.'
            )
        if self.entries is not None and self.entries < 1:
            raise ConfigError(f"entries={self.entries} must be at least 1.")


class SVFTLayer(SpectralLayer):
    """Frozen weight with a trained sparse matrix between its singular bases.

    `svft_m[adapter]` holds the trained entries, float32 (entries,), and `svft_gate[adapter]`, with `author_gate` alone,
    the gate (1,). `svft_entries[adapter]` has the places of random and top_k entries in the flattened M, int32, and is
    saved with the adapter, because no seed and no other basis has to give the same ones.
    """

    adapter_layer_names = ("svft_m", "svft_gate")
    other_param_names = ("svft_u", "svft_s", "svft_vh", "svft_entries")
    #: The diagonals of M (diagonals, r), in the order 0, 1, -1, 2, -2, ..., each by the rows of M and zero outside.
    row_fields = MappingProxyType({"svft_m": 0.0})
    decayed_vectors = ("svft_m",)

    def initial_values(self, adapter: str, config: SVFTConfig) -> dict[str, Tensor]:
        bases = self.hold_bases(adapter, config, config.rank)
        count = _count(config, bases.rank)
        if config.pattern in ("random", "top_k"):
            self.svft_entries[adapter] = self._chosen_entries(config, bases, count).int()
        values = {"svft_m": torch.zeros(count)}
        return {**values, "svft_gate": torch.zeros(1)} if config.author_gate else values

    def values(self, adapter: str) -> Tensor:
        """Entries of M (entries,)."""
        value = self.svft_m[adapter]
        return value * torch.sigmoid(self.svft_gate[adapter]) if adapter in self.svft_gate else value

    def places(self, adapter: str) -> Tensor:
        """Places of the entries in the flattened M, int64 (entries,)."""
        config, side, device = self.configs[adapter], self.ranks[adapter], self.svft_m[adapter].device
        if adapter in self.svft_entries:
            return self.svft_entries[adapter].long()
        return _band(side, 0 if config.pattern == "plain" else config.off_diagonals, device)

    def core(self, adapter: str) -> Tensor:
        """M as a matrix (r, r)."""
        values, side = self.values(adapter), self.ranks[adapter]
        return values.new_zeros(side * side).index_add(0, self.places(adapter), values).reshape(side, side)

    def delta_weight(self, adapter: str) -> Tensor:
        bases, core = self.bases(adapter), self.core(adapter)
        return bases.u.to(core.dtype) @ core @ bases.vh.to(core.dtype)

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        bases, core = self.bases(adapter), self.core(adapter).detach()
        u, vh = bases.u.to(core.dtype), bases.vh.to(core.dtype)
        # Rank as small as the pattern allows: the rows, or the columns, of M that are not zero.
        rows, columns = (core != 0).any(1), (core != 0).any(0)
        if rows.sum() < columns.sum():
            return u[:, rows], core[rows] @ vh
        return u @ core[:, columns], vh[columns]

    def delta_output(self, adapter: str, x: Tensor) -> Tensor:
        if self.configs[adapter].pattern == "plain":
            return self.project(x, self.bases(adapter), self.values(adapter))
        # Where there are many tokens, one product with the delta is cheaper than three with its factors.
        if self.op.op_type != "embedding" and x.numel() > self.ranks[adapter] * x.shape[-1]:
            return super().delta_output(adapter, x)
        return self.project_core(x, self.bases(adapter), self.core(adapter))

    def adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        out, name = None, adapters[0]
        if len(adapters) == 1 and self.configs[name].pattern == "plain":
            out = self.diagonal_output(x, self.bases(name), self.values(name))
        return super().adapted(x, adapters, *args, **kwargs) if out is None else out

    # Rows with adapters of their own ------------------------------------------------------------------------------

    def row_shapes(self, config: SVFTConfig) -> dict[str, tuple[int, ...]]:
        if config.pattern in ("random", "top_k"):
            raise ConfigError(
                f'Adapters of SVFT with pattern="{config.pattern}" have entries at places of their own, which rows of '
                "one batch cannot share; load them with PeftModel.load_adapter and pass adapter_names."
            )
        return super().row_shapes(config)

    def row_values(self, values: Mapping[str, Tensor], config: SVFTConfig) -> dict[str, Tensor]:
        m, gate = values["svft_m"], values.get("svft_gate")
        m = m if gate is None else m * torch.sigmoid(gate)
        width = 0 if config.pattern == "plain" else config.off_diagonals
        # A share of energy gives the side with the weight alone, so it is read off the number of entries.
        side = next(side for side in range(1, self.shared_bases.rank + 1) if _count(config, side) == len(m))
        width, start = min(width, side - 1), 0
        diagonals = m.new_zeros(2 * width + 1, side)
        for offset in range(-width, width + 1):
            length, first = side - abs(offset), max(-offset, 0)
            diagonals[_slot(offset), first : first + length] = m[start : start + length]
            start += length
        return {"svft_m": diagonals}

    def rows_output(
        self, x: Tensor, values: Mapping[str, Tensor], out: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        diagonals = values["svft_m"]
        if diagonals.shape[1] > 1:
            return super().rows_output(x, values, out, *args, **kwargs)
        bases = self.shared_bases.select(diagonals.shape[-1], "principal")
        return self.rows_diagonal(x, bases, diagonals[:, 0], out, *args, **kwargs)

    def rows_delta(self, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        diagonals = values["svft_m"]
        bases = self.shared_bases.select(diagonals.shape[-1], "principal")
        if self.is_grouped:
            return self.project_core(x, bases, _core_of(diagonals))
        hidden = self.down(x, bases, diagonals.dtype)
        mixed = torch.zeros_like(hidden)
        for offset in _offsets(diagonals.shape[1]):
            diagonal = diagonals[:, _slot(offset)].reshape(len(diagonals), *(1,) * (hidden.dim() - 2), -1)
            # The coordinates of tokens are those of the other side, so M acts transposed on them.
            if self.op.op_type == "embedding":
                mixed = mixed + _shifted(hidden * diagonal, offset)
            else:
                mixed = mixed + diagonal * _shifted(hidden, -offset)
        return self.up(mixed, bases)

    def _values_by_row(self, x: Tensor, rows: RowAdapters) -> dict[str, Tensor] | None:
        configs = [self.configs[name] for name in rows.names if name in self.configs]
        shapes = {(config.pattern, config.off_diagonals, config.rank) for config in configs}
        # One adapter after the other where their entries are at different places.
        if len(shapes) != 1 or configs[0].pattern in ("random", "top_k"):
            return None
        return super()._values_by_row(x, rows)

    def _parameters_of(self, adapter: str) -> dict[str, Tensor]:
        return {"svft_m": self.values(adapter)}

    def check_values(self, adapter: str, values: Mapping[str, Tensor]) -> None:
        places, side = values.get("svft_entries"), self.ranks[adapter]
        if places is not None and places.numel() and not 0 <= int(places.min()) <= int(places.max()) < side * side:
            raise ConfigError(f"svft_entries must be places in a matrix of {side} x {side}, from 0 to {side**2 - 1}.")

    def _chosen_entries(self, config: SVFTConfig, bases: Bases, count: int) -> Tensor:
        """Places of the random entries, or of those whose singular vectors are most alike."""
        if config.pattern == "random":
            draw = torch.Generator().manual_seed(config.random_seed)
            return torch.randperm(bases.rank**2, generator=draw)[:count].sort().values
        rows, columns = len(bases.u), bases.vh.shape[1]
        if rows != columns:
            raise ConfigError(
                'pattern="top_k" compares left and right singular vectors, which takes a square weight, and '
                f'this one is {rows} x {columns}; use pattern="banded" or "random", or choose other target_modules.'
            )
        alike = (bases.u.mT @ bases.vh.mT).abs().flatten()
        return alike.topk(count).indices.sort().values


def _count(config: SVFTConfig, side: int) -> int:
    """Number of trained entries of an M of `side` x `side`.

    Raises:
        ConfigError: more were asked for than M has.
    """
    if config.entries is not None and config.entries > side * side:
        raise ConfigError(f"entries={config.entries} is more than the {side} x {side} of M; give at most {side**2}.")
    if config.entries is not None:
        return config.entries
    width = 0 if config.pattern == "plain" else min(config.off_diagonals, side - 1)
    return side * (2 * width + 1) - width * (width + 1)


def _band(side: int, width: int, device: torch.device) -> Tensor:
    """Places (row * side + column) of the entries within `width` of the diagonal."""
    diagonals = []
    for offset in range(-min(width, side - 1), min(width, side - 1) + 1):
        first = offset if offset > 0 else -offset * side
        diagonals.append(first + torch.arange(side - abs(offset), device=device) * (side + 1))
    return torch.cat(diagonals)


def _slot(offset: int) -> int:
    """Place of a diagonal among the row fields."""
    return 2 * abs(offset) - (offset > 0)


def _offsets(diagonals: int) -> range:
    """Offsets of so many diagonals."""
    return range(-(diagonals // 2), diagonals // 2 + 1)


def _shifted(values: Tensor, offset: int) -> Tensor:
    """Values moved by `offset` places to the right along the last axis, with zeros behind them."""
    if offset > 0:
        return F.pad(values[..., :-offset], (offset, 0))
    return F.pad(values[..., -offset:], (0, -offset))


def _core_of(diagonals: Tensor) -> Tensor:
    """M of each row (rows, r, r) by its diagonals."""
    core = diagonals.new_zeros(len(diagonals), diagonals.shape[-1], diagonals.shape[-1])
    for offset in _offsets(diagonals.shape[1]):
        length, first = diagonals.shape[-1] - abs(offset), max(-offset, 0)
        core.diagonal(offset, 1, 2).copy_(diagonals[:, _slot(offset), first : first + length])
    return core


register(METHOD, SVFTConfig, SVFTLayer)
