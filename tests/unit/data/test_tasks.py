"""Tasks: the closed schema, the registry, and what `load_splits` makes of data."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

import peft_lab.data.task_registry as task_module
from peft_lab import registry
from peft_lab.data.splits import fingerprint, load_splits, subset
from peft_lab.data.task_registry import kind, list_tasks, load_task, parse_task, validate_task
from peft_lab.errors import TaskError
from peft_lab.registry import list_kinds

BUILTIN = list_tasks()
LOCAL = [name for name, task in BUILTIN.items() if task.where.startswith("$")]
needs_data = pytest.mark.skipif(not os.environ.get("PEFT_LAB_DATA"), reason="PEFT_LAB_DATA is not set")

TEXT: dict[str, Any] = {
    "name": "t",
    "kind": "text_classification",
    "data": {"builder": "csv", "files": {"train": "train.csv"}},
    "columns": {"text": "sentence", "label": "topic"},
}
PROMPT: dict[str, Any] = {
    "name": "p",
    "kind": "causal_lm",
    "data": {"builder": "json", "files": {"train": "train.jsonl"}},
    "template": {"prompt": "Q: {question}", "answer": "{answer}"},
}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def topics(count: int = 60, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"sentence": f"sentence {i}", "topic": ["music", "food", "weather"][i % 3]} for i in range(start, start + count)
    ]


def make(folder: Path, values: dict[str, Any] = TEXT, **changes: Any) -> Any:
    """Write a task file into a folder and load it; a change of None removes the key."""
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_task(path)


# --- built-in tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_task_is_complete(name: str) -> None:
    task = validate_task(name)
    assert all((task.title, task.description, task.version, task.licence, task.citation, task.homepage))
    assert "test" in task.splits or task.test_fraction > 0
    assert task.kind in list_kinds()


def test_a_shipped_data_file_is_small_and_has_its_licence() -> None:
    folder = BUILTIN["snips"].folder / "data"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 1_700_000
    for part in folder.iterdir():
        assert "Licence:" in (part / "README.md").read_text(encoding="utf-8")


def test_tasks_are_listed_and_checked_without_torch_and_datasets(tmp_path: Path) -> None:
    make(tmp_path)
    write_csv(tmp_path / "train.csv", topics())
    code = (
        "import sys, peft_lab; from peft_lab.data.task_registry import validate_task; "
        f"peft_lab.list_tasks(); peft_lab.list_kinds(); validate_task({str(tmp_path / 'task.yaml')!r}); "
        "print(sorted({'torch', 'datasets', 'transformers', 'evaluate', 'sklearn'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize(("name", "sizes"), [("snips", (12406, 1378, 700)), ("sign-digits", (1496, 166, 400))])
def test_a_shipped_task_loads(name: str, sizes: tuple[int, ...]) -> None:
    task = BUILTIN[name]
    splits = load_splits(task, test=True)
    assert splits.test is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
    assert splits.labels == task.labels
    for rows in (splits.train, splits.validation, splits.test):
        assert set(rows["label"][:]) == set(range(len(task.labels)))
        assert set(rows.column_names) == set(task.columns)


def test_the_fingerprint_of_shipped_data_is_the_same_on_every_machine() -> None:
    test = load_splits(BUILTIN["snips"], test=True).fingerprints["test"]
    assert test == "5c1d9553c5298d9cf67ea0a60b0b73bb"


@pytest.mark.full
@needs_data
@pytest.mark.parametrize("name", LOCAL)
def test_a_local_task_loads(name: str) -> None:
    task = validate_task(name)
    splits = load_splits(task, test=True)
    assert splits.test is not None
    assert min(len(splits.train), len(splits.validation), len(splits.test)) >= 18
    row = splits.train[0]
    assert set(row) == set(task.columns)
    if task.template is not None:
        assert all(text.strip() for text in task.template.render(row))
    if task.template is not None and "exact_match" in task.metrics:
        for row in splits.test.select(range(18)):
            written = task.template.render(row)[1]
            assert task.template.found(written) == task.template.target(row) != "", "a perfect answer must count as one"
    if task.template is not None and "coverage" in task.metrics:
        shares = [task.template.coverage(*task.template.render(row)) for row in splits.test.select(range(300))]
        assert 0.7 < sum(shares) / len(shares) <= 1, "people's answers must hold most of what the prompts ask for"
    if splits.labels:
        assert set(splits.validation["label"][:]) <= set(range(len(splits.labels)))


# --- the schema -----------------------------------------------------------------------------------------------------

HOSTILE = [
    (TEXT, {"colums": {}}, 'unknown key "colums" in a task. Did you mean "columns"?'),
    (TEXT, {"kind": "text_clasification"}, 'Did you mean "text_classification"?'),
    (TEXT, {"kind": None}, 'the key "kind" is missing'),
    (TEXT, {"name": "../up"}, "lower case letters"),
    (TEXT, {"name": 7}, '"name" in a task must be text, not a whole number'),
    (TEXT, {"columns": {"text": "sentence"}}, 'column of "label"'),
    (TEXT, {"columns": {"text": "a", "label": "b", "txt_pair": "c"}}, 'Did you mean "text_pair"?'),
    (TEXT, {"columns": {"text": "a", "label": "a"}}, '"a" is named for two purposes'),
    (TEXT, {"labels": [False, True]}, "put label names in quotes"),
    (TEXT, {"labels": ["a"]}, "at least two names"),
    (TEXT, {"labels": ["a", "b", "a"]}, 'the label "a" is given twice'),
    (TEXT, {"labels": ["a", "b"], "problem_type": "regression"}, 'a regression has no "labels"'),
    (TEXT, {"problem_type": "regresion"}, 'Did you mean "regression"?'),
    (TEXT, {"max_length": "long"}, '"max_length" in a task must be a whole number, not text'),
    (TEXT, {"max_length": True}, "must be a whole number, not true or false"),
    (TEXT, {"max_length": 0}, "at least 1"),
    (TEXT, {"image_size": 96}, '"image_size" has no meaning for the kind "text_classification"'),
    (TEXT, {"template": {"prompt": "{a}", "answer": "{b}"}}, '"template" has no meaning'),
    (TEXT, {"validation_fraction": 0.9}, "at most 0.5"),
    (TEXT, {"splits": {"train": "train"}}, '"splits" is for Hub data sets'),
    (TEXT, {"metrics": ["acuracy"]}, 'Unknown metric "acuracy". Did you mean "accuracy"?'),
    (TEXT, {"metrics": ["pearsonr"]}, "does not fit this kind of task; fitting: accuracy"),
    (TEXT, {"metrics": ["someone/metric"]}, "What strangers keep on the Hub is not run"),
    (TEXT, {"metrics": []}, '"metrics" is empty'),
    (TEXT, {"trust_remote_code": True}, 'unknown key "trust_remote_code"'),
    (TEXT, {"data": {"path": "./here"}}, "is no Hub id"),
    (TEXT, {"data": {"path": "nyu-mll/glue", "trust_remote_code": True}}, "unknown key"),
    (TEXT, {"data": {"path": "nyu-mll/glue", "name": "cola"}}, "`splits: {train: train}`"),
    (TEXT, {"data": {"path": "nyu-mll/glue", "revision": 12}}, 'Put it in quotes: "12"'),
    (
        TEXT,
        {"data": {"builder": "pickle", "files": {"train": "x"}}},
        '"builder" in the "data" of local files must be one of csv, json',
    ),
    (TEXT, {"data": {"builder": "csv", "files": {"test": "x"}}}, 'at least the file of "train"'),
    (TEXT, {"data": {"builder": "csv", "files": {"train": "x", "dev": "y"}}}, 'unknown key "dev"'),
    (TEXT, {"data": {"builder": "csv", "files": {"train": "https://host/x.csv"}}}, "is an address"),
    (TEXT, {"data": {"builder": "csv", "files": {"train": "${HOME}/x.csv"}}}, "only a leading ${PEFT_LAB_DATA}"),
    (TEXT, {"data": {"builder": "csv", "files": {"train": "a/${PEFT_LAB_DATA}/x"}}}, "only a leading"),
    (TEXT, {"data": {"builder": "csv", "files": {"train": "x"}, "options": {"converters": {}}}}, '"converters"'),
    (
        TEXT,
        {"data": {"builder": "csv", "files": {"train": "x"}, "options": {"quoting": "never"}}},
        '"quoting" in the options of csv must be',
    ),
    (PROMPT, {"template": None}, 'needs a "template"'),
    (PROMPT, {"template": {"prompt": "{a}"}}, 'the template needs "answer"'),
    (PROMPT, {"template": {"prompt": "{a.__class__}", "answer": "{b}", "x": 1}}, 'unknown key "x"'),
    (PROMPT, {"template": {"prompt": "{a[0]}", "answer": "{b}"}}, "must be a plain column name"),
    (PROMPT, {"template": {"prompt": "{a!r}", "answer": "{b}"}}, "must be a plain column name"),
    (PROMPT, {"template": {"prompt": "{a", "answer": "{b}"}}, "write a literal brace twice"),
    (PROMPT, {"template": {"prompt": "{a}", "answer": "{b}", "extract": "("}}, "is no regular expression"),
    (PROMPT, {"template": {"prompt": "{a}", "answer": "{b}", "extract": "x"}}, "exactly one group"),
    (PROMPT, {"template": {"prompt": "{a}", "answer": "{b}", "required": "("}}, "is no regular expression"),
    (PROMPT, {"template": {"prompt": "{a}", "answer": "{b}", "required": "x"}}, "must have exactly one group"),
    (PROMPT, {"template": {"prompt": "{a}", "answer": "{b}", "required": "(x)"}}, "go together"),
    (PROMPT, {"metrics": ["perplexity", "coverage"]}, '"coverage" and the key "required"'),
    (PROMPT, {"metrics": ["rouge_l", "perplexity"]}, 'cannot be "rouge_l"'),
    (TEXT, {"metrics": ["rouge_l"]}, "does not fit this kind of task"),
    (PROMPT, {"metrics": ["accuracy"]}, "does not fit this kind of task"),
    (PROMPT, {"metrics": ["exact_match"]}, "put it last"),
    (PROMPT, {"chat_template": "chatml"}, '"chat_template" has no effect'),
    (PROMPT, {"labels": ["a", "b"]}, '"labels" has no meaning'),
]


@pytest.mark.parametrize(("base", "change", "message"), HOSTILE, ids=[message for _, _, message in HOSTILE])
def test_a_wrong_task_is_refused_in_one_sentence(base: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError) as raised:
        parse_task({key: value for key, value in {**base, **change}.items() if value is not None})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: !!python/object/apply:os.system ['true']", "is not readable YAML or JSON"),
        ("name: !mine x", "is not readable YAML or JSON"),
        ("name: a\nname: b", 'the key "name" is given twice'),
        ("data: {path: a, path: b}", 'the key "path" is given twice'),
        ("- a\n- b", "must be a mapping"),
        ("", "must be a mapping"),
        ("name: [a", "is not readable YAML or JSON"),
        ("[" * 5000, "is not"),
        ("a: &a [x]\nb: [*a, *a]", 'unknown key "a"'),
    ],
)
def test_a_hostile_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TaskError, match=re.escape(message)) as raised:
        load_task(path)
    assert str(path) in str(raised.value)


def test_unknown_names_and_files_get_an_answer(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match='Did you mean "snips"'):
        load_task("snps")
    with pytest.raises(TaskError, match="does not exist"):
        load_task(tmp_path / "none.yaml")
    with pytest.raises(TaskError, match='Did you mean "causal_lm"'):
        kind("causal-lm")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="cannot be read as UTF-8"):
        load_task(tmp_path / "bytes.yaml")


def test_validate_wants_the_files_to_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    with pytest.raises(TaskError, match=r"the train file .*train\.csv does not exist"):
        validate_task(tmp_path / "task.yaml")
    write_csv(tmp_path / "train.csv", topics())
    assert validate_task(tmp_path / "task.yaml").metrics == ("accuracy",)
    monkeypatch.delenv("PEFT_LAB_DATA", raising=False)
    task = make(tmp_path, data={"builder": "csv", "files": {"train": "${PEFT_LAB_DATA}/train.csv"}})
    assert validate_task(tmp_path / "task.yaml") == task, "the form can be checked without the data"
    with pytest.raises(TaskError, match="set the environment variable PEFT_LAB_DATA"):
        load_splits(task)
    monkeypatch.setenv("PEFT_LAB_DATA", str(tmp_path))
    assert len(load_splits(task).train) == 54


def test_the_ten_lines_of_the_readme_are_a_task(tmp_path: Path) -> None:
    text = (BUILTIN["snips"].folder / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert block is not None
    lines = block[1].strip().splitlines()
    assert len(lines) == 10
    (tmp_path / "my_task.yaml").write_text(block[1], encoding="utf-8")
    rows = [{"review": f"film {i}", "verdict": ["good", "bad"][i % 2]} for i in range(50)]
    write_csv(tmp_path / "reviews.csv", rows)
    splits = load_splits(validate_task(tmp_path / "my_task.yaml"), test=True)
    assert splits.labels == ("bad", "good")
    assert splits.test is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (36, 4, 10)


def test_the_readme_names_every_key() -> None:
    from peft_lab.data.task_schema import Task

    text = (BUILTIN["snips"].folder / "README.md").read_text(encoding="utf-8")
    assert not [key for key in Task.model_fields if f"`{key}`" not in text]


# --- third parties --------------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "other_tasks"
    package.mkdir()
    (package / "__init__.py").write_text(
        textwrap.dedent("""
        from peft_lab.registry import KindInfo
        from peft_lab.data.kind import Kind

        KIND = KindInfo(name="counting", title="counts", runtime="Count", columns={"text": True}, metrics=("accuracy",))

        class Count(Kind):
            info = KIND
        """)
    )
    (package / "counts.yaml").write_text(
        yaml.safe_dump({**TEXT, "name": "counts", "kind": "counting", "columns": {"text": "sentence"}})
    )
    info = tmp_path / "other_tasks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-tasks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[peft_lab.tasks]\ncount = other_tasks\ngone = no_such_module.here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "other_tasks", raising=False)
    for cached in (task_module._installed_tasks, task_module.kind, registry.list_kinds):
        cached.cache_clear()
    yield package
    for cached in (task_module._installed_tasks, task_module.kind, registry.list_kinds):
        cached.cache_clear()


def test_a_third_party_brings_kinds_and_tasks(plugin: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert list_tasks()["counts"].origin == plugin / "counts.yaml"
    assert set(list_tasks()) == {*BUILTIN, "counts"}
    assert list_kinds()["counting"].title == "counts"
    assert "no_such_module" in caplog.text


def test_a_broken_third_party_task_does_not_hide_the_others(plugin: Path, caplog: pytest.LogCaptureFixture) -> None:
    (plugin / "counts.yaml").write_text("name: counts\nkind: nothing\n")
    (plugin / "snips.yaml").write_text(yaml.safe_dump({**TEXT, "name": "snips"}))
    assert set(list_tasks()) == set(BUILTIN)
    assert list_tasks()["snips"].data.builder == "json", "a third party cannot replace a built-in task"
    assert "counts.yaml" in caplog.text


# --- data -----------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_complete_stratified_and_fixed(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", sorted(topics(300), key=lambda row: row["topic"]))
    task = make(tmp_path, test_fraction=0.2, validation_fraction=0.25)
    first, second = load_splits(task, test=True), load_splits(task, test=True)
    assert first.test is not None
    parts = [set(rows["text"][:]) for rows in (first.train, first.validation, first.test)]
    assert [len(part) for part in parts] == [180, 60, 60]
    assert len(set.union(*parts)) == 300
    for rows in (first.train, first.validation, first.test):
        assert len(set(Counter(rows["label"][:]).values())) == 1
    assert first.fingerprints == second.fingerprints
    assert first.fingerprint == load_splits(task).fingerprint, "reading the test rows changes nothing"
    assert set(load_splits(task, seed=1).validation["text"][:]) != parts[1]
    again = make(tmp_path, test_fraction=0.2, validation_fraction=0.25, split_seed=1)
    assert load_splits(again).fingerprint == load_splits(task, seed=1).fingerprint


def test_the_test_rows_are_read_only_when_asked_for(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", topics())
    (tmp_path / "test.csv").write_text("nothing\nof use\n")
    task = make(tmp_path, data={"builder": "csv", "files": {"train": "train.csv", "test": "test.csv"}})
    assert load_splits(task).test is None
    with pytest.raises(TaskError, match=r'the test data has no column "topic" for "label". Columns: nothing'):
        load_splits(task, test=True)
    with pytest.raises(TaskError, match="has no test rows"):
        load_splits(make(tmp_path), test=True)


def test_a_validation_split_of_the_source_is_used(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", topics())
    write_csv(tmp_path / "dev.csv", topics(9, start=100))
    task = make(tmp_path, data={"builder": "csv", "files": {"train": "train.csv", "validation": "dev.csv"}})
    splits = load_splits(task)
    assert len(splits.train) == 60
    assert splits.validation["text"][:] == [f"sentence {i}" for i in range(100, 109)]
    with pytest.raises(TaskError, match='"validation_fraction" has no effect'):
        make(
            tmp_path,
            data={"builder": "csv", "files": {"train": "train.csv", "validation": "dev.csv"}},
            validation_fraction=0.1,
        )


def test_labels_are_names_or_positions(tmp_path: Path) -> None:
    rows = [{"sentence": f"s {i}", "topic": i % 3} for i in range(60)]
    write_csv(tmp_path / "train.csv", rows)

    def numbers(rows: Any) -> set[tuple[int, int]]:
        return {(int(row["text"].split()[1]) % 3, row["label"]) for row in rows}

    named = load_splits(make(tmp_path, labels=["zero", "one", "two"]))
    assert numbers(named.train) == {(0, 0), (1, 1), (2, 2)}
    assert load_splits(make(tmp_path)).labels == ("0", "1", "2")
    odd = load_splits(make(tmp_path, labels=["2", "1", "0"]))
    assert numbers(odd.train) == {(0, 2), (1, 1), (2, 0)}
    with pytest.raises(TaskError, match='label "2" of the train rows is not one of no, yes'):
        load_splits(make(tmp_path, labels=["no", "yes"]))


def test_a_label_that_training_has_not_seen_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", topics())
    write_csv(tmp_path / "test.csv", [{"sentence": "x", "topic": "musik"}])
    task = make(tmp_path, data={"builder": "csv", "files": {"train": "train.csv", "test": "test.csv"}})
    with pytest.raises(TaskError, match=r'"musik" of the test rows is not one of food, music.*Did you mean "music"'):
        load_splits(task, test=True)


def test_free_text_is_no_label(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [{"sentence": str(i), "topic": f"unique {i}"} for i in range(1200)])
    with pytest.raises(TaskError, match="1200 different values, which is no classification"):
        load_splits(make(tmp_path))


def test_rare_classes_are_drawn_at_random_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_csv(tmp_path / "train.csv", [*topics(40), {"sentence": "alone", "topic": "rare"}])
    splits = load_splits(make(tmp_path))
    assert len(splits.train) + len(splits.validation) == 41
    assert "some classes are rare" in caplog.text


def test_words_that_pandas_takes_for_missing_stay_words(tmp_path: Path) -> None:
    words = ["null", "None", "NA", "nan", "", "n/a", "007"]
    rows = [{"sentence": words[i % 7], "topic": i % 2} for i in range(70)]
    write_csv(tmp_path / "train.csv", rows)
    splits = load_splits(make(tmp_path, empty_rows="keep"))
    assert set(splits.train["text"][:]) == set(words)


def test_missing_texts_are_an_error(tmp_path: Path) -> None:
    lines = [json.dumps({"sentence": None if i == 3 else "x", "topic": i % 2}) for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    task = make(tmp_path, data={"builder": "json", "files": {"train": "train.jsonl"}})
    with pytest.raises(TaskError, match=r'1 train rows have no value in column "sentence" \(row 4 of 20\)'):
        load_splits(task)


def test_the_fingerprint_is_of_the_content_only(tmp_path: Path) -> None:
    """csv, zipped JSON lines and shards of parquet with the same rows agree; one changed cell does not."""
    from datasets import Dataset

    rows = topics()
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "train.csv", rows)
        found.append(load_splits(make(tmp_path / name)).fingerprint)
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in rows))
    found.append(
        load_splits(make(tmp_path, data={"builder": "json", "files": {"train": "train.jsonl.gz"}})).fingerprint
    )
    for index in (0, 1):
        Dataset.from_list(rows[index * 30 : index * 30 + 30]).to_parquet(tmp_path / f"p-{index}.parquet")
    found.append(
        load_splits(make(tmp_path, data={"builder": "parquet", "files": {"train": "p-*.parquet"}})).fingerprint
    )
    assert len(set(found)) == 1
    rows[7]["sentence"] += "!"
    write_csv(tmp_path / "train.csv", rows)
    assert load_splits(make(tmp_path)).fingerprint not in found


def test_a_fingerprint_keeps_cells_apart() -> None:
    from datasets import Dataset

    one, two = Dataset.from_dict({"a": ["ab"], "b": ["c"]}), Dataset.from_dict({"a": ["a"], "b": ["bc"]})
    three = Dataset.from_dict({"b": ["ab"], "a": ["c"]})
    assert len({fingerprint(rows) for rows in (one, two, three)}) == 3


def test_an_image_folder_maps_classes_by_name(tmp_path: Path) -> None:
    """The test folder lacks a class, so its own numbering would be shifted by one."""
    from PIL import Image

    for split, classes in (("train", "abc"), ("test", "bc")):
        for name in classes:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(10):
                Image.new("L" if index % 2 else "RGB", (8, 8), index).save(folder / f"{index}.png")
    task = make(
        tmp_path,
        kind="image_classification",
        data={"builder": "imagefolder", "files": {"train": "train", "test": "test"}},
        columns={"image": "image", "label": "label"},
    )
    splits = load_splits(task, test=True)
    assert splits.labels == ("a", "b", "c")
    assert splits.test is not None
    assert Counter(splits.test["label"][:]) == {1: 10, 2: 10}
    assert {image.mode for image in splits.test["image"][:]} == {"RGB"}
    before = splits.fingerprints["test"]
    Image.new("RGB", (8, 8), 99).save(tmp_path / "test" / "b" / "3.png")
    assert load_splits(task, test=True).fingerprints["test"] != before


def test_a_column_of_file_names_is_no_image(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", topics())
    task = make(tmp_path, kind="image_classification", columns={"image": "sentence", "label": "topic"})
    with pytest.raises(TaskError, match=r"holds .*string, not images; use the builder imagefolder"):
        load_splits(task)


def test_data_of_the_hub_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: Any, **kwargs: Any) -> None:
        assert kwargs == {"revision": None, "split": "train"}
        raise ConnectionError("no way\nout")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(TaskError, match='cannot be read from "nyu-mll/glue" of the Hub: no way out') as raised:
        load_splits(load_task("glue-cola"))
    assert "\n" not in str(raised.value)


def test_a_subset_is_drawn_from_everywhere(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", sorted(topics(300), key=lambda row: row["topic"]))
    rows = load_splits(make(tmp_path)).train.sort("label")
    some = subset(rows, 60, seed=0)
    assert set(some["label"][:]) == {0, 1, 2}
    assert some["text"][:] == subset(rows, 60, seed=0)["text"][:]
    assert subset(rows, None) is rows
    assert subset(rows, 10**6) is rows


def test_a_key_of_one_kind_is_read_by_that_kind_alone(plugin: Path) -> None:
    card = (
        (plugin / "__init__.py")
        .read_text()
        .replace('metrics=("accuracy",)', 'metrics=("accuracy",), options={"least": 2}')
    )
    (plugin / "__init__.py").write_text(card)
    registry.list_kinds.cache_clear()
    own = {**TEXT, "name": "counts", "kind": "counting", "columns": {"text": "sentence"}}
    assert parse_task(own).options == {"least": 2}
    assert parse_task({**own, "least": 5}).options == {"least": 5}
    with pytest.raises(TaskError, match='"least" in a task must be a whole number'):
        parse_task({**own, "least": "five"})
    with pytest.raises(TaskError, match='"least" has no meaning for the kind "text_classification"'):
        parse_task({**TEXT, "least": 5})
