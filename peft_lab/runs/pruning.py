"""The run option `prune`, and the record of what it has set to zero. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from peft_lab.adapter_files import safe_files
from peft_lab.adapter_files.names import PRUNING
from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo
from peft_lab.utils.schema import Number, Schema, check


class PruneOptions(Schema):
    """Values of the run option `prune`.

    Attributes:
        by: "magnitude": the smallest weights of the base, before the method is put on; "bip": those that bi-level
            steps on training rows choose, before it too; "l1": the smallest trained weights in the end, after a
            training with an L1 penalty on them.
        share: of the weights, those that are set to zero; of the filters of each layer if `structured`.
        structured: prune whole filters, output rows of a linear layer, instead of entries.
        penalty: by "l1" the factor of the L1 norm, by "bip" γ, the divisor of the implicit gradient.
        steps: by "bip" the steps of each level, on a batch each.
        learning_rate: by "bip" that of the weights, which are the base's own again afterwards.
        mask_learning_rate: by "bip" that of the scores, relative to their size.
    """

    by: Literal["magnitude", "bip", "l1"] = "magnitude"
    share: Number
    structured: bool = False
    penalty: Number | None = Field(default=None, gt=0, allow_inf_nan=False)
    steps: int | None = Field(default=None, ge=1)
    learning_rate: Number | None = Field(default=None, gt=0, allow_inf_nan=False)
    mask_learning_rate: Number | None = Field(default=None, gt=0, allow_inf_nan=False)

    @field_validator("share")
    @classmethod
    def _is_share(cls, share: float) -> float:
        if not 0 < share < 1:
            raise ValueError(f'"share" of prune must be over 0 and below 1, got {share:g}; leave prune out for none.')
        return share

    @property
    def before(self) -> bool:
        """True if the base is pruned before the training."""
        return self.by != "l1"


#: Values of `prune` that some ways of pruning have -> those ways.
_OF_SOME = {
    "penalty": ("bip", "l1"),
    "steps": ("bip",),
    "learning_rate": ("bip",),
    "mask_learning_rate": ("bip",),
}


def read_prune(values: Mapping[str, Any]) -> PruneOptions | None:
    """Read the run option `prune`; None for an empty one.

    Raises:
        ConfigError: an unknown key or way, or a value that none can have.
    """
    if not values:
        return None
    try:
        found = check(PruneOptions, values, "prune", ConfigError)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text[0].upper() + text[1:]) from error
    for name, ways in _OF_SOME.items():
        if getattr(found, name) is not None and found.by not in ways:
            raise ConfigError(f"prune: {name} is for by={' and by='.join(ways)}, not by={found.by}; leave it out.")
    return found


def check_prune(values: Mapping[str, Any], info: MethodInfo, run: Mapping[str, Any]) -> None:
    """Check the run option `prune`, alone and against the method and other options.

    Args:
        values: the option.
        info: card of the method.
        run: further options of the run by name, such as `quantization`.

    Raises:
        ConfigError: naming the option and the mend.
    """
    options = read_prune(values)
    if options is None:
        return
    form = run.get("quantization")
    if form is not None:
        raise ConfigError(
            f"prune sets weights of the base to zero, and those of quantization={form} have no values of their own; "
            "leave one of them out."
        )
    if options.by == "l1" and not trains_base(info):
        raise ConfigError(
            f'prune: by=l1 shrinks the weights of the base while they are trained, and method "{info.name}" keeps them '
            "frozen; take --method full, or by=magnitude."
        )


def trains_base(info: MethodInfo) -> bool:
    """Test whether a method trains all weights of the base, as full fine-tuning does."""
    return info.place == "baseline" and info.takes_steps and "head" not in info.roles


class PruningRecord(Schema):
    """Content of pruning.json.

    Attributes:
        by: "magnitude", or another way, whose masks are stored.
        share, structured: as of the run option `prune`.
        pruned: number of weights that are zero by the masks.
        weights: number of weights of the layers that are pruned.
        sha256: hash of the masks.
        layers: paths of the layers whose masks are stored; none for masks that the weights tell.
    """

    by: str = Field(max_length=64)
    share: float = Field(gt=0, lt=1)
    structured: bool
    pruned: int = Field(ge=0)
    weights: int = Field(ge=0)
    sha256: str = Field(max_length=64)
    layers: list[Annotated[str, Field(max_length=safe_files.MAX_TEXT)]] = Field(
        default=[], max_length=safe_files.MAX_NAMES
    )

    def in_words(self) -> str:
        """Pruned part in words, such as `4,096 of 8,192 weights (50.0 %) by magnitude`."""
        return pruned_words(self.model_dump())


def read_record(folder: Path) -> PruningRecord | None:
    """Read pruning.json beside an adapter; None for an adapter of a dense base.

    Raises:
        ConfigError: the file is not one that a run wrote.
    """
    path = folder / PRUNING
    return check(PruningRecord, safe_files.read_json(path), f'"{path}"', ConfigError) if path.is_file() else None


def pruned_words(values: Mapping[str, Any]) -> str:
    """Pruned part of a base in words, such as `4,096 of 8,192 weights (50.0 %) by magnitude`.

    Args:
        values: `pruned`, `weights`, `by` and `structured`, as metrics.json has them under `pruning`.
    """
    pruned, weights = values.get("pruned", 0), values.get("weights", 0)
    filters = ", whole filters" if values.get("structured") else ""
    return f"{pruned:,} of {weights:,} weights ({100 * pruned / max(weights, 1):.1f} %) by {values.get('by')}{filters}"
