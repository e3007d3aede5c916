"""Look-up of metrics: ours, those of `evaluate`, and a user's own file.

Ours (`table.py`) need no network. Those that the `evaluate` library keeps itself are fetched from the Hub by `evaluate`
when they are loaded. A metric that a stranger keeps on the Hub is refused: its code would run, so the user must have
fetched it and must name the file.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from peft_lab.errors import TaskError, did_you_mean
from peft_lab.metrics.table import METRICS, Metric

if TYPE_CHECKING:
    from evaluate import EvaluationModule

__all__ = ["HUB_METRICS", "METRICS", "Metric", "greater_is_better", "load_metric", "metric_path"]

_HUB_SCORES = (
    *("bertscore", "chrf", "google_bleu", "meteor", "nist_mt", "poseval", "precision"),
    *("r_squared", "recall", "roc_auc", "rouge", "sacrebleu", "sari", "seqeval", "squad", "squad_v2", "wiki_split"),
)
_HUB_ERRORS = (*("brier_score", "cer", "character", "charcut_mt", "mape", "mase", "mse", "smape", "ter", "wer"),)

#: Metrics that the evaluate library keeps on the Hub under its own account and that take plain predictions and
#: references.
HUB_METRICS = tuple(sorted(_HUB_SCORES + _HUB_ERRORS))


def greater_is_better(name: str) -> bool:
    """Test whether a larger value of the metric is better.

    True for metrics that are not known here.
    """
    # Trainer puts `eval_` before the names of its results
    name = name.removeprefix("eval_")
    if name in METRICS:
        return METRICS[name].greater_is_better
    return name not in _HUB_ERRORS and name != "loss"


def metric_path(name: str, folder: Path | None = None, extra: Iterable[str] = ()) -> Path | None:
    """Path of the user's own metric module; None for other metrics.

    A name is a path if it ends in `.py` or contains a slash; it is relative to `folder`. Reads no file.

    Raises:
        TaskError: the path does not exist, or the name is neither ours, `extra`, nor one that evaluate keeps.
    """
    if name.endswith(".py") or "/" in name or os.sep in name:
        path = ((folder or Path.cwd()) / name).absolute()
        # evaluate keeps a metric in a folder as NAME/NAME.py
        script = path / f"{path.name}.py" if path.is_dir() else path
        # the name stands in results, tables and files
        if not re.fullmatch(r"\w[\w-]*", script.stem):
            raise TaskError(
                f'Metric "{name}": the name of its file must be letters, digits, "_" and "-", not "{script.name}".'
            )
        if not script.is_file():
            raise TaskError(
                f'Metric "{name}": no metric file or folder at {path}. What strangers keep on the Hub is not run '
                "from there: fetch the file and name its path."
            )
        return script
    known = [*METRICS, *HUB_METRICS, *extra]
    if name not in known:
        raise TaskError(
            f'Unknown metric "{name}".{did_you_mean(name, known)} Ours: {", ".join(METRICS)}; or a metric of the '
            "evaluate library, or the path of your own metric module."
        )
    return None


def load_metric(name: str) -> Metric | EvaluationModule:
    """Load a metric; ours need no network.

    Its `compute(predictions=..., references=...)` returns a mapping of names to values.

    Raises:
        TaskError: unknown name, a package is missing, or evaluate cannot load it (for instance one of the Hub's
            while offline).
    """
    path = metric_path(name)
    if name in METRICS:
        metric = METRICS[name]
        if metric.package and importlib.util.find_spec(metric.package) is None:
            raise TaskError(
                f"Metric \"{name}\" needs the package {metric.package}: pip install 'peft-lab[{metric.extra}]'"
            )
        return metric
    if path is None and os.path.exists(f"{name}/{name}.py"):
        # evaluate looks there before it fetches its own
        raise TaskError(
            f'Metric "{name}" means the one of the evaluate library, but {name}/{name}.py of the working '
            f'directory would be run in its place; work in another folder, or name your own file as "./{name}".'
        )
    import evaluate

    try:
        # else evaluate writes the predictions to a cache file and locks it
        return evaluate.load(str(path or name), keep_in_memory=True)
    except (OSError, ImportError, ValueError, TypeError, AttributeError) as error:
        raise TaskError(f'Metric "{name}" cannot be loaded: {" ".join(str(error).split())}') from error
