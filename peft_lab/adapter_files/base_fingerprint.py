"""Fingerprints of the base weights that an adapter belongs to.

An adapter records, per adapted module, the shape, dtype and sha256 of the base weight, and a few of its values. At
load the hash decides; the values tell "other weights" from "the same weights in another dtype" or "quantised". Of
quantised weights all of this is that of their dequantised values.
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
from peft_lab.backbones.quantized_weight import (
    dense_weight,
    is_plain,
    quantization,
    stored_parts,
    stored_weight,
    weight_shape,
)
from peft_lab.backbones.sharded_weights import is_sharded, whole_weight
from peft_lab.errors import AdapterMismatchError, ConfigError

_LOG = logging.getLogger("peft_lab")
_PROBES = 8
# peft calls the tuners that check the base, and would pass no argument on to them.
_ANY_BASE: ContextVar[bool] = ContextVar("any_base", default=False)
#: Largest relative difference between probes of one weight in two dtypes (bfloat16 keeps 8 bits of mantissa).
_DTYPE_TOLERANCE = 2**-7
#: Largest relative error that quantising leaves in the probes of all modules, for forms of 8 bits and for smaller ones;
#: one form may be stored with exact or with rounded scales.
_EIGHT_BITS = frozenset(("int8", "torchao-int8", "torchao-float8"))
_EIGHT_BITS_TOLERANCE, _FEW_BITS_TOLERANCE, _SAME_FORM_TOLERANCE = 0.1, 0.2, 0.02
#: The same for the few probes of one module, among which the error varies.
_QUANTISED_MODULE_TOLERANCE = 0.6


def weight_hash(weight: Tensor) -> str:
    """Return the sha256 of the raw bytes of a tensor.

    It may have any dtype and device, and be sharded over processes.
    """
    digest = hashlib.sha256()
    for part in stored_parts(whole_weight(weight).detach()):
        # numpy has no bfloat16, so the bytes are read as integers.
        data = part.to("cpu").contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


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
    own = stored_weight(module)
    if own is not None:
        return own
    for part in module.modules():
        if quantization(part):
            return stored_weight(part)
        for parameter in part.parameters(recurse=False):
            if parameter.ndim > 1:
                return parameter
    return None


def module_fingerprint(module: nn.Module, weight: Tensor) -> dict[str, Any]:
    """Return `fingerprint`, kept on the module until its weight changes.

    So many adapters need one hash. A quantised weight has two entries more: the name of its `quantization` and the
    root mean square of its values, `rms`.
    """
    # Changes in place are counted, but not for tensors that were made in inference mode.
    # Processes gather a sharded weight together, so none may leave that out.
    if weight.is_inference() or is_sharded(weight):
        return _values_fingerprint(module, weight)
    parts = stored_parts(weight)
    key = (id(weight), parts[0].data_ptr(), parts[0]._version, weight.dtype)
    known = module.__dict__.get("_peft_lab_fingerprint")
    if known is None or known[0] != key:
        known = (key, _values_fingerprint(module, weight))
        module.__dict__["_peft_lab_fingerprint"] = known
    return known[1]


def _values_fingerprint(module: nn.Module, weight: Tensor) -> dict[str, Any]:
    """Fingerprint of a weight in `module`, dequantised where it is quantised."""
    if is_plain(weight):
        return fingerprint(weight)
    # An adapter around the module shows its weight too, and is not quantised itself.
    holders = (part for part in module.modules() if stored_weight(part) is weight and quantization(part))
    owner = next(holders, None)
    if owner is None:
        return fingerprint(weight)
    name = quantization(owner)
    try:
        values = dense_weight(owner)
        return {**fingerprint(values), "quantization": name, "rms": values.square().mean().sqrt().item()}
    # Without values there is only the hash of what is stored to go by.
    except ConfigError:
        return {**fingerprint(weight), "shape": list(weight_shape(owner)), "probe": [], "quantization": name}


def compare(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Compare two fingerprints.

    Returns:
        "same", "shape", "dtype" (same values in another dtype), "quantization" (same values up to the error of
        quantising one of them) or "weights".
    """
    if list(recorded.get("shape", ())) != list(found["shape"]):
        return "shape"
    if found["sha256"] == recorded.get("sha256"):
        return "same"
    if recorded.get("quantization") or found.get("quantization"):
        return "quantization" if _probe_error(recorded, found) <= _QUANTISED_MODULE_TOLERANCE else "weights"
    # Within one dtype, another hash can only mean other values.
    if found["dtype"] == recorded.get("dtype"):
        return "weights"
    # Hashes of two dtypes always differ, so a few values decide.
    then, now = _probes(recorded), _probes(found)
    scale = then.abs().max().clamp_min(1e-12)
    close = then.shape == now.shape and bool(((then - now).abs() <= _DTYPE_TOLERANCE * scale).all())
    return "dtype" if close else "weights"


def _probe_error(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Root mean square error of a fingerprint's values, in that of the weight.

    Infinite if there are no values to compare.
    """
    then, now = _probes(recorded), _probes(found)
    rms = recorded.get("rms") or found.get("rms")
    if then.shape != now.shape or not rms:
        return float("inf")
    return ((then - now).square().mean().sqrt() / rms).nan_to_num(float("inf")).item()


def _probes(entry: Mapping[str, Any]) -> Tensor:
    return torch.tensor(entry.get("probe") or [float("nan")])


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
        dtype_bound: refuse the same weights in another dtype or quantised form.

    Raises:
        AdapterMismatchError: naming the first module that differs, in what, and the mend.
    """
    missing = [name for name in recorded if found.get(name) is None]
    if missing:
        raise AdapterMismatchError(
            f'The base has no module "{missing[0]}" ({len(missing)} of {len(recorded)} adapted modules are missing); '
            "load the adapter on the model class and backbone it was trained on."
        )
    other, forms = [], {}
    for name, entry in recorded.items():
        now = found[name] or {}
        verdict = compare(entry, now)
        if verdict == "shape":
            raise AdapterMismatchError(
                f'Base weight "{name}" has shape {now["shape"]}, the adapter was trained on one of shape '
                f"{list(entry.get('shape', ()))}; load it on the backbone it was trained on."
            )
        if verdict == "quantization":
            forms[name] = entry, now
        if verdict == "weights" or (verdict in ("dtype", "quantization") and dtype_bound):
            other.append(name)
            if not _ANY_BASE.get():
                raise AdapterMismatchError(_difference(verdict, name, entry, now))
    if forms:
        _check_forms(forms)
    if other:
        _LOG.warning(
            "The base differs from the one the adapter was trained on in %d of %d adapted modules; its answers may be "
            "worthless.",
            len(other),
            len(recorded),
        )


def _check_forms(entries: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Check that weights in another quantised form are those of the same base, and say that they are.

    One module's few values tell little. Those of all modules together tell the error of quantising from that of other
    weights; a base that differs by less than that cannot be told apart.

    Raises:
        AdapterMismatchError: the values of all modules differ by more than quantising explains.
    """
    errors = torch.tensor([_probe_error(entry, current) for entry, current in entries.values()])
    error = errors.square().mean().sqrt().item()
    entry, current = next(iter(entries.values()))
    trained, now_form, tolerance = *_forms(entry, current), _FEW_BITS_TOLERANCE
    if entry.get("quantization") == current.get("quantization"):
        tolerance = _SAME_FORM_TOLERANCE
    elif {entry.get("quantization") or "int8", current.get("quantization") or "int8"} <= _EIGHT_BITS:
        tolerance = _EIGHT_BITS_TOLERANCE
    if error > tolerance and not _ANY_BASE.get():
        raise AdapterMismatchError(
            f"The base in {now_form} differs by {error:.0%} from the one in {trained} that the adapter was trained "
            f"on, more than the {tolerance:.0%} that quantising explains; load it on the same checkpoint and revision "
            "of the backbone, or pass --allow_other_base (allow_other_base=True)."
        )
    _LOG.warning(
        "The adapter was trained on the base in %s, and this is the base in %s: their weights differ by %.1f %% in the "
        "%d modules compared, and so its answers differ too.",
        trained,
        now_form,
        100 * error,
        len(entries),
    )


def _difference(verdict: str, name: str, entry: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if verdict == "weights":
        return (
            f'Base weight "{name}" differs from the one the adapter was trained on (sha256 {now["sha256"][:12]}, '
            f"expected {str(entry.get('sha256'))[:12]}); load it on the same checkpoint and revision of the backbone, "
            "or pass --allow_other_base (allow_other_base=True)."
        )
    trained, now_form = _forms(entry, now)
    return (
        f'Base weight "{name}" is that of the same base in {now_form}, but the adapter was trained on {trained}, and '
        f"the bases that it takes from the weight would come out differently; load the backbone in {trained}, or save "
        "the adapter with save_bases=True."
    )


def _forms(entry: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str]:
    """Quantisation or dtype of a recorded and a found weight, in words."""
    trained, now_form = (str(values.get("quantization") or values.get("dtype")) for values in (entry, now))
    # The scales of one form are rounded by packing, or once more where they are quantised themselves.
    return trained, f"{now_form} with other scales" if now_form == trained else now_form
