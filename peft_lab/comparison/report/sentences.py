"""Results of a comparison in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from peft_lab.comparison.stats.cell_baselines import cell_baselines
from peft_lab.comparison.stats.estimates import LEVEL, Estimate
from peft_lab.comparison.stats.statistics import ALL_TASKS, ArmResult, CellResult
from peft_lab.metrics.baselines import beats

_TITLES = {
    "ece": "calibration error",
    "f1": "F1",
    "matthews_correlation": "Matthews correlation",
    "pearsonr": "Pearson correlation",
    "rouge_l": "ROUGE-L",
    "spearmanr": "Spearman correlation",
}


def leaders(cell: CellResult) -> tuple[str, ...]:
    """Labels of the arms with the best mean, several where it is the same as it is printed."""
    shown = number(cell.arms[0].score.value) if cell.arms else ""
    return tuple(arm.label for arm in cell.arms if number(arm.score.value) == shown)


def describe(cell: CellResult) -> str:
    """Describe the results on one task and backbone.

    An arm is called better only if the test against it is significant, and best only if no other has the same score.
    """
    if not cell.arms:
        return f"No run on {cell.task} with {cell.backbone} gave a score. " + _failures(cell)
    top = cell.arms[0]
    if len(cell.arms) == 1:
        text = f"{top.label} is the only arm with a score, {interval_text(top.score)}."
    # one seed: no statement about the method, only about this run
    elif top.score.basis in ("rows", "none"):
        text = (
            f"{_best(cell)}, with one seed. Another seed may turn the order, so no arm is called better than another."
        )
    elif len(leaders(cell)) == len(cell.arms):
        text = f"{_best(cell)}, and there is no other arm."
    else:
        text = f"{_best(cell)}; {_against_others(cell)}"
    if top.score.basis == "rows":
        text += " The interval is over the test rows alone; there is none over seeds."
    if top.score.basis == "seeds":
        text += (
            " The intervals are over seeds alone: the runs left nothing from which the test rows could be resampled."
        )
    return " ".join(filter(None, (text, _beside_baseline(cell), _failures(cell))))


def _best(cell: CellResult) -> str:
    """Clause on the arm or the arms with the best mean."""
    top, first = cell.arms[0], leaders(cell)
    extreme = "highest" if cell.higher_is_better else "lowest"
    of_what = "over tasks" if cell.task == ALL_TASKS else metric_title(cell.metric)
    if len(first) == 1:
        return f"{top.label} has the {extreme} mean {of_what}, {interval_text(top.score)}"
    return f"{join(first)} tie for the {extreme} mean {of_what}, {number(top.score.value)}"


def _beside_baseline(cell: CellResult) -> str:
    """Sentences on the arms beside the best of the baselines."""
    known = cell_baselines(cell)
    if not known:
        return ""
    best = f"{known[0].predictor} ({number(known[0].score)})"
    beaten = [arm for arm in cell.arms if beats(cell.metric, arm.score.value, known[0].score)]
    below = [arm.label for arm in cell.arms if arm not in beaten]
    if not beaten:
        return f"No arm beats {best}." if len(below) > 1 else f"It does not beat {best}."
    if below:
        text = f"{join(below)} {'does' if len(below) == 1 else 'do'} not beat {best}."
    elif len(beaten) > 1:
        text = f"Every arm beats {best}."
    else:
        text = f"It beats {best}."
    # a mean that is better by chance is no evidence
    within = [arm.label for arm in beaten if _includes(arm.score, known[0].score)]
    if within:
        intervals = "interval of" if len(within) == 1 else "intervals of"
        text += f" The {intervals} {join(within)} {'includes' if len(within) == 1 else 'include'} that score."
    return text


def _includes(score: Estimate, value: float) -> bool:
    """Test whether the interval of a score includes a value."""
    return score.low is not None and score.high is not None and score.low <= value <= score.high


def _against_others(cell: CellResult) -> str:
    """Clauses on the tests of the best arm against those that do not tie with it."""
    first = leaders(cell)
    subject = "it" if len(first) == 1 else f"of these, {cell.arms[0].label}"
    others = [arm for arm in cell.arms if arm.label not in first]
    # each other arm is worse, untested, or not distinguishable
    worse = [arm.label for arm in others if arm.label not in cell.indistinguishable]
    untested = [arm.label for arm in others if arm.versus_best is None or arm.versus_best.p is None]
    same = [arm.label for arm in others if arm.label not in (*worse, *untested)]
    at_level = "at the 5 % level (Holm)"
    if not worse and same:
        text = f"{subject} is not distinguishable from {_all_others('any', same, len(others))} {at_level}."
    elif not same and worse:
        text = f"{subject} is better than {_all_others('each', worse, len(others))} {at_level}."
    elif same:
        text = f"{subject} is not distinguishable from {join(same)} {at_level}, and better than {join(worse)}."
    else:
        text = f"{subject} could be tested against no other arm."
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


def _all_others(every: str, labels: list[str], others: int) -> str:
    """Join labels, or count them if they are all others, of which there are more than two."""
    if len(labels) == others and len(labels) > 2:
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
