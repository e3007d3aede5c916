"""Pruned bases of adapters: saved with an adapter, and pruned again before it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_lab.adapter_files import safe_files
from peft_lab.adapter_files.names import ADAPTER_CONFIG, PRUNED_BASE, PRUNING, PRUNING_MASKS, write_json
from peft_lab.backbones.names import unwrap
from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.runs.pruning import PruningRecord, read_record
from peft_lab.tuners.pruning import (
    apply_masks,
    count_pruned,
    layers_of_masks,
    magnitude_masks,
    masks_digest,
    pack_masks,
    prunable_layers,
    unpack_masks,
)
from peft_lab.utils.atomic_files import new_file

_LOG = logging.getLogger("peft_lab")
#: Attribute of a pruned base: the hash of its masks.
_MARK = "_peft_lab_pruning"


@dataclass(frozen=True)
class SavedPruning:
    """Pruning of an adapter's base, from its folder.

    Attributes:
        record: content of pruning.json.
        folder: the folder, which holds the masks if they are stored.
    """

    record: PruningRecord
    folder: Path

    def masks(self, layers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Masks for the layers of a base, and these layers by the names of the masks.

        Raises:
            ConfigError: the stored masks are not those of the layers.
        """
        record = self.record
        if not record.layers:
            return dict(layers), magnitude_masks(layers, record.share, record.structured)
        path = self.folder / PRUNING_MASKS
        if not path.is_file():
            raise ConfigError(f'"{self.folder}" has no {PRUNING_MASKS}, so its base cannot be pruned; copy it whole.')
        safe_files.check_size(path, sum(layer.weight.numel() for layer in layers.values()) + 2**24)
        if {*safe_files.read_header(path)} != {*record.layers}:
            raise ConfigError(f'"{path}" has other layers than {PRUNING} beside it; train the adapter again.')
        named = layers_of_masks(layers, record.layers)
        packed = load_file(path)
        return named, unpack_masks(named, {name: packed[name] for name in record.layers}, record.structured)


def read_pruning(folder: Path) -> SavedPruning | None:
    """Read how the base of an adapter is pruned; None for a dense one.

    Raises:
        ConfigError: the file is not one that `write_pruning` wrote.
    """
    record = read_record(folder)
    return None if record is None else SavedPruning(record, folder)


def record_of(by: str, share: float, structured: bool, masks: Mapping[str, Tensor], stored: bool) -> PruningRecord:
    """Record of masks; `stored` if they are saved beside it."""
    pruned, weights = count_pruned(masks)
    return PruningRecord(
        by=by,
        share=share,
        structured=structured,
        pruned=pruned,
        weights=weights,
        sha256=masks_digest(masks),
        layers=[*masks] if stored else [],
    )


def write_pruning(folder: Path, record: PruningRecord, layers: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
    """Write how the base of an adapter is pruned beside the adapter.

    The config of a tuner of peft's own, which loads without this package, gets a key that peft warns of.
    """
    if record.layers:
        with new_file(folder / PRUNING_MASKS) as partial:
            save_file(pack_masks(layers, masks, record.structured), partial)
    write_json(folder / PRUNING, record.model_dump())
    tell_peft(folder, record)


def tell_peft(folder: Path, record: PruningRecord) -> None:
    """Note the pruned base in the config of a tuner of peft's own; ours compare the base themselves."""
    path = folder / ADAPTER_CONFIG
    values = safe_files.read_json(path)
    if values and "fingerprints" not in values:
        values[PRUNED_BASE] = f"{record.in_words()}; load the adapter by peft_lab.load_adapter, which prunes the base."
        write_json(path, values)


def mark_pruned(base: nn.Module, record: PruningRecord) -> None:
    """Note on a base which masks it is pruned by."""
    vars(base)[_MARK] = record.sha256


def prune_for(
    model: nn.Module,
    saved: SavedPruning | None,
    adapter: str,
    *,
    occupied: bool | None = None,
    allow_other_base: bool = False,
) -> None:
    """Prune a base in place as that of an adapter was, unless it is so already.

    Args:
        model: the base, or a model with adapters on it.
        saved: the pruning of the adapter's base; None for a dense one.
        adapter: name of the adapter, for errors.
        occupied: True if other adapters are on the base; by default the model is looked at.
        allow_other_base: warn where other weights than those of the training are the smallest.

    Raises:
        ConfigError: the base cannot be pruned.
        AdapterMismatchError: the base is pruned otherwise, has adapters for which it is not, or has other weights.
    """
    base = unwrap(model)
    done = vars(base).get(_MARK)
    if done == (saved.record.sha256 if saved else None):
        return
    if saved is None and allow_other_base:
        return
    if saved is None:
        raise AdapterMismatchError(
            f'The base is pruned, and the adapter "{adapter}" was trained on a dense one; load the base again.'
        )
    words = saved.record.in_words()
    if occupied is None:
        occupied = any(isinstance(module, BaseTunerLayer) for module in base.modules())
    if done is not None or occupied:
        raise AdapterMismatchError(
            f'The adapter "{adapter}" was trained on a pruned base ({words}), and this one is '
            f"{'dense and has other adapters on it' if done is None else 'pruned otherwise'}; load the base again for "
            "it alone."
        )
    layers, masks = saved.masks(prunable_layers(base))
    if masks_digest(masks) != saved.record.sha256:
        sentence = (
            f'The adapter "{adapter}" was trained on a base pruned of {words}, and in this base others are the '
            "smallest weights"
        )
        if not allow_other_base:
            raise AdapterMismatchError(
                f"{sentence}; load it on the same checkpoint, revision and dtype of the backbone, or pass "
                "--allow_other_base (allow_other_base=True)."
            )
        _LOG.warning("%s; its answers may be worthless.", sentence)
    apply_masks(layers, masks)
    mark_pruned(base, saved.record)
    _LOG.info("The base of %s was pruned: %s.", adapter, words)
