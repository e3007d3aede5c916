"""Sections of a report: one on each task and backbone, and one on all tasks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from peft_lab.comparison.records.run import Record
from peft_lab.comparison.report import answers, figures, tables
from peft_lab.comparison.report.contents import Section
from peft_lab.comparison.report.further_metrics import further_metrics_table
from peft_lab.comparison.report.ood_table import ood_table
from peft_lab.comparison.report.row_texts import RowTexts, row_texts
from peft_lab.comparison.report.sentences import describe, join, metric_title
from peft_lab.comparison.stats.pareto import front_of_all
from peft_lab.comparison.stats.statistics import CellResult, ReadPredictions

#: Why a copy to share has no row of the data.
NOT_SHARED = RowTexts(reason="Their contents are left out of a copy to share.")


def anchors_of(cells: Sequence[CellResult]) -> list[str]:
    """Unique names of the cells for addresses and file names."""
    found: list[str] = []
    for cell in cells:
        # names that differ only in signs or capitals have the same slug
        name = slug(f"{cell.task}-{cell.backbone}")
        found.append(f"{name}-{len(found)}" if name in found else name)
    return found


def cell_section(
    source: Path,
    place: Path,
    anchor: str,
    cell: CellResult,
    records: Sequence[Record],
    predictions: ReadPredictions,
    order: Sequence[str] | None,
) -> Section:
    """Section on one task and backbone.

    Args:
        source: the comparison's folder, with its runs.
        place: the folder of the page; another one than `source` for a copy to share.
        anchor: address of the section, and beginning of the names of its plots.
        cell: the results.
        records: all runs of the comparison.
        predictions: record -> predictions of its test rows.
        order: all arms, in the order of their colours; None to draw nothing.
    """
    costs = tables.costs(records)
    # one front over all costs at once; the figures show one cost each
    labels, heads = front_of_all(cell, costs)
    front = ""
    if len(cell.arms) > 1 and labels:
        axes = join([metric_title(cell.metric), *heads])
        front = f"Pareto front of the means, over {axes} at once: {join(labels)}."
    title = f"{cell.task}, {cell.backbone}"
    section = Section(
        anchor, title, describe(cell), tables.headline(cell), front, further_metrics_table(cell, predictions)
    )
    found = answers.read_answers(cell, source, predictions)

    def texts(rows: list[int]) -> RowTexts:
        return row_texts(source, cell.arms[0].records[0], rows) if place == source else NOT_SHARED

    parts = (
        ood_table(cell, source),
        answers.class_table(found),
        answers.agreement_table(found),
        answers.wrong_rows(found, texts),
    )
    section.parts += [part for part in parts if part is not None]
    if order is not None:
        mine = [record for record in records if (record.task, record.backbone) == (cell.task, cell.backbone)]
        specs = [
            *figures.cell_figures(cell, mine, order, costs),
            *figures.confusion_figures(answers.confusions(found), found.labels),
        ]
        section.pictures += [figures.draw(spec, place / figures.PLOTS, anchor) for spec in specs]
    return section


def overall_section(place: Path, mean: CellResult, cells: Sequence[CellResult], plots: bool) -> Section:
    """Section on the means over all tasks."""
    text = describe(mean)
    averaged = {arm.label for arm in mean.arms}
    left_out = []
    for cell in cells:
        if not averaged.issubset(arm.label for arm in cell.arms):
            left_out.append(cell.task)
    if "," in mean.metric:
        text += f" The tasks have different metrics ({metric_title(mean.metric)})."
    if left_out:
        text += f" {join(left_out)} counts in neither mean nor rank."
    section = Section("all-tasks", "All tasks", text, tables.overall(mean, cells))
    if plots:
        plan = figures.FigureSpec("intervals", f"{figures.INTERVALS}.", partial(figures.plots.forest, mean))
        section.pictures.append(figures.draw(plan, place / figures.PLOTS, "all-tasks"))
    return section


def slug(text: str) -> str:
    """Text as part of a file name or an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"
