"""Baselines of a run: scores of a predictor that sees no input.

Imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft_lab.metrics import greater_is_better


@dataclass(frozen=True)
class Baseline:
    """Scores of a predictor that sees training answers and no input.

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
    score, least = scores.get(split, {}).get(metric), recorded.get(split, {}).get(metric)
    better = None
    if score is not None and least is not None and math.isfinite(score) and math.isfinite(least):
        better = beats(metric, score, least)
    return {
        "baseline": {"predictor": next(iter(baselines.values())).predictor, "metrics": recorded},
        "beats_baseline": better,
    }


def baseline_of(metrics: Mapping[str, Any], split: str, metric: str) -> tuple[str, float] | None:
    """Recorded baseline of a run: predictor and score; None without one.

    Args:
        metrics: content of metrics.json, which may come from an earlier version or from a stranger.
        split, metric: name of the score.
    """
    score = _number(metrics, "baseline", "metrics", split, metric)
    return None if score is None else (str(metrics["baseline"].get("predictor"))[:200], score)


def shortfall(metrics: Mapping[str, Any]) -> str:
    """Sentence on a run that does not beat its baseline, else "".

    Args:
        metrics: as for `baseline_of`.
    """
    if metrics.get("beats_baseline") is not False:
        return ""
    split, metric = _split(metrics["metrics"]), str(metrics["main_metric"])
    score, found = _number(metrics, "metrics", split, metric), baseline_of(metrics, split, metric)
    if score is None or found is None:
        return ""
    predictor, least = found
    return f"The {split} {metric} of {score:.4f} does not beat {predictor}, which has {least:.4f} without any input."


def _number(values: Any, *keys: str) -> float | None:
    """Number below nested keys; None if there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return float(values) if isinstance(values, int | float) else None


def _split(scores: Mapping[str, Any]) -> str:
    """Split that decides: test where it was scored."""
    return "test" if "test" in scores else next(iter(scores), "")
