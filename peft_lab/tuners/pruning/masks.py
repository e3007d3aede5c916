"""Masks of pruned weights: found by magnitude, applied, counted and stored.

A set of masks is a dict of the path of a layer to a bool tensor of its weight's shape, True for what is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_lab.backbones.backbone_map import backbone_map
from peft_lab.backbones.names import is_under
from peft_lab.backbones.quantized_weight import quantization
from peft_lab.errors import ConfigError
from peft_lab.tuners.operations import operation

#: Modules whose weights are pruned.
_PRUNED = (nn.Linear, nn.Conv2d, Conv1D)


def prunable_layers(model: nn.Module, spared: Iterable[nn.Module] | None = None) -> dict[str, Any]:
    """Linear and convolution layers of a base by path, in its order.

    Layers whose weights are zero alone are left out, because a share of them would be no pruning; so is a second layer
    with the weight of another one. Embeddings, norms and stacked weights of experts are no such layers.

    Args:
        model: the base, without adapters.
        spared: modules that stay dense with all inside; by default the task head and what writes tokens.

    Raises:
        ConfigError: the base has no such layers, or one whose values are not there: quantised, sharded or not loaded.
    """
    return layers_with_values(candidate_layers(model, spared), "pruning")


def layers_with_values(layers: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Those of some layers whose weights are not zero alone, by path.

    Raises:
        ConfigError: as `prunable_layers`; `what` is what asks for them.
    """
    found = {}
    for path, layer in layers.items():
        weight: Any = layer.weight
        plain = type(weight) is nn.Parameter and weight.is_floating_point()
        if quantization(layer) or weight.is_meta or not plain:
            raise ConfigError(
                f'{what}: the weight of "{path}" is quantised, sharded or not loaded, so there is nothing to compare; '
                "load the base whole into memory, not quantised."
            )
        if bool(weight.any()):
            found[path] = layer
    if not found:
        raise ConfigError(f"{what}: the base has no linear or convolution weights to prune.")
    return found


def candidate_layers(model: nn.Module, spared: Iterable[nn.Module] | None = None) -> dict[str, Any]:
    """Layers of `prunable_layers` by their class alone: their values are not looked at."""
    left_out = _heads(model) if spared is None else [module for part in spared for module in part.modules()]
    taken = {id(module) for module in left_out}
    # a weight that is an embedding as well, as that of a decoder's head may be, is none of a layer
    seen = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if not isinstance(module, _PRUNED) or id(module) in taken:
            continue
        if id(module.weight) not in seen:
            found[path] = module
        seen.add(id(module.weight))
    return found


def _heads(model: Any) -> list[nn.Module]:
    paths = backbone_map(model).heads
    found = [module for path, module in model.named_modules() if any(is_under(path, head) for head in paths)]
    writer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return found if writer is None else [*found, writer]


def magnitude_masks(layers: Mapping[str, Any], share: float, structured: bool = False) -> dict[str, Tensor]:
    """Masks that take away the smallest weights.

    Args:
        layers: Linear, transformers' Conv1D or Conv2d by path, as of `prunable_layers`.
        share: of the entries of all layers together, as `torch.nn.utils.prune.global_unstructured` counts them; or of
            the filters of each layer.
        structured: take away whole filters, output rows of a linear layer, by their L2 norm, as
            `torch.nn.utils.prune.ln_structured`. At least one stays in each layer. Biases stay.

    Returns:
        Masks on the CPU, where ties fall alike for every device: of equal entries the last ones go.

    Raises:
        ConfigError: the share of so few entries is none.
    """
    masks = _filter_masks(layers, share) if structured else _entry_masks(layers, share)
    if not count_pruned(masks)[0]:
        what = "filters" if structured else "weights"
        raise ConfigError(f"share={share} prunes none of the {what} of {len(layers)} layers; give a larger share.")
    return masks


def _entry_masks(layers: Mapping[str, Any], share: float) -> dict[str, Tensor]:
    weights = [layer.weight.detach() for layer in layers.values()]
    sizes = torch.cat([weight.abs().cpu().float().reshape(-1) for weight in weights])
    kept = ~_smallest(sizes, round(share * len(sizes)))
    parts = kept.split([weight.numel() for weight in weights])
    return {path: part.view(weight.shape).clone() for path, weight, part in zip(layers, weights, parts, strict=True)}


def _filter_masks(layers: Mapping[str, Any], share: float) -> dict[str, Tensor]:
    masks = {}
    for path, layer in layers.items():
        weight = layer.weight.detach().cpu()
        norms = operation(layer, path).matrix(weight.float()).norm(dim=1)
        count = min(round(share * len(norms)), len(norms) - 1)
        masks[path] = _from_filters(layer, path, ~_smallest(norms, count))
    return masks


def _from_filters(layer: Any, path: str, kept: Tensor) -> Tensor:
    """Mask of a weight's shape from one value (out,) for each filter."""
    shape = layer.weight.shape
    return kept.view(operation(layer, path).scale_shape(len(shape))).expand(shape).clone()


def _smallest(values: Tensor, count: int) -> Tensor:
    """True at the smallest values, exactly `count` of them."""
    if not count:
        return torch.zeros(len(values), dtype=torch.bool)
    # not by topk, which leaves open what of equal values it takes
    limit = values.kthvalue(count).values
    found = values < limit
    equal = (values == limit).nonzero()[:, 0]
    found[equal[len(equal) - (count - int(found.sum())) :]] = True
    return found


@torch.inference_mode(False)  # because training may come after
def apply_masks(layers: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
    """Set the entries that masks take away to zero; each weight gets new storage."""
    for path, mask in masks.items():
        weight = layers[path].weight
        weight.data = weight.data.masked_fill(~mask.to(weight.device), 0.0)


def count_pruned(masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """Number of entries that are taken away, and of all."""
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    return total - kept, total


# Storage ------------------------------------------------------------------------------------------------------------


def masks_digest(masks: Mapping[str, Tensor]) -> str:
    """Hash (sha256) of masks in their order; paths have no part in it, because versions name layers otherwise."""
    digest = hashlib.sha256()
    for mask in masks.values():
        digest.update(f"{tuple(mask.shape)}\n".encode())
        digest.update(_packed(mask).tobytes())
    return digest.hexdigest()


def pack_masks(layers: Mapping[str, Any], masks: Mapping[str, Tensor], structured: bool) -> dict[str, Tensor]:
    """Masks as packed bits, uint8, one bit for each entry, or for each filter."""
    found = {}
    for path, mask in masks.items():
        values = operation(layers[path], path).matrix(mask)[:, 0] if structured else mask
        found[path] = torch.from_numpy(_packed(values))
    return found


def unpack_masks(layers: Mapping[str, Any], packed: Mapping[str, Tensor], structured: bool) -> dict[str, Tensor]:
    """Masks from packed bits, for the layers of the same names.

    Raises:
        ConfigError: the bits are not those of these layers.
    """
    found = {}
    for path, bits in packed.items():
        layer = layers[path]
        count = operation(layer, path).channels if structured else layer.weight.numel()
        if bits.dtype != torch.uint8 or bits.ndim != 1 or len(bits) != -(-count // 8):
            raise ConfigError(f'The mask of "{path}" is not one of its {count} entries; train the adapter again.')
        values = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count)).bool()
        found[path] = _from_filters(layer, path, values) if structured else values.view(layer.weight.shape)
    return found


def layers_of_masks(layers: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Layers for the paths of masks, which may be those of another version or of a model with another head.

    Returns:
        Path of a mask -> layer: that of the same path, or, where some have other paths, of the same number.

    Raises:
        ConfigError: the layers are not as many.
    """
    paths = list(paths)
    if all(path in layers for path in paths):
        return {path: layers[path] for path in paths}
    if len(paths) != len(layers):
        raise ConfigError(
            f"The masks are for {len(paths)} layers, and the base has {len(layers)} that can be pruned; load the "
            "backbone that the adapter was trained on."
        )
    return dict(zip(paths, layers.values(), strict=True))


def _packed(mask: Tensor) -> np.ndarray:
    bits: np.ndarray = np.packbits(mask.cpu().numpy().reshape(-1))
    return bits
