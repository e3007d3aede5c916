"""Task vectors, read from folders of LoRA adapters and of fine-tuned checkpoints."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_lab.adapter_files import base_fingerprint, module_matching, safe_files
from peft_lab.adapter_files.name_patterns import check_key_pattern
from peft_lab.adapter_files.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG
from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.backbones.heads import head_paths
from peft_lab.backbones.names import PEFT_PREFIX
from peft_lab.errors import AdapterMismatchError, ConfigError, PeftLabError
from peft_lab.tuners import changed_base, lora_rank, lora_scaling, lora_variant, matrix_shape, operation

#: A file of an adapter may be at most so many times as large as the base in float32.
_MOST_TIMES = 4
_ENTRY = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)")


@dataclass(frozen=True)
class TaskVector:
    """Difference of a fine-tuned model to its base, by module of the model that it is read for.

    Attributes:
        name: the folder as it was given.
        sha256: hash of the file of weights, or of several one behind the other.
        factors: B (out, r), with the scaling, and A (r, in) of a LoRA adapter, float32.
        dense: differences (out, in) of a checkpoint, float32.
    """

    name: str
    sha256: str
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Largest rank of the factors; 0 for a checkpoint."""
        return max((len(down) for _, down in self.factors.values()), default=0)

    @property
    def modules(self) -> set[str]:
        """Modules that the vector changes."""
        return {*self.factors, *self.dense}


def read_vectors(names: Sequence[str], model: nn.Module) -> list[TaskVector]:
    """Read the task vectors of folders for a model.

    Args:
        names: folders of LoRA adapters or runs, or of checkpoints in transformers' form.
        model: the base, whose modules and weights the vectors must fit.

    Raises:
        ConfigError: a folder is not there, holds something else, or is not safe to read; naming it.
        AdapterMismatchError: a vector belongs to another base, as far as its folder tells.
    """
    return [_read(name, model) for name in names]


def _read(name: str, model: nn.Module) -> TaskVector:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(f'The task vector "{name}" is no folder; name one of an adapter or of a checkpoint.')
    try:
        safe_files.check_folder(folder)
        if (folder / ADAPTER_CONFIG).is_file():
            return _read_lora(name, folder, model)
        if (folder / MODEL_CONFIG).is_file():
            return _read_checkpoint(name, folder, model)
    except AdapterMismatchError as error:
        raise AdapterMismatchError(f'The task vector "{name}" does not fit: {error}') from error
    except PeftLabError as error:
        raise ConfigError(f'The task vector "{name}" cannot be read: {error}') from error
    raise ConfigError(f'The task vector "{name}" has neither {ADAPTER_CONFIG} nor {MODEL_CONFIG}.')


# LoRA adapters ------------------------------------------------------------------------------------------------------


def _read_lora(name: str, folder: Path, model: nn.Module) -> TaskVector:
    config, weights = _lora_config(folder), folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ConfigError(f"it has no {ADAPTER_WEIGHTS}; only safetensors files are read.")
    safe_files.check_size(weights, _MOST_TIMES * 4 * sum(p.numel() for p in model.parameters()) + 2**20)
    safe_files.read_header(weights)
    _check_base(folder, model)
    entries: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(weights).items():
        found = _ENTRY.fullmatch(key.removeprefix(PEFT_PREFIX))
        if found is not None:  # a task head or a resized embedding is no part of the vector
            entries.setdefault(found[1], {})[found[2]] = value
    find, vector = module_matching.module_finder(model), TaskVector(name, _file_hash(weights))
    for module, values in entries.items():
        path = find(module)
        if path is None:
            raise AdapterMismatchError(f'the model has no module "{module}", which the vector changes.')
        vector.factors[path] = _factors(config, module, values, module_matching.base_layer(model, path))
    if not vector.factors:
        raise ConfigError("the adapter holds no factors of a weight.")
    return vector


def _lora_config(folder: Path) -> Any:
    """Config of a LoRA adapter without variants.

    Raises:
        ConfigError: another method, a variant, or a pattern that may take for ever.
    """
    values = safe_files.read_json(folder / ADAPTER_CONFIG)
    method = str(values.get("peft_type"))
    if method != "LORA":
        raise ConfigError(f'it is an adapter of type "{method}", not of LoRA; convert it with `peft-lab to-lora`.')
    known = {key: value for key, value in values.items() if key in LoraConfig.__dataclass_fields__}
    for pattern in ("rank_pattern", "alpha_pattern"):
        for key in known.get(pattern) or ():
            check_key_pattern(pattern, str(key))
    # which modules are adapted is read off the weights, so no regex of the file is run
    config = LoraConfig(**{**known, "target_modules": None, "exclude_modules": None})
    setting = lora_variant(config) or changed_base(config)
    if setting:
        raise ConfigError(f"a LoRA adapter with {setting}={getattr(config, setting)!r} is more than a low-rank delta.")
    return config


def _factors(config: Any, module: str, values: dict[str, Tensor], base: Any) -> tuple[Tensor, Tensor]:
    """Factors B (out, r) and A (r, in) of a module's matrix, as `Operation.matrix` has it.

    Raises:
        ConfigError: an entry is missing, or not finite.
        AdapterMismatchError: the shapes are not those of the module.
    """
    op = operation(base, module)
    if op.op_type == "embedding":  # the matrix is (tokens, dim), and its factors are transposed
        found = values.get("lora_embedding_A"), values.get("lora_embedding_B")
    else:
        found = values.get("lora_B.weight"), values.get("lora_A.weight")
    if found[0] is None or found[1] is None:
        raise ConfigError(f'the file lacks a factor of "{module}".')
    up, down = found[0].float().flatten(1), found[1].float().flatten(1)
    if op.op_type == "embedding":
        up, down = up.T, down.T
    rows, columns = matrix_shape(base, op)
    if (len(up), down.shape[1], up.shape[1]) != (rows, columns, len(down)) or len(down) != lora_rank(config, module):
        raise AdapterMismatchError(
            f'the factors of "{module}" are {list(up.shape)} and {list(down.shape)}, the weight is {rows} x {columns}.'
        )
    if not (up.isfinite().all() and down.isfinite().all()):
        raise ConfigError(f'the factors of "{module}" are not finite.')
    return up * lora_scaling(config, module), down


def _check_base(folder: Path, model: nn.Module) -> None:
    """Compare the record of the base beside an adapter with the model; nothing is known without one.

    Raises:
        AdapterMismatchError: the adapter was trained on other weights.
    """
    recorded = base_fingerprint.read_record(folder)
    find = module_matching.module_finder(model)
    found: dict[str, Any] = {}
    for module in recorded:
        path = find(module)
        layer: Any = None if path is None else module_matching.base_layer(model, path)
        weight = None if layer is None else base_fingerprint.reference_weight(layer)
        found[module] = None
        if layer is not None and weight is not None:
            found[module] = base_fingerprint.module_fingerprint(layer, weight)
    base_fingerprint.check(recorded, found, dtype_bound=False)


# Checkpoints --------------------------------------------------------------------------------------------------------


def _read_checkpoint(name: str, folder: Path, model: nn.Module) -> TaskVector:
    """Differences of the weight matrices of a checkpoint, without those of the task head.

    Raises:
        ConfigError: the model is none of transformers, it is quantised, or the checkpoint has other modules.
        AdapterMismatchError: a weight of the backbone has another shape.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"it is a checkpoint, and {type(model).__name__} is no model of transformers to read it as.")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError("it has no safetensors file; only these are read.")
    tuned, info = load_checkpoint(
        type(model), str(folder), dtype=torch.float32, ignore_mismatched_sizes=True, use_safetensors=True
    )
    # transformers lists a key, or a key with its two shapes
    wrong = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get("mismatched_keys", ())]
    heads, absent = tuple(f"{path}." for path in head_paths(tuned)), {*info.get("missing_keys", ()), *wrong}
    for key in wrong:
        if not key.startswith(heads):
            raise AdapterMismatchError(f'the weight "{key}" has another shape than in the base.')
    vector = TaskVector(name, _file_hash(*files))
    for path, module in tuned.named_modules():
        if f"{path}.".startswith(heads) or f"{path}.weight" in absent:
            continue
        base = module_matching.base_layer(model, path)
        try:
            op = operation(base, path)
        except ConfigError:  # a module that is no operation with a weight
            continue
        if op.op_type == "norm":
            continue
        if op.quantization:
            raise ConfigError(
                f"the weight of {path} is quantised ({op.quantization}), so that a difference to it holds its rounding "
                "too; load the base unquantised, or give LoRA adapters."
            )
        delta = op.matrix(module.weight.detach().float() - base.weight.detach().float())
        if delta.any():
            vector.dense[path] = delta.clone()
    if not vector.dense:
        raise ConfigError("its weights are those of the base.")
    return vector


def _file_hash(*files: Path) -> str:
    """Return the sha256 of files, one behind the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while part := stream.read(2**20):
                digest.update(part)
    return digest.hexdigest()
