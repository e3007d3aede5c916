"""What a run has tokenised is found again by a later one, and by none that would tokenise otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from support.tiny_runs import environment, make_backbone, make_task, options
from transformers import AutoTokenizer

from peft_lab.data.row_maps import identity_of_tokenizer, map_options, map_rows
from peft_lab.training.run import train

FULL = pytest.mark.full


@pytest.fixture
def rows(tmp_path: Path) -> Dataset:
    Dataset.from_dict({"x": [1, 2, 3, 4]}).save_to_disk(str(tmp_path / "rows"))
    return Dataset.load_from_disk(str(tmp_path / "rows"))


def test_results_are_kept_by_what_they_depend_on(rows: Dataset) -> None:
    calls = []

    def add(row: dict[str, Any]) -> dict[str, Any]:
        calls.append(row["x"])
        return {"y": row["x"] + 1}

    assert map_rows(rows, add, ["a"])["y"][:] == [2, 3, 4, 5]
    assert len(calls) == 4
    map_rows(rows, add, ["a"])
    assert len(calls) == 4
    map_rows(rows, add, ["b"])
    assert len(calls) == 8
    map_rows(rows.select([0, 1]), add, ["a"])
    assert len(calls) == 10
    with map_options(None, True):
        map_rows(rows, add, ["a"])
    assert len(calls) == 14

    def other(row: dict[str, Any]) -> dict[str, Any]:
        return {"y": row["x"] * 2}

    assert map_rows(rows, other, ["a"])["y"][:] == [2, 4, 6, 8]


def test_a_tokenizer_is_known_by_its_tokens_and_not_by_its_use(tmp_path: Path) -> None:
    path = make_backbone(tmp_path / "bert")
    tokenizer, used = AutoTokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    used("the rain", truncation=True, max_length=3, padding="max_length")
    assert identity_of_tokenizer(tokenizer) == identity_of_tokenizer(used)
    used.add_tokens(["hail"])
    assert identity_of_tokenizer(tokenizer) != identity_of_tokenizer(used)
    used = AutoTokenizer.from_pretrained(path)
    used.chat_template = "{{ messages }}"
    assert identity_of_tokenizer(tokenizer) != identity_of_tokenizer(used)


@FULL
def test_a_second_run_does_not_tokenise_again(tmp_path: Path) -> None:
    """Both in processes of their own, with another seed of Python's hashes."""
    task, base = make_task(tmp_path / "texts"), make_backbone(tmp_path / "base")
    values = options(task, base, tmp_path / "out", max_steps=13, save_strategy="no")  # more than an epoch
    code = """
        import json, sys
        from datasets import Dataset
        worked = []
        plain = Dataset._map_single
        def counting(*args, **kwargs):
            worked.append(kwargs.get("desc") or (args[0] if args else kwargs["shard"]).column_names)
            yield from plain(*args, **kwargs)
        Dataset._map_single = staticmethod(counting)
        from peft_lab.training.run import train
        train(json.loads(sys.argv[1]))
        print("WORKED", len(worked))
    """

    def run(number: int, **changes: Any) -> int:
        given = values | {"output_dir": str(tmp_path / f"out{number}")} | changes
        where = environment({"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONHASHSEED": str(number)})
        command = [sys.executable, "-c", textwrap.dedent(code), json.dumps(given)]
        done = subprocess.run(command, capture_output=True, text=True, env=where, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.rpartition("WORKED")[2])

    first = run(1)
    assert first >= 3
    assert run(2, seed=5) == 0
    assert run(3, overwrite_cache=True) == first
    task.write_text(yaml.safe_dump(yaml.safe_load(task.read_text()) | {"max_length": 4}))
    assert run(4) == 3  # labels are those of before


@FULL
def test_several_processes_tokenise_the_same_rows(tmp_path: Path) -> None:
    task, base = make_task(tmp_path / "texts"), make_backbone(tmp_path / "bert")
    one = train(options(task, base, tmp_path / "one", max_steps=13, overwrite_cache=True))
    more = {"preprocessing_num_workers": 2, "overwrite_cache": True}
    two = train(options(task, base, tmp_path / "two", max_steps=13, **more))
    assert one.metrics["metrics"] == two.metrics["metrics"]
    assert list(one.trainer.train_dataset) == list(two.trainer.train_dataset)
