"""A task's column of domains chooses each row's prompts, in training, evaluation and prediction; others go without."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from peft import get_peft_model
from support.tiny_runs import make_backbone, make_decoder, make_image_backbone, make_image_task, options

from peft_lab.adapters.sequence.metadata_prompt import MetadataPromptConfig
from peft_lab.data import prompt_column
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import parse_task
from peft_lab.errors import ConfigError, TaskError
from peft_lab.loading.load_run import load
from peft_lab.training.evaluate import evaluate, predict
from peft_lab.training.run import prepare, train

DOMAINS = ["press", "novel", "letter"]
#: What a row's domain alone decides; the sentences say nothing of it.
LABEL = {"press": "yes", "novel": "no", "letter": "yes"}
OF_DOMAINS = {"num_prompts": 4, "deep": True}


def make_domains(folder: Path, **changes: Any) -> Path:
    """A task whose label is a function of the column `domain`; a test row has a domain that no training row has."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 48), ("validation", 12), ("test", 13)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence", "domain", "verdict"])
            for index in range(count):
                domain = DOMAINS[index % 3] if index < 12 or split == "train" else "poem"
                words = ["the song", "a soup", "some rain", "the band"][index // 3 % 4]
                writer.writerow([words, domain, LABEL.get(domain, "yes")])
    values = {
        "name": "domains",
        "kind": "text_classification",
        "data": {"builder": "csv", "files": {s: f"{s}.csv" for s in ("train", "validation", "test")}},
        "columns": {"text": "sentence", "label": "verdict", "prompt_ids": "domain"},
    }
    path = folder / "domains.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**values, **changes}.items() if v is not None}))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains")
    return {"task": make_domains(folder / "data"), "bert": make_backbone(folder / "bert"), "folder": folder}


@pytest.fixture(scope="module")
def trained(place):
    """A run whose rows can be told apart by their domain alone."""
    run = options(place["task"], place["bert"], place["folder"] / "out", method="metadata_prompt", max_steps=60)
    return train(run, method_args=OF_DOMAINS, per_device_train_batch_size=16, learning_rate=3e-2)


def test_a_domain_decides_where_nothing_else_does(trained):
    assert trained.metrics["metrics"]["validation"]["accuracy"] == 1.0
    config = trained.model.active_peft_config
    assert (config.modes, config.prompt_values) == (3, ["letter", "novel", "press"])


def test_the_mapping_is_kept_with_the_adapter(trained, place, caplog):
    saved = json.loads((trained.output_dir / "adapter_config.json").read_text())
    assert saved["prompt_values"] == ["letter", "novel", "press"]
    assert evaluate(trained.output_dir, split="validation")["accuracy"] == 1.0
    # another order of the values in another task file changes nothing, and the adapter's own counts
    other = make_domains(place["folder"] / "other", prompt_values=["press", "letter", "novel"])
    assert evaluate(trained.output_dir, str(other), split="validation")["accuracy"] == 1.0
    caplog.clear()
    assert evaluate(trained.output_dir, split="test")["accuracy"] == 1.0  # "poem" is read as the set 0, "letter"
    assert "Unknown values for prompt_ids (poem) take the prompts of set 0." in caplog.text


def test_predict_takes_the_domain_from_the_rows(trained, tmp_path):
    rows = [{"sentence": "the song", "domain": domain} for domain in DOMAINS]
    answers = [answer["label"] for answer in predict(trained.output_dir, rows, batch_size=2)]
    assert answers == [LABEL[domain] for domain in DOMAINS]
    (tmp_path / "rows.csv").write_text("text,prompt_ids\nthe song,novel\nthe song,press\n")
    assert [answer["label"] for answer in predict(trained.output_dir, str(tmp_path / "rows.csv"))] == ["no", "yes"]
    assert predict(trained.output_dir, "the song")[0]["label"] == LABEL["letter"]


def test_each_domain_trains_its_own_prompts(place, tmp_path):
    with prepare(options(place["task"], place["bert"], tmp_path, method="metadata_prompt", max_steps=100)) as trainer:
        rows = trainer.train_dataset
        assert rows["prompt_ids"][:6] == [2, 1, 0] * 2
        name, table = next((n, p) for n, p in trainer.model.named_parameters() if "metadata_prompt_table" in n)
        assert table.shape[0] == 3, name
        for mode in range(3):
            table.grad = None
            chosen = rows.select([i for i, m in enumerate(rows["prompt_ids"]) if m == mode][:4])
            trainer.model(**trainer.data_collator(list(chosen))).loss.backward()
            assert [bool(part.abs().sum() > 0) for part in table.grad] == [m == mode for m in range(3)]


@pytest.mark.parametrize("method", ["lora", "soft_prompt", "head"])
def test_other_methods_do_not_see_the_column(place, tmp_path, method):
    with prepare(options(place["task"], place["bert"], tmp_path, method=method, max_steps=100)) as trainer:
        assert "prompt_ids" not in trainer.train_dataset.column_names
        trainer.model(**trainer.data_collator(list(trainer.train_dataset.select(range(2)))))


def test_images(tmp_path):
    path = make_image_task(tmp_path)
    for split in ("train", "validation", "test"):
        file = tmp_path / f"{split}.parquet"
        rows = Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
        rows.add_column("lens", [index % 2 + 7 for index in range(len(rows))]).to_parquet(file)
    task = yaml.safe_load(path.read_text())
    task["columns"]["prompt_ids"] = "lens"
    path.write_text(yaml.safe_dump(task))
    backbone = make_image_backbone(tmp_path / "vit")
    result = train(options(path, backbone, tmp_path / "out", method="metadata_prompt", max_steps=2))
    assert result.model.active_peft_config.prompt_values == ["7", "8"]
    batch = result.trainer.data_collator([result.trainer.train_dataset[i] for i in range(4)])
    assert batch["prompt_ids"].tolist() == [0, 1, 0, 1]
    images = [{"image": str(tmp_path / "test.png"), "lens": lens} for lens in (7, 8)]
    scores = [answer["score"] for answer in predict(result.output_dir, images)]
    apart = [predict(result.output_dir, [image])[0]["score"] for image in images]
    assert scores == pytest.approx(apart, abs=1e-5)


def test_written_answers(tmp_path):
    """Rows with the same prompt and other domains are written apart, and each with the prompts of its own."""
    task = make_domains(
        tmp_path / "data",
        kind="causal_lm",
        template={"prompt": "{sentence}", "answer": "{verdict}"},
        columns={"prompt_ids": "domain"},
        metrics=["perplexity", "exact_match"],
        max_new_tokens=3,
    )
    out = tmp_path / "out"
    run = options(task, make_decoder(tmp_path / "llama"), out, method="metadata_prompt", method_args=OF_DOMAINS)
    result = train(run, max_steps=4, learning_rate=1.0)
    assert set(result.trainer.train_dataset[0]) == {"input_ids", "attention_mask", "labels", "prompt_ids"}
    loaded = load(out)
    rows = [{"sentence": "the song", "domain": domain} for domain in DOMAINS]
    ids = prompt_column.ids_of_inputs(rows, loaded.model, loaded.task)
    assert ids == [2, 1, 0]
    alone = [predict(out, [row])[0] for row in rows]
    assert predict(out, rows, batch_size=2) == alone
    raw = Dataset.from_list([{"sentence": "the song", "verdict": "x", "prompt_ids": number} for number in ids])
    seen = []
    written = loaded.kind.predict

    def keep(*args: Any, **kwargs: Any) -> Any:
        seen.extend(written(*args, **kwargs))
        return seen[-len(args[2]) :]

    loaded.kind.predict = keep
    try:
        loaded.kind.generation_scores(loaded.model, loaded.processor, raw, loaded.task)
    finally:
        del loaded.kind.predict
    assert seen == alone


def test_values_are_texts_names_or_whole_numbers(tmp_path):
    sentences = [{"sentence": "a", "verdict": "yn"[i % 2], "domain": 9 + i % 3} for i in range(20)]
    Dataset.from_list(sentences).to_json(tmp_path / "train.jsonl")
    values = {"name": "t", "kind": "text_classification"}
    values["data"] = {"builder": "json", "files": {"train": "train.jsonl"}}
    values["columns"] = {"text": "sentence", "label": "verdict", "prompt_ids": "domain"}
    task = parse_task(values, tmp_path / "t.yaml")
    splits = load_splits(task)
    assert splits.prompt_values == ("9", "10", "11")  # by size, not as texts
    assert set(splits.train["prompt_ids"]) == {"9", "10", "11"}
    plain = load_splits(parse_task(values | {"columns": {"text": "sentence", "label": "verdict"}}, tmp_path / "t.yaml"))
    assert plain.prompt_values is None
    assert plain.fingerprint != splits.fingerprint
    from datasets import ClassLabel

    named = splits.train.remove_columns("prompt_ids").add_column("domain", [1, 0] * 9)
    named = named.cast_column("domain", ClassLabel(names=["far", "near"]))
    assert prompt_column.texts(task, "train", named)[:2] == ["near", "far"]
    for missing in (-1, None):  # datasets has either for a missing class
        lacking = named.remove_columns("domain").add_column(
            "domain", [1, missing] * 9, feature=named.features["domain"]
        )
        with pytest.raises(TaskError, match="9 train rows have no value"):
            prompt_column.texts(task, "train", lacking)
    for column, wrong in ((np.linspace(0, 1, 18).tolist(), "not float64"), (["x", None] * 9, "9 train rows have no")):
        with pytest.raises(TaskError, match=wrong):
            prompt_column.texts(task, "train", splits.train.remove_columns("prompt_ids").add_column("domain", column))


BASE = {
    "name": "t",
    "kind": "text_classification",
    "data": {"builder": "csv", "files": {"train": "train.csv"}},
    "columns": {"text": "sentence", "label": "verdict", "prompt_ids": "domain"},
}
WRONG = [
    ({"columns": {"text": "a", "label": "b", "prompt_id": "c"}}, 'Did you mean "prompt_ids"?'),
    ({"columns": {"text": "a", "label": "b", "prompt_ids": "b"}}, 'the column "b" holds the answer'),
    ({"columns": {"text": "a", "label": "b"}, "prompt_values": ["x"]}, '"prompt_values" needs "columns" to name'),
    ({"prompt_values": []}, '"prompt_values" needs at least one name, not 0'),
    ({"prompt_values": ["x", "x"]}, 'the prompt_value "x" is given twice'),
    ({"prompt_values": [True]}, "a prompt_value must be text"),
    ({"kind": "causal_lm", "template": {"prompt": "{prompt_ids}", "answer": "{x}"}, "columns": {}}, "call the one of"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_task_file_is_refused(changes, message):
    with pytest.raises(TaskError, match=message.replace("?", r"\?")):
        parse_task(BASE | changes)


def test_a_column_may_also_stand_in_the_prompt():
    template = {"prompt": "{domain}: {sentence}", "answer": "{verdict}"}
    task = parse_task(BASE | {"kind": "causal_lm", "template": template, "columns": {"prompt_ids": "domain"}})
    assert (task.inputs, task.columns["prompt_ids"]) == (("domain", "sentence"), "domain")


def test_wrong_values_are_refused(place, tmp_path):
    wrong = make_domains(tmp_path, columns={"text": "sentence", "label": "verdict", "prompt_ids": "domian"})
    with pytest.raises(TaskError, match=r'no column "domian" for "prompt_ids". Did you mean "domain"\?'):
        load_splits(parse_task(yaml.safe_load(wrong.read_text()), wrong))
    short = yaml.safe_load(wrong.read_text()) | {"prompt_values": ["letters", "press"]}
    short["columns"]["prompt_ids"] = "domain"
    with pytest.raises(TaskError, match=r'value "(novel|letter)" of column "domain" is not one of the prompt_values'):
        load_splits(parse_task(short, wrong))
    few = options(place["task"], place["bert"], tmp_path / "out", method="metadata_prompt")
    with pytest.raises(ConfigError, match="num_modes=2 is too few for 3 prompt_values"):
        train(few, method_args={"num_modes": 2})
    with pytest.raises(ConfigError, match=r"value for prompt_ids is poem, and default_mode is null"):
        train(few, method_args={"default_mode": None})
    with pytest.raises(ConfigError, match="remove_unused_columns=True would remove prompt_ids"):
        train(few, remove_unused_columns=True)


def test_the_mapping_of_a_config(caplog):
    config = MetadataPromptConfig(prompt_values=["b", "a"], num_modes=4, default_mode=3)
    assert config.ids_of_values(["a", "b", None, "c"]) == [1, 0, 3, 3]
    assert "(c) take the prompts of set 3" in caplog.text
    strict = MetadataPromptConfig(prompt_values=["press", "novel"], default_mode=None)
    with pytest.raises(ConfigError, match=r'is pres, and default_mode is null.*Did you mean "press"\?'):
        strict.ids_of_values(["pres"])
    for values in ([], ["a", "a"]):
        with pytest.raises(ConfigError, match="must be different values, at least one"):
            MetadataPromptConfig(prompt_values=values)


def test_a_kind_that_loses_the_numbers_is_found():
    raw = Dataset.from_dict({"text": ["a"], "prompt_ids": [1]})
    with pytest.raises(ConfigError, match='"text_classification" does not hand the column "prompt_ids" on'):
        prompt_column.check_kept(raw.remove_columns("prompt_ids"), raw, "text_classification")


def test_a_task_without_the_column_is_warned_of(tmp_path, place, caplog):
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(place["bert"])
    torch.manual_seed(0)
    model = get_peft_model(base, MetadataPromptConfig(prompt_values=["a", "b"]))
    rows = Dataset.from_dict({"text": ["a"]})
    assert prompt_column.for_model(rows, model, parse_task(BASE)) is rows
    assert "all rows take the default prompts" in caplog.text
