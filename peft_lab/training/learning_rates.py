"""Learning rates of groups of parameters, and of the steps of a schedule made of phases."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from peft_lab.backbones.backbone_map import backbone_map
from peft_lab.backbones.module_roles import ROLES, modules_by_role
from peft_lab.backbones.names import PEFT_PREFIX
from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.runs.optimization import OptimizationOptions, Phase


def rates_of_parameters(
    model: nn.Module, options: OptimizationOptions, rate: float, head: Collection[nn.Parameter]
) -> dict[int, float]:
    """Learning rates of the trained parameters that have one of their own, by the id of the parameter.

    Layer decay (ELECTRA, arXiv 2003.10555; BEiT, arXiv 2106.08254) counts as timm does: with L blocks, block l of
    1 ... L has rate * decay^(L + 1 - l), what stands in front of them l = 0, and all else the whole rate. It multiplies
    the rates of groups too.

    Args:
        model: the model that is trained.
        options: the options of the run.
        rate: learning rate of the run.
        head: parameters of the task head.

    Raises:
        ConfigError: a group without a trained parameter, or layer decay without one in the blocks.
    """
    trained = {_bare(name): value for name, value in model.named_parameters() if value.requires_grad}
    groups: dict[str, Any] = dict(options.learning_rates)
    if options.head_learning_rate is not None:
        groups = {"head": options.head_learning_rate, **groups}
    found: dict[int, float] = {}
    for key, own in groups.items():
        members = [value for value in _members(model, trained, key, head) if id(value) not in found]
        # a head that is not trained has no rate, as it always was
        if not members and not (key == "head" and options.head_learning_rate is not None):
            raise ConfigError(
                f'learning_rates: no trained parameter is left for "{key}".{did_you_mean(key, ROLES)} It is a role, or '
                f"a part of a name such as {next(iter(trained), 'none')}; the first key that fits a parameter counts."
            )
        found.update({id(value): float(own) for value in members})
    if options.layer_decay is not None:
        found = _decayed(model, trained, options.layer_decay, rate, found)
    return found


def _decayed(
    model: nn.Module, trained: Mapping[str, nn.Parameter], decay: float, rate: float, own: Mapping[int, float]
) -> dict[int, float]:
    known, found = backbone_map(model), dict(own)
    depths = {name: known.depth(name) for name in trained}
    if not any(depths.values()):
        raise ConfigError(
            f"layer_decay={decay} has no effect: no trained parameter lies in a block of the backbone; leave it out."
        )
    for name, depth in depths.items():
        if depth is not None:
            place, blocks = depth
            found[id(trained[name])] = own.get(id(trained[name]), rate) * decay ** (blocks + 1 - place)
    return found


def _members(
    model: nn.Module, trained: Mapping[str, nn.Parameter], key: str, head: Collection[nn.Parameter]
) -> list[nn.Parameter]:
    """Trained parameters of a role, or with a name that a pattern is found in."""
    if key == "head":
        of_head = {id(parameter) for parameter in head}
        return [value for value in trained.values() if id(value) in of_head]
    if key in ROLES:
        paths = tuple(f"{path}." for path in modules_by_role(model, key))
        return [value for name, value in trained.items() if name.startswith(paths)]
    return [value for name, value in trained.items() if re.search(key, name)]


def _bare(name: str) -> str:
    """Name of a parameter in the base model, as peft's layers in it are named."""
    return name.removeprefix("module.").removeprefix(PEFT_PREFIX)


def split_groups(optimizer: torch.optim.Optimizer, rates: Mapping[int, float]) -> None:
    """Move parameters with a rate of their own into groups that differ in the rate alone."""
    for group in list(optimizer.param_groups):
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(rates.get(id(parameter), group["lr"]), []).append(parameter)
        # a group may become empty, and keeps its place, because a checkpoint counts the groups
        group["params"] = parts.pop(group["lr"], [])
        for rate, parameters in parts.items():
            optimizer.add_param_group({**group, "params": parameters, "lr": rate})


def rate_record(optimizer: torch.optim.Optimizer | None) -> list[dict[str, Any]]:
    """Learning rates of an optimizer at their highest, with the number of values that each trains."""
    counts: dict[float, int] = {}
    for group in optimizer.param_groups if optimizer is not None else ():
        rate = float(group.get("initial_lr", group["lr"]))
        size = sum(parameter.numel() for parameter in group["params"])
        if size:
            counts[rate] = counts.get(rate, 0) + size
    return [{"learning_rate": rate, "parameters": counts[rate]} for rate in sorted(counts, reverse=True)]


# Schedules ----------------------------------------------------------------------------------------------------------


def phase_schedule(optimizer: torch.optim.Optimizer, phases: Sequence[Phase], steps: int) -> LambdaLR:
    """Schedule of a chain of phases: linear warm-up, cosine cool-down, constant, exponential annealing.

    The infinite schedule of Ibrahim et al. (arXiv 2403.08763) is warmup, cooldown, constant, annealing: the constant
    phase needs no known end, and a later run goes on with it, without another warm-up.

    Args:
        optimizer: the optimizer.
        phases: the phases; one without a length takes the steps that the others leave.
        steps: steps of the training.

    Raises:
        ConfigError: the phases are longer than the training, or end before it.
    """
    return LambdaLR(optimizer, phase_factors(phases, steps))


def phase_factors(phases: Sequence[Phase], steps: int) -> Callable[[int], float]:
    """Function from the number of a step to the factor of the learning rate.

    Raises:
        ConfigError: the phases are longer than the training, or end before it.
    """
    lengths = _lengths(phases, steps)
    spans: list[tuple[int, int, str, float, float]] = []
    # a chain that does not begin with a warm-up goes on with the rate of its first phase
    start, factor = 0, _first_factor(phases)
    for phase, length in zip(phases, lengths, strict=True):
        end = factor if phase.factor is None else phase.factor
        spans.append((start, length, phase.name, factor, end))
        start, factor = start + length, end

    def factor_of(step: int) -> float:
        for first, length, name, before, after in spans:
            if step < first + length:
                return _SHAPES[name](before, after, (step - first) / length)
        return spans[-1][4]

    return factor_of


def _first_factor(phases: Sequence[Phase]) -> float:
    # without a warm-up, a run goes on with the rate of an earlier one, which is the learning rate that it is given
    return 0.0 if phases[0].name == "warmup" else 1.0


def _lengths(phases: Sequence[Phase], steps: int) -> list[int]:
    """Steps of each phase."""
    lengths: list[int] = []
    for phase in phases:
        size = phase.length or 0
        lengths.append(max(1, round(size * steps)) if 0 < size < 1 else int(size))
    left = steps - sum(lengths)
    open_phase = next((number for number, phase in enumerate(phases) if phase.length is None), None)
    if open_phase is not None and left > 0:
        lengths[open_phase] = left
        left = 0
    # shares are rounded, so they may miss the last steps by one each
    if left < 0 and -left <= len(phases) and max(lengths) > -left:
        lengths[lengths.index(max(lengths))] += left
        left = 0
    if left < 0 or left > len(phases) or min(lengths) < 1:
        raise ConfigError(
            f"lr_phases last {sum(lengths)} steps, but the training has {steps}; give shares that sum up to 1, or "
            "leave the length of one phase out."
        )
    return lengths


def _linear(before: float, after: float, part: float) -> float:
    return before + (after - before) * part


def _cosine(before: float, after: float, part: float) -> float:
    return after + (before - after) * (1 + math.cos(math.pi * part)) / 2


def _exponential(before: float, after: float, part: float) -> float:
    return before * (after / before) ** part


_SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "warmup": _linear,
    "cooldown": _cosine,
    "constant": _linear,
    "annealing": _exponential,
}
