"""Singular bases of frozen weights, shared in memory and cached on disk.

They come from an exact or a converged randomized SVD, with a rank by number or by energy. Used by every method that
works in the singular bases of a weight: bases are found again by the hash of the weight, whichever method made them.
The factors are always float32, since LAPACK has neither bfloat16 nor float16, and signs are made canonical (the largest
entry of each right vector is positive).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_lab.errors import ConfigError, WriteError
from peft_lab.utils.atomic_files import new_file
from peft_lab.utils.cache import cache_dir

logger = logging.getLogger("peft_lab")

#: Matrices whose smaller side is at most this are decomposed exactly; so are larger ones if the rank is no small part.
EXACT_SIDE = 2048
_RANDOMIZED_SHARE = 0.25
_OVERSAMPLING = 16
_MAX_ITERATIONS = 60
#: Relative change of singular values and subspace below which the randomized iteration has converged.
_CONVERGED = 1e-5
#: Two singular values closer than this, relative to the largest, leave their vectors undetermined.
_DEGENERATE_GAP = 1e-6
#: Below this many entries an SVD is faster than reading a file.
_CACHE_MIN_ENTRIES = 128 * 128
_CACHE_VERSION = 1
#: Factors that a layer holds now, by hash of the weight, rank, device and name.
_IN_USE: WeakValueDictionary[tuple[str, str, str, str], Tensor] = WeakValueDictionary()


@dataclass(frozen=True)
class Bases:
    """Truncated singular value decomposition `u @ diag(s) @ vh`, float32.

    Attributes:
        u: left vectors (out, r).
        s: singular values (r,), descending.
        vh: right vectors (r, in).

    Those of a stack of matrices have one more axis in front.
    """

    u: Tensor
    s: Tensor
    vh: Tensor

    @property
    def rank(self) -> int:
        """Number of singular values."""
        return self.s.shape[-1]

    def select(self, rank: int, selection: str) -> Bases:
        """Choose `rank` of all triplets; they are views, but for "mixed"."""
        first = leading(rank, selection)
        chosen: Any = slice(0, rank) if first == rank else slice(self.rank - rank, self.rank)
        if 0 < first < rank:
            chosen = torch.arange(rank, device=self.s.device)
            chosen = chosen + (self.rank - rank) * (chosen >= first)
        return Bases(self.u[..., chosen], self.s[..., chosen], self.vh[..., chosen, :])

    def to(self, device: torch.device) -> Bases:
        """Move the factors to a device."""
        return Bases(self.u.to(device), self.s.to(device), self.vh.to(device))


def leading(rank: int, selection: str) -> int:
    """Number of the largest among `rank` chosen singular values; the others are the smallest."""
    return {"principal": rank, "minor": 0, "mixed": (rank + 1) // 2}[selection]


def parse_rank(rank: int | str) -> int | float | None:
    """Parse a rank: a positive int, "full" or "energy:0.99".

    "full" gives None, and "energy:" a float, the share of the sum of sigma².

    Raises:
        ConfigError: anything else.
    """
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return rank
    if rank == "full":
        return None
    match = re.fullmatch(r"energy:(0?\.\d+|1\.0*|1)", rank) if isinstance(rank, str) else None
    if match and 0 < float(match[1]) <= 1:
        return float(match[1])
    raise ConfigError(f'rank={rank!r} must be a positive integer, "full", or "energy:0.99" with a share in (0, 1].')


def bases(matrix: Tensor, rank: int | str, key: str | None = None) -> Bases:
    """Leading singular triplets of a matrix (out, in), on the matrix's device.

    Args:
        matrix: the frozen weight as (out, in), or a stack of them, of any float dtype.
        rank: see `parse_rank`; an int is capped at min(out, in). A stack has one rank: the largest that a matrix needs.
        key: hash of the weight; with it the result is kept on disk and found again by the next load, and layers on the
            same weight hold the same tensors, which nothing may change in place.
    """
    wanted = parse_rank(rank)
    if key is None:
        return _decompose(matrix.detach().float(), wanted)
    name = f"{key}-{_describe(matrix)}"
    found = _in_use(name, str(rank), matrix.device) or _cached(matrix, rank, key)
    if found is None:
        found = _decompose(matrix.detach().float(), wanted)
        path = _cache_path(matrix, rank, key)
        if path:
            _write(path, found)
    # Tensors of inference mode could not be trained with by another layer.
    if not found.u.is_inference():
        for part, value in vars(found).items():
            _IN_USE[name, str(rank), str(matrix.device), part] = value
    return found


def _in_use(name: str, rank: str, device: torch.device) -> Bases | None:
    """Bases that a layer on the same weight holds."""
    parts = [_IN_USE.get((name, rank, str(device), part)) for part in ("u", "s", "vh")]
    u, s, vh = parts
    return None if u is None or s is None or vh is None else Bases(u, s, vh)


def _cached(matrix: Tensor, rank: int | str, key: str) -> Bases | None:
    """Bases from the disk: of this rank, or the leading ones of the full ones where the same SVD would give them."""
    path = _cache_path(matrix, rank, key)
    found = _read(path, matrix) if path else None
    if found is not None or rank == "full":
        return found
    wanted, side = parse_rank(rank), min(matrix.shape[-2:])
    path = None if _is_randomized(side, wanted) else _cache_path(matrix, "full", key)
    full = _read(path, matrix) if path else None
    if full is None:
        return None
    kept = energy_rank(full.s, wanted) if isinstance(wanted, float) else min(wanted or side, side)
    return _leading(full.u, full.s, full.vh, kept)


def degenerate(s: Tensor, largest: Tensor | None = None) -> int:
    """Number of pairs of neighbours in (r,) too close, by the largest of all, for their vectors to be determined."""
    gap = _DEGENERATE_GAP * (s[..., :1] if largest is None else largest).clamp_min(1e-30)
    return int(((s[..., :-1] - s[..., 1:]).abs() <= gap).sum())


def _decompose(matrix: Tensor, wanted: int | float | None) -> Bases:
    side = min(matrix.shape[-2:])
    rank = side if wanted is None or isinstance(wanted, float) else min(wanted, side)
    if _is_randomized(side, wanted):
        found = _randomized(matrix, rank)
        if found is not None:
            return found
        logger.info("The randomized SVD of a %s matrix did not converge; taking the exact one.", tuple(matrix.shape))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    if isinstance(wanted, float):
        rank = energy_rank(s, wanted)
    return _canonical(u[..., :rank], s[..., :rank], vh[..., :rank, :])


def _is_randomized(side: int, wanted: int | float | None) -> bool:
    """Test whether a rank is computed by a randomized SVD.

    That pays only for a small part of a large matrix, and the energy is known of the whole alone.
    """
    return isinstance(wanted, int) and side > EXACT_SIDE and wanted < _RANDOMIZED_SHARE * side


def _leading(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> Bases:
    """Copies of the leading triplets, so that the others are not kept in memory with them."""
    return Bases(u[..., :rank].clone(), s[..., :rank].clone(), vh[..., :rank, :].clone())


def energy_rank(s: Tensor, share: float) -> int:
    """Smallest rank that holds a share of the sum of squares.

    `s` are singular values (..., r), descending.
    """
    energy = s.double().square().cumsum(-1)
    # A tolerance of rounding, so that a share of 1 is reached; a matrix of zeros reaches it at once.
    reached = (energy >= share * energy[..., -1:] * (1 - 1e-12)).reshape(-1, s.shape[-1])
    return int(reached.all(0).nonzero()[0, 0]) + 1


def _canonical(u: Tensor, s: Tensor, vh: Tensor) -> Bases:
    """Bases with signs such that each right vector's largest entry is positive."""
    # A pair of vectors is determined up to its sign, and libraries choose differently.
    largest = vh.gather(-1, vh.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    sign = torch.where(largest < 0, -1.0, 1.0).to(vh)
    return Bases((u * sign.unsqueeze(-2)).contiguous(), s.contiguous(), (vh * sign.unsqueeze(-1)).contiguous())


def _randomized(matrix: Tensor, rank: int) -> Bases | None:
    """Randomized SVD by subspace iteration from a fixed random start.

    Iterates until values and vectors have converged; None if they do not.
    """
    width = min(rank + _OVERSAMPLING, min(matrix.shape[-2:]))
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(matrix.shape[-1], width, generator=generator).to(matrix)
    q, _ = torch.linalg.qr(matrix @ start)
    before: Bases | None = None
    for _ in range(_MAX_ITERATIONS):
        # Orthonormal after each product, or all columns would turn to the leading vector.
        v, _ = torch.linalg.qr(matrix.mT @ q)
        q, _ = torch.linalg.qr(matrix @ v)
        small_u, s, vh = torch.linalg.svd(q.mT @ matrix, full_matrices=False)
        now = _canonical(q @ small_u[..., :rank], s[..., :rank], vh[..., :rank, :])
        if before is not None:
            # Every vector must have converged, so the worst one counts.
            moved = 1 - (before.vh * now.vh).sum(-1).abs().min()
            stretched = ((before.s - now.s).abs() / now.s[..., :1]).max()
            if moved < _CONVERGED**2 * 100 and stretched < _CONVERGED:
                return now
        before = now
    return None


def _cache_path(matrix: Tensor, rank: int | str, key: str | None) -> Path | None:
    if key is None or matrix.numel() < _CACHE_MIN_ENTRIES:
        return None
    name = f"v{_CACHE_VERSION}-{key}-{_describe(matrix)}-{str(rank).replace(':', '-')}.safetensors"
    return cache_dir("bases") / name


def _describe(matrix: Tensor) -> str:
    """Dtype, shape and order of a matrix, as parts of a file's name.

    The same bytes are another matrix where the weight is seen transposed.
    """
    order = "" if matrix.is_contiguous() else "-transposed"
    return f"{str(matrix.dtype).removeprefix('torch.')}-{'x'.join(map(str, matrix.shape))}{order}"


def _read(path: Path, matrix: Tensor) -> Bases | None:
    if not path.is_file():
        return None
    # The cache only saves time: a file that cannot be used is left out with a warning.
    try:
        state = load_file(path)
        found = Bases(state["u"], state["s"], state["vh"])
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning("Leaving out the unreadable cache file %s (%s); computing its bases again.", path.name, error)
        return None
    shapes = (*found.u.shape[:-1], found.vh.shape[-1], found.u.shape[-1], found.vh.shape[-2])
    if shapes != (*matrix.shape, found.rank, found.rank):
        logger.warning("Leaving out the cache file %s of another shape; computing its bases again.", path.name)
        return None
    return found.to(matrix.device)


def _write(path: Path, found: Bases) -> None:
    state = {"u": found.u, "s": found.s, "vh": found.vh}
    try:
        with new_file(path) as partial:
            save_file({k: v.cpu().contiguous() for k, v in state.items()}, partial)
    except WriteError as error:
        logger.warning("The bases could not be kept in the cache. %s", error)
