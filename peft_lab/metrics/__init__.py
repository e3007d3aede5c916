"""Metrics by name. Those that ship here are `evaluate` modules that need no network: `metrics/<name>/<name>.py`.

Three sorts of names are accepted: one of ours, one of the metrics that the `evaluate` library keeps itself (fetched
from the Hub by `evaluate` when it is loaded), and a path to a metric module of the user's own. A metric that a stranger
keeps on the Hub is not: its code would run, so the user must have fetched it and must name the file.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from peft_lab.errors import TaskError, did_you_mean

if TYPE_CHECKING:
    from evaluate import EvaluationModule

#: Our own, each a folder beside this file.
METRICS = (
    "accuracy",
    "ece",
    "exact_match",
    "f1",
    "matthews_correlation",
    "pearsonr",
    "perplexity",
    "rouge_l",
    "spearmanr",
)

#: Package that one of ours needs and that is not installed with peft-lab itself, and the extra that brings it.
_NEEDS = {"rouge_l": ("rouge_score", "text")}

#: Those of ours that take the probabilities of the classes, (n, classes), in the place of the predicted class.
PROBABILITIES = frozenset({"ece"})

#: What the evaluate library keeps on the Hub under its own account and what takes plain predictions and references.
HUB_METRICS = (
    *("bertscore", "bleu", "brier_score", "cer", "character", "charcut_mt", "chrf", "google_bleu", "mae", "mape"),
    *(
        "mase",
        "mean_iou",
        "meteor",
        "mse",
        "nist_mt",
        "poseval",
        "precision",
        "r_squared",
        "recall",
        "roc_auc",
        "rouge",
    ),
    *("sacrebleu", "sari", "seqeval", "smape", "squad", "squad_v2", "ter", "wer", "wiki_split"),
)

_LOWER_IS_BETTER = frozenset(
    (
        "ece",
        "perplexity",
        "loss",
        "brier_score",
        "cer",
        "character",
        "charcut_mt",
        "mae",
        "mape",
        "mase",
        "mse",
        "smape",
        "ter",
        "wer",
    )
)


def greater_is_better(name: str) -> bool:
    """Whether a larger value of the metric is a better one; true for metrics that are not known here."""
    return name.removeprefix("eval_") not in _LOWER_IS_BETTER


def metric_path(name: str, folder: Path | None = None, extra: Iterable[str] = ()) -> Path | None:
    """The path of the user's own metric module that `name` means, or None if it is a name that needs no path.

    A name is a path if it ends in `.py` or contains a slash; it is relative to `folder`. Reads no file.

    Raises:
        TaskError: the path does not exist, or the name is neither ours, `extra`, nor one that evaluate keeps.
    """
    if name.endswith(".py") or "/" in name or os.sep in name:
        path = ((folder or Path.cwd()) / name).absolute()
        script = path / f"{path.name}.py" if path.is_dir() else path
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


def load_metric(name: str) -> EvaluationModule:
    """Load a metric; ours needs no network.

    Raises:
        TaskError: unknown name, a package is missing, or evaluate cannot load it (for instance one of the Hub's
            while offline).
    """
    path = metric_path(name)
    package, extra = _NEEDS.get(name, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        raise TaskError(f"Metric \"{name}\" needs the package {package}: pip install 'peft-lab[{extra}]'")
    import evaluate

    if name in METRICS:
        path = Path(__file__).parent / name / f"{name}.py"
    try:
        return evaluate.load(str(path or name), keep_in_memory=True)
    except (OSError, ImportError, ValueError, TypeError) as error:
        raise TaskError(f'Metric "{name}" cannot be loaded: {" ".join(str(error).split())}') from error
