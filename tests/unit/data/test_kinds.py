"""The kinds of task: what a model is fed, what the metrics see, what predictions look like."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from sklearn.metrics import f1_score, matthews_corrcoef
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EfficientNetConfig,
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.image_utils import load_image

from peft_lab.data.prompt_template import Template
from peft_lab.data.task_registry import kind, parse_task
from peft_lab.errors import ConfigError, TaskError
from peft_lab.loading.load_run import load_base
from peft_lab.registry import list_kinds
from peft_lab.tasks.kinds.causal_lm import answer_only

LABELS = ("food", "music", "weather")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 ?:.#"


def text_task(**changes: Any) -> Any:
    data = {"builder": "csv", "files": {"train": "x.csv"}}
    values = {"name": "t", "kind": "text_classification", "data": data, "columns": {"text": "text", "label": "label"}}
    return parse_task({**values, **changes})


def image_task(**changes: Any) -> Any:
    data = {"builder": "parquet", "files": {"train": "x.parquet"}}
    values = {
        "name": "t",
        "kind": "image_classification",
        "data": data,
        "columns": {"image": "image", "label": "label"},
    }
    return parse_task({**values, **changes})


def prompt_task(**changes: Any) -> Any:
    data = {"builder": "json", "files": {"train": "x.jsonl"}}
    template = {"prompt": "q: {question}", "answer": " {answer}"}
    return parse_task({"name": "t", "kind": "causal_lm", "data": data, "template": template, **changes})


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a head for five labels and a tokenizer of single characters."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *CHARACTERS.replace(" ", "")]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs, **names)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, num_labels=5, initializer_range=0.5, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer of single characters that puts <s> first."""
    folder = tmp_path_factory.mktemp("llama")
    words = ["<pad>", "<s>", "</s>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=512)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=512, initializer_range=0.5, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sorted(list_kinds()))
def test_a_kind_supplies_the_whole_seam(name: str) -> None:
    from peft_lab.data.kind import Kind

    found = kind(name)
    assert found.name == name
    assert found.info.title
    # the Hub has no tag of models that read some inputs, and these say so in their own class
    inputs = getattr(found, "inputs", None)
    assert found.info.pipeline_tag or vars(type(inputs)).get("pipeline_tag") == ""
    assert found.info.metrics_for(found.info.problem_type)
    for method in ("auto_class", "load_processor", "load_model", "preprocess", "data_collator", "predict"):
        assert getattr(type(found), method) is not getattr(Kind, method), f"{name} does not supply {method}"


# --- text -----------------------------------------------------------------------------------------------------------


def text_rows(texts: list[str], pairs: list[str] | None = None) -> Dataset:
    columns: dict[str, Any] = {"text": texts, "label": [index % 3 for index in range(len(texts))]}
    features = {"text": Value("string"), "label": ClassLabel(names=list(LABELS))}
    if pairs is not None:
        columns["text_pair"], features["text_pair"] = pairs, Value("string")
    return Dataset.from_dict(columns, features=Features(features))


def test_a_checkpoint_keeps_its_body_and_gets_a_new_head(bert: Path) -> None:
    model = kind("text_classification").load_model(str(bert), text_task(), LABELS)
    saved = BertForSequenceClassification.from_pretrained(bert)
    assert model.classifier.weight.shape == (3, 16)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {name: index for index, name in enumerate(LABELS)}
    for name, value in saved.bert.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], value)


def test_weights_that_do_not_fit_below_the_head_are_refused(bert: Path, tmp_path: Path) -> None:
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(TaskError, match="the shape of its weight bert"):
        kind("text_classification").load_model(str(tmp_path), text_task(), LABELS)


def test_both_texts_of_a_pair_are_read(bert: Path) -> None:
    rule = kind("text_classification")
    task = text_task(columns={"text": "a", "text_pair": "b", "label": "c"}, max_length=20)
    tokenizer, model = rule.load_processor(str(bert), task), rule.load_model(str(bert), task, LABELS)
    rows = rule.preprocess(text_rows(["abc", "x" * 50], ["de", "y" * 50]), tokenizer, task, model)
    assert tokenizer.decode(rows[0]["input_ids"]) == "[CLS] a b c [SEP] d e [SEP]"
    assert rows[0]["token_type_ids"] == [0] * 5 + [1] * 3
    assert [len(row["input_ids"]) for row in rows] == [8, 20]
    assert {"x", "y"} <= set(tokenizer.decode(rows[1]["input_ids"]).split()), "truncation keeps some of both"
    assert rows["labels"][:] == [0, 1]
    batch = rule.data_collator(tokenizer, task, model)([rows[0], rows[1]])
    assert batch["input_ids"].shape == (2, 20)
    forward, backward = (rule.predict(model, tokenizer, [pair], task) for pair in (("abc", "de"), ("de", "abc")))
    assert forward != backward
    assert forward == rule.predict(model, tokenizer, [{"text_pair": "de", "text": "abc"}], task)
    with pytest.raises(TaskError, match="an input of this task is two texts, not 'abc'"):
        rule.predict(model, tokenizer, ["abc"], task)


def test_predictions_do_not_depend_on_the_batch(bert: Path) -> None:
    rule, task = kind("text_classification"), text_task()
    tokenizer, model = rule.load_processor(str(bert), task), rule.load_model(str(bert), task, LABELS)
    model.train()
    texts = ["a", "bcd efg", "hello world", "1 2 3", "what is this?"]
    whole = rule.predict(model, tokenizer, texts, task)
    single = rule.predict(model, tokenizer, texts, task, batch_size=1)
    assert model.training, "the mode is put back"
    assert [record["label"] for record in whole] == [record["label"] for record in single]
    np.testing.assert_allclose([r["score"] for r in whole], [r["score"] for r in single], rtol=1e-5)
    with torch.no_grad():
        logits = model.eval()(**tokenizer(texts[1], return_tensors="pt")).logits[0]
    assert whole[1] == {"label": LABELS[logits.argmax()], "score": pytest.approx(float(logits.softmax(-1).max()))}


def test_regression_has_one_output_and_correlations(bert: Path) -> None:
    rule, task = kind("text_classification"), text_task(problem_type="regression")
    assert task.metrics == ("pearsonr",)
    tokenizer, model = rule.load_processor(str(bert), task), rule.load_model(str(bert), task, None)
    assert model.classifier.weight.shape == (1, 16)
    (record,) = rule.predict(model, tokenizer, ["abc"], task)
    assert record["label"] == "score"
    draw = np.random.default_rng(0)
    logits, truth = draw.normal(size=(50, 1)), draw.normal(size=50)
    found = rule.compute_metrics(task, None)(EvalPrediction(logits, truth))
    assert found == {"pearsonr": pytest.approx(np.corrcoef(logits[:, 0], truth)[0, 1])}
    rows = Dataset.from_dict(
        {"text": ["a b"], "label": [2.5]}, features=Features(text=Value("string"), label=Value("float32"))
    )
    batch = rule.data_collator(tokenizer, task, model)([rule.preprocess(rows, tokenizer, task, model)[0]])
    with torch.no_grad():
        loss = model.eval()(**batch).loss
    assert float(loss) == pytest.approx(
        (rule.predict(model, tokenizer, ["a b"], task)[0]["score"] - 2.5) ** 2, rel=1e-5
    )


@pytest.mark.parametrize("labels", [LABELS, LABELS[:2]])
def test_metrics_of_a_classifier_equal_scikit_learn(labels: tuple[str, ...]) -> None:
    draw = np.random.default_rng(1)
    logits, truth = draw.normal(size=(90, len(labels))), draw.integers(0, len(labels), 90)
    task = text_task(metrics=["accuracy", "f1", "matthews_correlation"])
    # hidden states beside the logits must not disturb
    found = kind("text_classification").compute_metrics(task, labels)(EvalPrediction((logits, logits), truth))
    predicted = logits.argmax(-1)
    average = "binary" if len(labels) == 2 else "macro"
    assert found == {
        "accuracy": pytest.approx((predicted == truth).mean()),
        "f1": pytest.approx(f1_score(truth, predicted, average=average)),
        "matthews_correlation": pytest.approx(matthews_corrcoef(truth, predicted)),
    }


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import EfficientNetForImageClassification

    folders = {name: tmp_path_factory.mktemp(name) for name in ("vit", "efficientnet")}
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(folders["vit"])
    small = EfficientNetConfig(
        image_size=64, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, num_labels=7, dropout_rate=0.0
    )
    EfficientNetForImageClassification(small).save_pretrained(folders["efficientnet"])
    plain = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }
    vit = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}, **plain}
    (folders["vit"] / "preprocessor_config.json").write_text(json.dumps(vit))
    crop = {"do_center_crop": True, "crop_size": {"height": 56, "width": 56}, "size": {"shortest_edge": 64}}
    efficientnet = {"image_processor_type": "BitImageProcessor", **crop, **plain}
    (folders["efficientnet"] / "preprocessor_config.json").write_text(json.dumps(efficientnet))
    return folders


def pictures(count: int = 6) -> list[PILImage.Image]:
    draw = np.random.default_rng(0)
    return [PILImage.fromarray(draw.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)) for i in range(count)]


@pytest.mark.parametrize(
    ("name", "wanted", "size"), [("efficientnet", 32, 32), ("efficientnet", None, 56), ("vit", 32, 16)]
)
def test_images_arrive_in_the_size_that_the_backbone_can_take(
    image_models: dict[str, Path], name: str, wanted: int | None, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    rule = kind("image_classification")
    task = image_task(**({"image_size": wanted} if wanted else {}))
    path = str(image_models[name])
    processor, model = rule.load_processor(path, task), rule.load_model(path, task, LABELS)
    assert ("keeps its own image size" in caplog.text) == (name == "vit")
    features = Features(image=Image(mode="RGB"), label=ClassLabel(names=list(LABELS)))
    rows = Dataset.from_dict({"image": pictures(), "label": [0, 1, 2] * 2}, features=features)
    ready = rule.preprocess(rows, processor, task, model)
    assert set(ready.column_names) == {"pixel_values", "labels"}
    batch = rule.data_collator(processor, task, model)([ready[0], ready[1]])
    assert batch["pixel_values"].shape == (2, 3, size, size)
    assert batch["pixel_values"].min() < -0.5
    assert batch["pixel_values"].max() > 0.5
    out = model.eval()(**batch)
    assert out.logits.shape == (2, 3)
    assert out.loss.isfinite()


@pytest.mark.parametrize(("name", "refused"), [("vit", True), ("efficientnet", False)])
def test_a_processor_of_a_size_that_the_backbone_cannot_take_is_refused(
    image_models: dict[str, Path], tmp_path: Path, name: str, refused: bool
) -> None:
    folder = shutil.copytree(image_models[name], tmp_path / name)
    path = folder / "preprocessor_config.json"
    other = {"do_center_crop": False, "size": {"height": 40, "width": 40}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **other}))
    rule, task = kind("image_classification"), image_task()
    processor, model = load_base(rule, task, LABELS, str(folder))
    if not refused:
        rule.check_processor(processor, task, model)
        return
    with pytest.raises(ConfigError, match=r"takes no images of 40 x 40 pixels.*correct the size"):
        rule.check_processor(processor, task, model)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 56),
        ({"do_center_crop": False}, 64),
        ({"do_center_crop": False, "size": {"height": 24, "width": 32}}, None),
        ({"do_center_crop": False, "do_resize": False}, None),
    ],
)
def test_methods_are_told_the_size_of_images_where_there_is_one(
    image_models: dict[str, Path], changes: dict[str, Any], size: int | None
) -> None:
    rule = kind("image_classification")
    processor = rule.load_processor(str(image_models["efficientnet"]), image_task())
    for name, value in changes.items():
        setattr(processor, name, value)
    settings = rule.adapter_settings(processor, image_task(), LABELS)
    assert settings.get("image_size") == size
    assert settings["image_mean"] == pytest.approx([0.5] * 3, abs=1e-6)


def test_trainer_leaves_the_images_in_place(image_models: dict[str, Path], tmp_path: Path) -> None:
    """Trainer drops columns that the model does not know, under which the transform must not break."""
    from transformers import Trainer, TrainingArguments

    rule, task, path = kind("image_classification"), image_task(image_size=32), str(image_models["efficientnet"])
    processor, model = rule.load_processor(path, task), rule.load_model(path, task, LABELS)
    features = Features(image=Image(mode="RGB"), label=ClassLabel(names=list(LABELS)))
    rows = Dataset.from_dict({"image": pictures(), "label": [0, 1, 2] * 2}, features=features)
    ready = rule.preprocess(rows, processor, task, model)
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, report_to=[], use_cpu=True)
    trainer = Trainer(
        model,
        arguments,
        eval_dataset=ready,
        data_collator=rule.data_collator(processor, task, model),
        compute_metrics=rule.compute_metrics(task, LABELS),
    )
    found = trainer.predict(ready)
    records = rule.predict(model, processor, pictures(), task)
    assert [LABELS[row.argmax()] for row in found.predictions] == [record["label"] for record in records]
    hits = np.mean([record["label"] == LABELS[i % 3] for i, record in enumerate(records)])
    assert found.metrics["test_accuracy"] == pytest.approx(hits)


def test_predictions_see_photos_upright_as_training_does(image_models: dict[str, Path], tmp_path: Path) -> None:
    rule, task, path = kind("image_classification"), image_task(), str(image_models["vit"])
    processor, model = rule.load_processor(path, task), rule.load_model(path, task, LABELS)
    image = pictures()[0]
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    trained = Image(mode="RGB").decode_example({"path": str(tmp_path / "turned.png"), "bytes": None})
    assert trained.size == image.size[::-1]
    expected = rule.predict(model, processor, [trained], task)
    assert rule.predict(model, processor, [tmp_path / "turned.png"], task) == expected
    assert rule.predict(model, processor, [PILImage.open(tmp_path / "turned.png")], task) == expected
    assert rule.predict(model, processor, pictures()[:1], task) != expected


def test_an_image_file_that_is_none_is_named(image_models: dict[str, Path], tmp_path: Path) -> None:
    rule, task, path = kind("image_classification"), image_task(image_size=32), str(image_models["efficientnet"])
    processor, model = rule.load_processor(path, task), rule.load_model(path, task, LABELS)
    pictures()[0].save(tmp_path / "good.png")
    by_path = rule.predict(model, processor, [str(tmp_path / "good.png")], task)
    assert by_path == rule.predict(model, processor, [load_image(pictures()[0])], task)
    (tmp_path / "bad.png").write_text("no image")
    for name in ("bad.png", "none.png"):
        with pytest.raises(TaskError, match=f'{name}" cannot be read as an image'):
            rule.predict(model, processor, [tmp_path / name], task)


# --- prompts --------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    start=st.lists(st.integers(5, 50), min_size=1, max_size=12),
    end=st.lists(st.integers(5, 50), min_size=1, max_size=12),
    limit=st.integers(1, 30),
    bos=st.booleans(),
)
def test_labels_are_the_answer_and_nothing_else(start: list[int], end: list[int], limit: int, bos: bool) -> None:
    start = [1, *start] if bos else start
    row = answer_only(start, end, limit, 1)
    ids, labels = row["input_ids"], row["labels"]
    assert len(ids) == len(labels) == len(row["attention_mask"]) == min(limit, len(start) + len(end))
    kept = [label for label in labels if label != -100]
    assert kept == end[:limit], "the answer is cut last"
    assert ids[len(ids) - len(kept) :] == kept
    prompt = ids[: len(ids) - len(kept)]
    if bos and len(prompt) > 1:
        assert prompt[0] == 1
        prompt = prompt[1:]
    assert prompt == start[len(start) - len(prompt) :], "the end of the prompt is what the answer follows"


def test_the_loss_is_that_of_the_answer_alone(llama: Path) -> None:
    rule, task = kind("causal_lm"), prompt_task()
    tokenizer, model = rule.load_processor(str(llama), task), rule.load_model(str(llama), task, None)
    rows = Dataset.from_list([{"question": "a b?", "answer": "yes"}, {"question": "c", "answer": "no no no"}])
    ready = rule.preprocess(rows, tokenizer, task, model)
    ids = ready[0]["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:-1]).replace("  ", "_").replace(" ", "").replace("_", " ") == "q: a b? yes"
    assert [i for i, label in zip(ids, ready[0]["labels"], strict=True) if label != -100] == [*ids[-5:]]
    assert ids[-1] == tokenizer.eos_token_id
    batch = rule.data_collator(tokenizer, task, model)([ready[0], ready[1]])
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    with torch.no_grad():
        out = model(**batch)
        alone = [model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1) for row in ready]
    terms = [
        -float(alone[n][t - 1, row["input_ids"][t]])
        for n, row in enumerate(ready)
        for t in range(len(row["input_ids"]))
        if row["labels"][t] != -100
    ]
    assert len(terms) == len(" yes") + len(" no no no") + 2
    assert float(out.loss) == pytest.approx(np.mean(terms), rel=1e-5)

    kept = rule.preprocess_logits_for_metrics(out.logits, batch["labels"])
    predictions = EvalPrediction(tuple(value.numpy() for value in kept), batch["labels"].numpy())
    found = rule.compute_metrics(prompt_task(metrics=["perplexity", "token_accuracy"]), None)(predictions)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(terms)), rel=1e-4)
    hits = [
        int(alone[n][t - 1].argmax()) == row["labels"][t]
        for n, row in enumerate(ready)
        for t in range(len(row["labels"]))
        if row["labels"][t] != -100
    ]
    assert found["token_accuracy"] == pytest.approx(np.mean(hits))


def test_metrics_see_the_rows_own_tokens_behind_virtual_ones() -> None:
    rule = kind("causal_lm")
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 9), torch.randint(0, 9, (2, 6))
    labels[:, :2] = -100
    plain = rule.preprocess_logits_for_metrics(logits, labels)
    longer = rule.preprocess_logits_for_metrics((torch.cat([torch.randn(2, 4, 9), logits], 1), None), labels)
    for one, other in zip(plain, longer, strict=True):
        torch.testing.assert_close(one, other)
    expected = functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
    )
    torch.testing.assert_close(plain[1], -expected)


def test_written_answers_do_not_depend_on_the_batch(llama: Path) -> None:
    rule, task = kind("causal_lm"), prompt_task(metrics=["perplexity", "exact_match"], max_new_tokens=6)
    tokenizer, model = rule.load_processor(str(llama), task), rule.load_model(str(llama), task, None)
    questions = ["a", "what is this?", "b c d", "0123456789"]
    whole = rule.predict(model, tokenizer, questions, task)
    assert whole == rule.predict(model, tokenizer, questions, task, batch_size=1)
    assert whole == rule.predict(model, tokenizer, [{"question": question} for question in questions], task)
    rows = Dataset.from_dict({"question": questions, "answer": [whole[0], whole[1], "other", "wrong"]})
    assert rule.generation_metrics(model, tokenizer, rows, task) == {"exact_match": 0.5}
    assert rule.generation_metrics(model, tokenizer, rows, prompt_task()) == {}
    with pytest.raises(TaskError, match="a mapping with the keys question"):
        rule.predict(model, tokenizer, [7], task)


def test_written_texts_are_scored_by_row_in_one_pass(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = {"prompt": "{question} [{item}]", "answer": " {answer}", "required": r"\[(\w+)\]"}
    metrics = ["perplexity", "exact_match", "coverage"]
    rule, task = kind("causal_lm"), prompt_task(template=template, metrics=metrics, max_new_tokens=6)
    tokenizer, model = rule.load_processor(str(llama), task), rule.load_model(str(llama), task, None)
    asked: list[int] = []

    def predict(model: Any, processor: Any, inputs: list[Any], *args: Any) -> list[str]:
        asked.append(len(inputs))
        return [f"{row['question']} is Tea." for row in inputs]

    monkeypatch.setattr(rule, "predict", predict)
    rows = Dataset.from_dict(
        {
            "question": ["a", "b", "a", "a"],
            "item": ["tea", "tea", "te", "tea"],
            "answer": ["a is tea", "b is tea", "a is tea", "other"],
        }
    )
    found = rule.generation_scores(model, tokenizer, rows, task)
    assert found == {"exact_match": [1.0, 1.0, 1.0, 0.0], "coverage": [1.0, 1.0, 0.0, 1.0]}
    assert asked == [3], "rows with one prompt are written once, for all metrics"
    assert rule.generation_metrics(model, tokenizer, rows, task) == {"exact_match": 0.75, "coverage": 0.75}
    empty = Dataset.from_dict({"question": ["a"], "item": [""], "answer": ["b"]})
    with pytest.raises(TaskError, match=r"finds nothing in the prompt \"a \[\]\""):
        rule.preprocess(empty, tokenizer, task, model)


def test_rouge_l_compares_what_is_written_with_the_whole_answer(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rouge_score")
    template = {"prompt": "{question}", "answer": " so #### {answer}", "extract": "#### (.+)"}
    rule, task = kind("causal_lm"), prompt_task(template=template, metrics=["perplexity", "rouge_l", "exact_match"])
    monkeypatch.setattr(rule, "predict", lambda *args: ["so it is #### 7"])
    rows = Dataset.from_dict({"question": ["a"], "answer": ["7"]})
    found = rule.generation_scores(None, None, rows, task)
    assert found == {"exact_match": [1.0], "rouge_l": [pytest.approx(2 * 0.5 / 1.5)]}


def test_a_run_that_could_not_be_scored_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "rouge_score" else find(name, *a))
    with pytest.raises(TaskError, match="needs the package rouge_score"):
        kind("causal_lm").compute_metrics(prompt_task(metrics=["perplexity", "rouge_l"]), None)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Blue Spice is a LOW rated place near A+B.", 1.0),
        ("Blue  Spice is slow near A+B", 2 / 3),
        ("Blue and Spice", 0.0),
    ],
)
def test_coverage_is_the_share_of_whole_words_that_the_prompt_asks_for(text: str, share: float) -> None:
    template = Template(prompt="{mr}", answer="{ref}", required=r"(?<!yesno)\[([^\]]+)\]")
    prompt = "name[Blue Spice], rating[low], near[A+B], near[a+b], yesno[no]"
    assert template.coverage(prompt, text) == pytest.approx(share)


def test_a_chat_template_is_used_when_asked_for(llama: Path) -> None:
    rule = kind("causal_lm")
    task = prompt_task(template={"prompt": "{question}", "answer": "{answer}", "chat": True})
    with pytest.raises(TaskError, match="has no chat template"):
        rule.load_processor(str(llama), task)
    tokenizer = rule.load_processor(str(llama), prompt_task())
    tokenizer.chat_template = (
        "{% for m in messages %}u:{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    ready = rule.preprocess(Dataset.from_list([{"question": "x", "answer": "y"}]), tokenizer, task, None)
    assert ready[0]["input_ids"] == [
        *tokenizer("u:xa:y", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert [label != -100 for label in ready[0]["labels"]] == [False] * 5 + [True] * 2


@pytest.mark.parametrize(
    ("written", "truth", "same"),
    [
        ("so it is #### 1,234", "#### 1234", True),
        ("#### 18.00", "#### 18", True),
        ("#### 18.", "#### 18", True),
        ("#### 180", "#### 18", False),
        ("18", "#### 18", False),
        ("#### 1.05", "#### 1", False),
    ],
)
def test_extracted_answers_are_compared_as_numbers_are_written(written: str, truth: str, same: bool) -> None:
    template = Template(prompt="{q}", answer="{a}", extract=r"####\s*(\S+)")
    assert (template.found(written) == template.target({"a": truth})) == same


def test_a_template_reads_plain_values_only() -> None:
    template = Template(prompt="{a.0.b} {{x}} {c}", answer="{d}")
    assert template.columns() == ("a", "c", "d")
    assert template.render({"a": [{"b": 1}], "c": None, "d": "{a}"}) == ("1 {x} ", "{a}"), "values are not templates"
    with pytest.raises(TaskError, match="nothing at"):
        template.render({"a": [], "c": 1, "d": 2})
    with pytest.raises(TaskError, match="nothing at"):
        Template(prompt="{a.__class__}", answer="{a}").render({"a": "text"})


def test_a_limit_without_room_for_a_text_is_refused(bert: Path) -> None:
    rule, task = kind("text_classification"), text_task(max_length=2)
    tokenizer, model = rule.load_processor(str(bert), task), rule.load_model(str(bert), task, LABELS)
    message = "2 tokens have no room for a text beside the 2 of the tokenizer"
    with pytest.raises(TaskError, match=message):
        rule.preprocess(text_rows(["a"]), tokenizer, task, model)
    with pytest.raises(TaskError, match=message):
        rule.predict(model, tokenizer, ["a"], task)
