"""Command `init`: a task file for somebody's data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_lab.cli.options import Json
from peft_lab.cli.output import new_table, print_json, print_out
from peft_lab.errors import ConfigError
from peft_lab.utils.terminal import shown
from peft_lab.utils.text import one_line

if TYPE_CHECKING:
    from peft_lab.data.inspection.propose import TaskDraft


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(init)


def init(
    data: Annotated[
        str,
        typer.Argument(
            help="A file (csv, tsv, json, jsonl, parquet, txt, packed or not), a folder of such files or of images, or "
            "a Hub id.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="The task file to write.")] = Path("task.yaml"),
    kind: Annotated[str | None, typer.Option(help="Kind of task, if the surest one is not meant.")] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Column of the data for a purpose, such as label=verdict (may be repeated)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the task file if there is one.")] = False,
    as_json: Json = False,
) -> None:
    """Look at data, propose a task, and write its file."""
    from peft_lab.data.inspection.propose import draft_task, write_draft

    if output.exists() and not overwrite:
        raise ConfigError(f'"{output}" exists already; pass --overwrite to replace it, or name another by --output.')
    draft = draft_task(data, output, _pairs(column or []), kind)
    write_draft(draft, output, overwrite)
    if as_json:
        print_json(_document(draft, output))
    else:
        _show(draft, output)


def _pairs(given: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        purpose, equals, column = text.partition("=")
        if not equals or not purpose or not column:
            raise ConfigError(f'--column takes PURPOSE=COLUMN, got "{text}"; for example label=verdict.')
        found[purpose] = column
    return found


def _show(draft: TaskDraft, output: Path) -> None:
    table = new_table("column", "holds", "values", "blank", "mean length", "for example")
    for column in draft.profile.columns.values():
        length = f"{column.mean_length:.1f}" if column.mean_length else ""
        example = "" if column.type in ("image", "audio", "bytes") else str(next(iter(column.examples), ""))
        table.add_row(
            column.name, column.type, str(column.distinct), str(column.blanks), length, one_line(example)[:60]
        )
    print_out(table)
    rows = ", ".join(f"{count:,} {split}" for split, count in draft.rows.items())
    columns = draft.values.get("columns", {})
    purposes = ", ".join(f"{purpose}: {column}" for purpose, column in columns.items())
    print_out(f"[bold]{draft.values['kind']}[/], {rows} rows{f' ({shown(purposes)})' if purposes else ''}")
    for doubt in draft.doubts:
        print_out(f"[yellow]look at[/] {shown(doubt)}")
    print_out(f"Task file: {shown(output)}. `peft-lab validate --data {shown(output)}` reads all rows.")


def _document(draft: TaskDraft, output: Path) -> dict[str, object]:
    columns = {}
    for column in draft.profile.columns.values():
        columns[column.name] = {
            "type": column.type,
            "blanks": column.blanks,
            "distinct": column.distinct,
            "mean_length": column.mean_length,
        }
    return {
        "file": str(output),
        "task": dict(draft.values),
        "rows": dict(draft.rows),
        "columns": columns,
        "doubts": list(draft.doubts),
        "other_kinds": list(draft.others),
    }
