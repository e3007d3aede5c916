"""Answers of the arms row by row: classes, agreement, rows that no arm gets right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peft_lab.comparison.report.row_texts import RowTexts
from peft_lab.comparison.report.sentences import join
from peft_lab.comparison.report.tables import MISSING, Column, Entry, Subsection, Table
from peft_lab.comparison.stats.statistics import CellResult, ReadPredictions
from peft_lab.errors import ConfigError
from peft_lab.metrics.class_scores import ClassScore, agreement, class_scores, confusion, wrong_in_all
from peft_lab.metrics.predictions import Predictions
from peft_lab.runs import run_folder

#: Most classes, arms and wrong rows in a table.
MAX_CLASSES, MAX_ARMS, MAX_ROWS = 60, 12, 12


@dataclass(frozen=True)
class CellAnswers:
    """Predictions of the arms of a cell on the same test rows.

    Attributes:
        cell: the results.
        labels: names of the classes by index; empty without classes.
        arms: label of an arm -> seed -> predictions, for the arms that left those of every seed.
    """

    cell: CellResult
    labels: tuple[str, ...]
    arms: Mapping[str, Mapping[int, Predictions]]


def read_answers(cell: CellResult, folder: Path, predictions: ReadPredictions) -> CellAnswers:
    """Read the predictions of a cell's runs, and the names of its classes.

    Args:
        cell: results on one task and backbone.
        folder: the comparison's folder.
        predictions: record -> predictions; raises `ConfigError` where a run left none.
    """
    arms: dict[str, dict[int, Predictions]] = {}
    for arm in cell.arms:
        try:
            arms[arm.label] = {record.seed: predictions(record) for record in arm.records}
        except ConfigError:  # a copy without the runs has the scores alone, and a section without these parts
            continue
    sizes = Counter(len(each) for found in arms.values() for each in found.values())
    # predictions of other rows, by which a folder was changed, are compared with none
    common = sizes.most_common(1)[0][0] if sizes else 0
    arms = {label: found for label, found in arms.items() if set(map(len, found.values())) == {common}}
    return CellAnswers(cell, _labels(cell, folder), arms if common else {})


def _class_values(run: Sequence[ClassScore]) -> list[tuple[float, float, float]]:
    """F1, precision and recall of each class."""
    return [(each.f1, each.precision, each.recall) for each in run]


def _labels(cell: CellResult, folder: Path) -> tuple[str, ...]:
    for arm in cell.arms:
        for record in arm.records:
            place = folder / record.folder
            # a link may lead out of a comparison that was copied
            inside = bool(record.folder) and place.resolve().is_relative_to(folder.resolve())
            if inside and (place / run_folder.LABELS).is_file():
                return tuple(run_folder.read_labels(place) or ())
    return ()


def class_table(answers: CellAnswers) -> Subsection | None:
    """Table of the classes: rows and, for each arm, F1, precision and recall as means over seeds."""
    found: dict[str, np.ndarray] = {}
    support: list[int] = []
    for label, seeds in answers.arms.items():
        runs = [class_scores(each, answers.labels) for each in seeds.values()]
        known = [run for run in runs if run is not None]
        if known and len(known) == len(runs):
            found[label] = np.mean([_class_values(run) for run in known], axis=0)
            support = [one.support for one in known[0]]
    if not found:
        return None
    columns = [Column("class", numeric=False), Column("rows", help="test rows of the class")]
    for number, label in enumerate(found):
        help_ = f"{label}: harmonic mean of precision and recall, mean over seeds"
        columns.append(Column(f"{label} F1", help=help_, shown=number < MAX_ARMS // 2))
        columns.append(Column(f"{label} precision", help="share of the rows called so that are", shown=False))
        columns.append(Column(f"{label} recall", help="share of the rows of the class that are called so", shown=False))
    means = np.mean(list(found.values()), axis=0)[:, 0]
    # the classes that are hardest for all arms come first
    order = np.argsort(means, kind="stable")[:MAX_CLASSES]
    rows = []
    for index in order:
        entries = [Entry(answers.labels[index], answers.labels[index]), Entry(f"{support[index]:,}", support[index])]
        for label, scores in found.items():
            group = (answers.cell.task, answers.cell.backbone, label)
            entries += [Entry(f"{value:.3f}", float(value), group) for value in scores[index]]
        rows.append(tuple(entries))
    title = "Classes"
    words = "F1 of each class on the test rows, mean over seeds, the classes that are hardest for all arms first."
    if len(order) < len(means):
        words += f" The other {len(means) - len(order)} classes have higher scores and are left out."
    return Subsection(title, words, Table(_caption(title, answers), tuple(columns), tuple(rows)))


def confusions(answers: CellAnswers) -> dict[str, np.ndarray]:
    """Confusion matrix of each arm, summed over its seeds: rows are references, (classes, classes)."""
    found = {}
    for label, seeds in answers.arms.items():
        counts = [confusion(each, answers.labels) for each in seeds.values()]
        known = [each for each in counts if each is not None]
        if known and len(known) == len(counts):
            found[label] = np.sum(known, axis=0)
    return found


def agreement_table(answers: CellAnswers) -> Subsection | None:
    """Table of the agreement of each two arms; of an arm with itself, that of its seeds."""
    labels = list(answers.arms)[:MAX_ARMS]
    rows, any_known = [], False
    for first in labels:
        entries = [Entry(first, first)]
        for second in labels:
            shares = _agreements(answers.arms[first], answers.arms[second], first == second)
            if not shares:
                entries.append(MISSING)
                continue
            any_known = any_known or first != second
            share, kappa = np.mean(shares, axis=0)
            kappa_text = "" if np.isnan(kappa) else f" (kappa {kappa:.2f})"
            entries.append(Entry(f"{share:.3f}{kappa_text}", float(share)))
        rows.append(tuple(entries))
    if not any_known:
        return None
    title = "Agreement"
    by_class = all(each.classes is not None for seeds in answers.arms.values() for each in seeds.values())
    same = "with the same class" if by_class else "that both get right or both get wrong"
    words = (
        f"Share of the test rows {same}, between two arms on the same seed, and Cohen's kappa, which is 1 where they "
        "always agree and 0 where they agree as often as by chance. Where an arm meets itself: the same between its "
        "seeds. Two arms that agree less than one does with itself make different mistakes."
    )
    if len(labels) < len(answers.arms):
        words += f" {join(list(answers.arms)[MAX_ARMS:])} left out: the table has at most {MAX_ARMS} arms."
    columns = [Column("arm", numeric=False), *(Column(label) for label in labels)]
    return Subsection(title, words, Table(_caption(title, answers), tuple(columns), tuple(rows)))


def _agreements(
    first: Mapping[int, Predictions], second: Mapping[int, Predictions], itself: bool
) -> list[tuple[float, float]]:
    """Share and kappa of each shared seed, or of each two seeds of one arm; kappa is nan where it is undefined."""
    pairs = [(seed, seed) for seed in first if seed in second]
    if itself:
        pairs = [(one, other) for one in first for other in first if one < other]
    found = []
    for one, other in pairs:
        both = agreement(first[one], second[other])
        if both is not None:
            found.append((both.share, np.nan if both.kappa is None else both.kappa))
    return found


def wrong_rows(answers: CellAnswers, read_texts: Callable[[list[int]], RowTexts]) -> Subsection | None:
    """Table of the rows that every arm gets wrong with every seed.

    Args:
        answers: the predictions.
        read_texts: numbers of rows -> their contents.
    """
    runs = [each for seeds in answers.arms.values() for each in seeds.values()]
    rows = wrong_in_all(runs) if runs else None
    if rows is None:
        return None
    title = "Rows that every arm gets wrong"
    total = len(runs[0])
    if not len(rows):
        return Subsection(title, f"None: each of the {total:,} test rows is right in at least one run.")
    words = f"{len(rows):,} of the {total:,} test rows are wrong in every run of every arm"
    words += ", those first of which the arms are most sure. " if "confidence" in runs[0].columns else ". "
    words += "Look here for wrong labels, and for what the data do not tell."
    if len(rows) > MAX_ROWS:
        words += f" The table has the first {MAX_ROWS}."
    shown = rows[:MAX_ROWS].tolist()
    texts = read_texts(shown)
    if texts.reason:
        words += f" {texts.reason}"
    columns = [Column("row", help="line of items.csv in a run's folder, from 0")]
    columns += [Column(name, numeric=False) for name in texts.columns]
    with_classes = runs[0].classes is not None and bool(answers.labels)
    if with_classes:
        columns += [
            Column("true class", numeric=False),
            Column("predicted", numeric=False, help="each class with the number of runs that answer it"),
        ]
    lines = []
    for row in shown:
        entries = [Entry(str(row), row), *(Entry(text, text) for text in texts.of(row))]
        if with_classes:
            entries += _called(answers.labels, runs, row)
        lines.append(tuple(entries))
    return Subsection(title, words, Table(_caption(title, answers), tuple(columns), tuple(lines)))


def _called(labels: Sequence[str], runs: Sequence[Predictions], row: int) -> list[Entry]:
    """True class of a row, and the predicted ones with their numbers of runs."""
    pairs = [each.classes for each in runs if each.classes is not None]
    true = int(pairs[0][0][row])
    counts = Counter(int(predicted[row]) for _, predicted in pairs)
    names = [f"{_name(labels, index)} ({count})" for index, count in counts.most_common()]
    return [Entry(_name(labels, true), _name(labels, true)), Entry(", ".join(names), names[0])]


def _name(labels: Sequence[str], index: int) -> str:
    return labels[index] if index < len(labels) else str(index)


def _caption(title: str, answers: CellAnswers) -> str:
    return f"{title}: {answers.cell.task}, {answers.cell.backbone}"
