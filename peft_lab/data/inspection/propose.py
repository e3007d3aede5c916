"""Task files proposed for somebody's data.

The kinds of task say by themselves what they would make of the columns (`Kind.propose`); the one that is surest is
written, with what a careful person should look at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_lab.data.inspection.layout import Layout, find_layout
from peft_lab.data.inspection.sample import Sample, read_sample
from peft_lab.data.profile import DataProfile, Proposal, is_blank, profile_rows
from peft_lab.data.task_registry import kind, parse_task
from peft_lab.errors import ConfigError, TaskError, did_you_mean
from peft_lab.registry import kind_info, list_kinds
from peft_lab.utils.atomic_files import write_text
from peft_lab.utils.text import one_line

#: Share of the rows that become test rows where the data have none.
TEST_FRACTION = 0.2
#: A kind that is less sure than the surest one by less than this is named too.
_NEAR = 0.35
#: Characters of a line of the file.
_LINE = 110


@dataclass(frozen=True)
class TaskDraft:
    """Task file before it is written.

    Attributes:
        values: the mapping of the file.
        profile: profile of the training rows.
        rows: split -> number of rows that were looked at.
        whole: True if these are all rows.
        doubts: sentences about what should be looked at.
        others: further kinds that would fit.
    """

    values: Mapping[str, Any]
    profile: DataProfile
    rows: Mapping[str, int]
    whole: bool
    doubts: tuple[str, ...]
    others: tuple[str, ...]

    def text(self) -> str:
        """Content of the file, with the doubts as comments."""
        import yaml

        lines = ["# proposed by peft-lab from the data; look at:"] if self.doubts else []
        for doubt in self.doubts:
            lines.append(f"# - {one_line(doubt)}")
        body = yaml.safe_dump(dict(self.values), sort_keys=False, allow_unicode=True, width=_LINE)
        return "\n".join([*lines, body])


def draft_task(
    data: str | Layout, target: Path, given: Mapping[str, str] | None = None, kind_name: str | None = None
) -> TaskDraft:
    """Draft of a task file for data.

    Args:
        data: a file, a folder, an id of the Hub, or named files.
        target: place of the task file, which the names of local files start from.
        given: canonical column of a kind -> column of the data, as the user named them.
        kind_name: kind of task; without it, that of the surest proposal.

    Raises:
        TaskError: the data cannot be read, a named column is missing, or no kind fits.
    """
    layout = find_layout(data) if isinstance(data, str) else data
    sample = read_sample(layout)
    profile = profile_rows(sample.rows["train"], given, sample.class_names)
    _check_given(profile, kind_name)
    proposals = _proposals(profile, kind_name)
    if not proposals:
        raise TaskError(_no_kind(layout, profile, kind_name))
    best = proposals[0]
    sample, left_out = _without_unlabelled(sample, best)
    values = _values(sample, best, target)
    # a template names the columns that the task reads
    columns = list(dict.fromkeys(parse_task(values, target).columns.values()))
    doubts = [*sample.doubts, *best.doubts, *left_out, *_doubts_about_rows(sample, profile, columns)]
    if "test" not in sample.rows:
        doubts.append(f"no test split: {TEST_FRACTION:.0%} of the training rows are carved (test_fraction)")
    others = tuple(each.kind for each in proposals[1:] if each.confidence > best.confidence - _NEAR)
    if others:
        doubts.append(f"it may be {' or '.join(others)} too: choose by --kind")
    counts = {split: len(rows) for split, rows in sample.rows.items()}
    return TaskDraft(values, profile, counts, sample.whole, tuple(doubts), others)


def write_draft(draft: TaskDraft, target: Path, overwrite: bool = False) -> None:
    """Write a task file.

    Raises:
        ConfigError: there is a file already, and it is not to be replaced.
        WriteError: the file cannot be written.
    """
    if target.exists() and not overwrite:
        raise ConfigError(f'"{target}" exists already; pass --overwrite to replace it, or name another by --output.')
    write_text(target, draft.text())


def _check_given(profile: DataProfile, kind_name: str | None) -> None:
    """Check the columns that the user named."""
    known = dict.fromkeys(name for info in list_kinds().values() for name in info.columns)
    if kind_name is not None:
        known = dict.fromkeys(kind_info(kind_name).columns)
    for canonical, column in profile.given.items():
        if canonical not in known:
            what = f'The kind "{kind_name}" has' if kind_name else "No kind of task has"
            raise TaskError(
                f'{what} no column "{canonical}".{did_you_mean(canonical, known)} Columns: {", ".join(known)}.'
            )
        if column not in profile.columns:
            raise TaskError(
                f'The data have no column "{column}" for "{canonical}".{did_you_mean(column, profile.columns)} '
                f"Columns: {', '.join(profile.columns)}."
            )


def _proposals(profile: DataProfile, kind_name: str | None) -> list[Proposal]:
    """Proposals of the kinds, the surest first."""
    found = []
    for name, info in list_kinds().items():
        # a column that the user named must have a meaning
        if (kind_name in (None, name)) and (set(profile.given) <= set(info.columns)):
            proposal = kind(name).propose(profile)
            if proposal is not None:
                found.append(proposal)
    found.sort(key=lambda proposal: -proposal.confidence)
    needed = [name for name, required in kind_info(kind_name).columns.items() if required] if kind_name else []
    # where kind and columns are said, nothing has to be guessed
    if not found and kind_name and profile.given and set(needed) <= set(profile.given):
        found.append(Proposal(kind_name, 1.0, dict(profile.given)))
    return found


def _no_kind(layout: Layout, profile: DataProfile, kind_name: str | None) -> str:
    columns = ", ".join(f"{column.name} ({column.type})" for column in profile.columns.values())
    if kind_name is not None:
        needed = [name for name, required in kind_info(kind_name).columns.items() if required]
        wanted = f"; name its columns: {', '.join(needed)}" if needed else ""
        return f'"{layout.name}" does not look like data of the kind "{kind_name}" (columns: {columns}){wanted}.'
    return (
        f'No kind of task fits "{layout.name}" (columns: {columns}); name kind and columns, or write a task file '
        "(`peft-lab tasks` shows some)."
    )


def _without_unlabelled(sample: Sample, proposal: Proposal) -> tuple[Sample, list[str]]:
    """Sample without splits that lack a column of the proposal, as test files without answers do."""
    doubts = []
    for split in [split for split in sample.rows if split != "train"]:
        rows = sample.rows[split]
        for canonical, column in proposal.columns.items():
            if all(is_blank(row.get(column)) or (column in sample.class_names and row[column] == -1) for row in rows):
                doubts.append(f'the {split} rows have no "{column}" for "{canonical}" and are left out')
                kept = {name: part for name, part in sample.rows.items() if name != split}
                sample = replace(sample, rows=kept)
                break
    return sample, doubts


def _values(sample: Sample, proposal: Proposal, target: Path) -> dict[str, Any]:
    """Mapping of the task file."""
    layout = sample.layout
    values: dict[str, Any] = {"name": layout.name, "kind": proposal.kind}
    if layout.hub:
        values["data"] = dict(layout.hub)
        values["splits"] = {split: sample.splits[split] for split in sample.rows}
    else:
        files: dict[str, Any] = {}
        for split in sample.rows:
            names = [_relative(path, target) for path in layout.files[split]]
            files[split] = names[0] if len(names) == 1 else names
        values["data"] = {"builder": layout.builder, "files": files}
        if sample.options:
            values["data"]["options"] = dict(sample.options)
    if proposal.columns:
        values["columns"] = dict(proposal.columns)
    values |= proposal.settings
    if proposal.metrics:
        values["metrics"] = list(proposal.metrics)
    if "test" not in sample.rows:
        values["test_fraction"] = TEST_FRACTION
    return values


def _relative(path: Path, target: Path) -> str:
    """Name of a file as it starts from the folder of the task file."""
    return Path(os.path.relpath(path.absolute(), target.absolute().parent)).as_posix()


def _doubts_about_rows(sample: Sample, profile: DataProfile, columns: Sequence[str]) -> list[str]:
    found = []
    for name in columns:
        blanks = profile.columns[name].blanks
        if blanks:
            found.append(
                f'{blanks} of {profile.columns[name].count} training rows have no "{name}": mend them, or set '
                "empty_rows"
            )
    rows = {}
    for split, part in sample.rows.items():
        rows[split] = [_key(row, columns) for row in part]
    known = set(rows["train"])
    double = len(rows["train"]) - len(known)
    if double:
        found.append(f"{double} of {len(rows['train'])} training rows are duplicates, so that carved rows have twins")
    for split in [split for split in rows if split != "train"]:
        leaks = sum(row in known for row in rows[split])
        if leaks:
            found.append(f"{leaks} of {len(rows[split])} {split} rows are training rows too")
    unused = [name for name in profile.columns if name not in columns]
    if unused:
        found.append(f"columns that are not used: {', '.join(unused)}")
    if not sample.whole:
        found.append(f"only the first {max(map(len, sample.rows.values())):,} rows were looked at")
    return found


def _key(row: Mapping[str, Any], columns: Iterable[str]) -> str:
    """Text that equal rows have in common."""
    return json.dumps([row.get(name) for name in columns], sort_keys=True, default=repr)
