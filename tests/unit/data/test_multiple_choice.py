"""Multiple choice: forms of choices and answers, rows with different numbers of choices, and the families."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from support.backbones import _SPECIAL, _TEXT, _build
from support.tiny_runs import make_backbone, make_tokenizer, options

from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import kind, parse_task
from peft_lab.errors import ConfigError, TaskError
from peft_lab.loading.load_run import load_base
from peft_lab.training.evaluate import predict
from peft_lab.training.run import train

CHOICES = [["rain", "snow"], ["soup", "rice", "song"], ["tune", "drum"]] * 4
RIGHT = [1, 2, 0] * 4


def task_of(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows))
    values = {"name": "t", "kind": "multiple_choice", "data": {"builder": "json", "files": {"train": "rows.json"}}}
    columns = {"question": "q", "choices": "choices", "answer": "answer"}
    return parse_task({**values, "columns": columns, "validation_fraction": 0.25, **changes}, folder / "task.yaml")


def rows_of(answers: list[Any], choices: list[Any] = CHOICES) -> list[dict[str, Any]]:
    pairs = zip(choices, answers, strict=True)
    return [{"q": f"question {n}", "choices": each, "answer": answer} for n, (each, answer) in enumerate(pairs)]


def read(task: Any) -> list[tuple[list[str], int]]:
    splits = load_splits(task)
    found = {}
    for part in (splits.train, splits.validation):
        for row in part:
            found[int(row["question"].split()[1])] = (row["choices"], row["answer"])
    return [found[number] for number in sorted(found)]


EXPECTED = list(zip(CHOICES, RIGHT, strict=True))


@pytest.mark.parametrize(
    ("answers", "changes"),
    [
        (RIGHT, {}),
        ([str(n) for n in RIGHT], {}),
        (["ABC"[n] for n in RIGHT], {}),
        (["abc"[n] for n in RIGHT], {}),
        ([each[n] for each, n in EXPECTED], {}),
        ([n + 1 for n in RIGHT], {"first_choice": 1}),
    ],
    ids=["positions", "digits", "letters", "small letters", "texts", "numbers from 1"],
)
def test_all_forms_of_answers_mean_the_same(answers: Any, changes: Any, tmp_path: Path) -> None:
    assert read(task_of(tmp_path, rows_of(answers), **changes)) == EXPECTED


def test_choices_may_stand_in_columns_or_in_a_mapping(tmp_path: Path) -> None:
    rows = []
    for number, (each, place) in enumerate(EXPECTED):
        cells = dict(zip(("one", "two", "three"), [*each, "", None][:3], strict=True))
        rows.append({"q": f"question {number}", **cells, "answer": place})
    columns = {"question": "q", "choices": ["one", "two", "three"], "answer": "answer"}
    task = task_of(tmp_path / "columns", rows, columns=columns)
    assert task.columns["choices[2]"] == "three"
    assert read(task) == EXPECTED
    # as ARC writes them; some of its answers are numbers, others letters
    named = [{"text": each, "label": ["1", "2", "3"][: len(each)]} for each in CHOICES]
    named[0]["label"] = ["A", "B"]
    answers = [names["label"][place] for names, place in zip(named, RIGHT, strict=True)]
    Dataset.from_list(rows_of(answers, named)).to_parquet(tmp_path / "rows.parquet")
    data = {"builder": "parquet", "files": {"train": str(tmp_path / "rows.parquet")}}
    assert read(task_of(tmp_path / "mapping", [], data=data)) == EXPECTED


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (
            rows_of([*RIGHT[:11], 2]),
            {},
            r'the answer "2" of the train rows is none of its choices \(1 of 12 rows: row 12',
        ),
        (rows_of([n + 1 for n in RIGHT]), {}, 'If they count from 1, set "first_choice: 1"'),
        (rows_of(["A", *RIGHT[1:]]), {}, "all answers are numbers from 0, letters from A, or texts of choices"),
        (rows_of([1, 0] * 6, [["1", "0"]] * 12), {}, "may be the texts of choices or the numbers of choices"),
        (rows_of(RIGHT, [["rain"], *CHOICES[1:]]), {}, r"1 train rows have fewer than two choices \(row 1 of 12\)"),
        (rows_of(RIGHT, [["rain", " "], *CHOICES[1:]]), {}, r"1 train rows have a blank choice \(row 1 of 12\)"),
        (rows_of([" ", *RIGHT[1:]]), {}, r'1 train rows have no answer in column "answer" \(row 1 of 12\)'),
        (rows_of(RIGHT, ["rain, snow"] * 12), {}, "holds string; the choices of a row are a list of texts"),
        ([], {"first_choice": 2}, "0 or 1, not 2"),
        (
            [],
            {"columns": {"question": ["q", "r"], "choices": "c", "answer": "a"}},
            'one column for "question", not a li',
        ),
        (
            [],
            {"columns": {"question": "q", "choices": [], "answer": "a"}},
            'the list of columns for "choices" is empty',
        ),
        ([], {"columns": {"question": "q", "answer": "a"}}, 'needs "columns" to name the column of "choices"'),
    ],
)
def test_what_is_no_choice_is_refused(rows: Any, changes: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=words) as raised:
        load_splits(task_of(tmp_path, rows, **changes))
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("choices") / "bert")


def test_a_choice_is_read_behind_the_question_and_its_context(bert: Path, tmp_path: Path) -> None:
    rows = [{"q": "the rain", "story": "a song", "choices": ["now", "today"], "answer": 0}] * 4
    columns = {"context": "story", "question": "q", "choices": "choices", "answer": "answer"}
    for names, expected in (
        (columns, "[CLS] a song [SEP] the rain now [SEP]"),
        (None, "[CLS] the rain [SEP] now [SEP]"),
    ):
        task = task_of(tmp_path, rows, **({"columns": names} if names else {}))
        rule, splits = kind("multiple_choice"), load_splits(task)
        processor, model = load_base(rule, task, None, str(bert))
        ready = rule.preprocess(splits.validation, processor, task, model)
        assert processor.decode(ready[0]["input_ids"][0]) == expected


def test_rows_with_fewer_choices_have_the_loss_that_they_have_alone(bert: Path, tmp_path: Path) -> None:
    task = task_of(tmp_path, rows_of(RIGHT))
    rule, splits = kind("multiple_choice"), load_splits(task)
    processor, model = load_base(rule, task, None, str(bert))
    rows = list(rule.preprocess(splits.train, processor, task, model))
    collate = rule.data_collator(processor, task, model)
    counts = {len(row["input_ids"]) for row in rows}
    assert counts == {2, 3}
    for one in (model, copy.deepcopy(model)):
        with torch.no_grad():
            together = one(**collate(rows)).loss
            alone = torch.stack([one(**collate([row])).loss for row in rows])
        torch.testing.assert_close(together, alone.mean())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.classifier.weight.zero_()
        assert float(copied(**collate(rows)).loss) != pytest.approx(float(model(**collate(rows)).loss))


def test_prompts_chosen_by_row_reach_each_of_its_choices(bert: Path, tmp_path: Path) -> None:
    rows = [{**row, "domain": "ab"[n % 2]} for n, row in enumerate(rows_of(RIGHT))]
    columns = {"question": "q", "choices": "choices", "answer": "answer", "prompt_ids": "domain"}
    task_of(tmp_path, rows, columns=columns)
    import yaml

    values = {"name": "t", "kind": "multiple_choice", "columns": columns, "validation_fraction": 0.25}
    values["data"] = {"builder": "json", "files": {"train": "rows.json"}}
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(values))
    run = options(path, bert, tmp_path / "out", method="metadata_prompt", max_steps=4, learning_rate=0.5)
    folder = train(run | {"save_strategy": "no"}).output_dir
    inputs = [{"question": "the rain", "choices": each, "domain": name} for each in CHOICES[:2] for name in "ab"]
    together, alone = (predict(folder, inputs, batch_size=size) for size in (4, 1))
    assert [row["label"] for row in together] == [row["label"] for row in alone]
    assert [row["score"] for row in together] == pytest.approx([row["score"] for row in alone], abs=1e-5)
    assert together[0]["score"] != pytest.approx(together[1]["score"], abs=1e-4), "the prompts have an effect"


FAMILIES = {
    "roberta": (hf.RobertaForMultipleChoice, _TEXT | {"max_position_embeddings": 80}),
    "albert": (hf.AlbertForMultipleChoice, _TEXT | {"embedding_size": 8}),
    "electra": (hf.ElectraForMultipleChoice, _TEXT | {"embedding_size": 8}),
    "mpnet": (hf.MPNetForMultipleChoice, _TEXT | {"max_position_embeddings": 80}),
    "deberta-v2": (hf.DebertaV2ForMultipleChoice, _TEXT),
    "distilbert": (
        hf.DistilBertForMultipleChoice,
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64, **_SPECIAL},
    ),
    "camembert": (hf.CamembertForMultipleChoice, _TEXT | {"max_position_embeddings": 80}),
    "xlm-roberta": (hf.XLMRobertaForMultipleChoice, _TEXT | {"max_position_embeddings": 80}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_transformers_choose(family: str, tmp_path: Path) -> None:
    cls, settings = FAMILIES[family]
    _build(cls, **settings).save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "base")
    task = task_of(tmp_path, rows_of(RIGHT))
    rule = kind("multiple_choice")
    processor, model = load_base(rule, task, None, str(tmp_path / "base"))
    inputs = [{"question": "the rain", "choices": each} for each in CHOICES[:3]]
    together, alone = (rule.predict(model, processor, inputs, task, size) for size in (3, 1))
    assert [row["label"] for row in together] == [row["label"] for row in alone]
    assert [row["score"] for row in together] == pytest.approx([row["score"] for row in alone], abs=1e-5)


@pytest.mark.parametrize(
    "value",
    ["a question", {"question": "a"}, {"question": "a", "choices": ["b"]}, {"question": 1, "choices": ["b", "c"]}],
)
def test_an_input_that_is_no_choice_is_refused(value: Any, bert: Path, tmp_path: Path) -> None:
    task, rule = task_of(tmp_path, rows_of(RIGHT)), kind("multiple_choice")
    processor, model = load_base(rule, task, None, str(bert))
    with pytest.raises(TaskError, match=r"an input of this task is a mapping of question.*\(input 1\)"):
        rule.predict(model, processor, [value], task)


def test_a_decoder_has_no_head_for_it(tmp_path: Path) -> None:
    from support.tiny_runs import make_decoder

    with pytest.raises(ConfigError, match="choose one that transformers loads by AutoModelForMultipleChoice") as raised:
        load_base(kind("multiple_choice"), task_of(tmp_path, []), None, str(make_decoder(tmp_path / "llama")))
    assert "\n" not in str(raised.value)


def test_labels_are_smoothed_only_where_they_are_classes(bert: Path, tmp_path: Path) -> None:
    from support.kind_rows import write_task

    for name in ("multiple_choice", "multi_label", "regression"):
        run = options(write_task(tmp_path / name, name), bert, tmp_path / "out", label_smoothing_factor=0.1)
        with pytest.raises(ConfigError, match=r"label_smoothing_factor=0.1 is for answers that are one class"):
            train(run)
