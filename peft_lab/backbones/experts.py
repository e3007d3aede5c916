"""Stacked weights of mixtures of experts, found by their shape."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from peft_lab.backbones.names import WRAPPED, ends_with, unwrap, without_adapters
from peft_lab.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Value of `target_parameters` for all stacked weights of a model's experts.
ALL_EXPERTS = "all-experts"


def expert_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the stacked weights (experts, ., .) of a model by path.

    Transformers 5 holds the weights of all experts of a block in one parameter; adapters around it change no path.
    """
    found: dict[str, Tensor] = {}
    for path, module in unwrap(model).named_modules():
        count = getattr(module, "num_experts", None)
        for name, parameter in module._parameters.items() if isinstance(count, int) and path else ():
            if parameter is not None and parameter.ndim == 3 and len(parameter) == count:
                found[f"{WRAPPED.sub('', path)}.{name}"] = parameter
    return found


def expert_parameter(model: nn.Module, path: str) -> tuple[Any, Tensor] | None:
    """Return the experts module and the stacked weight at a path.

    None if there is no such parameter.
    """
    parent, _, name = path.rpartition(".")
    try:
        module: Any = unwrap(model).get_submodule(parent)
    except AttributeError:
        return None
    _, module = next(without_adapters(module))
    parameter = module._parameters.get(name)
    return None if parameter is None else (module, parameter)


def short_names(paths: Collection[str]) -> list[str]:
    """Return the last two parts of each path, which are the same in all blocks."""
    return sorted({".".join(path.split(".")[-2:]) for path in paths})


def find_expert_parameters(model: nn.Module, names: Collection[str] | str) -> list[str]:
    """Return the paths of the stacked weights that `target_parameters` names.

    A name is a path or its end, as in `target_modules`; `all-experts` stands for all of them.

    Raises:
        ConfigError: a name fits no stacked weight of experts.
    """
    known = expert_parameters(model)
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, str) else names:
        paths = [path for path in known if name == ALL_EXPERTS or ends_with(path, name)]
        if not paths:
            raise ConfigError(_not_found(model, name, short_names(known)))
        found |= dict.fromkeys(paths)
    return [path for path in known if path in found]


def names_of_experts(model: nn.Module, names: Collection[str] | str) -> list[str]:
    """Return the names of `target_parameters` in full: short ones if they mean the same, else paths.

    Raises:
        ConfigError: as `find_expert_parameters`.
    """
    found = find_expert_parameters(model, names)
    short = short_names(found)
    return short if find_expert_parameters(model, short) == found else found


def _not_found(model: nn.Module, name: str, known: list[str]) -> str:
    cls = type(unwrap(model)).__name__
    if not known:
        return (
            f'target_parameters names "{name}", but {cls} has no stacked weights of experts; '
            "name its modules in target_modules."
        )
    return (
        f'target_parameters names "{name}", which is no stacked weight of experts in {cls}.'
        f"{did_you_mean(name, known)} It has: {', '.join(known)}; {ALL_EXPERTS} stands for all."
    )


def left_out(model: nn.Module, adapted: Collection[str]) -> str:
    """Return a sentence about the experts without an adapter; "" if there are none.

    Args:
        model: the model, with or without adapters.
        adapted: paths of the stacked weights that carry the adapter.
    """
    known = expert_parameters(model)
    missed = {path: parameter for path, parameter in known.items() if path not in adapted}
    if not missed:
        return ""
    base = [parameter for _, module in without_adapters(unwrap(model)) for parameter in module._parameters.values()]
    distinct = {id(parameter): parameter.numel() for parameter in base if parameter is not None}
    count, total = sum(parameter.numel() for parameter in missed.values()), sum(distinct.values())
    return (
        f"{count / total:.0%} of the model's parameters ({count:,} of {total:,}) are stacked weights of experts "
        f"without an adapter: {', '.join(short_names(missed))}"
    )
