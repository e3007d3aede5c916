"""Options of the optimization: learning rates, schedule, sharpness, weights of rows. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from peft_lab import registry
from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.runs.pruning import check_prune
from peft_lab.utils.patterns import may_take_for_ever

#: Options of bi-level training.
ALTERNATING = ("alternating_every", "alternating_learning_rate", "alternating_fraction")

#: Ways to train without labels, and the options of such a training.
WITHOUT_LABELS = ("ufm",)
UNSUPERVISED = ("unsupervised", "trusted_per_class")

#: Phases of a schedule -> the factor of the learning rate that they end at. Those of cool-down and annealing are the
#: ratios of Ibrahim et al. (arXiv 2403.08763): 1.65e-4 and 3e-5 below a maximum of 3e-4.
PHASES = {"warmup": 1.0, "cooldown": 0.55, "constant": None, "annealing": 0.1}


@dataclass(frozen=True)
class Phase:
    """Phase of a learning rate schedule.

    Attributes:
        name: one of `PHASES`.
        length: share of all steps if below 1, else a number of steps; None for all that the others leave.
        factor: factor of the learning rate at its end; None for that of its beginning.
    """

    name: str
    length: float | None
    factor: float | None


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """Options of a run that change its loss, its gradient, the size of its steps, or which weights are zero."""

    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the task head, if it differs from --learning_rate."}
    )
    learning_rates: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Learning rates of groups of parameters, by role or by a regular expression that is searched for "
            "in their names; the first that fits counts: --learning_rates attn.q=1e-3 lora_B=1e-2"
        },
    )
    layer_decay: float | None = field(
        default=None,
        metadata={
            "help": "Factor of the learning rate from each block to the one before it, as in timm: the last block has "
            "rate * decay, the embeddings rate * decay^(blocks + 1), the head the whole rate."
        },
    )
    lr_phases: list[Any] | None = field(
        default=None,
        metadata={
            "help": "Schedule as a chain of warmup, cooldown, constant and annealing, each with a share of the steps "
            "or a number of them, in place of --lr_scheduler_type: --lr_phases warmup=0.1 cooldown=0.2:0.5 constant "
            "annealing=0.1. Behind the colon stands the factor of the learning rate at its end."
        },
    )
    sam_rho: float | None = field(
        default=None,
        metadata={
            "help": "Radius of sharpness-aware minimization (SAM): each step takes its gradient where the loss is "
            "highest nearby, which costs a second pass (0.05 in the paper)."
        },
    )
    prune: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Set weights of the base to zero: --prune by=magnitude share=0.5 takes the smallest half before "
            "the training, structured=true whole filters; by=bip those that bi-level steps choose; by=l1 the smallest "
            "after a full fine-tuning with an L1 penalty."
        },
    )
    row_weight_column: str | None = field(
        default=None,
        metadata={"help": "Column of the training rows that holds the weight of each row in the loss; its mean is 1."},
    )
    reference_model: str | None = field(
        default=None,
        metadata={
            "help": "Language model, or run of one, whose loss says which tokens are trained on: those with the "
            "largest excess over it (Rho-1)."
        },
    )
    reference_share: float | None = field(
        default=None,
        metadata={"help": "Share of the tokens that are trained on, by --reference_model (0.6 by default)."},
    )
    unsupervised: str | None = field(
        default=None,
        metadata={
            "help": "`ufm`: train a classifier without the labels of the training rows, on what the head of the "
            "checkpoint answers: unsupervised FixMatch with trusted rows."
        },
    )
    trusted_per_class: int | None = field(
        default=None,
        metadata={
            "help": "Rows of each class whose first answers stay their labels, by --unsupervised (rows / classes by "
            "default, at most 100)."
        },
    )
    alternating_every: int | None = field(
        default=None,
        metadata={
            "help": "Train the method's learned activation in turn, once after this many steps, on training rows that "
            "are held out for it alone: bi-level training, as of IAPT. Without it, it trains as everything else does."
        },
    )
    alternating_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of these steps (1e-6 by default)."}
    )
    alternating_fraction: float | None = field(
        default=None,
        metadata={"help": "Share of the training rows that is held out, drawn by the run's seed (0.1 by default)."},
    )

    @property
    def weighs_losses(self) -> bool:
        """True if rows or tokens differ in their weight in the loss."""
        return self.row_weight_column is not None or self.reference_model is not None


#: Options that choose the rates of groups of parameters.
RATES = ("head_learning_rate", "learning_rates", "layer_decay")
#: Options that act on the trained parameters, and so on methods that have some.
ON_GRADIENTS = (*RATES, "lr_phases", "sam_rho", "row_weight_column", "reference_model", "unsupervised")
#: Options that belong to the recipe of a method, so that the arms of a comparison may differ in them.
OF_A_RECIPE = (*ALTERNATING, *UNSUPERVISED, "features", "learning_rates", "layer_decay", "lr_phases", "sam_rho")
#: Names of these options.
NAMES = tuple(spec.name for spec in fields(OptimizationOptions))


def check_optimization(
    options: OptimizationOptions, arguments: Mapping[str, Any], info: registry.MethodInfo, run: Mapping[str, Any]
) -> None:
    """Check the options of the optimization, alone and against each other.

    Args:
        options: the options.
        arguments: flags of TrainingArguments that the run gives.
        info: card of the method.
        run: further options of the run by name, such as `max_seconds` and `packing`.

    Raises:
        ConfigError: naming the option and the mend.
    """
    _check_alternating(options, info)
    _check_rates(options)
    _check_phases(options, arguments, run)
    if options.sam_rho is not None and not 0 < options.sam_rho < float("inf"):
        raise ConfigError(f"sam_rho must be positive, got {options.sam_rho}; leave it out for none.")
    _check_weights(options, arguments, run)
    check_prune(options.prune, info, run)
    _check_unsupervised(options, arguments, info, run)


def _check_rates(options: OptimizationOptions) -> None:
    rates = {f'learning_rates of "{key}"': rate for key, rate in options.learning_rates.items()}
    for name, rate in {"head_learning_rate": options.head_learning_rate, **rates}.items():
        if name == "head_learning_rate" and rate is None:
            continue
        number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if not number or not 0 < rate < float("inf"):
            raise ConfigError(f"{name} must be positive, got {rate}.")
    if options.head_learning_rate is not None and "head" in options.learning_rates:
        raise ConfigError('head_learning_rate and learning_rates both give the rate of "head"; give one of them.')
    for key in options.learning_rates:
        try:
            re.compile(key)
        except re.error as error:
            raise ConfigError(
                f'learning_rates: "{key}" is neither a role nor a regular expression: {error}.'
            ) from error
        if not key or may_take_for_ever(key):
            raise ConfigError(
                f'learning_rates: the pattern "{key}" is empty or may take for ever; write a plainer one.'
            )
    decay = options.layer_decay
    if decay is not None and not 0 < decay < 1:
        raise ConfigError(f"layer_decay must be over 0 and below 1, got {decay}; leave it out for none.")


def _check_phases(options: OptimizationOptions, arguments: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    if options.lr_phases is None:
        return
    read_phases(options.lr_phases)
    if run.get("max_seconds") is not None:
        raise ConfigError("lr_phases counts steps, and max_seconds ends training after a time; give max_steps.")
    for name in ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"):
        if arguments.get(name) is not None:
            raise ConfigError(f"lr_phases says the whole schedule, so {name} has no effect; leave one of them out.")


def read_phases(values: Any) -> tuple[Phase, ...]:
    """Phases of a schedule, from texts such as `cooldown=0.2:0.5` or mappings of names to lengths.

    Raises:
        ConfigError: an unknown phase, or a length or factor that none can have.
    """
    pairs: list[tuple[str, Any]] = []
    for value in values:
        if isinstance(value, Mapping):
            pairs += [(str(name), length) for name, length in value.items()]
        else:
            name, _, length = str(value).partition("=")
            pairs.append((name, length or None))
    phases = tuple(_phase(name.strip(), value) for name, value in pairs)
    if len([phase for phase in phases if phase.length is None]) > 1:
        raise ConfigError("lr_phases: only one phase may do without a length, and takes the steps that are left.")
    shares = [phase.length for phase in phases if phase.length is not None and phase.length < 1]
    if sum(shares) > 1 + 1e-9:
        raise ConfigError(f"lr_phases: the shares of the steps sum up to {sum(shares):g}, which is more than 1.")
    return phases


def _phase(name: str, value: Any) -> Phase:
    if name not in PHASES:
        raise ConfigError(f'lr_phases: unknown phase "{name}".{did_you_mean(name, PHASES)} Known: {", ".join(PHASES)}.')
    length, colon, factor = str("" if value is None else value).partition(":")
    try:
        phase = Phase(name, float(length) if length else None, float(factor) if colon else PHASES[name])
    except ValueError as error:
        raise ConfigError(
            f'lr_phases: "{value}" of {name} must be a share of the steps or a number of them, then a colon and the '
            "factor at its end if it is not the usual one; for example 0.2:0.5."
        ) from error
    if phase.length is not None and not (0 < phase.length < 1 or (phase.length >= 1 and phase.length.is_integer())):
        raise ConfigError(f"lr_phases: {name} must have a share of the steps below 1 or a whole number, got {length}.")
    if phase.name == "constant" and colon:
        raise ConfigError(f"lr_phases: constant keeps its factor, so :{factor} has no effect; leave it out.")
    if phase.factor is not None and not 0 < phase.factor <= 1:
        raise ConfigError(f"lr_phases: the factor of {name} must be over 0 and at most 1, got {factor}.")
    return phase


def _check_weights(options: OptimizationOptions, arguments: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    share = options.reference_share
    if share is not None and options.reference_model is None:
        raise ConfigError(f"reference_share={share} has no effect without reference_model; give both.")
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"reference_share must be over 0 and at most 1, got {share}.")
    if not options.weighs_losses:
        return
    name = "row_weight_column" if options.row_weight_column is not None else "reference_model"
    _refuse_beside(name, arguments, _OTHER_LOSSES)
    _refuse_beside(name, run, ("loss_chunk_size", "packing"))


#: Flags of a training whose loss is computed elsewhere, or whose rows lose what is no argument of the model.
_OTHER_LOSSES = ("label_smoothing_factor", "use_liger_kernel", "remove_unused_columns")


def _refuse_beside(name: str, given: Mapping[str, Any], others: Iterable[str]) -> None:
    for other in others:
        if given.get(other):
            raise ConfigError(f"{name} has no place for {other}; leave one of them out.")


def _check_unsupervised(
    options: OptimizationOptions, arguments: Mapping[str, Any], info: registry.MethodInfo, run: Mapping[str, Any]
) -> None:
    name, count = options.unsupervised, options.trusted_per_class
    if count is not None and name is None:
        raise ConfigError(f"trusted_per_class={count} has no effect without unsupervised; give both.")
    if name is None:
        return
    if name not in WITHOUT_LABELS:
        raise ConfigError(
            f'unsupervised="{name}" must be {", ".join(WITHOUT_LABELS)}.{did_you_mean(name, WITHOUT_LABELS)}'
        )
    if count is not None and count < 1:
        raise ConfigError(f"trusted_per_class must be at least 1, got {count}.")
    if info.place == "head":
        raise ConfigError(
            f'unsupervised="{name}" takes its first labels from the head of the checkpoint, and method "{info.name}" '
            "replaces it; take a method that keeps the head."
        )
    _refuse_beside("unsupervised", arguments, _OTHER_LOSSES)
    _refuse_beside("unsupervised", run, _WITH_LABELS)


#: Options that read the labels of the training rows, weigh them, or leave no views or steps to see.
_WITH_LABELS = (
    *("examples_per_class", "row_weight_column", "reference_model", "alternating_every"),
    *("features", "packing", "loss_chunk_size", "max_seconds"),
)


def _check_alternating(options: OptimizationOptions, info: registry.MethodInfo) -> None:
    every, rate, fraction = (getattr(options, name) for name in ALTERNATING)
    if every is None:
        given = next((name for name in ALTERNATING if getattr(options, name) is not None), None)
        if given is not None:
            raise ConfigError(f"{given}={getattr(options, given)} has no effect without alternating_every; give both.")
        return
    if not registry.learns_activation(info):
        raise ConfigError(
            f'alternating_every={every} is for methods that learn an activation, and "{info.name}" has none; '
            "leave it out."
        )
    if every < 1:
        raise ConfigError(f"alternating_every must be at least 1, got {every}.")
    if rate is not None and rate <= 0:
        raise ConfigError(f"alternating_learning_rate must be positive, got {rate}.")
    if fraction is not None and not 0 < fraction <= 0.5:
        raise ConfigError(f"alternating_fraction must be over 0 and at most 0.5, got {fraction}.")
