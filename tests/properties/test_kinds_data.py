"""Properties of every kind of task before a training: it proposes itself for its rows, and they are reported on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.kind_rows import KINDS, SPLITS, kind_of, write_task

from peft_lab.data.inspection.check import check_data
from peft_lab.data.inspection.model_view import ModelView
from peft_lab.data.inspection.propose import draft_task
from peft_lab.data.profile import profile_rows
from peft_lab.data.read_files import read_rows
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import kind, load_task
from peft_lab.registry import kind_info, list_kinds

EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if " " in name else ()) for name in KINDS]
)


def test_every_kind_is_here() -> None:
    assert {kind_of(name) for name in KINDS} >= set(list_kinds())


@EACH
@pytest.mark.parametrize("named", [True, False], ids=["named", "guessed"])
def test_it_proposes_itself_for_its_rows(name: str, named: bool, tmp_path: Path) -> None:
    """What is proposed is a task that reads the same rows, if its columns are named or have telling names."""
    given = load_task(write_task(tmp_path, name))
    info, target = kind_info(given.kind), tmp_path / "proposed.yaml"
    columns = {purpose: column for purpose, column in given.columns.items() if purpose in info.columns}
    proposed_by_kind = kind(given.kind).propose(profile_rows(read_rows("parquet", [tmp_path / "train.parquet"])))
    if (named and (given.template or "problem_type" in KINDS[name].keys)) or (not named and proposed_by_kind is None):
        pytest.skip("no columns to name" if named else "its columns have names of any data")
    draft = draft_task(str(tmp_path), target, columns if named else {}, given.kind)
    assert draft.values["kind"] == given.kind
    assert dict(draft.rows) == SPLITS
    target.write_text(draft.text())
    proposed = load_task(target)
    if named:
        assert proposed.columns == given.columns
    found = load_splits(proposed, test=True)
    assert [len(part) for part in (found.train, found.validation, found.test) if part is not None] == [*SPLITS.values()]


@EACH
def test_proposals_have_grounds(name: str, tmp_path: Path) -> None:
    """No kind proposes itself for a column of numbers alone."""
    assert kind(kind_of(name)).propose(profile_rows([{"number": str(n)} for n in range(9)])) is None
    write_task(tmp_path, name)
    profile = profile_rows(read_rows("parquet", [tmp_path / "train.parquet"]))
    for other in list_kinds():
        proposal = kind(other).propose(profile)
        if proposal is not None:
            assert set(proposal.columns.values()) <= set(profile.columns)
            assert len(set(proposal.columns.values())) == len(proposal.columns)


@EACH
def test_its_rows_are_reported_on(name: str, tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path / "data", name))
    base = KINDS[name].backbone(tmp_path / "base")
    plain, seen = check_data(task), check_data(task, ModelView(task, str(base), "base"))
    for report in (plain, seen):
        assert not report.errors
        assert report.rows == SPLITS
        assert len(report.examples) == 3
        assert report.columns.keys() == SPLITS.keys()
    tokens: Any = seen.lengths.get("train")
    assert (tokens is not None and tokens.unit == "tokens") == ("model reads" in seen.examples[0])


@EACH
def test_rows_without_an_answer_are_an_error(name: str, tmp_path: Path) -> None:
    """What a run refuses, the report has among its errors."""
    report = check_data(load_task(write_task(tmp_path, name, blank=[2])))
    assert len(report.errors) == 1
    assert "1 train rows" in report.errors[0]
    assert "row 3" in report.errors[0]
