"""Embeddings and scores of pairs: adapters that sentence-transformers trains, saves and loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.properties import DRAWS, HEADS, IMAGES, KEEPS_HEAD, METHODS, SEQUENCE, UNTRAINED, config
from support.properties import TEXTS as FOR_TEXTS
from support.tiny_runs import make_backbone
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import peft_lab
from peft_lab.errors import ConfigError

pytest.importorskip("sentence_transformers")

from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer, losses
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer import modules
from sentence_transformers.sentence_transformer.trainer import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments

TEXTS = ["the rain", "please some soup with a song", "a band now", "cloud and more snow today"]
POOLINGS = ("mean", "cls", "lasttoken")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def classifier(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with a pooler and a head, which an adapter's file does not hold in full."""
    folder = tmp_path_factory.mktemp("classifier")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def embedder(base: Path, pooling: str = "mean") -> SentenceTransformer:
    transformer = modules.Transformer(str(base))
    return SentenceTransformer(modules=[transformer, modules.Pooling(32, pooling_mode=pooling)], device="cpu")


def arguments(cls: Any, folder: Path) -> Any:
    plain = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return cls(str(folder), max_steps=2, learning_rate=0.05, per_device_train_batch_size=2, **plain)


def adapter_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def pairs() -> Dataset:
    return Dataset.from_dict({"anchor": TEXTS, "positive": list(reversed(TEXTS))})


@pytest.mark.integration(
    library="sentence-transformers", use="`SentenceTransformer.add_adapter`: steps of its trainer, save, reload"
)
@pytest.mark.parametrize("method", [*METHODS, *FOR_TEXTS])
def test_an_embedder_is_trained_saved_and_loaded(method: str, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = embedder(base)
    before = model.encode(TEXTS)
    model.add_adapter(config(method))
    if method in UNTRAINED:
        read_data(model)
    else:
        start = adapter_values(model)
        trainer = SentenceTransformerTrainer(
            model,
            arguments(SentenceTransformerTrainingArguments, tmp_path / "run"),
            train_dataset=pairs(),
            loss=losses.MultipleNegativesRankingLoss(model),
        )
        trainer.train()
        moved = [name for name, value in adapter_values(model).items() if not torch.equal(value, start[name])]
        assert moved
    trained = model.encode(TEXTS)
    assert abs(trained - before).max() > 1e-4
    model.save_pretrained(str(tmp_path / "saved"))
    assert list((tmp_path / "saved").rglob("adapter_model.safetensors"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS)
    assert abs(again - trained).max() < 1e-6


def read_data(model: Any) -> None:
    """Let an adapter take its values from texts."""
    tokens = model.preprocess(TEXTS)
    peft_lab.domain_prompts(model[0].model, [{name: tokens[name] for name in ("input_ids", "attention_mask")}])


def move_all(model: SentenceTransformer) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()


@pytest.mark.integration(library="sentence-transformers", use="`CrossEncoder` with an adapter: steps, save, reload")
@pytest.mark.parametrize("method", [*METHODS, *FOR_TEXTS])
def test_a_cross_encoder_is_trained_saved_and_loaded(method: str, classifier: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CrossEncoder(str(classifier), num_labels=1, device="cpu")
    rows = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])]
    before = model.predict(rows)
    model.add_adapter(config(method, task_type="SEQ_CLS"))
    if method in UNTRAINED:
        read_data(model)
    else:
        start = adapter_values(model)
        data = Dataset.from_dict({"a": TEXTS, "b": list(reversed(TEXTS)), "label": [0.0, 1.0, 1.0, 0.0]})
        run = arguments(CrossEncoderTrainingArguments, tmp_path / "run")
        CrossEncoderTrainer(model, run, train_dataset=data, loss=BinaryCrossEntropyLoss(model)).train()
        moved = [name for name, value in adapter_values(model).items() if not torch.equal(value, start[name])]
        assert any("lora" in name or method in name for name in moved), moved
    trained = model.predict(rows)
    assert abs(trained - before).max() > 1e-5
    model.save_pretrained(str(tmp_path / "saved"))
    again = CrossEncoder(str(tmp_path / "saved"), device="cpu").predict(rows)
    assert abs(again - trained).max() < 1e-6


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("method", SEQUENCE)
def test_pooling_sees_the_tokens_alone(method: str, pooling: str, base: Path) -> None:
    """Prompts are taken out before pooling: one hidden state a token, cls first, none of padding counted."""
    torch.manual_seed(0)
    model = embedder(base, pooling)
    model.add_adapter(config(method))
    read_data(model) if method in UNTRAINED else move_all(model)
    inputs = model.preprocess(TEXTS)
    with torch.no_grad():
        found = model[0](dict(inputs))["token_embeddings"]
        hidden = model[0].model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    assert found.shape[:2] == inputs["attention_mask"].shape
    torch.testing.assert_close(found, hidden)
    # a row alone has no padding
    alone = torch.cat([torch.tensor(model.encode([text])) for text in TEXTS])
    torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), alone, atol=1e-5, rtol=0)
    mask = inputs["attention_mask"][..., None]
    last = mask.sum(1)[:, 0] - 1
    expected = {"mean": (hidden * mask).sum(1) / mask.sum(1), "cls": hidden[:, 0]}
    expected["lasttoken"] = hidden[torch.arange(len(TEXTS)), last]
    torch.testing.assert_close(torch.tensor(model.encode(TEXTS)), expected[pooling], atol=1e-5, rtol=0)


@pytest.mark.integration(library="sentence-transformers", use="`SentenceTransformer.add_adapter` of methods for images")
@pytest.mark.parametrize("method", [*IMAGES, *KEEPS_HEAD, *DRAWS])
def test_methods_for_images_refuse_a_text_encoder(method: str, base: Path, refused: Callable[[str], None]) -> None:
    model = embedder(base)
    with pytest.raises(ConfigError, match=r"images|image classifier"):
        model.add_adapter(config(method))
    refused("is for images alone")
    assert model.encode(TEXTS).shape == (4, 32)


@pytest.mark.integration(library="sentence-transformers", use="`SentenceTransformer.add_adapter` of methods for heads")
@pytest.mark.parametrize("method", HEADS)
def test_methods_for_heads_refuse_an_encoder_without_one(
    method: str, base: Path, refused: Callable[[str], None]
) -> None:
    model = embedder(base)
    with pytest.raises(ConfigError, match="replaces the head of a classifier"):
        model.add_adapter(config(method))
    refused("replaces the head of a classifier")
    assert model.encode(TEXTS).shape == (4, 32)
