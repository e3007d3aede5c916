"""Results of a comparison in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from peft_lab.comparison.stats.estimates import LEVEL, Estimate
from peft_lab.comparison.stats.statistics import ALL_TASKS, ArmResult, CellResult
from peft_lab.metrics.baselines import baseline_of, beats

_TITLES = {
    "ece": "calibration error",
    "f1": "F1",
    "matthews_correlation": "Matthews correlation",
    "pearsonr": "Pearson correlation",
    "rouge_l": "ROUGE-L",
    "spearmanr": "Spearman correlation",
}


def describe(cell: CellResult) -> str:
    """Describe the results on one task and backbone.

    An arm is called better only if the test against it is significant.
    """
    if not cell.arms:
        return f"No run on {cell.task} with {cell.backbone} gave a score. " + _failures(cell)
    top = cell.arms[0]
    extreme = "highest" if cell.higher_is_better else "lowest"
    of_what = "over tasks" if cell.task == ALL_TASKS else metric_title(cell.metric)
    best = f"{top.label} has the {extreme} mean {of_what}, {interval_text(top.score)}"
    if len(cell.arms) == 1:
        text = f"{top.label} is the only arm with a score, {interval_text(top.score)}."
    # one seed: no statement about the method, only about this run
    elif top.score.basis in ("rows", "none"):
        text = f"{best}, with one seed. Another seed may turn the order, so no arm is called better than another."
    else:
        text = f"{best}; {_against_others(cell)}"
    if top.score.basis == "rows":
        text += " The interval is over the test rows alone; there is none over seeds."
    if top.score.basis == "seeds":
        text += (
            " The intervals are over seeds alone: the runs left nothing from which the test rows could be resampled."
        )
    return " ".join(filter(None, (text, _below_baseline(cell), _failures(cell))))


def _below_baseline(cell: CellResult) -> str:
    """Sentence on the arms that do not beat a predictor without input."""
    below: dict[str, list[str]] = {}
    for arm in cell.arms:
        found = [baseline_of(record.metrics, "test", cell.metric) for record in arm.records]
        known = [each for each in found if each is not None]
        # a mean over tasks has no baseline of its own
        if cell.task == ALL_TASKS or not known:
            continue
        least = sum(score for _, score in known) / len(known)
        if not beats(cell.metric, arm.score.value, least):
            below.setdefault(f"{known[0][0]} ({number(least)})", []).append(arm.label)
    sentences = []
    for baseline, labels in below.items():
        sentences.append(f"{join(labels)} {'does' if len(labels) == 1 else 'do'} not beat {baseline}.")
    return " ".join(sentences)


def _against_others(cell: CellResult) -> str:
    """Clauses on the tests of the best arm against the others."""
    others = cell.arms[1:]
    # each other arm is worse, untested, or not distinguishable
    worse = [arm.label for arm in others if arm.label not in cell.indistinguishable]
    untested = [arm.label for arm in others if arm.versus_best is None or arm.versus_best.p is None]
    same = [arm.label for arm in others if arm.label not in (*worse, *untested)]
    at_level = "at the 5 % level (Holm)"
    if not worse and same:
        text = f"it is not distinguishable from {_all_others('any', same, cell)} {at_level}."
    elif not same and worse:
        text = f"it is better than {_all_others('each', worse, cell)} {at_level}."
    elif same:
        text = f"it is not distinguishable from {join(same)} {at_level}, and better than {join(worse)}."
    else:
        text = "it could be tested against no other arm."
    alone = [arm.label for arm in others if arm.label in same and _significant_alone(arm)]
    if alone:
        text += (
            f" Looked at alone, without the correction for all {len(cell.pair_tests)} comparisons, {join(alone)} "
            "would be told from it; more seeds could settle that."
        )
    if untested:
        text += f" There is no test against {join(untested)}: fewer than two seeds are shared."
    return text


def _significant_alone(arm: ArmResult) -> bool:
    """Test whether the unadjusted test against the best arm is significant."""
    return arm.versus_best is not None and arm.versus_best.p is not None and arm.versus_best.p < LEVEL


def _all_others(every: str, labels: list[str], cell: CellResult) -> str:
    """Join labels, or count them if they are all other arms."""
    if len(labels) == len(cell.arms) - 1 and len(labels) > 2:
        return f"{every} of the other {len(labels)} arms"
    return join(labels)


def _failures(cell: CellResult) -> str:
    """Sentences on missing seeds and arms without a score."""
    sentences = []
    for arm in cell.arms:
        if arm.missing:
            plural = "s" if len(arm.missing) > 1 else ""
            sentences.append(f"{arm.label} lacks seed{plural} {join([str(seed) for seed in arm.missing])}.")
    for label, runs in cell.without_score.items():
        reason = f"all its {len(runs)} runs failed" if runs else "it has no final run"
        if len(runs) == 1:
            reason = "its run failed"
        sentences.append(f"{label} has no score: {reason}.")
    return " ".join(sentences)


def join(names: Sequence[str]) -> str:
    """Join names: `a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def metric_title(name: str) -> str:
    """Name of a metric in a sentence.

    Several, joined by ", ", are joined again by commas and "and".
    """
    return join([_TITLES.get(part, part.replace("_", " ")) for part in name.split(", ")])


def number(value: float) -> str:
    """Format a score: three decimals, or four digits from 10 on."""
    if abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def interval_text(score: Estimate) -> str:
    """Format a mean with its interval: `0.953 [0.940, 0.966]`."""
    if score.low is None or score.high is None:
        return f"{number(score.value)} (no interval)"
    return f"{number(score.value)} [{number(score.low)}, {number(score.high)}]"
