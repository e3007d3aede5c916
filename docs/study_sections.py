"""Sections of a method's page on our studies and on the cost of its training step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import study_results
from markdown_table import table

if TYPE_CHECKING:
    from peft_lab.registry import MethodInfo

#: Columns of cost.md that a method's page shows, and their headings there.
_COSTS = {
    "trainable": "trainable",
    "GFLOPs / floor": "FLOPs / frozen floor",
    "kept MiB / floor": "saved activations / floor",
    "GFLOPs / LoRA": "FLOPs / LoRA",
    "kept MiB / LoRA": "saved activations / LoRA",
}


def results(info: MethodInfo) -> list[str]:
    """Paragraphs and tables on the studies that compared a method."""
    scores = study_results.scores_of(info.name)
    if not scores:
        return ["No study of ours has compared it yet, so nothing is said here of when it wins or loses."]
    parts = [_summary(scores), *_against_head(info)]
    for study in sorted({score.study for score in scores}):
        mine = [score for score in scores if score.study == study]
        link = f"../../benchmarks/results/{study}/report.md"
        parts.append(f"[{study}]({link}), {study_results.seeds_of(study)} seeds, {mine[0].arms} arms:")
        rows = []
        for score in mine:
            rank = f"{score.rank} of {score.arms}"
            rows.append((score.arm, score.task, score.metric, score.value, rank, _verdict(score)))
        parts.append(table(("arm", "task", "metric", "mean and 95 % interval", "rank", "against the best"), rows))
        sentence = study_results.overall_sentence(study)
        if sentence:
            parts.append(f"Over all tasks of the study: {sentence}")
    parts.append("A rank alone says little: where the test cannot tell an arm from the best, either may be better.")
    return parts


def _against_head(info: MethodInfo) -> list[str]:
    """Table of the seeds in which the method at its default rate beats the head alone; nothing if it was not run."""
    rows = []
    for count in study_results.seed_counts(info.name):
        link = f"[{count.task}](../../benchmarks/results/{count.study}/report.md)"
        rows.append((count.arm, link, f"{count.head} of {count.seeds}", f"{count.baseline} of {count.seeds}"))
    if not rows:
        return []
    head = ("arm", "task", "seeds in which it beats the head alone", "seeds in which it beats the baselines")
    return ["At the default learning rate, 60 steps of 16 rows, on the test rows:", table(head, rows)]


def _summary(scores: Sequence[study_results.Score]) -> str:
    tested = [score for score in scores if score.task != study_results.OVERALL]
    wins = [score for score in tested if score.rank == 1]
    losses = [score for score in tested if score.separated]
    undecided = len(tested) - len(wins) - len(losses)
    lines = [
        f"- It has the best mean, alone or in a tie, in {len(wins)} of {len(tested)} tables{_places(wins)}.",
        f"- It is worse than the best arm by Holm's test at the 5 % level in {len(losses)}{_places(losses)}.",
        f"- It cannot be told from the best arm in {undecided}.",
    ]
    return "\n".join(lines)


def _places(scores: Sequence[study_results.Score]) -> str:
    """Where some scores come from, as the end of a sentence."""
    names = []
    for score in scores:
        names.append(f"{score.task.split(',')[0]} ({score.arm}, study {score.study})")
    return f": {'; '.join(names)}" if names else ""


def _verdict(score: study_results.Score) -> str:
    if score.rank == 1:
        return "best mean" if score.best == score.arm else f"tie for the best: {score.best}"
    if score.separated is None:
        return f"best: {score.best}"
    return f"worse than {score.best}" if score.separated else f"cannot be told from {score.best}"


def cost(info: MethodInfo) -> list[str]:
    """Table of what a training step of a method costs."""
    rows = []
    for heading, row in study_results.cost_rows(info.title):
        rows.append((heading, row["method"], *(row.get(name, "-") for name in _COSTS)))
    if not rows:
        return ["Not measured."]
    head = ("model and batch", "setting", *_COSTS.values())
    source = "[benchmarks/results/cost.md](../../benchmarks/results/cost.md)"
    return [f"Counted, from {source}, which says how:", table(head, rows)]
