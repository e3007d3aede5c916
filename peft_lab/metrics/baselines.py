"""Baselines of a run: scores of predictors that learn nothing, beside which its own score stands.

Imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_lab.metrics import greater_is_better

#: Predictor of `Kind.chance`.
CHANCE = "uniform guessing"
#: Predictor whose scores are those of the backbone before any training.
UNTOUCHED = "the base without an adapter"


@dataclass(frozen=True)
class Baseline:
    """Scores of a predictor that learns nothing from the inputs.

    Attributes:
        predictor: what it answers, in words.
        scores: metric -> its value.
        seconds: time of its evaluation, where that cost any.
    """

    predictor: str
    scores: dict[str, float]
    seconds: float | None = None


def beats(metric: str, score: float, baseline: float) -> bool:
    """Test whether a score is better than that of the baseline."""
    return score > baseline if greater_is_better(metric) else score < baseline


def comparison(
    scores: Mapping[str, Mapping[str, Any]], baselines: Mapping[str, Sequence[Baseline]], metric: str
) -> dict[str, Any]:
    """Entries of metrics.json on the baselines.

    Args:
        scores: split -> metric -> value.
        baselines: split -> its baselines, for the splits that have some.
        metric: the main metric, which decides.

    Returns:
        `baselines`, each with its scores by split, and `beats_baseline`: whether the score on the test rows, or on the
        validation rows where no test rows were scored, is better than that of each baseline; None if undefined.
    """
    recorded: dict[str, dict[str, Any]] = {}
    for split, found in baselines.items():
        for each in found:
            entry = recorded.setdefault(each.predictor, {"predictor": each.predictor, "metrics": {}})
            entry["metrics"][split] = each.scores
            if each.seconds is not None:
                entry["seconds"] = entry.get("seconds", 0.0) + each.seconds
    entries: dict[str, Any] = {"baselines": list(recorded.values()), "beats_baseline": None}
    split = _split(scores)
    score, known = scores.get(split, {}).get(metric), baselines_of(entries, split, metric)
    if score is not None and math.isfinite(score) and known:
        entries["beats_baseline"] = all(beats(metric, score, least) for _, least in known)
    return entries


def baselines_of(metrics: Mapping[str, Any], split: str, metric: str) -> list[tuple[str, float]]:
    """Recorded baselines of a run that have a finite score: predictor and score, the best one first.

    Args:
        metrics: content of metrics.json, which may come from an earlier version or from a stranger.
        split, metric: name of the score.
    """
    entries = metrics.get("baselines")
    # earlier versions recorded a single one
    entries = entries if isinstance(entries, list) else [metrics.get("baseline")]
    found = []
    for entry in entries:
        score = _number(entry, "metrics", split, metric)
        if score is not None and math.isfinite(score):
            found.append((str(entry.get("predictor"))[:200], score))
    return sorted(found, key=lambda each: each[1], reverse=greater_is_better(metric))


def beside_baselines(metrics: Mapping[str, Any]) -> str:
    """Sentence that puts the main score of a run beside its baselines; "" without any.

    Args:
        metrics: as for `baselines_of`.
    """
    found = _decision(metrics)
    if found is None:
        return ""
    split, metric, score, known = found
    below = [f"{predictor} ({least:.4f})" for predictor, least in known if beats(metric, score, least)]
    above = [f"{predictor}, which has {least:.4f}" for predictor, least in known if not beats(metric, score, least)]
    clauses = []
    if above:
        clauses.append(f"does not beat {' or '.join(above)}")
    if below:
        clauses.append(f"{'it ' if above else ''}beats {' and '.join(below)}")
    return f"The {split} {metric} of {score:.4f} {'; '.join(clauses)}."


def shortfall(metrics: Mapping[str, Any]) -> str:
    """Sentence on a run that does not beat its baselines, else "".

    Args:
        metrics: as for `baselines_of`.
    """
    return beside_baselines(metrics) if metrics.get("beats_baseline") is False else ""


def _decision(metrics: Mapping[str, Any]) -> tuple[str, str, float, list[tuple[str, float]]] | None:
    """Split and metric that decide, the run's score there, and its baselines; None if one is missing."""
    scores, metric = metrics.get("metrics"), str(metrics.get("main_metric"))
    split = _split(scores) if isinstance(scores, Mapping) else ""
    score, known = _number(scores, split, metric), baselines_of(metrics, split, metric)
    return None if score is None or not math.isfinite(score) or not known else (split, metric, score, known)


def _number(values: Any, *keys: str) -> float | None:
    """Number below nested keys; None if there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return float(values) if isinstance(values, int | float) else None


def _split(scores: Mapping[str, Any]) -> str:
    """Split that decides: test where it was scored."""
    return "test" if "test" in scores else next(iter(scores), "")
