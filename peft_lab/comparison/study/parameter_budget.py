"""Value of a method's size argument for a number of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lab import registry
from peft_lab.adapter_files.names import write_json
from peft_lab.comparison.records.results import RUNS
from peft_lab.data import prompt_column
from peft_lab.errors import ConfigError
from peft_lab.utils.bounded_files import read_json

if TYPE_CHECKING:
    from peft_lab.comparison.records.run import Run

#: Usual names of the argument that the number of trainable parameters grows with, the commonest first.
SIZE_FIELDS = (
    *("rank", "r", "bottleneck", "bottleneck_size", "hidden_dim", "num_prompts", "num_tokens", "num_virtual_tokens"),
    *("n_frequency", "adapter_len", "num_vectors", "d"),
)
#: Largest value that is tried. No backbone has a larger dimension.
LARGEST = 1 << 16


def size_field(method: str, args: Mapping[str, Any], asked: str = "") -> str:
    """Find the argument that sets the size of an arm.

    Args:
        method: the method.
        args: its fixed arguments, which are left as they are.
        asked: the argument that the study names, "" for the usual ones.

    Raises:
        ConfigError: the method has no such argument, or it is fixed.
    """
    fields = registry.config_fields(method)
    usual = [name for name in SIZE_FIELDS if name in fields and "int" in fields[name].annotation]
    names = [asked] if asked else usual
    free = [name for name in names if name not in args]
    if not names:
        raise ConfigError(
            f'Method "{method}" cannot be sized to a number of trainable parameters: it has none of the arguments '
            f'{", ".join(SIZE_FIELDS)}; name the one that sets its size as "size", or leave the method out.'
        )
    if not free:
        raise ConfigError(f'"{names[0]}" of method "{method}" is fixed, so it cannot be chosen for an equal size.')
    return free[0]


def fit(count: Callable[[int], int], limit: int, what: str) -> tuple[int, int]:
    """Find the largest value whose count is within `limit`, and that count.

    Args:
        count: value -> number of trainable parameters, which must not fall; it raises `ConfigError` for a value that
            the method refuses as too large.
        limit: most trainable parameters.
        what: name of the arm in errors.

    Raises:
        ConfigError: even the smallest value has more parameters, the number does not depend on the value, or even the
            largest value has less than half of them.
    """
    # an error at the smallest value has another cause than size, so it is not caught
    smallest = count(1)
    if smallest > limit:
        raise ConfigError(f"{what} has {smallest:,} trainable parameters at its smallest, more than {limit:,}.")

    def fits(value: int) -> int | None:
        try:
            found = count(value)
        except ConfigError:
            return None
        return found if found <= limit else None

    # double the value until it is too large, then bisect
    low, best, high = 1, smallest, 2
    while high <= LARGEST and (found := fits(high)) is not None:
        # some arguments have no effect, for example on a backbone without such layers
        if high >= 8 and found == smallest:
            raise ConfigError(f"{what} cannot be sized: its number of trainable parameters stays {smallest:,}.")
        low, best, high = high, found, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        found = fits(middle)
        if found is None:
            high = middle
        else:
            low, best = middle, found
    # such an arm would not be compared at equal size
    if best < limit / 2:
        raise ConfigError(f"{what} has {best:,} trainable parameters at its largest, not even half of {limit:,}.")
    return low, best


def find_size(folder: Path, run: Run, name: str, limit: int) -> None:
    """Find the size of an arm on a backbone.

    The value, or the error, is written to `size_file`.
    """
    what = f'Arm "{run.arm}" on {run.backbone}'
    try:
        value, parameters = fit(_counter(run, name), limit, what)
        found: dict[str, Any] = {"field": name, "value": value, "parameters": parameters}
    except ConfigError as error:
        # the file takes the error to the process that waits for the size
        found = {"error": str(error)}
    write_json(size_file(folder, run.id), found)


def size_file(folder: Path, identity: str) -> Path:
    """File of the size of an arm."""
    return folder / RUNS / f"{identity}.size.json"


def read_size(file: Path) -> dict[str, int]:
    """Read the argument and value that `find_size` found.

    Raises:
        ConfigError: there is no such value.
    """
    found = read_json(file)
    if "error" in found:
        raise ConfigError(str(found["error"]))
    if not isinstance(found.get("field"), str) or not isinstance(found.get("value"), int):
        raise ConfigError(f'"{file}" holds no size of an arm; remove it, and it is found again.')
    return {found["field"]: found["value"]}


def _counter(run: Run, name: str) -> Callable[[int], int]:
    """Make the function from the argument's value to the arm's trainable parameters."""
    from peft_lab.data.splits import load_splits
    from peft_lab.data.task_registry import kind, load_task
    from peft_lab.loading.load_run import adapt, count_parameters, load_base
    from peft_lab.training.pruning import prune_alike
    from peft_lab.tuners.registration import has_trait

    task, options = load_task(str(run.options["task"])), run.options
    rule = kind(task.kind)
    info, splits = registry.method(run.method), load_splits(task)
    labels = splits.labels
    revision, dtype = options.get("model_revision"), options.get("dtype")
    keeps_head, form = has_trait(info, "uses_source_head"), options.get("quantization")
    processor, base = load_base(rule, task, labels, run.backbone, revision, dtype, keeps_head, form)
    prune_alike(base, options.get("prune") or {})  # zeros may be what an adapter trains
    settings = rule.adapter_settings(processor, task, labels) | prompt_column.settings(splits.prompt_values)

    def count(value: int) -> int:
        arguments = {**run.method_args, name: value}
        # a copy, because peft changes the model that it adapts in place
        return count_parameters(adapt(copy.deepcopy(base), info, arguments, rule.task_type(task), settings))[0]

    return count
