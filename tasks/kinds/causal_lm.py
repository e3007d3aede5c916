"""Language modelling with decoders: instructions, chats, completions and plain texts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.data import chat, decoder_rows, written_answers
from peft_lab.data.decoder_rows import EncodedRow, RowForm
from peft_lab.data.profile import ColumnProfile, DataProfile, Proposal
from peft_lab.data.row_checks import RowFault, check_inputs, numbered, source_rows, warn_of_cut
from peft_lab.data.row_maps import identity_of_tokenizer, map_rows
from peft_lab.data.task_schema import PROMPT_IDS
from peft_lab.data.text_inputs import cast_texts, length_limit, longer_rows, padding_tokenizer
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
MAX_NEW_TOKENS = 64

#: Column of the numbers of tokens before the last answer, and from its beginning on, before a row is cut.
_LENGTHS = "lengths"

#: Usual names of the columns of prompt and answer; a third column may hold what the instruction is about.
_PAIRS = (
    *(("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("instruction", "response")),
    *(("question", "answer"), ("input", "output"), ("source", "target")),
)
_ABOUT = ("input", "context")


KIND = KindInfo(
    name="causal_lm",
    title="prompt, chat or text -> written text",
    runtime="CausalLM",
    columns={"messages": False, "prompt": False, "completion": False, "text": False},
    forms=(("messages",), ("prompt", "completion"), ("text",)),
    answers=("label", "completion"),
    settings=("template", "max_length", "max_new_tokens"),
    options={"chat_template": ""},
    metrics=("perplexity", "token_accuracy", "exact_match", "rouge_l", "bleu", "coverage"),
    task_type="CAUSAL_LM",
    pipeline_tag="text-generation",
    source_head=True,
)


class CausalLM(WritingKind):
    """A template, `messages`, `prompt` + `completion`, or `text`; AutoModelForCausalLM.

    The loss is on the answer of a template and on the completion, on the assistant's turns, or on all of a text.
    Perplexity and token accuracy are taken on the same tokens, end token included, with the true tokens before them.
    The other metrics let the model write (greedily): `exact_match` compares what `template.extract` finds, `rouge_l`
    and `bleu` the whole text with the row's last answer, and `coverage` is the share of what `template.required` finds
    in the prompt that stands in the text.
    """

    info = KIND
    scores_tokens = True
    shift = 1

    def propose(self, profile: DataProfile) -> Proposal | None:
        if profile.given:
            return None
        messages = profile.find("messages", ("messages", "conversation", "conversations"), _holds_turns)
        if messages is not None:
            return Proposal(self.name, 0.9, {"messages": messages.name}, metrics=KIND.metrics[:2])
        known = {
            column.name.lower(): column
            for column in profile.columns.values()
            if column.type in ("text", "number") or _holds_turns(column)
        }
        pair = next((pair for pair in _PAIRS if known.keys() >= set(pair)), None)
        if pair is None:
            return self._of_two_texts(list(known.values())) or self._plain_text(profile)
        prompt, answer = (known[name] for name in pair)
        # a question with an answer, or a source with a target, may be meant for another kind
        confidence = 0.9 if pair[0] in ("prompt", "instruction") else 0.3 if answer.holds_classes else 0.6
        if pair == _PAIRS[0]:
            return Proposal(
                self.name, confidence, {"prompt": prompt.name, "completion": answer.name}, metrics=KIND.metrics[:2]
            )
        if _holds_turns(prompt) or _holds_turns(answer):
            return None
        about = next((known[name] for name in _ABOUT if name in known and name not in pair), None)
        between = f"\n{{{about.name}}}" if about else ""
        template = {"prompt": f"{{{prompt.name}}}{between}\n", "answer": f"{{{answer.name}}}"}
        return Proposal(self.name, confidence, settings={"template": template}, metrics=KIND.metrics[:2])

    def _of_two_texts(self, columns: Sequence[ColumnProfile]) -> Proposal | None:
        """Proposal for two columns of texts whose names say nothing."""
        if len(columns) != 2 or any(column.type != "text" or column.holds_few_classes for column in columns):
            return None
        first, second = columns
        template = {"prompt": f"{{{first.name}}}\n", "answer": f"{{{second.name}}}"}
        doubt = f'the prompt is "{first.name}", and "{second.name}" is what the model learns to write'
        return Proposal(self.name, 0.3, settings={"template": template}, metrics=KIND.metrics[:2], doubts=(doubt,))

    def _plain_text(self, profile: DataProfile) -> Proposal | None:
        """Proposal for data that hold nothing but one column of texts."""
        columns = list(profile.columns.values())
        if len(columns) != 1 or columns[0].type != "text" or columns[0].holds_classes:
            return None
        doubt = "the texts have no answers or labels, so a language model is trained on all of each"
        return Proposal(self.name, 0.6, {"text": columns[0].name}, metrics=KIND.metrics[:2], doubts=(doubt,))

    def check(self, task: Task) -> None:
        form = decoder_rows.form_of(task)
        written_answers.check_metrics(task, KIND.metrics if form.has_answers else KIND.metrics[:2])
        name = task.options["chat_template"]
        if name:
            chat.check_template_name(name)
            # prompts may be lists of turns, which only the data show
            if not form.chats and "prompt" not in task.columns:
                raise TaskError('"chat_template" has no effect on rows that are no chats; remove it.')

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        from datasets import Value

        if task.template is not None:
            return dataset
        names = [name for name in ("text", "prompt", "completion") if name in dataset.column_names]
        decoder_rows.form_of_rows(task, dataset)
        return cast_texts(dataset, task, [name for name in names if isinstance(dataset.features[name], Value)])

    def reads_texts(self, task: Task) -> bool:
        return True

    def auto_class(self, task: Task) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=False, **hub_kwargs)
        if tokenizer.eos_token is None:
            raise TaskError(f'The tokenizer of "{model_name_or_path}" has no end token, so no answer could ever end.')
        # the end token can pad, because padding is masked by position and not by its id
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        name = task.options["chat_template"]
        if task.template is not None and task.template.chat and not (tokenizer.chat_template or name):
            raise TaskError(
                f'"{model_name_or_path}" has no chat template; set "chat: false" in the template of the task, or name '
                f'one as "chat_template": {", ".join(chat.TEMPLATES)}.'
            )
        if name or decoder_rows.form_of(task).chats:
            chat.set_template(tokenizer, name, model_name_or_path)
        return tokenizer

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        hub_kwargs.setdefault("dtype", KIND.default_dtype)
        return load_checkpoint(self.auto_class(task), model_name_or_path, **hub_kwargs)[0]

    def form(self, task: Task, dataset: Dataset) -> RowForm:
        return decoder_rows.form_of_rows(task, dataset)

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        return self.form(task, dataset).faults(dataset, task)

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        """Data set of `input_ids`, `attention_mask` and `labels`, which are -100 on tokens without a loss."""
        form = _ready(self.form(task, dataset), processor)
        limit = length_limit(task, MAX_LENGTH, processor, model)
        ends = chat.end_tokens(processor) if form.chats else []

        def encode(row: dict[str, Any], place: int) -> dict[str, Any]:
            try:
                found = form.encode(row, processor, ends)
            except TaskError as error:
                number = numbered(source_rows(dataset, [place]))
                raise TaskError(f'Task "{task.name}", {number}: {error}') from error
            lengths = [found.start, len(found.ids) - found.start]
            return {**decoder_rows.cut(found, limit, processor.bos_token_id), _LENGTHS: lengths}

        read = [name for name in dataset.column_names if name != PROMPT_IDS]
        reads = [identity_of_tokenizer(processor), form.identity, limit]
        rows = map_rows(dataset, encode, reads, with_indices=True, remove_columns=read, desc="Tokenising")
        lengths = rows[_LENGTHS][:]
        # of a text, the first token is predicted by none
        least = (1, 1) if form.cut_front else (0, 2)
        empty = [row for row, (start, end) in enumerate(lengths) if start < least[0] or end < least[1]]
        if empty:
            numbers, what = numbered(source_rows(dataset, empty)), "prompt" if form.cut_front else "text"
            raise TaskError(
                f'Task "{task.name}": {len(empty)} of {len(rows)} rows have a {what} without a token ({numbers}); '
                f"write something in the {what}, or leave these rows out."
            )
        cut = {form.cut_end: [row for row, (_, end) in enumerate(lengths) if end > limit]}
        if form.cut_front:
            cut = {form.cut_front: [row for row, (start, end) in enumerate(lengths) if start + end > limit]} | cut
        warn_of_cut(task, dataset, cut, longer_rows(limit, processor, model))
        return rows.remove_columns(_LENGTHS)

    def packed_length(self, processor: Any, task: Task, model: Any) -> int:
        return length_limit(task, MAX_LENGTH, processor, model)

    def data_collator(self, processor: Any, task: Task, model: Any) -> Any:
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(padding_tokenizer(processor, model), label_pad_token_id=IGNORED)

    def predict(self, model: Any, processor: Any, inputs: Sequence[Any], task: Task, batch_size: int = 32) -> list[str]:
        """Texts that the model writes, greedily.

        Inputs are mappings of the template's columns, or texts if it has a single column; conversations, or texts that
        stand for a turn of the user; prompts; or beginnings of texts.
        """
        form = _ready(decoder_rows.form_of(task, inputs), processor)
        new_tokens = task.max_new_tokens or MAX_NEW_TOKENS
        limit = max(1, length_limit(task, MAX_LENGTH, processor, model, reserve=new_tokens))
        texts = decoder_rows.checked_prompts(form, inputs)
        blank = [row for row, (_, is_blank) in enumerate(texts) if is_blank]
        check_inputs(task, [RowFault("have an empty prompt, or no value in one of its columns", blank, "empty")])
        whole = [form.prompt_ids(text, processor) for text, _ in texts]
        check_inputs(
            task, [RowFault("have a prompt without a token", [row for row, ids in enumerate(whole) if not ids])]
        )
        cut = {decoder_rows.CUT_PROMPT: [row for row, ids in enumerate(whole) if len(ids) > limit]}
        warn_of_cut(task, None, cut, longer_rows(limit, processor, model, reserve=new_tokens))
        prompts = []
        for ids in whole:
            prompts.append([ids[place] for place in decoder_rows.last_places(ids, limit, processor.bos_token_id)])
        ends = chat.stop_tokens(model, processor) if form.chats else None
        return _generate(model, processor, prompts, batch_size, new_tokens, ends)

    def predict_with_prompts(
        self,
        model: Any,
        processor: Any,
        inputs: Sequence[Any],
        task: Task,
        batch_size: int,
        ids: Sequence[int] | None,
        **options: Any,
    ) -> list[Any]:
        # numbers of prompts are given batch by batch, in the order of the inputs, which `predict` may change
        size = batch_size if ids is None or _skips_padding(model) else 1
        return super().predict_with_prompts(model, processor, inputs, task, size, ids, **options)


def answer_only(start: list[int], end: list[int], limit: int, bos: int | None) -> dict[str, list[int]]:
    """Join the tokens of prompt and answer; see `decoder_rows.cut`."""
    return decoder_rows.cut(EncodedRow(start + end, [IGNORED] * len(start) + end, len(start)), limit, bos)


def _generate(
    model: Any, processor: Any, prompts: Sequence[list[int]], batch_size: int, new_tokens: int, ends: list[int] | None
) -> list[str]:
    """Texts that a model writes after prompts; `ends` are tokens that end a text, the model's own by default."""
    import torch

    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": processor.pad_token_id}
    if ends is not None:
        options["eos_token_id"] = ends
    written = [""] * len(prompts)
    training = model.training
    model.eval()
    try:
        for chosen in written_answers.batches([len(ids) for ids in prompts], batch_size, _skips_padding(model)):
            # padded on the left: the new tokens must follow the prompt's last one
            batch = processor.pad(
                {"input_ids": [prompts[row] for row in chosen]}, padding_side="left", return_tensors="pt"
            ).to(model.device)
            with torch.no_grad():
                tokens = model.generate(**batch, **options)
            texts = processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, text in zip(chosen, texts, strict=True):
                written[row] = text.strip()
            advance(len(chosen))
    finally:
        model.train(training)
    return written


def _ready(form: RowForm, processor: Any) -> RowForm:
    """Form of rows, once the tokenizer has a template for its chats."""
    if form.chats and not processor.chat_template:
        chat.set_template(processor, "", str(processor.name_or_path))
    return form


def _holds_turns(column: ColumnProfile) -> bool:
    """Test whether a column holds lists of turns with a role."""
    return column.type == "list" and column.entries is not None and "role" in column.entries.keys


def _skips_padding(model: Any) -> bool:
    """Test whether a decoder can go on with a batch that is padded at the left.

    It must take positions, with which `generate` leaves the padding out of the count, and have no recurrence or
    convolution over the text, which would carry prompts of an adapter through the padding.
    """
    config = model.config.get_text_config()
    forward = (model.get_base_model() if hasattr(model, "get_base_model") else model).forward
    kinds = set(getattr(config, "layer_types", None) or ())
    attends = all(kind.endswith("_attention") and kind != "linear_attention" for kind in kinds)
    return attends and "position_ids" in inspect.signature(forward).parameters
