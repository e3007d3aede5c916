"""Report of a comparison: report.html, .md and .tex, results.csv and plots/, made from results.jsonl."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from peft_lab.comparison.records.results import read_predictions, read_results
from peft_lab.comparison.records.run import Record
from peft_lab.comparison.records.run_frame import results_csv
from peft_lab.comparison.records.search_budget import overlapping, search_budgets
from peft_lab.comparison.report import figures, tables
from peft_lab.comparison.report.contents import Report, RunGroup, RunLine
from peft_lab.comparison.report.pages import as_html, as_latex, as_markdown
from peft_lab.comparison.report.public_copy import check_copy, copy_records, without_paths
from peft_lab.comparison.report.run_standing import write_standings
from peft_lab.comparison.report.sections import anchors_of, cell_section, overall_section
from peft_lab.comparison.report.sentences import join
from peft_lab.comparison.stats.over_tasks import over_tasks
from peft_lab.comparison.stats.statistics import CellResult, rank_arms
from peft_lab.runs.run_config import dump_yaml
from peft_lab.utils.atomic_files import check_can_be_made, new_folder, write_text

HTML, MARKDOWN, LATEX, CSV = "report.html", "report.md", "report.tex", "results.csv"

#: Below these, the report warns.
FEW_SEEDS, FEW_VALIDATION_ROWS = 3, 200


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write report.html, report.md, report.tex, results.csv and plots/*.png of a comparison.

    The page is one file that needs no network. Each final run's folder gets its standing.json, from which its model
    card states the mean over seeds.

    Runs that failed or are missing are named in it. Without matplotlib there are no plots, and the report says so.

    Args:
        folder: the output folder of a comparison, finished or not.
        out: another folder for them, to be shared without the runs: it gets study.yaml and results.jsonl too, the
            records without paths of this machine, and the page has no links to the folders of runs and no row of the
            data.

    Returns:
        The path of report.html.

    Raises:
        ConfigError: the folder holds no results.jsonl, or a broken one, or `out` is a comparison's folder itself.
        WriteError: the disk refuses; a copy is then whole or not there.
    """
    folder, place = Path(folder), Path(out or folder)
    records = without_paths(read_results(folder))
    check_can_be_made(place / HTML)
    if out is None:
        _write(folder, records, place)
        write_standings(folder, records)
        return place / HTML
    check_copy(place)
    with new_folder(place) as partial:
        copy_records(folder, partial, records)
        _write(folder, records, partial)
    return place / HTML


def _write(folder: Path, records: Sequence[Record], place: Path) -> None:
    report = build(folder, records, place)
    write_text(place / CSV, results_csv(records))
    write_text(place / MARKDOWN, as_markdown(report))
    write_text(place / LATEX, as_latex(report))
    write_text(place / HTML, as_html(report))


def build(folder: Path, records: Sequence[Record], out: Path | None = None) -> Report:
    """Build the report of a comparison and draw its plots.

    Args:
        folder: the comparison's folder, with the predictions of its runs.
        records: the records that are reported.
        out: folder for the plots, `folder` by default.
    """
    # predictions lie beside the runs, plots beside the page
    place = out or folder
    predictions = partial(read_predictions, folder)
    cells = rank_arms(records, predictions)
    # matplotlib is an optional dependency
    plots = importlib.util.find_spec("matplotlib") is not None
    order = figures.colour_order(cells, records)
    drawn = order if plots else None
    sections = []
    for anchor, cell in zip(anchors_of(cells), cells, strict=True):
        sections.append(cell_section(folder, place, anchor, cell, records, predictions, drawn))
    mean = over_tasks(cells)
    lines = [_line(folder, record, linked=place == folder) for record in records]
    return Report(
        title=", ".join(dict.fromkeys(record.study for record in records)) or "Comparison",
        summary=_summary(records),
        warnings=[*_warnings(records, cells), *([] if plots else [NO_PLOTS])],
        sections=sections,
        overall=overall_section(place, mean, cells, plots) if mean else None,
        budget=_budget(records),
        tuning=tables.tuning(records),
        groups=_groups(lines),
        failed=[line for line in lines if not line.record.ok],
        facts=_facts(records),
        data=_data(records),
    )


NO_PLOTS = "There are no plots: matplotlib is not installed (pip install 'peft-lab[plots]')."


def _summary(records: Sequence[Record]) -> str:
    if not records:
        return "No run has ended yet."
    counts = [
        _count(len({record.arm for record in records}), "arm"),
        _count(len({(record.task, record.backbone) for record in records}), "task"),
        _count(len({record.seed for record in records if record.stage == "final"}), "seed"),
    ]
    failed = sum(not record.ok for record in records)
    ended = max(record.finished for record in records)[:16].replace("T", " ")
    return f"{', '.join(counts)}; {_count(len(records), 'run')}, {failed or 'none'} failed. Last run ended {ended} UTC."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _warnings(records: Sequence[Record], cells: Sequence[CellResult]) -> list[str]:
    found = []
    if not cells:
        found.append("No final run has ended yet: there is no score on test rows to report.")
    few = [cell for cell in cells if cell.arms and len(cell.seeds) < FEW_SEEDS]
    if few:
        names = join([f"{cell.task} ({_count(len(cell.seeds), 'seed')})" for cell in few])
        found.append(
            f"Fewer than {FEW_SEEDS} seeds on {names}: intervals are wide or leave out the seed, and tests are rough."
        )
    incomplete = [cell.task for cell in cells if not cell.is_complete]
    if incomplete:
        names = join(incomplete)
        found.append(f"Not every arm has every seed on {names}; the arms concerned are named there.")
    small = _few_validation_rows(records)
    if small:
        names = join([f"{task} ({rows})" for task, rows in small.items()])
        found.append(
            f"Fewer than {FEW_VALIDATION_ROWS} validation rows on {names}: the choice of learning rate is noisy."
        )
    if overlapping(records):
        found.append("Runs shared the machine with one another, so their times are not comparable.")
    return found


def _few_validation_rows(records: Iterable[Record]) -> dict[str, int]:
    rows = {}
    for record in records:
        count = record.metrics.get("data", {}).get("rows", {}).get("validation")
        if count is not None and count < FEW_VALIDATION_ROWS:
            rows[record.task] = count
    return rows


def _budget(records: Sequence[Record]) -> str:
    # runs beyond an edge are every arm's right, so they do not make budgets unequal
    spent = search_budgets(record for record in records if not record.beyond)
    if not spent:
        return "Nothing was searched: every arm ran with the learning rate it was given."
    sizes: dict[tuple[str, str], set[tuple[int, int]]] = {}
    for budget in spent:
        sizes.setdefault((budget.task, budget.backbone), set()).add((budget.trials, budget.runs))
    unequal = [f"{task}, {backbone}" for (task, backbone), found in sizes.items() if len(found) > 1]
    if unequal:
        return (
            f"The tuning budgets differ between the arms on {'; '.join(unequal)}: see the table before comparing them."
        )
    words = "On each task, every arm was tuned with the same number of candidates and runs."
    if any(record.beyond for record in records):
        words += (
            " Where the best learning rate was the lowest or the highest of them, the search went on beyond it, "
            "by the same rule for every arm; the table counts these candidates."
        )
    return words


def _groups(lines: Sequence[RunLine]) -> list[RunGroup]:
    found: dict[tuple[str, str, str], list[RunLine]] = {}
    for line in lines:
        found.setdefault((line.record.task, line.record.backbone, line.record.arm), []).append(line)
    groups = []
    for number, (key, runs) in enumerate(found.items(), 1):
        runs.sort(key=lambda run: (run.record.stage, run.record.seed))
        groups.append(RunGroup(f"runs-{number}", *key, tuple(runs)))
    return groups


def _line(folder: Path, record: Record, linked: bool) -> RunLine:
    score, validation = _score_text(record, "test"), _score_text(record, "validation")
    # a record names its folder, and a hostile one might name any
    inside = linked and bool(record.folder) and (folder / record.folder).resolve().is_relative_to(folder.resolve())
    files = ("metrics.json", "run.yaml", "error.txt") if inside else ()
    present = tuple(name for name in files if (folder / record.folder / name).is_file())
    # "./" and quoting: whatever the record names, the link stays a relative path
    link = f"./{quote(record.folder)}" if inside else ""
    return RunLine(record, score, validation, dump_yaml(record.options) if record.options else "", link, present)


def _score_text(record: Record, split: str) -> str:
    score = record.score(split) if record.ok else None
    return "-" if score is None else f"{score:.4f}"


def _facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Versions, device and further facts of the runs.

    There are several values where runs differ.
    """
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        # a launched run's own processes know their versions best
        used = {**record.environment.get("versions", {}), **record.metrics.get("versions", {})}
        for name, version in used.items():
            versions.setdefault(str(name), {})[str(version)] = None
    facts = [("versions", ", ".join(f"{name} {'/'.join(found)}" for name, found in versions.items()))]
    for name in ("device", "threads", "platform", "commit"):
        values = [record.environment.get(name) for record in records]
        facts.append((name, "; ".join(dict.fromkeys(str(value) for value in values if value))))
    seeds = sorted({record.seed for record in records if record.stage == "final"})
    facts.append(("seeds of the final runs", ", ".join(map(str, seeds))))
    return [(name, value) for name, value in facts if value]


def _data(records: Iterable[Record]) -> tables.Table | None:
    found: dict[tuple[str, str, str], Mapping[str, int]] = {}
    for record in records:
        data: Mapping[str, Any] = record.metrics.get("data", {})
        key = (record.task, str(data.get("version", "")), str(data.get("fingerprint", "")))
        # the runs of the search see no test rows: of runs on the same data the one that saw most is shown
        if data and len(data.get("rows", {})) > len(found.get(key, {})):
            found[key] = data["rows"]
    columns = tuple(tables.Column(title, numeric=False) for title in ("task", "version", "fingerprint", "rows"))
    rows = []
    for seen, counts in found.items():
        texts = (*seen, ", ".join(f"{count:,} {split}" for split, count in counts.items()))
        rows.append(tuple(tables.Entry(text, text) for text in texts))
    return tables.Table("Data", columns, tuple(rows)) if rows else None
