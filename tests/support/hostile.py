"""Hostile files of an adapter's folder, a base, a task, a study and a comparison, and the doors that read them."""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Edit = Callable[[Path], Any]

#: YAML of a few hundred bytes that stands for ten to the ninth values.
ALIASES = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
DEEP = 100_000


def _json(name: str, **changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / name
        values = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**values, **changes}))

    return edit


def _text(name: str, text: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def _task(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        values = yaml.safe_load((folder / "task.yaml").read_text())
        (folder / "task.yaml").write_text(yaml.safe_dump({**values, **changes}))

    return edit


def _data(name: str, content: bytes, builder: str = "csv", **options: Any) -> Edit:
    def edit(folder: Path) -> None:
        files = dict.fromkeys(("train", "validation", "test"), name)
        _task(data={"builder": builder, "files": files, "options": options})(folder)
        (folder / name).write_bytes(content)

    return edit


def _link(folder: Path) -> None:
    (folder / "data").mkdir()
    os.symlink("/etc/passwd", folder / "data" / "x.csv")


def _metrics_run(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "metrics.json").read_text())
        values["run"].update(changes)
        (folder / "metrics.json").write_text(json.dumps(values))

    return edit


def _pipe(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return edit


def _same_task_beside(folder: Path) -> None:
    """The run names a task file in a sibling of its folder, equal to the copy; its metric is a file to run."""
    other = folder.parent / f"{folder.name}-task"
    other.mkdir()
    (other / "evil.py").write_text("raise SystemExit(7)\n")
    (folder / "evil.py").write_text("raise SystemExit(7)\n")
    _task(metrics=["./evil.py"])(folder)
    (other / "mine.yaml").write_bytes((folder / "task.yaml").read_bytes())
    _metrics_run(task=str(other / "mine.yaml"))(folder)


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Edits of the folder of a run.
FOLDER: dict[str, Edit] = {
    "config deep": _text(CONFIG, '{"a":' + "[" * DEEP + "]" * DEEP + "}"),
    "config of aliases": _text(CONFIG, ALIASES),
    "config of many lists": _text(CONFIG, '{"peft_type": "LORA", "x": [' + ",".join(["[]"] * 2_000_000) + "]}"),
    "config of many names": _json(CONFIG, target_modules=[f"m{i}" for i in range(200_000)]),
    "config with a list for a name": _json(CONFIG, base_model_name_or_path=[1], task_type=["SEQ_CLS"]),
    "config as a pipe": _pipe(CONFIG),
    "header without an end": _text(WEIGHTS, struct.pack("<Q", 2**63) + b"{}"),
    "header of 17 megabytes": _text(WEIGHTS, struct.pack("<Q", 17 * 2**20) + b" " * 17 * 2**20),
    "header deep": _text(WEIGHTS, struct.pack("<Q", 2 * DEEP) + b"[" * 2 * DEEP),
    "pickle for weights": _text(WEIGHTS, b"\x80\x04cposix\nsystem\n(S'true'\ntR."),
    "metrics with a list for the run": _json("metrics.json", run=[1]),
    "metrics with texts for numbers": _json("metrics.json", metrics={"test": {"accuracy": "x"}}, seed="0"),
    "metrics without a card's numbers": _text("metrics.json", '{"run": {"method": "lora"}}'),
    "metrics deep": _text("metrics.json", '{"run":' + "[" * DEEP + "]" * DEEP + "}"),
    "metrics with half a character": _text("metrics.json", '{"run": {"task": "\\ud800"}}'),
    "labels that are lists": _json("labels.json", id2label={"0": [1], "1": {}, "2": None}),
    "labels in thousands": _json("labels.json", id2label={str(i): "same" for i in range(120_000)}),
    "standing of another form": _text("standing.json", '{"study": 1, "seeds": {}}'),
    "items of no numbers": _text("items.csv", "classification:row,a\n0,x\n"),
    "items of many columns": _text("items.csv", "x:row," + ",".join(["a"] * 500_000) + "\n"),
    "task deep": _text("task.yaml", "[" * DEEP),
    "task deep in blocks": _text("task.yaml", "- " * DEEP),
    "task of aliases": _text("task.yaml", ALIASES),
    "task of itself": _text("task.yaml", "name: &a [*a]\n"),
    "task of many labels": _text("task.yaml", "labels:\n" + "- a\n" * 100_000),
    "task as a pipe": _pipe("task.yaml"),
    "task with a metric of a name": _task(metrics=["precision"]),
    "task beside, with a metric to run": _same_task_beside,
    "task with data outside": _task(data={"builder": "csv", "files": {"train": "../x.csv", "test": "/etc/passwd"}}),
    "link in a sub-folder": _link,
    "data packed": _data("x.csv", gzip.compress(b"sentence,topic\n" + b"rain,weather\n" * 1_000_000)),
    "data packed by name": _data("x.csv.gz", gzip.compress(b"sentence,topic\nrain,weather\n")),
    "data of parquet": _data("x.parquet", b"PAR1", builder="parquet"),
    "data of many columns": _data("x.csv", ",".join(map(str, range(300_000))).encode() + b"\n1\n"),
    "data of deep rows": _data("x.jsonl", b'{"sentence": ' + b"[" * DEEP + b"]" * DEEP + b"}\n", builder="json"),
    "data with a regex between cells": _data("x.csv", b"a" * 40, delimiter="(a+)+$"),
}


def _base_config(**changes: Any) -> Edit:
    return _json("config.json", **changes)


def _pattern(folder: Path) -> None:
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(values))


#: Edits of the folder of a base, or of a whole model.
BASE: dict[str, Edit] = {
    "wide": _base_config(hidden_size=10**9),
    "wide within the limits": _base_config(hidden_size=2**13, intermediate_size=2**13),
    "of many words": _base_config(vocab_size=2**27),
    "of many layers": _base_config(num_hidden_layers=10**7),
    "of many layers within the limits": _base_config(num_hidden_layers=60_000),
    "deep config": _text("config.json", '{"a":' + "[" * DEEP + "]" * DEEP + "}"),
    "attention of the Hub": _base_config(attn_implementation="someone/kernel"),
    "pattern of a tokenizer": _pattern,
    "broken tokenizer": _text("tokenizer.json", '{"version": "1.0", "model": []}'),
    "deep tokenizer": _text("tokenizer.json", "[" * DEEP),
    "deep tokens": _text("special_tokens_map.json", '{"a":' + "[" * DEEP + "]" * DEEP + "}"),
    "header without an end": _text("model.safetensors", struct.pack("<Q", 2**63) + b"{}"),
}

_RECORD = {"folder": "../../outside"}


def _records(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        lines = [json.loads(line) | changes for line in (folder / "results.jsonl").read_text().splitlines()]
        (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return edit


def _first_items(text: str) -> Edit:
    def edit(folder: Path) -> None:
        for line in (folder / "results.jsonl").read_text().splitlines():
            place = folder / json.loads(line)["folder"]
            place.mkdir(parents=True, exist_ok=True)
            (place / "items.csv").write_text(text)

    return edit


def _linked_run(folder: Path) -> None:
    outside = folder.parent / f"{folder.name}-outside"
    outside.mkdir()
    (outside / "items.csv").write_text("classification:row,reference,prediction\n0,1,1\n")
    (folder / "runs").mkdir(exist_ok=True)
    for line in (folder / "results.jsonl").read_text().splitlines():
        place = folder / json.loads(line)["folder"]
        place.symlink_to(outside)


#: Edits of the folder of a comparison.
COMPARISON: dict[str, Edit] = {
    "deep record": _text("results.jsonl", '{"id":' + "[" * DEEP + "]" * DEEP + "}\n"),
    "record of other types": _records(seed="x", learning_rate=[1]),
    "record with texts for scores": _records(metrics={"metrics": {"test": {"accuracy": "x"}}, "main_metric": 7}),
    "record of a folder outside": _records(folder="../../outside"),
    "record of an absolute folder": _records(folder="/etc"),
    "record of a huge number": _text("results.jsonl", '{"id": "a", "seed": ' + "9" * 4000 + "}\n"),
    "a line of 20 megabytes": _text("results.jsonl", b"{" + b" " * 20 * 2**20 + b"}\n"),
    "runs that are no list": _text("comparison.json", '{"runs": {"a": 1}}'),
    "deep list of runs": _text("comparison.json", '{"runs":' + "[" * DEEP + "]" * DEEP + "}"),
    "study of aliases": _text("study.yaml", ALIASES),
    "deep study": _text("study.yaml", "- " * DEEP),
    "items of texts": _first_items("classification:row,reference,prediction\n0,a,b\n"),
    "run that is a link": _linked_run,
}

#: Texts of YAML files.
TEXTS: dict[str, str] = {
    "deep": "[" * DEEP,
    "deep in blocks": "- " * DEEP,
    "deep in keys": "? " * DEEP,
    "aliases": ALIASES,
    "alias of itself": "a: &a [*a]",
    "many values": "- a\n" * 120_000,
    "large": "a: " + "x" * 10**6,
    "tag": "a: !!python/object/apply:os.system ['true']",
    "date": "a: 2024-13-45",
    "number": "a: " + "9" * 5000,
    "key of a list": "[1]: 2",
    "texts within texts": "task: x\nmodel_name_or_path: y\nmethod: lora\noutput_dir: z\nmethod_args: {r: '"
    + "[" * 2000
    + "'}",
}
