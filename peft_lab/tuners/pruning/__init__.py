"""Choice of the entries or filters of a base's weights that pruning keeps."""

from __future__ import annotations

from peft_lab.tuners.pruning.bip import BiPSolution, bip_masks, solve_bip
from peft_lab.tuners.pruning.masks import (
    apply_masks,
    candidate_layers,
    count_pruned,
    layers_of_masks,
    magnitude_masks,
    masks_digest,
    pack_masks,
    prunable_layers,
    unpack_masks,
)
from peft_lab.tuners.pruning.reversible import ReversiblePruning

__all__ = [
    "BiPSolution",
    "ReversiblePruning",
    "apply_masks",
    "bip_masks",
    "candidate_layers",
    "count_pruned",
    "layers_of_masks",
    "magnitude_masks",
    "masks_digest",
    "pack_masks",
    "prunable_layers",
    "solve_bip",
    "unpack_masks",
]
