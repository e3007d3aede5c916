"""Standing of a run in its comparison: standing.json in its folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from peft_lab.adapter_files import safe_files
from peft_lab.adapter_files.names import write_json
from peft_lab.errors import ConfigError

STANDING = "standing.json"


@dataclass(frozen=True)
class Standing:
    """The arm of a run in a comparison.

    Attributes:
        study, arm, task: labels.
        metric: the metric that arms are ranked by.
        mean: its mean over seeds on the test rows.
        low, high: ends of its 95 % interval; None where there is none.
        over: what the interval is over, in words.
        seeds: seeds of the arm's runs.
        words: what the report says of the arms: which mean is best, and from which it is not distinguishable.
    """

    study: str
    arm: str
    task: str
    metric: str
    mean: float
    low: float | None
    high: float | None
    over: str
    seeds: tuple[int, ...]
    words: str


_CHECKED = TypeAdapter(Standing)


def write_standing(folder: Path, standing: Standing) -> None:
    """Write the standing of a run into its folder."""
    write_json(folder / STANDING, asdict(standing))


def read_standing(folder: Path) -> Standing | None:
    """Read a run's standing; None if it belongs to no comparison.

    Raises:
        ConfigError: the file is not one that `write_standing` wrote.
    """
    path = folder / STANDING
    if not path.is_file():
        return None
    values = safe_files.read_json(path)
    try:
        return _CHECKED.validate_python(values, extra="forbid")
    except ValidationError as error:
        names = ", ".join(f.name for f in fields(Standing))
        raise ConfigError(f'"{path}" is no standing of a run: it must hold {names}, each of its type.') from error
