"""Standing of a run in its comparison.

It is the mean of the run's arm over seeds, and the report's sentence on the arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft_lab.comparison.records.results import read_predictions, read_results
from peft_lab.comparison.records.run import Record
from peft_lab.comparison.report.public_copy import without_paths
from peft_lab.comparison.report.sentences import describe
from peft_lab.comparison.stats.statistics import rank_arms
from peft_lab.errors import ConfigError
from peft_lab.hub.push import local_adapter
from peft_lab.runs.run_folder import read_metrics
from peft_lab.runs.standing import Standing, write_standing

#: Values of metrics.json that identify a run: no two runs share them all, and copies keep them.
_IDENTIFYING = ("metrics", "train_seconds", "learning_rate", "seed", "global_step")

_OVER = {"seeds and rows": "seeds and test rows", "seeds": "seeds alone", "rows": "the test rows alone"}


def write_standings(folder: Path, records: Sequence[Record]) -> None:
    """Write standing.json into the folder of each final run of a comparison.

    Args:
        folder: the comparison's folder.
        records: its records, without paths of this machine.
    """
    for record in records:
        run = folder / record.folder
        # a link may lead out of a comparison that was copied
        inside = run.resolve().is_relative_to(folder.resolve())
        if record.stage == "final" and record.ok and record.folder and run.is_dir() and inside:
            standing = _standing(folder, record, records)
            if standing is not None:
                write_standing(run, standing)


def write_standing_in(adapter: str | Path, comparison: str | Path) -> None:
    """Write into a run's folder its standing in a comparison elsewhere.

    Args:
        adapter: the run's folder; its metrics.json identifies its record.
        comparison: the comparison's folder, or a copy of it that was made to be shared.

    Raises:
        ConfigError: there is no such folder, or the run is none of the final runs of the comparison.
    """
    run, place = local_adapter(adapter), Path(comparison).expanduser()
    metrics = read_metrics(run)
    # the standing goes into a model card, which must name no folder of this machine
    records = without_paths(read_results(place))
    # the folder's name is no proof: a copy may have another
    own = [one for one in records if one.stage == "final" and one.ok and _same(one, metrics)]
    standing = _standing(place, own[0], records) if own else None
    if standing is None:
        raise ConfigError(f'"{run}" is none of the final runs of the comparison "{comparison}".')
    write_standing(run, standing)


def _same(record: Record, metrics: Mapping[str, Any]) -> bool:
    return bool(metrics) and all(record.metrics.get(name) == metrics.get(name) for name in _IDENTIFYING)


def _standing(place: Path, record: Record, records: Sequence[Record]) -> Standing | None:
    mine = [one for one in records if (one.task, one.backbone) == (record.task, record.backbone)]
    # records of one task and backbone give exactly one cell
    cell = rank_arms(mine, partial(read_predictions, place))[0]
    arm = cell.arm(record.arm)
    if arm is None:
        return None
    score = arm.score
    over, seeds = _OVER.get(score.basis, ""), tuple(arm.by_seed)
    ends = (score.low, score.high)
    return Standing(record.study, record.arm, record.task, cell.metric, score.value, *ends, over, seeds, describe(cell))
