"""Where a run stands in the comparison it belongs to: its arm's mean over seeds, and what the report says of arms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peft_lab.compare.results import RESULTS, RUNS, Record, read_items, read_results
from peft_lab.errors import ConfigError

#: What no two runs have in common, and what a copy of a run or of its record keeps.
_MARKS = ("metrics", "train_seconds", "learning_rate", "seed", "global_step")

_OVER = {"seeds and rows": "seeds and test rows", "seeds": "seeds alone", "rows": "the test rows alone"}


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


def find_standing(folder: Path, metrics: Mapping[str, Any], comparison: str | Path | None = None) -> Standing | None:
    """Where a run stands in a comparison; None if it belongs to none, or has no score on test rows there.

    Args:
        folder: the run's folder.
        metrics: content of its metrics.json, by which its record is known.
        comparison: the comparison's folder or a shared copy; by default the one whose `runs` the folder lies in.

    Raises:
        ConfigError: the run is none of the final runs of the comparison that was named.
    """
    around = folder.resolve().parent
    if comparison is not None:
        place = Path(comparison).expanduser()
    elif around.name == RUNS and (around.parent / RESULTS).is_file():
        place = around.parent
    else:
        return None
    from peft_lab.compare.shared import without_paths

    records = without_paths(read_results(place))
    record = next((one for one in records if one.stage == "final" and one.ok and _same(one, metrics)), None)
    if record is None and comparison is not None:
        raise ConfigError(f'"{folder}" is none of the final runs of the comparison "{comparison}".')
    return _standing(place, record, records) if record else None


def _same(record: Record, metrics: Mapping[str, Any]) -> bool:
    return bool(metrics) and all(record.metrics.get(name) == metrics.get(name) for name in _MARKS)


def _standing(place: Path, record: Record, records: list[Record]) -> Standing | None:
    from peft_lab.compare.findings import words
    from peft_lab.compare.statistics import rank_arms

    mine = [one for one in records if (one.task, one.backbone) == (record.task, record.backbone)]
    cell = rank_arms(mine, partial(read_items, place))[0]
    arm = cell.arm(record.arm)
    if arm is None:
        return None
    score = arm.score
    over, seeds = _OVER.get(score.basis, ""), tuple(arm.by_seed)
    ends = (score.low, score.high)
    return Standing(record.study, record.arm, record.task, cell.metric, score.value, *ends, over, seeds, words(cell))
