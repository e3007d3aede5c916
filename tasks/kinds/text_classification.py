"""Text classification and regression, of one text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.kind import ClassificationKind, Record, length_limit, padding_side, padding_tokenizer
from peft_lab.errors import TaskError
from peft_lab.registry import KindInfo

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from peft_lab.data.task_registry import Task

MAX_LENGTH = 128


KIND = KindInfo(
    name="text_classification",
    title="one text or a pair -> label or number",
    runtime="TextClassification",
    columns={"text": True, "text_pair": False, "label": True},
    settings=("labels", "problem_type", "max_length"),
    metrics=("accuracy", "f1", "matthews_correlation", "ece"),
    regression_metrics=("pearsonr", "spearmanr"),
    task_type="SEQ_CLS",
    pipeline_tag="text-classification",
)


class TextClassification(ClassificationKind):
    """`text` or `text` + `text_pair` -> `label`; AutoModelForSequenceClassification."""

    info = KIND

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        from datasets import Value

        for name in {"text", "text_pair"} & set(dataset.column_names):
            # the reader of CSV files makes numbers of texts such as 2024
            dataset = dataset.cast_column(name, Value("string"))
            missing = sum(value is None for value in dataset[name][:])
            if missing:
                raise TaskError(f'Task "{task.name}": {missing} rows have no value in column "{task.columns[name]}".')
        return dataset

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **hub_kwargs)
        # decoders such as GPT-2 come without a padding token, and a batch needs one
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        model = super().load_model(model_name_or_path, task, labels, **hub_kwargs)
        config = model.config.get_text_config()
        if getattr(config, "pad_token_id", None) is None:
            # decoders find the last token of a row by its padding; load_processor pads with the same token
            end = getattr(config, "eos_token_id", None)
            config.pad_token_id = end[0] if isinstance(end, list) else end
        return model

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        limit = length_limit(task, MAX_LENGTH, processor, model)
        names = [name for name in ("text", "text_pair") if name in dataset.column_names]

        def tokenise(*texts: list[str]) -> dict[str, Any]:
            # not padded here, because the collator pads to the longest row of a batch and not of all rows
            return dict(processor(*texts, truncation=True, max_length=limit))

        dataset = dataset.map(tokenise, input_columns=names, batched=True, remove_columns=names, desc="Tokenising")
        return dataset.rename_column("label", "labels")

    def data_collator(self, processor: Any, model: Any) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(padding_tokenizer(processor, model))

    def predict(
        self, model: Any, processor: Any, inputs: Sequence[Any], task: Task, batch_size: int = 32
    ) -> list[Record]:
        """Label and score of each input.

        An input is a text, a pair of texts, or a mapping with the keys `text` and `text_pair`.
        """
        limit, side = length_limit(task, MAX_LENGTH, processor, model), padding_side(model)
        pairs = [_texts(value, pair="text_pair" in task.columns) for value in inputs]

        def encode(batch: Sequence[tuple[str, ...]]) -> Any:
            columns = [list(column) for column in zip(*batch, strict=True)]
            settings = {"truncation": True, "max_length": limit, "padding": True, "padding_side": side}
            return processor(*columns, **settings, return_tensors="pt")

        return self.batches(model, pairs, encode, batch_size)


def _texts(value: Any, pair: bool) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        value = [value[name] for name in ("text", "text_pair") if name in value]
    texts = (value,) if isinstance(value, str) else tuple(value)
    if len(texts) != 1 + pair or not all(isinstance(text, str) for text in texts):
        wanted = "two texts" if pair else "one text"
        raise TaskError(f"an input of this task is {wanted}, not {value!r}.")
    return texts
