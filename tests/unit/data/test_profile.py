"""Profiles of columns, and the kinds' proposals for them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from peft_lab.data.profile import profile_column, profile_rows
from peft_lab.data.task_registry import kind, parse_task
from peft_lab.registry import kind_info, list_kinds

PNG, WAV = b"\x89PNG\r\n", b"RIFF\x00\x00\x00\x00WAVE"
WORDS = ("play a song", "book a table for two", "will it rain tomorrow", "rate this novel", "find a film", "add it")


@pytest.mark.parametrize(
    ("values", "held"),
    [
        (["a", "b", None, " "], "text"),
        (["1", "-2", "3e5", ""], "number"),
        (["007", "12"], "text"),  # a code, and no number
        (["1", "one"], "text"),
        ([1.5, 2], "number"),
        ([True, False], "boolean"),
        ([["a"], []], "list"),
        ([{"start": 1}], "mapping"),
        ([{"bytes": PNG, "path": None}], "image"),
        ([{"bytes": None, "path": "x.JPG"}], "image"),
        ([{"bytes": WAV, "path": None}], "audio"),
        ([b"RIFF\x00\x00\x00\x00WEBP"], "image"),
        ([b"nothing known"], "bytes"),
        (["a", ["b"]], "mixed"),
        ([None, ""], "empty"),
    ],
)
def test_type_of_column(values: list[Any], held: str) -> None:
    assert profile_column("c", values).type == held


def test_column_is_counted() -> None:
    column = profile_column("c", ["b", "a", "b", "", None, "b"])
    assert (column.count, column.blanks, column.distinct, column.most_frequent) == (6, 2, 2, 3)
    assert column.examples == ("b", "a")
    assert column.mean_length == 1
    assert column.holds_classes


def test_nested_values_have_profiles() -> None:
    lists = profile_column("tags", [["a", "b"], ["a"]])
    assert lists.mean_length == 1.5
    assert lists.entries is not None
    assert (lists.entries.type, lists.entries.distinct, lists.entries.count) == ("text", 2, 3)
    spans = profile_column("spans", [[{"start": 0, "label": "x"}], []]).entries
    assert spans is not None
    assert spans.keys["start"].type == "number"
    assert spans.keys["label"].type == "text"


def test_many_and_unequal_classes_are_doubted() -> None:
    doubts = profile_column("topic", [f"t{n}" for n in range(212)] * 6).class_doubts()
    assert doubts == ['"topic" has 212 values in 1272 rows: is this a classification?']
    assert "90%" in profile_column("topic", ["a"] * 9 + ["b"]).class_doubts()[-1]
    assert not profile_column("topic", ["a", "b"] * 9).class_doubts()


def rows(**columns: Any) -> list[dict[str, Any]]:
    return [{name: make(number) for name, make in columns.items()} for number in range(24)]


def text(number: int) -> str:
    return f"{WORDS[number % 6]} {number}"


#: Rows -> kind, columns and further keys that are proposed with the highest confidence.
FOR_KINDS = {
    "intents": (
        rows(id=str, utterance=text, intent=lambda n: WORDS[n % 3]),
        ("text_classification", {"text": "utterance", "label": "intent"}, {}),
    ),
    "unusual names": (
        rows(what=text, which=lambda n: "ab"[n % 2]),
        ("text_classification", {"text": "what", "label": "which"}, {}),
    ),
    "pairs": (
        rows(premise=text, hypothesis=text, label=lambda n: str(n % 3)),
        ("text_classification", {"text": "premise", "text_pair": "hypothesis", "label": "label"}, {}),
    ),
    "scores": (
        rows(sentence1=text, sentence2=text, score=lambda n: f"{n / 7:.2f}"),
        ("regression", {"text": "sentence1", "text_pair": "sentence2", "label": "score"}, {}),
    ),
    "scores of images": (
        rows(image=lambda n: {"bytes": PNG, "path": None}, age=lambda n: n / 3),
        ("regression", {"image": "image", "label": "age"}, {}),
    ),
    "lists of labels": (
        rows(text=text, tags=lambda n: [["a"], ["a", "b"], [], ["c", "b"]][n % 4]),
        ("multi_label", {"text": "text", "labels": "tags"}, {}),
    ),
    "joined labels": (
        rows(text=text, labels=lambda n: ["a", "a;b", "", "c;b", "c"][n % 5]),
        ("multi_label", {"text": "text", "labels": "labels"}, {"label_separator": ";"}),
    ),
    "tags of words": (
        rows(tokens=lambda n: text(n).split(), tags=lambda n: ["O" for _ in text(n).split()[1:]] + ["B-x"]),
        ("token_classification", {"tokens": "tokens", "tags": "tags"}, {}),
    ),
    "images": (
        rows(picture=lambda n: {"bytes": PNG, "path": None}, label=lambda n: n % 2),
        ("image_classification", {"image": "picture", "label": "label"}, {}),
    ),
    "instructions": (
        rows(instruction=text, input=lambda n: "", output=text),
        ("causal_lm", {}, {"template": {"prompt": "{instruction}\n", "answer": "{output}"}}),
    ),
}


def proposals(data: list[dict[str, Any]], given: dict[str, str] | None = None) -> list[Any]:
    found = [kind(name).propose(profile_rows(data, given)) for name in list_kinds()]
    return sorted(filter(None, found), key=lambda proposal: -proposal.confidence)


@pytest.mark.parametrize("name", FOR_KINDS)
def test_best_proposal(name: str) -> None:
    data, (wanted, columns, settings) = FOR_KINDS[name]
    best = proposals(data)[0]
    assert best.kind == wanted
    if columns:
        assert dict(best.columns) == columns
    if settings:
        assert dict(best.settings) == settings


@pytest.mark.parametrize("name", FOR_KINDS)
def test_every_proposal_makes_a_task(name: str) -> None:
    """What a kind proposes passes its own check, whatever the data."""
    for proposal in proposals(FOR_KINDS[name][0]):
        info = kind_info(proposal.kind)
        assert 0 < proposal.confidence <= 1
        assert set(proposal.settings) <= {*info.settings, *info.options}
        values: dict[str, Any] = {"name": "t", "kind": proposal.kind, **proposal.settings}
        values["data"] = {"builder": "parquet", "files": {"train": "x"}}
        values |= {"columns": dict(proposal.columns)} if proposal.columns else {}
        parse_task(values | ({"metrics": list(proposal.metrics)} if proposal.metrics else {}))


def test_named_columns_win() -> None:
    data = rows(text=text, other=text, label=lambda n: "ab"[n % 2], topic=lambda n: "xyz"[n % 3])
    best = proposals(data, {"text": "other", "label": "topic"})[0]
    assert dict(best.columns) == {"text": "other", "label": "topic"}


def test_fractions_are_a_regression() -> None:
    best = proposals(rows(text=text, score=lambda n: f"{n / 7:.2f}"))[0]
    assert (best.kind, best.columns["label"]) == ("regression", "score")


def test_images_alone_are_no_kind() -> None:
    found = proposals(rows(image=lambda n: {"bytes": PNG, "path": None}))
    assert not [proposal for proposal in found if "text" in proposal.columns]


def test_proposals_import_no_torch() -> None:
    code = (
        "import sys\nfrom peft_lab.data.profile import profile_rows\nfrom peft_lab.data.task_registry import kind\n"
        "from peft_lab.registry import list_kinds\n"
        "rows = [{'text': str(n) + ' words', 'label': 'ab'[n % 2]} for n in range(9)]\n"
        "found = [kind(name).propose(profile_rows(rows)) for name in list_kinds()]\n"
        "assert any(found) and 'torch' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
