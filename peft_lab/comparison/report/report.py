"""The report of a comparison: report.html, report.md, results.csv and plots/, from results.jsonl alone."""

from __future__ import annotations

import datetime
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from peft_lab.comparison.records.results import Record, overlapping, read_items, read_results, search_budgets
from peft_lab.comparison.report import figures, tables
from peft_lab.comparison.report.further_metrics import Further, further
from peft_lab.comparison.report.public_copy import copy_records, without_paths
from peft_lab.comparison.report.run_standing import write_standings
from peft_lab.comparison.report.sentences import join, metric_title, words
from peft_lab.comparison.stats.over_tasks import over_tasks
from peft_lab.comparison.stats.pareto import front_of_all
from peft_lab.comparison.stats.statistics import Cell, rank_arms
from peft_lab.metrics.predictions import Predictions
from peft_lab.runs.run_config import dump_yaml
from peft_lab.utils.text import markdown_text

HTML, MARKDOWN, CSV, PLOTS = "report.html", "report.md", "results.csv", "plots"

#: Below these, the report warns.
FEW_SEEDS, FEW_VALIDATION_ROWS = 3, 200

METHOD = (
    "A mean is over seeds. Its 95 % interval accounts for two sources of chance: another seed, and other test rows of "
    "the same kind. The variance of the seeds' scores over the number of seeds and the variance over the test rows "
    "(by the jackknife for metrics that are not means of rows) are added; the quantile is that of a mixture of t "
    "distributions with the degrees of freedom of each source: for 3 seeds alone, 4.3 standard errors each way.",
    "Two arms are compared on the same seeds and the same test rows, difference by difference. The variance between "
    "seeds is pooled over the arms of a table, and an arm that varies more than the others is charged for it. The "
    "p-values are two-sided and adjusted by Holm's method for all pairs of arms in a table, at a familywise level of "
    "5 %. An arm is called better only if this test separates it. The interval of a single difference is not widened "
    "for the number of pairs, so it may leave out zero where the adjusted test does not separate. In simulations the "
    "familywise error is 2 to 5 % where arms vary about alike with the seed; where one arm varies five times as much "
    "as the others and seeds outweigh test rows, it reaches 7 to 9 % at 3 seeds.",
    "The mean over tasks is over these tasks, not over tasks in general. Learning rates and other tuned arguments were "
    "chosen on validation rows; the test rows were scored by the final runs alone.",
)


@dataclass
class Section:
    """What the report says of one task and backbone."""

    anchor: str
    title: str
    words: str
    table: tables.Table | None
    front: str = ""
    further: Further | None = None
    pictures: list[figures.Picture] = field(default_factory=list)


@dataclass(frozen=True)
class RunGroup:
    """The runs of one arm on one task and backbone, with the anchor that numbers link to."""

    anchor: str
    task: str
    backbone: str
    arm: str
    runs: tuple[RunLine, ...]


@dataclass(frozen=True)
class RunLine:
    """One run in the list of runs; `link` is its folder as a relative address, "" if it left none."""

    record: Record
    score: str
    validation: str
    options: str
    link: str
    files: tuple[str, ...]


@dataclass
class Report:
    """Everything that the page and the Markdown file show."""

    title: str
    summary: str
    warnings: list[str]
    sections: list[Section]
    overall: Section | None
    budget: str
    tuning: tables.Table | None
    groups: list[RunGroup]
    failed: list[RunLine]
    facts: list[tuple[str, str]]
    data: tables.Table | None
    method: tuple[str, ...] = METHOD


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write report.html (one file that needs no network), report.md, results.csv and plots/*.png of a comparison.

    Each final run's folder gets its standing.json, from which its model card states the mean over seeds.

    Runs that failed or are missing are named in it. Without matplotlib there are no plots, and the report says so.

    Args:
        folder: the output folder of a comparison, finished or not.
        out: another folder for them, to be shared without the runs: it gets study.yaml and results.jsonl too, the
            records without paths of this machine, and the page has no links to the folders of runs.

    Returns:
        The path of report.html.

    Raises:
        ConfigError: the folder holds no results.jsonl, or a broken one, or `out` is a comparison's folder itself.
    """
    folder, place = Path(folder), Path(out or folder)
    records = without_paths(read_results(folder))
    if out is not None:
        copy_records(folder, place, records)
    report = build(folder, records, place)
    (place / CSV).write_text(tables.results_csv(records), encoding="utf-8")
    (place / MARKDOWN).write_text(as_markdown(report), encoding="utf-8")
    page = place / HTML
    page.write_text(as_html(report), encoding="utf-8")
    if out is None:
        write_standings(folder, records)
    return page


def build(folder: Path, records: Sequence[Record], out: Path | None = None) -> Report:
    """Work out what the report of a comparison's folder says, and draw its plots there or into another folder."""
    place = out or folder
    items = partial(read_items, folder)
    cells = rank_arms(records, items)
    plots = importlib.util.find_spec("matplotlib") is not None
    order = figures.colour_order(cells, records)
    anchors = _anchors(cells)
    sections = [
        _section(place, anchor, cell, records, items, order, plots) for anchor, cell in zip(anchors, cells, strict=True)
    ]
    mean = over_tasks(cells)
    lines = [_line(folder, record, linked=place == folder) for record in records]
    return Report(
        title=", ".join(dict.fromkeys(record.study for record in records)) or "Comparison",
        summary=_summary(records),
        warnings=[*_warnings(records, cells), *([] if plots else [NO_PLOTS])],
        sections=sections,
        overall=_overall(place, mean, cells, plots) if mean else None,
        budget=_budget(records),
        tuning=tables.tuning(records),
        groups=_groups(lines),
        failed=[line for line in lines if not line.record.ok],
        facts=_facts(records),
        data=_data(records),
    )


NO_PLOTS = "There are no plots: matplotlib is not installed (pip install 'peft-lab[plots]')."


def _anchors(cells: Sequence[Cell]) -> list[str]:
    """A name for each cell that can stand in an address and a file name; numbered where two would be the same."""
    found: list[str] = []
    for cell in cells:
        name = slug(f"{cell.task}-{cell.backbone}")
        found.append(f"{name}-{len(found)}" if name in found else name)
    return found


def _section(
    folder: Path,
    anchor: str,
    cell: Cell,
    records: Sequence[Record],
    items: Callable[[Record], Predictions],
    order: Sequence[str],
    plots: bool,
) -> Section:
    costs = tables.costs(records)
    labels, heads = front_of_all(cell, costs)
    front = ""
    if len(cell.arms) > 1 and labels:
        axes = join([metric_title(cell.metric), *heads])
        front = f"Pareto front of the means, over {axes} at once: {join(labels)}."
    title = f"{cell.task}, {cell.backbone}"
    section = Section(anchor, title, words(cell), tables.headline(cell), front, further(cell, items))
    if plots:
        mine = [record for record in records if (record.task, record.backbone) == (cell.task, cell.backbone)]
        for plan in figures.of_cell(cell, mine, order, costs):
            section.pictures.append(figures.draw(plan, folder / PLOTS, anchor))
    return section


def _overall(folder: Path, mean: Cell, cells: Sequence[Cell], plots: bool) -> Section:
    text = words(mean)
    left_out = [cell.task for cell in cells if not all(cell.arm(arm.label) for arm in mean.arms)]
    if "," in mean.metric:
        text += f" The tasks have different metrics ({metric_title(mean.metric)})."
    if left_out:
        text += f" {join(left_out)} counts in neither mean nor rank."
    section = Section("all-tasks", "All tasks", text, tables.overall(mean, cells))
    if plots:
        plan = figures.Plan("intervals", f"{figures.INTERVALS}.", partial(figures.plots.forest, mean))
        section.pictures.append(figures.draw(plan, folder / PLOTS, "all-tasks"))
    return section


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


def _warnings(records: Sequence[Record], cells: Sequence[Cell]) -> list[str]:
    found = []
    if not cells:
        found.append("No final run has ended yet: there is no score on test rows to report.")
    few = [cell for cell in cells if cell.arms and len(cell.seeds) < FEW_SEEDS]
    if few:
        names = join([f"{cell.task} ({_count(len(cell.seeds), 'seed')})" for cell in few])
        found.append(
            f"Fewer than {FEW_SEEDS} seeds on {names}: intervals are wide or leave out the seed, and tests are rough."
        )
    partial_cells = [cell for cell in cells if any(arm.missing for arm in cell.arms) or cell.without_score]
    if partial_cells:
        names = join([cell.task for cell in partial_cells])
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
    spent = search_budgets(record for record in records if not record.beyond)
    if not spent:
        return "Nothing was searched: every arm ran with the learning rate it was given."
    unequal = []
    for task, backbone in dict.fromkeys((one.task, one.backbone) for one in spent):
        mine = [one for one in spent if (one.task, one.backbone) == (task, backbone)]
        if len({(one.trials, one.runs) for one in mine}) > 1:
            unequal.append(f"{task}, {backbone}")
    if unequal:
        return (
            f"The tuning budgets differ between the arms on {'; '.join(unequal)}: see the table before comparing them."
        )
    found = "On each task, every arm was tuned with the same number of candidates and runs."
    if any(record.beyond for record in records):
        found += (
            " Where the best learning rate was the lowest or the highest of them, the search went on beyond it, "
            "by the same rule for every arm; the table counts these candidates."
        )
    return found


def _groups(lines: Sequence[RunLine]) -> list[RunGroup]:
    found: dict[tuple[str, str, str], list[RunLine]] = {}
    for line in lines:
        found.setdefault((line.record.task, line.record.backbone, line.record.arm), []).append(line)
    return [
        RunGroup(f"runs-{number}", *key, tuple(sorted(runs, key=lambda run: (run.record.stage, run.record.seed))))
        for number, (key, runs) in enumerate(found.items(), 1)
    ]


def _line(folder: Path, record: Record, linked: bool) -> RunLine:
    scores = [record.score(split) if record.ok else None for split in ("test", "validation")]
    shown = ["-" if score is None else f"{score:.4f}" for score in scores]
    inside = linked and bool(record.folder) and (folder / record.folder).resolve().is_relative_to(folder.resolve())
    files = ("metrics.json", "run.yaml", "error.txt") if inside else ()
    present = tuple(name for name in files if (folder / record.folder / name).is_file())
    # "./" and quoting: whatever the record names, the link stays a relative path
    link = f"./{quote(record.folder)}" if inside else ""
    return RunLine(record, shown[0], shown[1], dump_yaml(record.options) if record.options else "", link, present)


def _facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What the runs were made with; several values where runs differ."""
    versions: dict[str, dict[str, None]] = {}
    for record in records:
        for name, version in {**record.environment.get("versions", {}), **record.metrics.get("versions", {})}.items():
            versions.setdefault(str(name), {})[str(version)] = None
    facts = [("versions", ", ".join(f"{name} {'/'.join(found)}" for name, found in versions.items()))]
    for name in ("device", "threads", "platform", "commit"):
        found = dict.fromkeys(str(record.environment[name]) for record in records if record.environment.get(name))
        facts.append((name, "; ".join(found)))
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


def slug(text: str) -> str:
    """A text as part of a file name or an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def as_html(report: Report) -> str:
    """The page; everything that comes from records is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    anchors = {(group.task, group.backbone, group.arm): group.anchor for group in report.groups}
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template("report.html.jinja").render(report=report, anchors=anchors, now=now)


def as_markdown(report: Report) -> str:
    """The same words and tables as Markdown."""
    text = markdown_text
    parts = [f"# {text(report.title)}", text(report.summary)]
    if report.warnings:
        parts.append("\n".join(f"- **Note:** {text(warning)}" for warning in report.warnings))
    for section in [*report.sections, *([report.overall] if report.overall else [])]:
        parts += [f"## {text(section.title)}", text(section.words)]
        parts += [tables.markdown(section.table)] if section.table else []
        parts += [text(section.front)] if section.front else []
        if section.further:
            more = section.further
            parts += [f"### {more.title}", text(more.words), tables.markdown(more.table)]
    parts += ["## Tuning", text(report.budget)]
    parts += [tables.markdown(report.tuning)] if report.tuning else []
    if report.failed:
        parts.append("## Failed runs")
        parts.append("\n".join(f"- {text(_failure(line.record))}" for line in report.failed))
    parts += ["## How it was measured", *map(text, report.method)]
    parts.append("\n".join(f"- {text(name)}: {text(value)}" for name, value in report.facts))
    parts += [tables.markdown(report.data)] if report.data else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _failure(record: Record) -> str:
    where = f"{record.arm} on {record.task}, {record.backbone}, {record.stage} run, seed {record.seed}"
    return f"{where}, learning rate {record.learning_rate:g}: {record.error}"
