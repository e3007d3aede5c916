"""Formats of a report: HTML, Markdown and LaTeX."""

from __future__ import annotations

import datetime
from pathlib import Path

from peft_lab.comparison.records.run import Record
from peft_lab.comparison.report import tables
from peft_lab.comparison.report.contents import Report
from peft_lab.comparison.report.latex import latex_table
from peft_lab.utils.text import markdown_text, one_line, visible


def as_html(report: Report) -> str:
    """Render the page; everything that comes from records is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        # undefined names must not pass as empty text
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        # markup that autoescape has made is a text of its own type
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    anchors = {(group.task, group.backbone, group.arm): group.anchor for group in report.groups}
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template("report.html.jinja").render(report=report, anchors=anchors, now=now)


def as_markdown(report: Report) -> str:
    """Render the same words and tables as Markdown."""
    text = markdown_text
    parts = [f"# {text(report.title)}", text(report.summary)]
    if report.warnings:
        parts.append("\n".join(f"- **Note:** {text(warning)}" for warning in report.warnings))
    for section in report.all_sections:
        parts += [f"## {text(section.title)}", text(section.words)]
        parts += [tables.markdown(section.table)] if section.table else []
        parts += [text(section.front)] if section.front else []
        for part in section.subsections:
            parts += [f"### {part.title}", text(part.words)]
            parts += [tables.markdown(tables.chosen(part.table))] if part.table else []
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


def as_latex(report: Report) -> str:
    """Render the tables of the arms and of further metrics for LaTeX, in the columns that the page shows at first."""
    parts = [f"% {one_line(report.title)}: tables of peft-lab compare; \\usepackage{{booktabs}} is all they need."]
    for section in report.all_sections:
        if section.table:
            parts.append(latex_table(tables.chosen(section.table), section.words, f"tab:{section.anchor}"))
        more = section.further_metrics
        if more is not None and more.table is not None:
            parts.append(latex_table(tables.chosen(more.table), more.words, f"tab:{section.anchor}-further"))
    return "\n\n".join(parts) + "\n"
