"""Baselines of a run: scores of a predictor that sees no input. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_lab.metrics import greater_is_better


@dataclass(frozen=True)
class Baseline:
    """Scores of a predictor that knows the training answers and sees no input.

    Attributes:
        predictor: what it answers, in words.
        scores: metric -> its value.
    """

    predictor: str
    scores: dict[str, float]


def beats(metric: str, score: float, baseline: float) -> bool:
    """Test whether a score is better than that of the baseline."""
    return score > baseline if greater_is_better(metric) else score < baseline


def comparison(
    scores: Mapping[str, Mapping[str, Any]], baselines: Mapping[str, Baseline], metric: str
) -> dict[str, Any]:
    """Entries of metrics.json on the baseline.

    Args:
        scores: split -> metric -> value.
        baselines: split -> its baseline, for the splits that have one.
        metric: the main metric, which decides.

    Returns:
        `baseline`, with its scores by split, and `beats_baseline` on the test rows, or on the validation rows where no
        test rows were scored; None if that is not defined.
    """
    if not baselines:
        return {"baseline": None, "beats_baseline": None}
    split, recorded = _split(scores), {name: found.scores for name, found in baselines.items()}
    score, least = (values.get(split, {}).get(metric) for values in (scores, recorded))
    defined = score is not None and least is not None and math.isfinite(score) and math.isfinite(least)
    return {
        "baseline": {"predictor": next(iter(baselines.values())).predictor, "metrics": recorded},
        "beats_baseline": beats(metric, score, least) if defined else None,
    }


def baseline_of(metrics: Mapping[str, Any], split: str, metric: str) -> tuple[str, float] | None:
    """Predictor and score of the baseline that a run recorded; None without one.

    Args:
        metrics: content of metrics.json, which may come from an earlier version.
        split, metric: name of the score.
    """
    recorded = metrics.get("baseline")
    if not isinstance(recorded, dict):
        return None
    score = (recorded.get("metrics") or {}).get(split, {}).get(metric)
    return (str(recorded.get("predictor")), float(score)) if isinstance(score, int | float) else None


def shortfall(metrics: Mapping[str, Any]) -> str:
    """Sentence on a run that does not beat its baseline; "" for one that does.

    Args:
        metrics: content of metrics.json.
    """
    if metrics.get("beats_baseline") is not False:
        return ""
    split, metric = _split(metrics["metrics"]), metrics["main_metric"]
    found = baseline_of(metrics, split, metric)
    if found is None:
        return ""
    predictor, least = found
    score = metrics["metrics"][split][metric]
    return f"The {split} {metric} of {score:.4f} does not beat {predictor}, which has {least:.4f} without any input."


def _split(scores: Mapping[str, Any]) -> str:
    """Split that decides: test where it was scored."""
    return "test" if "test" in scores else next(iter(scores), "")
