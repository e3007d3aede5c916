"""Adapters that read the training data: what they get and when, and that the training is the same with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_lab import ReadTrainingData
from peft_lab.errors import ConfigError
from peft_lab.training.trainer import LabTrainer

ROWS = 22
FEATURES = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A model with dropout, so that a shift of the random state would show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.dropout = nn.Linear(4, 3), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.linear(self.dropout(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Reader(nn.Module):
    """Keeps which rows it has read at which epoch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, []
        self.modes: set[bool] = set()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return self.model(x, labels)

    def read_data(self, batches: Any, epoch: int) -> None:
        self.modes.add(self.model.training)
        self.seen.append((epoch, [label for batch in batches for label in batch["number"].tolist()]))
        torch.rand(3)


def rows() -> Dataset:
    numbers = list(range(ROWS))
    return Dataset.from_dict({"x": FEATURES.tolist(), "labels": [n % 3 for n in numbers], "number": numbers})


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}


class OwnTrainer(Trainer):
    """Trainer that leaves the row's number out of the model's call."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {k: v for k, v in inputs.items() if k != "number"}, *args, **kwargs)


def fit(model: nn.Module, folder: Path, resume: str | None = None, data: Any = None, **options: Any) -> OwnTrainer:
    settings = {
        **{"output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 0.1, "num_train_epochs": 3},
        **{"remove_unused_columns": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 1},
        **{"save_strategy": "steps", "save_steps": 1},
    }
    arguments = TrainingArguments(**{**settings, **options})
    data = rows() if data is None else data
    trainer = OwnTrainer(model, arguments, train_dataset=data, data_collator=collate, callbacks=[ReadTrainingData()])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_every_epoch_reads_all_rows_in_order(tmp_path: Path) -> None:
    reader = Reader(Net())
    fit(reader, tmp_path)
    assert reader.seen == [(epoch, list(range(ROWS))) for epoch in range(3)]
    assert reader.modes == {False}


@pytest.mark.full
@pytest.mark.parametrize("accumulation", [1, 4])
def test_training_is_the_same_with_a_reader(accumulation: int, tmp_path: Path) -> None:
    """Shuffling and dropout draw the same numbers, although a reader draws some of its own."""
    plain, reader = Net(), Reader(Net())
    fit(plain, tmp_path / "plain", gradient_accumulation_steps=accumulation)
    fit(reader, tmp_path / "reader", gradient_accumulation_steps=accumulation)
    assert torch.equal(plain.linear.weight, reader.model.linear.weight)
    assert not torch.equal(plain.linear.weight, Net().linear.weight)
    assert len(reader.seen) == 3


@pytest.mark.full
@pytest.mark.parametrize(("step", "epochs"), [(6, [1, 2]), (8, [2]), (11, [2]), (12, [2]), (13, [])])
def test_a_resumed_training_reads_from_the_next_whole_epoch(step: int, epochs: list[int], tmp_path: Path) -> None:
    """Six steps are an epoch."""
    whole, again = Reader(Net()), Reader(Net())
    assert fit(whole, tmp_path).state.global_step == 18
    fit(again, tmp_path, resume=str(tmp_path / f"checkpoint-{step}"))
    assert [epoch for epoch, _ in again.seen] == epochs
    assert torch.equal(whole.model.linear.weight, again.model.linear.weight)


def test_a_reader_inside_a_peft_model_reads_once(tmp_path: Path) -> None:
    """Peft's wrappers answer for what they wrap, and must not be taken for readers."""

    class ReadingNet(Net):
        seen = 0

        def read_data(self, batches: Any, epoch: int) -> None:
            self.seen += 1

    model = get_peft_model(ReadingNet(), LoraConfig(target_modules=["linear"], r=1))
    assert hasattr(model, "read_data")
    fit(model, tmp_path, num_train_epochs=1)
    assert model.base_model.model.seen == 1


def test_a_stream_of_rows_is_refused_only_by_a_reader(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(rows()))
    fit(Net(), tmp_path / "plain", data=stream, max_steps=2)
    with pytest.raises(ConfigError, match="a stream of rows has no epochs"):
        fit(Reader(Net()), tmp_path / "reader", data=stream, max_steps=2)


def test_our_own_trainer_hands_the_data_over(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    callbacks = LabTrainer(Net(), arguments, train_dataset=rows()).callback_handler.callbacks
    assert sum(isinstance(callback, ReadTrainingData) for callback in callbacks) == 1
