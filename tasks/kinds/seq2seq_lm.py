"""Summaries, translations and other texts from texts, by models with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.data import decoder_rows, written_answers
from peft_lab.data.decoder_rows import TemplateForm
from peft_lab.data.profile import DataProfile, Proposal
from peft_lab.data.prompt_template import Template
from peft_lab.data.row_checks import RowFault, check_inputs, column_faults, numbered, source_rows, warn_of_cut
from peft_lab.data.row_maps import identity_of_tokenizer, map_rows
from peft_lab.data.task_schema import PROMPT_IDS
from peft_lab.data.text_inputs import cast_texts, length_limit, load_tokenizer, longer_rows, padding_tokenizer
from peft_lab.data.token_kind import IGNORED
from peft_lab.data.written_answers import WritingKind
from peft_lab.errors import TaskError
from peft_lab.registry import KindInfo
from peft_lab.utils.batch_progress import advance

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from peft_lab.data.task_registry import Task

MAX_LENGTH = 512

#: Column of the numbers of tokens that source and target have before they are cut.
_LENGTHS = "lengths"
_CUT_SOURCE = "have a source longer than the limit, which loses its end"
_CUT_TARGET = "have a target longer than the limit, which loses its end"

#: Usual names of the columns: summaries, and pairs of texts.
_PAIRS = (
    *(("article", "highlights"), ("document", "summary"), ("dialogue", "summary"), ("text", "summary")),
    *(("source", "target"), ("src", "tgt"), ("mr", "ref")),
)

KIND = KindInfo(
    name="seq2seq_lm",
    title="one text -> written text",
    runtime="Seq2SeqLM",
    columns={"source": False, "target": False},
    forms=(("source", "target"),),
    answers=("label", "target"),
    settings=("template", "max_length", "max_new_tokens"),
    options={"source_prefix": "", "max_target_length": 128, "source_lang": "", "target_lang": ""},
    metrics=("perplexity", "token_accuracy", "exact_match", "rouge_l", "bleu", "coverage"),
    task_type="SEQ_2_SEQ_LM",
    pipeline_tag="text2text-generation",
    source_head=True,
)


class Seq2SeqLM(WritingKind):
    """`source` -> `target`, or those of a template; AutoModelForSeq2SeqLM.

    Perplexity and token accuracy are taken on the target's tokens, end token included, with the true tokens before
    them. The other metrics let the model write, as its generation config says, greedily where that says nothing.
    """

    info = KIND

    def propose(self, profile: DataProfile) -> Proposal | None:
        if profile.given.keys() >= {"source", "target"}:
            columns = {name: profile.given[name] for name in ("source", "target")}
            return Proposal(self.name, 0.9, columns, metrics=KIND.metrics[:2])
        texts = {column.name.lower(): column for column in profile.columns.values() if column.type == "text"}
        pair = next((pair for pair in _PAIRS if texts.keys() >= set(pair)), None)
        if pair is None or profile.given or texts[pair[1]].holds_classes:
            return None
        columns = {"source": texts[pair[0]].name, "target": texts[pair[1]].name}
        doubt = 'for a model that writes by itself, without an encoder, the kind is "causal_lm"'
        return Proposal(self.name, 0.8, columns, metrics=KIND.metrics[:2], doubts=(doubt,))

    def check(self, task: Task) -> None:
        written_answers.check_metrics(task, KIND.metrics)
        options = task.options
        if options["max_target_length"] < 1:
            raise TaskError(f'"max_target_length" must be at least 1, not {options["max_target_length"]}.')
        if options["source_prefix"] and task.template is not None:
            raise TaskError('write the "source_prefix" into the "prompt" of the template, and remove the key.')
        if bool(options["source_lang"]) != bool(options["target_lang"]):
            raise TaskError('"source_lang" and "target_lang" go together; give both, or none.')
        if task.template is not None and task.template.chat:
            raise TaskError('"chat" of a template is for decoders; remove it.')

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        return dataset if task.template is not None else cast_texts(dataset, task, ("source", "target"))

    def form(self, task: Task, dataset: Dataset) -> TemplateForm:
        return _form(task)

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        if task.template is not None:
            return _form(task).faults(dataset, task)
        return column_faults(dataset, task, ("source", "target"))

    def reads_texts(self, task: Task) -> bool:
        return True

    def auto_class(self, task: Task) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        source, target = task.options["source_lang"], task.options["target_lang"]
        tokenizer = load_tokenizer(model_name_or_path, **hub_kwargs)
        if tokenizer.eos_token is None:
            raise TaskError(f'The tokenizer of "{model_name_or_path}" has no end token, so no text could ever end.')
        if not source:
            return tokenizer
        if not hasattr(tokenizer, "src_lang"):
            raise TaskError(f'The tokenizer of "{model_name_or_path}" knows no languages; remove "source_lang".')
        for name in (source, target):
            if tokenizer.convert_tokens_to_ids(name) in (None, tokenizer.unk_token_id):
                raise TaskError(f'The tokenizer of "{model_name_or_path}" does not know the language "{name}".')
        tokenizer.src_lang, tokenizer.tgt_lang = source, target
        return tokenizer

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        hub_kwargs.setdefault("dtype", KIND.default_dtype)
        return load_checkpoint(self.auto_class(task), model_name_or_path, **hub_kwargs)[0]

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        """Data set of `input_ids`, `attention_mask` and `labels`, which are the tokens of the target."""
        form = _form(task)
        limits = length_limit(task, MAX_LENGTH, processor, model), _target_limit(task, processor, model)

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            source, target = form.template.render(row)
            if form.template.required:
                form.template.demands(source)  # a row without any is found before the training and not after it
            (ids, before), (labels, after) = (
                _source(source, processor, limits[0]),
                _target(target, processor, limits[1]),
            )
            return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, _LENGTHS: [before, after]}

        read = [name for name in dataset.column_names if name != PROMPT_IDS]
        reads = [identity_of_tokenizer(processor), form.identity, limits, _languages(task)]
        rows = map_rows(dataset, encode, reads, remove_columns=read, desc="Tokenising")
        lengths = rows[_LENGTHS][:]
        empty = [row for row, (before, _) in enumerate(lengths) if not before]
        if empty:
            raise TaskError(
                f'Task "{task.name}": {len(empty)} of {len(rows)} rows have a source without a token '
                f"({numbered(source_rows(dataset, empty))}); leave these rows out."
            )
        cut = {_CUT_SOURCE: [row for row, (before, _) in enumerate(lengths) if before > limits[0]]}
        warn_of_cut(task, dataset, cut, longer_rows(limits[0], processor, model))
        cut = {_CUT_TARGET: [row for row, (_, after) in enumerate(lengths) if after > limits[1]]}
        mend = f'the limit is {limits[1]} tokens: raise "max_target_length" in the task file'
        warn_of_cut(task, dataset, cut, mend)
        return rows.remove_columns(_LENGTHS)

    def data_collator(self, processor: Any, task: Task, model: Any) -> Any:
        from transformers import DataCollatorForSeq2Seq

        # with the model, the collator makes the decoder's inputs: the labels, one place later
        return DataCollatorForSeq2Seq(padding_tokenizer(processor, model), model=model, label_pad_token_id=IGNORED)

    def predict(self, model: Any, processor: Any, inputs: Sequence[Any], task: Task, batch_size: int = 32) -> list[str]:
        """Texts that the model writes; inputs are texts, or mappings of the template's columns."""
        import torch

        form, limit = _form(task), length_limit(task, MAX_LENGTH, processor, model)
        texts = decoder_rows.checked_prompts(form, inputs)
        blank = [row for row, (_, is_blank) in enumerate(texts) if is_blank]
        check_inputs(task, [RowFault("have an empty source, or no value in one of its columns", blank, "empty")])
        sources = [_source(text, processor, limit) for text, _ in texts]
        cut = {_CUT_SOURCE: [row for row, (_, before) in enumerate(sources) if before > limit]}
        warn_of_cut(task, None, cut, longer_rows(limit, processor, model))
        options: dict[str, Any] = {"max_new_tokens": task.max_new_tokens or _target_limit(task, processor, model)}
        if task.options["target_lang"]:
            options["forced_bos_token_id"] = processor.convert_tokens_to_ids(task.options["target_lang"])
        written: list[str] = []
        padding = padding_tokenizer(processor, model)
        training = model.training
        model.eval()
        try:
            for start in range(0, len(sources), batch_size):
                ids = [found for found, _ in sources[start : start + batch_size]]
                batch = padding.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
                with torch.no_grad():
                    tokens = model.generate(**batch, do_sample=False, **options)
                written += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
                advance(len(ids))
        finally:
            model.train(training)
        return written


def _form(task: Task) -> TemplateForm:
    """Form of a task's rows: its template, or source and target as they are."""
    if task.template is not None:
        return TemplateForm(task.template)
    # a brace of the prefix is no field
    prefix = task.options["source_prefix"].replace("{", "{{").replace("}", "}}")
    return TemplateForm(Template(prompt=f"{prefix}{{source}}", answer="{target}"))


def _languages(task: Task) -> list[str]:
    return [task.options["source_lang"], task.options["target_lang"]]


def _target_limit(task: Task, processor: Any, model: Any) -> int:
    """Number of tokens that a target may have."""
    return min(task.options["max_target_length"], length_limit(task, 2**31, processor, model))


def _source(text: str, processor: Any, limit: int) -> tuple[list[int], int]:
    """Token ids of a source, cut to a limit, and their number before."""
    return _encoded(processor, {"text": text}, limit)


def _target(text: str, processor: Any, limit: int) -> tuple[list[int], int]:
    """Token ids of a target with its end token, cut to a limit, and their number before."""
    ids, before = _encoded(processor, {"text_target": text}, limit)
    # a tokenizer that writes no end token leaves a text that would never end
    if processor.eos_token_id not in ids:
        ids, before = [*ids[: limit - 1], processor.eos_token_id], before + 1
    return ids, before


def _encoded(processor: Any, text: Mapping[str, str], limit: int) -> tuple[list[int], int]:
    ids = processor(**text, truncation=True, max_length=limit)["input_ids"]
    # without a warning of the tokenizer's own, which counts nothing
    before = len(processor(**text, verbose=False)["input_ids"]) if len(ids) >= limit else len(ids)
    return ids, before
