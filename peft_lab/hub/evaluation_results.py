"""Evaluation results of a run as the Hub reads them.

The card's head holds a `model-index` with every metric; `.eval_results` holds the main metric on the test rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, EvalResultEntry

if TYPE_CHECKING:
    from peft_lab.data.task_schema import Task
    from peft_lab.registry import MethodInfo
    from peft_lab.runs.standing import Standing


def eval_results(
    metrics: Mapping[str, Any], task: Task, pipeline_tag: str, standing: Standing | None = None
) -> list[EvalResult]:
    """Entries of the card's `model-index`.

    They are the task's metrics on every split and, in a comparison, the mean of the run's arm.

    Args:
        metrics: content of metrics.json.
        task: the task of the run.
        pipeline_tag: the Hub's name for what its model does; empty without one.
        standing: standing of the run in the comparison that it belongs to.
    """
    entry = partial(
        EvalResult,
        task_type=pipeline_tag or task.kind,
        dataset_type=task.data.path or task.name,
        dataset_name=task.title or task.name,
        dataset_config=task.data.name or None,
        dataset_revision=task.data.revision or None,
    )
    found = []
    for split, values in metrics["metrics"].items():
        for name, value in values.items():
            # no metric that others could compare, or one that is undefined for the predictions
            if name == "loss" or value is None:
                continue
            result = entry(
                dataset_split=task.splits.get(split, split),
                metric_type=name,
                metric_value=value,
                metric_name=f"{name} ({split})",
            )
            found.append(result)
    if standing:
        interval = {} if standing.low is None else {"interval_95": [standing.low, standing.high], "over": standing.over}
        mean = entry(
            dataset_split=task.splits.get("test", "test"),
            metric_type=standing.metric,
            metric_value=standing.mean,
            metric_name=f"{standing.metric} (test, mean of {count_seeds(standing)})",
            metric_args={"study": standing.study, "arm": standing.arm, "seeds": list(standing.seeds), **interval},
        )
        found.append(mean)
    return found


def eval_entries(
    metrics: Mapping[str, Any], info: MethodInfo, task: Task, standing: Standing | None = None
) -> list[EvalResultEntry]:
    """Entry of `.eval_results`; none for data that are not on the Hub.

    It is the main metric on the test rows. The value is that of the pushed run; the mean of its arm in a comparison
    stands in the notes.
    """
    value = metrics["metrics"].get("test", {}).get(metrics["main_metric"])
    if value is None or not task.data.path:
        return []
    rows = metrics["data"]["rows"].get("test")
    notes = (
        f"{metrics['main_metric']} on {rows} rows of split {task.splits.get('test', 'test')}; {info.title}, "
        f"seed {metrics['seed']}, peft-lab {metrics['versions']['peft-lab']}"
    )
    if standing:
        notes += f'; arm {standing.arm} in the study "{standing.study}": {mean_of_arm(standing)}'
    return [
        EvalResultEntry(
            dataset_id=task.data.path,
            task_id=task.data.name or "default",
            dataset_revision=task.data.revision or None,
            value=value,
            notes=notes,
        )
    ]


def mean_of_arm(standing: Standing) -> str:
    """Describe the mean of an arm over its seeds, with its interval."""
    found = f"mean {standing.metric} {standing.mean:.4f} of {count_seeds(standing)}"
    if standing.low is None:
        return found
    return f"{found} (95 % interval {standing.low:.4f} to {standing.high:.4f} over {standing.over})"


def count_seeds(standing: Standing) -> str:
    """Number of an arm's seeds, such as `3 seeds`."""
    return f"{len(standing.seeds)} seed{'s' if len(standing.seeds) > 1 else ''}"
