"""Ranks that no adapted matrix can have: refused where they are above all of them, said where above some.

Some tuners clip such a rank in silence, and others train factors that are larger than the matrix itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo
from peft_lab.tuners.operations import ExpertWeight

logger = logging.getLogger("peft_lab")

#: Fields of configs that hold a rank.
_RANKS = ("r", "rank", "init_r", "effective_rank")


def check_rank(model: Any, info: MethodInfo, args: Mapping[str, Any]) -> None:
    """Check the rank that the user gave against the matrices that are adapted.

    A number that gives parameters of its own beside the matrices, as that of VeRA, is no such rank. One that is above
    some matrices alone is said.

    Raises:
        ConfigError: the rank is above that of every adapted matrix.
    """
    config = model.active_peft_config
    name = next((name for name in _RANKS if name in args), None)
    sizes = _sizes(model)
    above = _above(sizes, getattr(config, name, None) if name else None)
    if not above:
        return
    if len(above) == len(sizes):
        most = max(min(shape) for shape, _ in sizes.values())
        path, (rows, columns) = next(iter(above.items()))
        raise ConfigError(
            f'{name}={getattr(config, str(name))} of method "{info.name}" is above the rank of every adapted matrix '
            f"({path}: {rows} x {columns}); give at most {most}."
        )
    # a tuner of ours has said it itself, whoever put it on the model
    if info.module.startswith("peft."):
        tell_rank(model, config, info)


def tell_rank(model: Any, config: Any, info: MethodInfo) -> None:
    """Warn of a rank that is above those of some or all adapted matrices.

    Args:
        model: the model with its adapter.
        config: the adapter's config.
        info: the method's card.
    """
    name = next((name for name in _RANKS if hasattr(config, name)), None)
    sizes = _sizes(model)
    above = _above(sizes, getattr(config, name) if name else None)
    if not above:
        return
    path, (rows, columns) = next(iter(above.items()))
    logger.warning(
        '%s=%d of method "%s" is above the rank of %d of %d adapted matrices (%s: %d x %d), which have no more.',
        name,
        getattr(config, str(name)),
        info.name,
        len(above),
        len(sizes),
        path,
        rows,
        columns,
    )


def _sizes(model: Any) -> dict[str, tuple[tuple[int, int], nn.Module]]:
    """Shape of each adapted weight as a matrix, and its layer, by path."""
    found: dict[str, tuple[tuple[int, int], nn.Module]] = {}
    for path, layer in model.named_modules():
        shape = _matrix(layer) if isinstance(layer, BaseTunerLayer) else None
        if shape is not None:
            found[path.removeprefix("base_model.model.")] = (shape, layer)
    return found


def _above(sizes: Mapping[str, tuple[tuple[int, int], nn.Module]], rank: Any) -> dict[str, tuple[int, int]]:
    """Shapes of the matrices whose rank is smaller; none where the number is no rank."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        return {}
    above = {path: shape for path, (shape, _) in sizes.items() if rank > min(shape)}
    return {} if any(_has_vector(sizes[path][1], rank) for path in above) else above


def _matrix(layer: BaseTunerLayer) -> tuple[int, int] | None:
    """Shape of an adapted weight as a matrix, (out, in); None for one that is none."""
    base: Any = layer.get_base_layer()
    # a quantised weight is stored in another shape
    out, inside = getattr(base, "out_features", None), getattr(base, "in_features", None)
    if isinstance(out, int) and isinstance(inside, int):
        return out, inside
    weight = getattr(base, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim < 2:
        return None
    # each expert of a stacked weight has a matrix of its own
    if isinstance(base, ExpertWeight):
        return weight.shape[1], weight.shape[2]
    return weight.shape[0], weight[0].numel()


def _has_vector(layer: nn.Module, rank: int) -> bool:
    """Test whether a layer trains a vector of as many values as the rank, or twice as many: it is no factor then."""
    # means and deviations of a distribution are two for each value
    return any(each.ndim == 1 and each.numel() in (rank, 2 * rank) for each in _own_parameters(layer))


def _own_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and "base_layer" not in name.split("."):
            yield parameter
