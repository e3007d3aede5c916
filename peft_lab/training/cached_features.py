"""Training and evaluation of a head on features that a frozen backbone computes once.

The features are those of the backbone in evaluation mode, whatever its dropout. The rows that a Trainer sees hold their
number and their labels; `peft_lab.features.backbone` looks the features up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.data import DataLoader
from transformers import DefaultDataCollator

from peft_lab.backbones.head_features import HeadFeatures
from peft_lab.backbones.names import unwrap
from peft_lab.data.row_stream import RowStream
from peft_lab.data.splits import fingerprint
from peft_lab.errors import ConfigError
from peft_lab.features.backbone import looked_up
from peft_lab.features.extract import MASK, POOLED, features_key, features_of
from peft_lab.tuners.head_layer import HeadLayer

if TYPE_CHECKING:
    from datasets import Dataset

#: Value of the run option `features`.
CACHED = "cached"
#: Largest difference between logits on computed and on stored features, in the largest logit.
_TOLERANCE = 1e-3


def check_value(features: str | None) -> None:
    """Refuse other values of the run option `features`.

    Raises:
        ConfigError: naming the value.
    """
    if features not in (None, CACHED):
        raise ConfigError(f'features="{features}" must be "{CACHED}", or left out.')


class CachedFeatures:
    """Features of a run's rows, in place of its inputs.

    Args:
        model: the model with its method on it.
        facts: facts of its head, as they were before.
        method: name of the method, for errors.

    Raises:
        ConfigError: the method changes or trains something in the backbone, or the model has no head over whole rows.
    """

    model: Any
    #: Joins rows into batches.
    collator = DefaultDataCollator()

    def __init__(self, model: nn.Module, facts: HeadFeatures | None, method: str) -> None:
        self.adapted, self.model = model, unwrap(model)
        reason = _reason(self.model, facts)
        if reason or facts is None:
            raise ConfigError(
                f'features="{CACHED}" keeps what a frozen backbone gives the head of a classifier, but with method '
                f'"{method}" {reason}; leave it out.'
            )
        self.facts = facts
        layers = [module for module in self.model.modules() if isinstance(module, HeadLayer)]
        self.with_tokens = any(layer.reads_tokens for layer in layers)
        self.tables: list[dict[str, np.ndarray]] = []

    def rows(self, rows: Mapping[str, Dataset], collator: Callable[..., Any], processor: Any, batch: int) -> Any:
        """Rows of each split as numbers and labels, their features stored.

        Args:
            rows: split -> preprocessed rows.
            collator: joins them into batches.
            processor: image processor or tokenizer that made them.
            batch: rows that the backbone computes at a time.

        Raises:
            ConfigError: the rows are a stream, or the model does not give its head the same from stored features.
        """
        # The base's own head answers meanwhile, because an estimator has no answers before it has read its features.
        alone = self.adapted.disable_adapter() if isinstance(self.adapted, PeftModel) else nullcontext()
        with alone:
            self._fill(rows, collator, processor, batch)
        return self._numbered(rows)

    def _fill(self, rows: Mapping[str, Dataset], collator: Callable[..., Any], processor: Any, batch: int) -> None:
        """Store the features of each split."""
        identity = json.dumps(processor.to_dict(), default=str, sort_keys=True) if _has_pixels(self.model) else ""
        for split, part in rows.items():
            if isinstance(part, RowStream):
                raise ConfigError(
                    f'features="{CACHED}" needs all rows, and those of {split} are streamed; leave it out.'
                )

            def batches(part: Dataset = part) -> Iterator[Mapping[str, Any]]:
                with torch.random.fork_rng(devices=[]):  # a loader draws a seed for its workers
                    yield from DataLoader(part, batch, collate_fn=collator)

            key = features_key(self.model, self.facts, fingerprint(part), identity)
            self.tables.append(features_of(key, self.model, self.facts, batches, self.with_tokens))
            if self.tables[-1][POOLED].ndim != 2:
                raise ConfigError(
                    f'features="{CACHED}" needs one feature a row, and the head of {type(self.model).__name__} reads '
                    "every token; leave it out."
                )
            if len(self.tables) == 1:
                self._check(next(batches()))

    def used(self) -> AbstractContextManager[None]:
        """Let the backbone answer from the stored features inside a `with` block."""
        return looked_up(self.model, self.facts, self.tables)

    def _numbered(self, rows: Mapping[str, Dataset]) -> dict[str, Dataset]:
        from datasets import Dataset

        longest = max((table[MASK].shape[1] for table in self.tables if MASK in table), default=0)
        found, start = {}, 0
        for (split, part), table in zip(rows.items(), self.tables, strict=True):
            count = len(part)
            columns: dict[str, Any] = {self.model.main_input_name: list(range(start, start + count))}
            columns["labels"] = part.with_format(None)["labels"][:]
            if MASK in table:
                room = longest - table[MASK].shape[1]
                columns["attention_mask"] = np.pad(table[MASK], ((0, 0), (0, room))).astype(np.int64).tolist()
            found[split], start = Dataset.from_dict(columns), start + count
        return found

    @torch.no_grad()
    def _check(self, batch: Mapping[str, Any]) -> None:
        """Compare the logits of a batch with those on its stored features."""
        model, training, name = self.model, self.model.training, self.model.main_input_name
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        model.eval()
        try:
            expected = model(**inputs).logits.float()
            numbers = {name: torch.arange(len(expected), device=device)}
            if MASK in self.tables[0]:
                numbers["attention_mask"] = torch.as_tensor(self.tables[0][MASK][: len(expected)].astype(np.int64))
            with self.used():
                found = model(**numbers).logits.float()
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise ConfigError(self._unfit(str(error).partition("\n")[0])) from error
        finally:
            model.train(training)
        difference = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
        if not difference <= _TOLERANCE * max(expected.abs().max().item(), 1.0):
            raise ConfigError(self._unfit(f"logits differ by {difference:.1e}"))

    def _unfit(self, reason: str) -> str:
        return (
            f'features="{CACHED}": {type(self.model).__name__} does not give its head the same from stored features '
            f"({reason}); leave it out."
        )


def _has_pixels(model: Any) -> bool:
    """Test whether rows are images, whose pixels the processor makes when they are read."""
    return bool(model.main_input_name == "pixel_values")


def _reason(model: Any, facts: HeadFeatures | None) -> str:
    """Reason for which a model's backbone has to run in training; "" if it does not."""
    if facts is None:
        return f"{type(model).__name__} has no such head"
    if getattr(model.config, "is_encoder_decoder", False):
        return "the text is read twice, by encoder and decoder"
    if any(parameter.requires_grad for parameter in model.get_submodule(facts.backbone).parameters()):
        return "weights of the backbone are trained"
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, HeadLayer):
            return "something acts in front of the head"
        if isinstance(module, HeadLayer) and any(map(module.runs_backbone, module.configs.values())):
            return "the backbone also runs on further views of a row"
    return ""
