"""Rows of each kind of task, written as each builder reads them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_lab.data.task_registry import parse_task
from support.tiny_runs import (
    make_backbone,
    make_decoder,
    make_encoder_decoder,
    make_image_backbone,
    make_masked_lm,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class KindRows:
    """How a kind of task is tested.

    Attributes:
        values: its keys of a task file, without the data.
        texts: source columns of texts that a model reads or writes.
        label: source column of labels; empty without one.
        inputs: those of `texts` that a prediction is given.
        backbone: writes a tiny backbone to a folder.
        builders: that its rows can be written for.
        classes: its labels are classes.
        others: further columns, with one value in all rows.
        blank_answers: a blank text is an answer, such as no label at all.
        limits: further keys that limit a row to 24 tokens, beside `max_length`.
        answer: makes the value of `label` from the texts of a row, where it is no name of a class.
        keeps_blank: a blank text can be kept.
        cuts: a text over the limit loses its end.
    """

    values: dict[str, Any]
    texts: tuple[str, ...]
    label: str
    inputs: tuple[str, ...]
    backbone: Callable[[Path], Path]
    builders: tuple[str, ...] = ("csv", "tsv", "json", "jsonl", "parquet")
    classes: bool = True
    blank_answers: bool = False
    others: Mapping[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    answer: Callable[[Row], str] | None = None
    keeps_blank: bool = True
    cuts: bool = True

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of the classes that `make_rows` gives."""
        names = self.values.get("labels", ("00", "01"))
        return tuple(names) if self.label and self.classes else None


def whole_context(row: Row) -> str:
    """Answer that is all of the context, as JSON; none without a context."""
    context = row.get("other") or ""
    return json.dumps({"text": [context], "answer_start": [0]} if context.strip() else {"text": [], "answer_start": []})


TEXT_COLUMNS = {"text": "sentence", "text_pair": "other", "label": "topic"}
TEMPLATE = {"prompt": "{sentence}", "answer": "{other}"}
#: A kind of task that is registered and stands not here fails the tests.
KINDS = {
    "text_classification": KindRows(
        {"columns": TEXT_COLUMNS}, ("sentence", "other"), "topic", ("sentence", "other"), make_backbone
    ),
    "regression": KindRows(
        *({"columns": TEXT_COLUMNS}, ("sentence", "other"), "topic", ("sentence", "other"), make_backbone),
        classes=False,
    ),
    "multi_label": KindRows(
        {"columns": {"text": "sentence", "text_pair": "other", "labels": "topic"}, "label_separator": ";"},
        *(("sentence", "other"), "topic", ("sentence", "other"), make_backbone),
        blank_answers=True,
    ),
    "token_classification": KindRows(
        {"columns": {"text": "sentence", "spans": "topic"}, "labels": ["O", "B-x"]},
        *(("sentence",), "topic", ("sentence",), make_backbone),
        answer=lambda row: "[]",
        keeps_blank=False,
    ),
    "question_answering": KindRows(
        {"columns": {"question": "sentence", "context": "other", "answers": "topic"}},
        *(("sentence", "other"), "topic", ("sentence", "other"), make_backbone),
        **{"classes": False, "answer": whole_context, "keeps_blank": False, "cuts": False},
    ),
    "multiple_choice": KindRows(
        {"columns": {"question": "sentence", "choices": ["other", "third"], "answer": "topic"}},
        *(("sentence",), "topic", ("sentence",), make_backbone),
        classes=False,
        others={"other": "the snow", "third": "some rain"},
    ),
    "causal_lm": KindRows({"template": TEMPLATE}, ("sentence", "other"), "", ("sentence",), make_decoder),
    "seq2seq_lm": KindRows(
        {"columns": {"source": "sentence", "target": "other"}},
        *(("sentence", "other"), "", ("sentence",), make_encoder_decoder),
        limits={"max_target_length": 24},
    ),
    "masked_lm": KindRows(
        {"columns": {"text": "sentence"}, "line_by_line": True}, ("sentence",), "", ("sentence",), make_masked_lm
    ),
    "image_classification": KindRows(
        {"columns": {"image": "image", "label": "topic"}},
        (),
        "topic",
        (),
        make_image_backbone,
        ("metadata.csv", "metadata.jsonl", "metadata.parquet"),
    ),
}


def builders() -> list[tuple[str, str]]:
    """Pairs of a kind and a builder."""
    return [(name, builder) for name, rows in KINDS.items() for builder in rows.builders]


def make_rows(kind: str, count: int = 40) -> list[Row]:
    """Rows that nothing is wrong with."""
    found = []
    for index in range(count):
        row = {name: f"the rain {name} {index}" for name in KINDS[kind].texts}
        labels = {KINDS[kind].label: f"0{index % 2}"} if KINDS[kind].label else {}
        found.append({**row, **KINDS[kind].others, **labels})
    return found


def write_task(folder: Path, kind: str, builder: str, rows: list[Row], **changes: Any) -> tuple[Any, Path]:
    """Task over rows in a file of a builder, and that file; images get a folder with the table in it."""
    folder.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any]
    if builder.startswith("metadata"):
        from PIL import Image

        for index, row in enumerate(rows):
            Image.new("RGB", (32, 32), (index, 0, 0)).save(folder / f"{index}.png")
            row["file_name"] = f"{index}.png"
        path, data = folder / builder, {"builder": "imagefolder", "files": {"train": "."}}
    else:
        path = folder / f"train.{builder}"
        data = {"builder": {"tsv": "csv", "jsonl": "json"}.get(builder, builder), "files": {"train": path.name}}
        if builder == "tsv":
            data["options"] = {"delimiter": "\t"}
    answer, label = KINDS[kind].answer, KINDS[kind].label
    _write(path, [row | {label: answer(row)} if answer and row.get(label) in ("00", "01") else row for row in rows])
    values = {"name": "t", "kind": kind, "data": data, **KINDS[kind].values, **changes}
    return parse_task(values, folder / "task.yaml"), path


def _write(path: Path, rows: list[Row]) -> None:
    ending = path.suffix
    if ending in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if ending == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif ending == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif ending == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
