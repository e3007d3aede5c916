"""Words as the inputs of a model: tokens of each word, with the first one standing for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_lab.data.row_checks import RowFault, check_inputs, numbered, source_rows, warn_of_cut
from peft_lab.data.row_maps import identity_of_tokenizer, map_rows
from peft_lab.data.tag_columns import cast_tags, tag_faults
from peft_lab.data.task_schema import PROMPT_IDS, Task
from peft_lab.data.text_inputs import (
    TextInputs,
    cast_texts,
    length_limit,
    load_fast_tokenizer,
    longer_rows,
    right_padding,
    virtual_tokens,
)
from peft_lab.data.words import Word, words_and_marks, words_at_spaces, words_of_list
from peft_lab.errors import TaskError
from peft_lab.utils.mappings import without

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("peft_lab")

MAX_LENGTH = 128
#: Label of tokens that stand for no word.
IGNORED = -100

#: Columns of the number of words that a row loses by its length, and of those that are read as the unknown token.
_LOST, _UNKNOWN = "lost_words", "unknown_words"


@dataclass(frozen=True)
class EncodedWords:
    """Tokens of the words of one row.

    Attributes:
        inputs: arguments of a model's forward, such as `input_ids`.
        first: place of the first token of each word; words behind the limit have none.
        lost: number of words behind the limit.
        unknown: number of words that the tokenizer makes nothing of, which are read as its unknown token.
    """

    inputs: dict[str, list[int]]
    first: list[int]
    lost: int
    unknown: int


class WordInputs(TextInputs):
    """Column `tokens`, or `text` with spans of its characters; a fast tokenizer."""

    columns = ("tokens", "text")

    def auto_class(self) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        return cast_tags(cast_texts(dataset, task, ("text",)), task)

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        return tag_faults(dataset, task)

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        purpose = f'kind "{task.kind}"'
        tokenizer = load_fast_tokenizer(model_name_or_path, purpose, **hub_kwargs)
        # such a tokenizer refuses words, because it would take each for the middle of one
        if _joins_words(tokenizer):
            tokenizer = load_fast_tokenizer(model_name_or_path, purpose, add_prefix_space=True, **hub_kwargs)
        return tokenizer

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        """Data set of the model's arguments and `labels`: a word's tag at its first token, else -100."""
        limit = word_limit(task, processor, model)

        def tokenise(tokens: list[str], tags: list[int]) -> dict[str, Any]:
            found = encode_words(processor, tokens, limit)
            labels = [IGNORED] * len(found.inputs["input_ids"])
            for place, tag in zip(found.first, tags, strict=False):
                labels[place] = tag
            return {**found.inputs, "labels": labels, _LOST: found.lost, _UNKNOWN: found.unknown}

        removed = [name for name in dataset.column_names if name != PROMPT_IDS]
        options = {"input_columns": ["tokens", "tags"], "remove_columns": removed, "desc": "Tokenising"}
        rows = map_rows(dataset, tokenise, [identity_of_tokenizer(processor), limit], **options)
        mend = longer_rows(limit, processor, model)
        warn_of_words(task, dataset, rows[_LOST][:], rows[_UNKNOWN][:], processor, mend)
        return rows.remove_columns([_LOST, _UNKNOWN])

    def data_collator(self, processor: Any, model: Any) -> Any:
        return WordCollator(right_padding(processor), virtual_tokens(model))

    def encoder(self, inputs: Sequence[Any], processor: Any, task: Task, model: Any) -> Callable[[Sequence[int]], Any]:
        """Encode inputs that `words_of_inputs` takes."""
        return batches_of(self.encode_inputs(inputs, processor, task, model)[1], processor)

    def encode_inputs(
        self, inputs: Sequence[Any], processor: Any, task: Task, model: Any
    ) -> tuple[list[list[Word]], list[EncodedWords]]:
        """Words of raw inputs, and their tokens."""
        words, limit = words_of_inputs(inputs, task), word_limit(task, processor, model)
        encoded = []
        for row in words:
            encoded.append(encode_words(processor, [word.text for word in row], limit))
        mend = longer_rows(limit, processor, model)
        lost, unknown = [row.lost for row in encoded], [row.unknown for row in encoded]
        warn_of_words(task, None, lost, unknown, processor, mend)
        return words, encoded


def batches_of(encoded: Sequence[EncodedWords], processor: Any) -> Callable[[Sequence[int]], Any]:
    """Function from positions of encoded rows to a batch."""
    padding = right_padding(processor)

    def encode(rows: Sequence[int]) -> Any:
        return padding.pad([encoded[row].inputs for row in rows], return_tensors="pt")

    return encode


class WordCollator:
    """Collator that pads tokens and labels at the right.

    Args:
        tokenizer: pads the arguments of the model.
        virtual: number of tokens that an adapter puts before those of a row, which have no label.
    """

    def __init__(self, tokenizer: Any, virtual: int) -> None:
        self.tokenizer, self.virtual = tokenizer, virtual

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Join rows into a batch."""
        import torch

        plain = [without(row, "labels") for row in rows]
        batch = dict(self.tokenizer.pad(plain, return_tensors="pt"))
        if "labels" in rows[0]:
            labels = torch.full((len(rows), self.virtual + batch["input_ids"].shape[1]), IGNORED)
            for number, row in enumerate(rows):
                labels[number, self.virtual : self.virtual + len(row["labels"])] = torch.tensor(row["labels"])
            batch["labels"] = labels
        return batch


def word_limit(task: Task, processor: Any, model: Any) -> int:
    """Number of tokens that a row may have; it has room for a word.

    Raises `TaskError` if not.
    """
    limit, own = length_limit(task, MAX_LENGTH, processor, model), processor.num_special_tokens_to_add(False)
    if limit <= own:
        raise TaskError(
            f'Task "{task.name}": {limit} tokens have no room for a word beside the {own} of the tokenizer; raise '
            '"max_length".'
        )
    return limit


def encode_words(processor: Any, words: Sequence[str], limit: int) -> EncodedWords:
    """Tokens of the words of a row, at most `limit`.

    Raises:
        TaskError: a word has no token, and the tokenizer no unknown token to put in its place.
    """
    whole = processor(list(words), is_split_into_words=True, verbose=False)
    there = set(whole.word_ids(0))
    unknown = [place for place in range(len(words)) if place not in there]
    if unknown:
        if processor.unk_token is None:
            raise TaskError(
                f"The tokenizer makes no token of the word {words[unknown[0]]!r}, and has no unknown token to read it "
                "as; leave such words out."
            )
        words = [processor.unk_token if place not in there else word for place, word in enumerate(words)]
    if unknown or len(whole["input_ids"]) > limit:
        whole = processor(words, is_split_into_words=True, truncation=True, max_length=limit)
    first: dict[int, int] = {}
    for place, word in enumerate(whole.word_ids(0)):
        if word is not None:
            first.setdefault(word, place)
    inputs = {name: list(values) for name, values in whole.items()}
    return EncodedWords(inputs, [first[word] for word in sorted(first)], len(words) - len(first), len(unknown))


def words_of_inputs(inputs: Sequence[Any], task: Task) -> list[list[Word]]:
    """Words of the inputs of a prediction: texts or lists of words.

    A text is split as the texts of training are: at white space where the task has a column `tokens`, and at
    punctuation marks too where it has a column `text`. Places of words in a list are those in the text that single
    spaces make of them.

    Raises:
        TaskError: an input is neither, or has no word.
    """
    split = words_and_marks if "text" in task.columns else words_at_spaces
    found = []
    for number, value in enumerate(inputs, start=1):
        if isinstance(value, str):
            found.append(split(value))
        elif isinstance(value, (list, tuple)) and all(isinstance(word, str) and word.strip() for word in value):
            found.append(words_of_list(value))
        else:
            raise TaskError(f"an input of this task is a text or a list of words, not {value!r} (input {number}).")
    check_inputs(task, [RowFault("have no word", [row for row, words in enumerate(found) if not words])])
    return found


def warn_of_words(
    task: Task, dataset: Dataset | None, lost: Sequence[int], unknown: Sequence[int], processor: Any, mend: str
) -> None:
    """Warn of words that a model does not see.

    Args:
        task, dataset: as for `warn_of_cut`.
        lost, unknown: number of words of each row that are behind the limit, or read as the unknown token.
        processor: the tokenizer.
        mend: how to keep the lost ones.
    """
    cut = [row for row, count in enumerate(lost) if count]
    what = f"are longer than the limit, and {sum(lost)} words at their ends are tagged O, so entities there are missed"
    warn_of_cut(task, dataset, {what: cut}, mend)
    rows = [row for row, count in enumerate(unknown) if count]
    if rows:
        logger.warning(
            'Task "%s": %d words have no token and are read as %s (%s).',
            task.name,
            sum(unknown),
            processor.unk_token,
            numbered(rows if dataset is None else source_rows(dataset, rows)),
        )


def _joins_words(tokenizer: Any) -> bool:
    """Test for byte-level tokens that mark the space before a word, and none before the first."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()).get("pre_tokenizer") or {}
    parts = state.get("pretokenizers", [state])
    return any(part["type"] == "ByteLevel" and not part["add_prefix_space"] for part in parts)
