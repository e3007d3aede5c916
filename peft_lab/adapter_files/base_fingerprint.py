"""Fingerprints of the base weights that an adapter belongs to.

An adapter records, per adapted module, the shape, dtype and sha256 of the base weight, and a few of its values. At
load the hash decides; the values tell "other weights" from "the same weights in another dtype".
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_lab.adapter_files import safe_files
from peft_lab.adapter_files.names import BASE_RECORD
from peft_lab.errors import AdapterMismatchError
from peft_lab.utils.sharded_weights import is_sharded, whole_weight

_LOG = logging.getLogger("peft_lab")
_PROBES = 8
# peft calls the tuners that check the base, and would pass no argument on to them.
_ANY_BASE: ContextVar[bool] = ContextVar("any_base", default=False)
#: Largest relative difference between probes of one weight in two dtypes (bfloat16 keeps 8 bits of mantissa).
_DTYPE_TOLERANCE = 2**-7


def weight_hash(weight: Tensor) -> str:
    """Return the sha256 of the raw bytes of a tensor.

    It may have any dtype and device, and be sharded over processes.
    """
    weight = whole_weight(weight)
    # numpy has no bfloat16, so the bytes are read as integers.
    data = weight.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def model_hash(model: nn.Module, without: Sequence[str] = ()) -> str:
    """Return the sha256 over names, shapes, dtypes and bytes of all parameters.

    Those below the module paths `without` are left out, and those on the meta device, which have no bytes.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.is_meta or name.startswith(tuple(f"{path}." for path in without)):
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {weight_hash(parameter)}\n".encode())
    return digest.hexdigest()


def fingerprint(weight: Tensor) -> dict[str, Any]:
    """Return the fingerprint of one base weight as plain values.

    Returns:
        `shape`, `dtype`, `sha256` and `probe` (8 of its values).
    """
    weight = whole_weight(weight)
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, max(flat.numel() - 1, 0), min(_PROBES, flat.numel())).long().to(flat.device)
    return {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "sha256": weight_hash(weight),
        "probe": [round(v, 9) for v in flat[index].float().tolist()],
    }


def reference_weight(module: nn.Module) -> Tensor | None:
    """Return the weight that identifies the base of a module.

    It is its own, or the first matrix of a block; None if it has none.
    """
    own = getattr(module, "weight", None)
    if isinstance(own, Tensor):
        return own
    return next((parameter for parameter in module.parameters() if parameter.ndim > 1), None)


def module_fingerprint(module: nn.Module, weight: Tensor) -> dict[str, Any]:
    """Return `fingerprint`, kept on the module until its weight changes.

    So many adapters need one hash.
    """
    # Changes in place are counted, but not for tensors that were made in inference mode.
    # Processes gather a sharded weight together, so none may leave that out.
    if weight.is_inference() or is_sharded(weight):
        return fingerprint(weight)
    key = (id(weight), weight.data_ptr(), weight._version, weight.dtype)
    known = module.__dict__.get("_peft_lab_fingerprint")
    if known is None or known[0] != key:
        known = (key, fingerprint(weight))
        module.__dict__["_peft_lab_fingerprint"] = known
    return known[1]


def compare(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Compare two fingerprints.

    Returns:
        "same", "shape", "dtype" (same values in another dtype) or "weights".
    """
    if list(recorded.get("shape", ())) != list(found["shape"]):
        return "shape"
    if found["sha256"] == recorded.get("sha256"):
        return "same"
    # Within one dtype, another hash can only mean other values.
    if found["dtype"] == recorded.get("dtype"):
        return "weights"
    # Hashes of two dtypes always differ, so a few values decide.
    then, now = torch.tensor(recorded.get("probe") or [float("nan")]), torch.tensor(found["probe"])
    scale = then.abs().max().clamp_min(1e-12)
    close = then.shape == now.shape and bool(((then - now).abs() <= _DTYPE_TOLERANCE * scale).all())
    return "dtype" if close else "weights"


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the base record beside an adapter of peft's own tuners.

    {} without one.

    Raises:
        ConfigError: the file is not such a record.
    """
    values = safe_files.read_json(folder / BASE_RECORD).get("modules", {})
    safe_files.check_fingerprints(values, f'"{folder / BASE_RECORD}"')
    return values


@contextmanager
def any_base(allowed: bool = True) -> Iterator[None]:
    """Let `check` warn of other weights instead of refusing them.

    Their shapes must still fit.
    """
    token = _ANY_BASE.set(allowed)
    try:
        yield
    finally:
        _ANY_BASE.reset(token)


def check(
    recorded: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any] | None], dtype_bound: bool
) -> None:
    """Compare recorded fingerprints with those of the base weights found.

    Args:
        recorded: module name -> fingerprint.
        found: module name -> fingerprint, or None where the base has no such module.
        dtype_bound: refuse the same weights in another dtype.

    Raises:
        AdapterMismatchError: naming the first module that differs, in what, and the mend.
    """
    missing = [name for name in recorded if found.get(name) is None]
    if missing:
        raise AdapterMismatchError(
            f'The base has no module "{missing[0]}" ({len(missing)} of {len(recorded)} adapted modules are missing); '
            "load the adapter on the model class and backbone it was trained on."
        )
    other = []
    for name, entry in recorded.items():
        now = found[name] or {}
        verdict = compare(entry, now)
        if verdict == "shape":
            raise AdapterMismatchError(
                f'Base weight "{name}" has shape {now["shape"]}, the adapter was trained on one of shape '
                f"{list(entry.get('shape', ()))}; load it on the backbone it was trained on."
            )
        if verdict == "weights" or (verdict == "dtype" and dtype_bound):
            other.append(name)
            if not _ANY_BASE.get():
                raise AdapterMismatchError(_difference(verdict, name, entry, now))
    if other:
        _LOG.warning(
            "The base differs from the one the adapter was trained on in %d of %d adapted modules; its answers may be "
            "worthless.",
            len(other),
            len(recorded),
        )


def _difference(verdict: str, name: str, entry: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if verdict == "weights":
        return (
            f'Base weight "{name}" differs from the one the adapter was trained on (sha256 {now["sha256"][:12]}, '
            f"expected {str(entry.get('sha256'))[:12]}); load it on the same checkpoint and revision of the backbone, "
            "or pass --allow_other_base (allow_other_base=True)."
        )
    return (
        f'Base weight "{name}" holds the same values in {now["dtype"]}, but the adapter was trained on '
        f"{entry.get('dtype')}, and its bases would come out differently; load the backbone with "
        f"dtype={entry.get('dtype')}, or save the adapter with save_bases=True."
    )
