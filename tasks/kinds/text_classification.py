"""Text classification and regression, of one text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.kind import ClassificationKind, Record, length_limit, longer_rows, padding_side, padding_tokenizer
from peft_lab.data.row_checks import RowFault, check_inputs, numbered, source_rows, warn_of_cut
from peft_lab.data.row_maps import identity_of_tokenizer, map_rows
from peft_lab.errors import TaskError
from peft_lab.registry import KindInfo

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from peft_lab.data.task_registry import Task

MAX_LENGTH = 128

#: Column of the number of tokens that a row has before it is cut.
_WHOLE_LENGTH = "whole_length"
_CUT = "are longer than the limit and lose their end"

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
    text_columns = ("text", "text_pair")
    predicts_texts = True

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        from datasets import Value

        for name in [name for name in self.text_columns if name in dataset.column_names]:
            feature = dataset.features[name]
            held = feature.dtype if isinstance(feature, Value) else type(feature).__name__
            # a fraction or a date could be written in several ways
            if not held.startswith(("string", "large_string", "int", "uint", "null")):
                raise TaskError(
                    f'Task "{task.name}": the column "{task.columns[name]}" holds {held}, not texts; write them as '
                    "text, in JSON in quotes."
                )
            if held != "string":
                dataset = dataset.cast_column(name, Value("string"))
        return dataset

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=False, **hub_kwargs)
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
        limit = _limit(task, processor, model)
        names = [name for name in self.text_columns if name in dataset.column_names]

        def tokenise(*texts: list[str]) -> dict[str, Any]:
            # not padded here, because the collator pads to the longest row of a batch and not of all rows
            return _encoded(processor, texts, limit)

        reads = [identity_of_tokenizer(processor), names, limit]
        options = {"input_columns": names, "batched": True, "remove_columns": names, "desc": "Tokenising"}
        rows = map_rows(dataset, tokenise, reads, **options)
        tokens = rows[_WHOLE_LENGTH][:]
        empty = [row for row, count in enumerate(tokens) if not count]
        if empty:
            numbers = numbered(source_rows(dataset, empty))
            raise TaskError(f'Task "{task.name}": {_no_tokens(len(empty), len(rows), "rows", numbers)}')
        cut = {_CUT: [row for row, count in enumerate(tokens) if count > limit]}
        warn_of_cut(task, dataset, cut, longer_rows(limit, processor, model))
        return rows.remove_columns(_WHOLE_LENGTH).rename_column("label", "labels")

    def data_collator(self, processor: Any, model: Any) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(padding_tokenizer(processor, model))

    def predict(
        self, model: Any, processor: Any, inputs: Sequence[Any], task: Task, batch_size: int = 32
    ) -> list[Record]:
        """Label and score of each input.

        An input is a text, a pair of texts, or a mapping with the keys `text` and `text_pair`.
        """
        limit = _limit(task, processor, model)
        paired = "text_pair" in task.columns
        pairs = [_texts(value, paired, number) for number, value in enumerate(inputs, start=1)]
        blank = [row for row, texts in enumerate(pairs) if not all(map(str.strip, texts))]
        check_inputs(task, [RowFault("have an empty text", blank, "empty")])
        columns = [list(column) for column in zip(*pairs, strict=True)]
        encoded = _encoded(processor, columns, limit) if pairs else {}
        tokens = encoded.pop(_WHOLE_LENGTH, [])
        empty = [row for row, count in enumerate(tokens) if not count]
        if empty:
            raise TaskError(_no_tokens(len(empty), len(pairs), "inputs", numbered(empty)))
        cut = {_CUT: [row for row, count in enumerate(tokens) if count > limit]}
        warn_of_cut(task, None, cut, longer_rows(limit, processor, model))

        def encode(rows: Sequence[int]) -> Any:
            # one run of rows, because they are taken in order
            chosen = {name: values[rows[0] : rows[-1] + 1] for name, values in encoded.items()}
            return processor.pad(chosen, padding_side=padding_side(model), return_tensors="pt")

        return self.batches(model, range(len(pairs)), encode, batch_size)


def _limit(task: Task, processor: Any, model: Any) -> int:
    """Number of tokens that a row may have; it has room for a text beside the tokenizer's own tokens."""
    limit = length_limit(task, MAX_LENGTH, processor, model)
    own = processor.num_special_tokens_to_add("text_pair" in task.columns)
    if limit <= own:
        raise TaskError(
            f'Task "{task.name}": {limit} tokens have no room for a text beside the {own} of the tokenizer; raise '
            '"max_length".'
        )
    return limit


def _encoded(processor: Any, texts: Sequence[list[str]], limit: int) -> dict[str, Any]:
    """Tokens of texts or pairs, cut to `limit`, and the length that each row had before."""
    found = dict(processor(*texts, truncation=True, max_length=limit))
    lengths = [len(ids) for ids in found["input_ids"]]
    full = [row for row, length in enumerate(lengths) if length >= limit]
    if full:
        # without a warning of the tokenizer's own, which counts nothing
        for row in full:
            lengths[row] = len(processor(*(column[row] for column in texts), verbose=False)["input_ids"])
    return {**found, _WHOLE_LENGTH: lengths}


def _no_tokens(count: int, total: int, what: str, numbers: str) -> str:
    return (
        f"{count} of {total} {what} have no token, because the tokenizer adds none of its own ({numbers}); drop them."
    )


def _texts(value: Any, pair: bool, number: int) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        value = [value[name] for name in ("text", "text_pair") if name in value]
    texts = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(texts) != 1 + pair or not all(isinstance(text, str) for text in texts):
        wanted = "two texts" if pair else "one text"
        raise TaskError(f"an input of this task is {wanted}, not {value!r} (input {number}).")
    return texts
