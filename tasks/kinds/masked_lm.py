"""Masked language modelling: continued pre-training of encoders on plain texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.data.masking import SPECIAL, MaskingCollator, masked_once
from peft_lab.data.profile import DataProfile, Proposal
from peft_lab.data.row_checks import RowFault, check_inputs, column_faults, numbered, source_rows, warn_of_cut
from peft_lab.data.row_maps import identity_of_tokenizer, map_rows
from peft_lab.data.task_schema import PROMPT_IDS
from peft_lab.data.text_inputs import cast_texts, length_limit, load_tokenizer, longer_rows, padding_tokenizer
from peft_lab.data.token_kind import TokenKind
from peft_lab.errors import ConfigError, TaskError
from peft_lab.registry import KindInfo

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from peft_lab.data.task_registry import Task

MAX_LENGTH = 128
#: Tokens that a prediction names for each mask.
TOP_TOKENS = 5

_LENGTH = "whole_length"
_CUT = "are longer than the limit and lose their end"
#: Names of a plain column of texts.
_TEXTS = ("text", "sentence", "content", "document")

KIND = KindInfo(
    name="masked_lm",
    title="text -> tokens for its masks",
    runtime="MaskedLM",
    columns={"text": True},
    settings=("max_length",),
    options={"line_by_line": False, "mlm_probability": 0.15},
    metrics=("perplexity", "token_accuracy"),
    pipeline_tag="fill-mask",
    source_head=True,
)


class MaskedLM(TokenKind):
    """`text` with masked tokens -> these tokens; AutoModelForMaskedLM.

    Texts are joined to blocks of `max_length` tokens, or stay rows of their own with `line_by_line`. Of each row the
    share `mlm_probability` of the tokens is chosen: 80 % become the mask token, 10 % another one, 10 % stay. Training
    chooses anew in every epoch; an evaluation has the same masks in every run. Perplexity and token accuracy are taken
    on the chosen tokens.
    """

    info = KIND
    known = "the frequencies of the training texts' tokens"

    def propose(self, profile: DataProfile) -> Proposal | None:
        columns = list(profile.columns.values())
        if profile.given or len(columns) != 1 or columns[0].type != "text" or columns[0].holds_classes:
            return None
        doubt = "texts without labels may also be meant for a model that writes, of the kind causal_lm"
        return Proposal(self.name, 0.3, {"text": columns[0].name}, metrics=KIND.metrics, doubts=(doubt,))

    def check(self, task: Task) -> None:
        share = task.options["mlm_probability"]
        if not 0 < share < 1:
            raise TaskError(f'"mlm_probability" must be between 0 and 1, not {share}.')
        if PROMPT_IDS in task.columns and not task.options["line_by_line"]:
            raise TaskError(f'a block joins texts whose "{PROMPT_IDS}" may differ; set "line_by_line: true".')

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        return cast_texts(dataset, task, ("text",))

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        return column_faults(dataset, task, ("text",))

    def reads_texts(self, task: Task) -> bool:
        return True

    def auto_class(self, task: Task) -> Any:
        from transformers import AutoModelForMaskedLM

        return AutoModelForMaskedLM

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        tokenizer = load_tokenizer(model_name_or_path, **hub_kwargs)
        if tokenizer.mask_token is None:
            raise TaskError(f'The tokenizer of "{model_name_or_path}" has no mask token; take a masked language model.')
        return tokenizer

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        """Model with the head that it was pretrained with.

        Raises:
            ConfigError: the checkpoint brings no such head, so that an adapter would learn towards random numbers.
        """
        hub_kwargs.setdefault("dtype", KIND.default_dtype)
        model, info = load_checkpoint(self.auto_class(task), model_name_or_path, **hub_kwargs)
        absent = sorted(str(key) for key in info.get("missing_keys", ()))
        head = [key for key in absent if not key.startswith(f"{model.base_model_prefix}.")]
        if head:
            raise ConfigError(
                f'"{model_name_or_path}" does not bring the head of a masked language model ({head[0]} is missing), '
                "without which there is nothing to go on with; take a checkpoint that was saved with it."
            )
        return model

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        """Data set of `input_ids`, `attention_mask`, and `token_type_ids` where the tokenizer makes them.

        The column `special_tokens_mask` is for the baseline; the collator leaves it out.
        """
        limit = self._limit(task, processor, model)
        by_line = task.options["line_by_line"]

        def tokenise(texts: list[str]) -> dict[str, Any]:
            # a block cuts nothing off, and a line is as long as the model may read
            whole = processor(texts, verbose=False, return_special_tokens_mask=True)
            lengths = [len(ids) for ids in whole["input_ids"]]
            options = {"truncation": True, "max_length": limit, "return_special_tokens_mask": True}
            found = processor(texts, **options) if by_line else whole
            return {**found, _LENGTH: lengths}

        reads = [identity_of_tokenizer(processor), limit, by_line]
        options = {"input_columns": ["text"], "batched": True, "remove_columns": ["text"], "desc": "Tokenising"}
        rows = map_rows(dataset, tokenise, reads, **options)
        lengths, special = rows[_LENGTH][:], processor.num_special_tokens_to_add()
        empty = [row for row, length in enumerate(lengths) if length <= special]
        if empty:
            raise TaskError(
                f'Task "{task.name}": {len(empty)} of {len(rows)} rows have no token '
                f"({numbered(source_rows(dataset, empty))}); leave them out."
            )
        rows = rows.remove_columns(_LENGTH)
        if by_line:
            cut = {_CUT: [row for row, length in enumerate(lengths) if length > limit]}
            warn_of_cut(task, dataset, cut, longer_rows(limit, processor, model))
            return rows
        return _blocks(rows, limit, processor)

    def _limit(self, task: Task, processor: Any, model: Any) -> int:
        limit = length_limit(task, MAX_LENGTH, processor, model)
        own = processor.num_special_tokens_to_add()
        if limit <= own:
            raise TaskError(
                f'Task "{task.name}": {limit} tokens have no room for a text beside the {own} of the tokenizer; raise '
                '"max_length".'
            )
        return limit

    def evaluation_rows(self, rows: Dataset, processor: Any, task: Task) -> Dataset:
        return masked_once(rows, processor, task.options["mlm_probability"])

    def data_collator(self, processor: Any, task: Task, model: Any) -> MaskingCollator:
        return MaskingCollator(padding_tokenizer(processor, model), task.options["mlm_probability"])

    def training_tokens(self, rows: Dataset) -> Any:
        import numpy as np

        # none of the tokenizer's own tokens is ever asked for
        tokens, special = (np.concatenate(rows[name][:]) for name in ("input_ids", SPECIAL))
        return tokens[special == 0]

    def predict(
        self, model: Any, processor: Any, inputs: Sequence[Any], task: Task, batch_size: int = 32
    ) -> list[dict[str, Any]]:
        """Tokens for the masks of texts.

        Returns:
            For each text `sequence`, the text with the most likely tokens in place of its masks, and `masks`, for each
            of them the most likely tokens as `{"token": text, "score": probability}`.
        """
        texts = [_text(value, number) for number, value in enumerate(inputs, start=1)]
        check_inputs(task, [RowFault("have an empty text", [n for n, text in enumerate(texts) if not text.strip()])])
        limit = self._limit(task, processor, model)
        encoded = processor(texts, truncation=True, max_length=limit) if texts else {"input_ids": []}
        bare = [n for n, ids in enumerate(encoded["input_ids"]) if processor.mask_token_id not in ids]
        beyond = [n for n in bare if processor.mask_token in texts[n]]
        check_inputs(task, [RowFault(f"have their {processor.mask_token} behind the limit of {limit} tokens", beyond)])
        check_inputs(task, [RowFault(f"have no {processor.mask_token} for which a token could be found", bare)])
        lengths = [len(ids) for ids in processor(texts, verbose=False)["input_ids"]] if texts else []
        cut = {_CUT: [row for row, length in enumerate(lengths) if length > limit]}
        warn_of_cut(task, None, cut, longer_rows(limit, processor, model))
        found: list[dict[str, Any]] = []
        for batch in _padded(encoded, padding_tokenizer(processor, model), batch_size):
            found += _filled(model, processor, batch)
        return found


def _blocks(rows: Dataset, limit: int, processor: Any) -> Dataset:
    """Rows joined in their order and cut to blocks of `limit` tokens, a thousand texts at a time.

    This is `group_texts` of the example script of transformers, but for the last block of a thousand texts, which that
    leaves out and which is shorter here.
    """
    names, special = rows.column_names, set(processor.all_special_ids)

    def group(*columns: list[list[int]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain.from_iterable(values)) for name, values in zip(names, columns, strict=True)}
        ids = joined["input_ids"]
        starts = list(range(0, len(ids), limit))
        # the end marks of the last text alone hold nothing to learn
        if set(ids[starts[-1] :]) <= special:
            starts.pop()
        found = {}
        for name, values in joined.items():
            found[name] = [values[start : start + limit] for start in starts]
        return found

    reads = [names, limit, sorted(special)]
    # by one process, because the number of processes would decide which texts are joined
    options = {"input_columns": names, "batched": True, "batch_size": 1000, "num_proc": None, "desc": "Joining"}
    return map_rows(rows, group, reads, remove_columns=names, **options)


def _text(value: Any, number: int) -> str:
    if isinstance(value, Mapping):
        value = value.get("text")
    if not isinstance(value, str):
        raise TaskError(f"an input of this task is a text with a mask, not {value!r} (input {number}).")
    return value


def _padded(encoded: Mapping[str, list[Any]], tokenizer: Any, size: int) -> Iterator[Any]:
    for start in range(0, len(encoded["input_ids"]), size):
        chosen = {name: values[start : start + size] for name, values in encoded.items()}
        yield tokenizer.pad(chosen, return_tensors="pt")


def _filled(model: Any, processor: Any, batch: Any) -> list[dict[str, Any]]:
    """Answers to a batch of texts; the model's own mode is put back."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(**batch.to(model.device)).logits
    finally:
        model.train(training)
    # virtual tokens of a prompt method stand before the row's own
    logits = logits[:, -batch["input_ids"].shape[1] :].float().cpu()
    found = []
    for ids, scores in zip(batch["input_ids"].cpu(), logits, strict=True):
        places = (ids == processor.mask_token_id).nonzero().flatten()
        top = scores[places].softmax(-1).topk(TOP_TOKENS)
        ids[places] = top.indices[:, 0]
        masks = []
        for tokens, values in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            pairs = zip(tokens, values, strict=True)
            masks.append([{"token": processor.decode([token]), "score": score} for token, score in pairs])
        found.append({"sequence": processor.decode(ids, skip_special_tokens=True), "masks": masks})
    return found
