"""Texts as the inputs of a model: one text or a pair a row, tokenised and cut with a count."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.model_inputs import ModelInputs
from peft_lab.data.row_checks import RowFault, check_inputs, column_faults, numbered, source_rows, warn_of_cut
from peft_lab.data.row_maps import identity_of_tokenizer, map_rows
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from peft_lab.data.task_schema import Task

MAX_LENGTH = 128

#: Column of the number of tokens that a row has before it is cut.
WHOLE_LENGTH = "whole_length"
_CUT = "are longer than the limit and lose their end"


class TextInputs(ModelInputs):
    """Columns `text` and, for pairs, `text_pair`; a tokenizer."""

    columns = ("text", "text_pair")
    texts = True
    task_type = "SEQ_CLS"
    pipeline_tag = "text-classification"

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        return cast_texts(dataset, task, self.columns)

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        return column_faults(dataset, task, self.columns)

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        return load_tokenizer(model_name_or_path, **hub_kwargs)

    def prepare_model(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        if getattr(config, "pad_token_id", None) is None:
            # decoders find the last token of a row by its padding; load_tokenizer pads with the same token
            end = getattr(config, "eos_token_id", None)
            config.pad_token_id = end[0] if isinstance(end, list) else end

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        limit = token_limit(task, MAX_LENGTH, processor, model, pair="text_pair" in task.columns)
        names = [name for name in self.columns if name in dataset.column_names]

        def tokenise(*texts: list[str]) -> dict[str, Any]:
            # not padded here, because the collator pads to the longest row of a batch and not of all rows
            return encode_texts(processor, texts, limit)

        reads = [identity_of_tokenizer(processor), names, limit]
        options = {"input_columns": names, "batched": True, "remove_columns": names, "desc": "Tokenising"}
        rows = map_rows(dataset, tokenise, reads, **options)
        tokens = rows[WHOLE_LENGTH][:]
        empty = [row for row, count in enumerate(tokens) if not count]
        if empty:
            numbers = numbered(source_rows(dataset, empty))
            raise TaskError(f'Task "{task.name}": {_no_tokens(len(empty), len(rows), "rows", numbers)}')
        cut = {_CUT: [row for row, count in enumerate(tokens) if count > limit]}
        warn_of_cut(task, dataset, cut, longer_rows(limit, processor, model))
        return rows.remove_columns(WHOLE_LENGTH)

    def data_collator(self, processor: Any, model: Any) -> Any:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(padding_tokenizer(processor, model))

    def encoder(self, inputs: Sequence[Any], processor: Any, task: Task, model: Any) -> Callable[[Sequence[int]], Any]:
        """Check texts, pairs of texts or mappings with the keys `text` and `text_pair`, and encode them."""
        limit = token_limit(task, MAX_LENGTH, processor, model, pair="text_pair" in task.columns)
        paired = "text_pair" in task.columns
        pairs = [_texts(value, paired, number) for number, value in enumerate(inputs, start=1)]
        blank = [row for row, texts in enumerate(pairs) if not all(map(str.strip, texts))]
        check_inputs(task, [RowFault("have an empty text", blank, "empty")])
        columns = [list(column) for column in zip(*pairs, strict=True)]
        encoded = encode_texts(processor, columns, limit) if pairs else {}
        tokens = encoded.pop(WHOLE_LENGTH, [])
        empty = [row for row, count in enumerate(tokens) if not count]
        if empty:
            raise TaskError(_no_tokens(len(empty), len(pairs), "inputs", numbered(empty)))
        cut = {_CUT: [row for row, count in enumerate(tokens) if count > limit]}
        warn_of_cut(task, None, cut, longer_rows(limit, processor, model))

        def encode(rows: Sequence[int]) -> Any:
            # one run of rows, because they are taken in order
            chosen = {name: values[rows[0] : rows[-1] + 1] for name, values in encoded.items()}
            return processor.pad(chosen, padding_side=padding_side(model), return_tensors="pt")

        return encode


def cast_texts(dataset: Dataset, task: Task, columns: Sequence[str]) -> Dataset:
    """Cast columns of texts and whole numbers to texts.

    Raises:
        TaskError: a column holds values that could be written in several ways.
    """
    from datasets import Value

    for name in [name for name in columns if name in dataset.column_names]:
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


def load_tokenizer(model_name_or_path: str, **options: Any) -> Any:
    """Tokenizer of a backbone, with a padding token.

    `options` are those of `AutoTokenizer.from_pretrained`.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=False, **options)
    # decoders such as GPT-2 come without a padding token, and a batch needs one
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_fast_tokenizer(model_name_or_path: str, purpose: str, **options: Any) -> Any:
    """Tokenizer of a backbone that knows the places of its tokens in a text.

    Args:
        model_name_or_path: the backbone.
        purpose: what the places are needed for, for the message.
        options: those of `AutoTokenizer.from_pretrained`.

    Raises:
        TaskError: the backbone has a slow tokenizer alone.
    """
    tokenizer = load_tokenizer(model_name_or_path, **options)
    if not tokenizer.is_fast:
        raise TaskError(
            f'"{model_name_or_path}" has no fast tokenizer (tokenizer.json), and {purpose} needs the places of its '
            "tokens; convert the tokenizer, or take another backbone."
        )
    return tokenizer


def right_padding(tokenizer: Any) -> Any:
    """Copy of a tokenizer that pads at the right, for heads that read every place."""
    padding = copy.copy(tokenizer)
    padding.padding_side = "right"
    return padding


def virtual_tokens(model: Any) -> int:
    """Number of tokens that an adapter of peft puts before those of a row, in inputs and logits."""
    config: Any = getattr(model, "active_peft_config", None)
    # a prefix stands in the keys and values of the blocks alone
    in_cache = str(getattr(config, "peft_type", "")).rpartition(".")[2] in ("PREFIX_TUNING", "CARTRIDGE")
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) and not in_cache else 0


def padding_side(model: Any) -> str:
    """Side at which the rows of a batch are padded, whatever the tokenizer's own side is.

    It is the right one: most backbones number tokens from the left edge of the batch, and the heads of encoders read
    the first place. Only a head that reads the last place (XLNet) needs padding at the left.
    """
    return "left" if getattr(getattr(model, "config", None), "summary_type", None) == "last" else "right"


def padding_tokenizer(tokenizer: Any, model: Any) -> Any:
    """Copy of a tokenizer that pads at the model's `padding_side`, for a collator; the original keeps its own."""
    padding = copy.copy(tokenizer)
    padding.padding_side = padding_side(model)
    return padding


def length_limit(task: Task, default: int, tokenizer: Any, model: Any, reserve: int = 0) -> int:
    """Number of tokens that a row may have.

    It is the task's, or the default, but at most what tokenizer and model take, less `reserve`.
    """
    return int(min(task.max_length or default, _most_tokens(tokenizer, model) - reserve))


def longer_rows(limit: int, tokenizer: Any, model: Any, reserve: int = 0) -> str:
    """Mend for rows that are longer than the limit on their tokens."""
    if limit < _most_tokens(tokenizer, model) - reserve:
        return f'the limit is {limit} tokens: raise "max_length" in the task file'
    if reserve:
        return (
            f"the model takes no more than {limit} tokens beside the {reserve} that it may write: shorten the texts, "
            'or lower "max_new_tokens"'
        )
    return f"the model takes no more than {limit} tokens: shorten the texts"


def _most_tokens(tokenizer: Any, model: Any) -> float:
    """Number of tokens that tokenizer and model take."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    # models with relative positions, such as T5, state no limit
    positions = getattr(text, "max_position_embeddings", None) or math.inf
    return min(tokenizer.model_max_length or math.inf, positions)


def token_limit(task: Task, default: int, processor: Any, model: Any, pair: bool) -> int:
    """Number of tokens that a text or a pair of texts may have.

    Raises `TaskError` if it leaves no room for a text beside the tokenizer's own tokens.
    """
    limit = length_limit(task, default, processor, model)
    own = processor.num_special_tokens_to_add(pair)
    if limit <= own:
        raise TaskError(
            f'Task "{task.name}": {limit} tokens have no room for a text beside the {own} of the tokenizer; raise '
            '"max_length".'
        )
    return limit


def encode_texts(processor: Any, texts: Sequence[list[str]], limit: int) -> dict[str, Any]:
    """Tokens of texts or pairs, cut to `limit`, and the length that each row had before."""
    found = dict(processor(*texts, truncation=True, max_length=limit))
    lengths = [len(ids) for ids in found["input_ids"]]
    full = [row for row, length in enumerate(lengths) if length >= limit]
    if full:
        # without a warning of the tokenizer's own, which counts nothing
        for row in full:
            lengths[row] = len(processor(*(column[row] for column in texts), verbose=False)["input_ids"])
    return {**found, WHOLE_LENGTH: lengths}


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
