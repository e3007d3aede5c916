"""Residual connections of one block of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft_lab.backbones.family import Family, ResidualConnection

if TYPE_CHECKING:
    from torch import nn


def residual_connections(family: Family, block: nn.Module, config: Any) -> tuple[ResidualConnection, ...]:
    """Return the residual connections of a block, in their order.

    Left out are those whose modules the block lacks, such as cross-attention in the encoder of an encoder-decoder.

    Args:
        family: the family of the stack.
        block: one block, wrapped by an adapter or not.
        config: the config of the stack, which says in OPT whether the norms stand before or behind.

    Example:
        >>> [c.norm_before for c in residual_connections(FAMILIES["vit"], model.vit.layers[0], model.config)]
        ['layernorm_before', 'layernorm_after']
    """
    names = {name for name, _ in getattr(block, "base_layer", block).named_modules()}
    found = [connection for connection in family.residual if _paths(connection) <= names]
    # OPT-350m has its norms behind the additions, the other sizes before the sub-layers.
    if family.norm_first_flag and getattr(config, family.norm_first_flag, True) is False:
        return tuple(c._replace(norm_before="", norm_after=c.norm_before) for c in found)
    return tuple(found)


def _paths(connection: ResidualConnection) -> set[str]:
    """Return the modules that a block must have for this connection."""
    return {connection.norm_before, connection.output, connection.norm_after, connection.only_with} - {""}
