"""Forms in which rows for a decoder are written: a template, conversations, prompt and completion, or plain text.

A form turns a row into tokens with their labels, and an input of a prediction into the tokens of a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_lab.data import chat
from peft_lab.data.prompt_template import Template, fields, fill, normalise, values_in
from peft_lab.data.row_checks import RowFault, column_faults
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from datasets import Dataset

    from peft_lab.data.task_schema import Task

IGNORED = -100

CUT_PROMPT = "are longer than the limit, and their prompt loses its beginning"
CUT_ANSWER = "have an answer longer than the limit, which loses its end and the end token, and no prompt"


@dataclass(frozen=True)
class EncodedRow:
    """Row as tokens, before it is cut.

    Attributes:
        ids: of the tokens.
        labels: of the same length; -100 where there is no loss.
        start: place of the answer that is kept whatever is cut before it.
    """

    ids: list[int]
    labels: list[int]
    start: int


class RowForm:
    """Base of the forms.

    Attributes:
        chats: the tokenizer's chat template is used.
        has_answers: rows have an answer that a written text can be compared with.
        cut_front, cut_end: words on rows that lose the beginning of a prompt, and the end of their answer.
    """

    chats: bool = False
    has_answers: bool = True
    cut_front: str = CUT_PROMPT
    cut_end: str = CUT_ANSWER

    @property
    def identity(self) -> Any:
        """Values that the tokens depend on, as JSON holds them."""
        return type(self).__name__

    def faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        """Rows that no model can learn from."""
        raise NotImplementedError

    def encode(self, row: Mapping[str, Any], tokenizer: Any, ends: Sequence[int]) -> EncodedRow:
        """Tokens of a row; `ends` are those with which the chat template ends a turn."""
        raise NotImplementedError

    def row_prompt(self, row: Mapping[str, Any]) -> str:
        """Text that stands for the prompt of a row of the task, as `prompt` makes it of `row_input`."""
        raise NotImplementedError

    def row_input(self, row: Mapping[str, Any]) -> Any:
        """Input of a prediction for a row of the task; by default the row itself."""
        return row

    def prompt(self, value: Any) -> tuple[str, bool]:
        """Text that stands for an input of a prediction, and True if nothing of the input's own is in it.

        Raises `TaskError` for anything that is no input of the form.
        """
        raise NotImplementedError

    def prompt_ids(self, prompt: str, tokenizer: Any) -> list[int]:
        """Token ids of a prompt."""
        raise NotImplementedError

    def answer(self, row: Mapping[str, Any]) -> str:
        """Text that a written answer is compared with."""
        raise NotImplementedError

    def target(self, row: Mapping[str, Any]) -> str:
        """Normal form of what `found` must give."""
        return normalise(self.answer(row))

    def found(self, text: str) -> str:
        """Normal form of a written answer, or of the part of it that counts."""
        return normalise(text)

    def coverage(self, row: Mapping[str, Any], text: str) -> float:
        """Share of what the prompt asks for that a written text contains."""
        raise NotImplementedError


class TemplateForm(RowForm):
    """Prompt and answer of a template."""

    def __init__(self, template: Template) -> None:
        self.template, self.chats = template, template.chat

    @property
    def identity(self) -> Any:
        return self.template.model_dump()

    def faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        missing: list[int] = []
        parts = ("prompt", "answer", "reference") if self.template.reference else ("prompt", "answer")
        blank: dict[str, list[int]] = {part: [] for part in parts}
        for row, values in enumerate(dataset):
            try:
                for part, rows in blank.items():
                    found = values_in(getattr(self.template, part), values)
                    if None in found.values():
                        missing.append(row)
                    elif _is_blank(found):
                        rows.append(row)
            except TaskError as error:
                raise TaskError(f'Task "{task.name}", row {row + 1}: {error}') from error
        return [
            RowFault("have no value in a column of the template", list(dict.fromkeys(missing)), "empty"),
            *[RowFault(f"have an empty {part}", rows, "empty") for part, rows in blank.items()],
        ]

    def encode(self, row: Mapping[str, Any], tokenizer: Any, ends: Sequence[int]) -> EncodedRow:
        prompt, answer = self.template.render(row)
        if self.template.required:
            self.template.demands(prompt)  # a row without any is found before the training and not after it
        # tokenised apart, so that the answer's tokens do not depend on where the prompt ends
        start = text_prompt_ids(tokenizer, prompt, self.template.chat)
        # the end token is learnt as well, else a written answer would never end
        end = [*tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
        return EncodedRow(start + end, [IGNORED] * len(start) + end, len(start))

    def row_prompt(self, row: Mapping[str, Any]) -> str:
        return fill(self.template.prompt, row)

    def prompt(self, value: Any) -> tuple[str, bool]:
        names = list(dict.fromkeys(fields(self.template.prompt)))
        if isinstance(value, str) and len(names) == 1:
            value = {names[0]: value}
        if not isinstance(value, Mapping):
            raise TaskError(f"an input of this task is a mapping with the keys {', '.join(names)}, not {value!r}.")
        read = values_in(self.template.prompt, value)
        return fill(self.template.prompt, value), None in read.values() or _is_blank(read)

    def prompt_ids(self, prompt: str, tokenizer: Any) -> list[int]:
        return text_prompt_ids(tokenizer, prompt, self.template.chat)

    def answer(self, row: Mapping[str, Any]) -> str:
        return self.template.render(row)[1]

    def target(self, row: Mapping[str, Any]) -> str:
        return self.template.target(row)

    def found(self, text: str) -> str:
        return self.template.found(text)

    def coverage(self, row: Mapping[str, Any], text: str) -> float:
        return self.template.coverage(fill(self.template.prompt, row), text)


class ChatForm(RowForm):
    """Conversations in the column `messages`; the loss is on the assistant's turns."""

    chats = True
    columns: tuple[str, ...] = ("messages",)
    cut_front = "are longer than the limit and lose their beginning"
    cut_end = "have a last answer longer than the limit, which loses its end, and nothing before it"

    def faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        found: dict[tuple[str, str], list[int]] = {}
        for row, values in enumerate(dataset):
            held = self._fault(values, task)
            if held is not None:
                found.setdefault(held, []).append(row)
        return [RowFault(what, rows, level) for (what, level), rows in found.items()]

    def _fault(self, row: Mapping[str, Any], task: Task) -> tuple[str, str] | None:
        empty = next((name for name in self.columns if row[name] is None), None)
        if empty is not None:
            return f'have no value in column "{task.columns[empty]}"', "missing"
        try:
            turns, first = self._turns(row)
        except TaskError as error:
            return f"hold no conversation ({str(error).rstrip('.')})", "missing"
        held = chat.fault(turns)
        if held is None and not any(turn["role"] == "assistant" for turn in turns[first:]):
            return "have no turn of the assistant in the completion", "missing"
        if held is None and turns[-1]["role"] != "assistant":
            return "end with turns after the last answer, which train nothing", "remark"
        return held

    def _turns(self, row: Mapping[str, Any]) -> tuple[chat.Conversation, int]:
        """Turns of a row, and the position of the first one whose answer is learnt."""
        return chat.conversation(row["messages"]), 0

    def encode(self, row: Mapping[str, Any], tokenizer: Any, ends: Sequence[int]) -> EncodedRow:
        turns, first = self._turns(row)
        ids, answers = chat.encode(tokenizer, turns, first)
        # an answer must be able to end, also where the template has no token for the end of a turn
        if not ends and turns[-1]["role"] == "assistant" and ids[-1] != tokenizer.eos_token_id:
            ids, answers = [*ids, tokenizer.eos_token_id], [*answers, True]
        labels = [IGNORED] * len(ids)
        for place, learnt in enumerate(answers):
            if learnt:
                labels[place] = ids[place]
        last = max(place for place, learnt in enumerate(answers) if learnt)
        while last and answers[last - 1]:
            last -= 1
        return EncodedRow(ids, labels, last)

    def row_prompt(self, row: Mapping[str, Any]) -> str:
        turns, _ = self._turns(row)
        return json.dumps(chat.before_answer(turns))

    def row_input(self, row: Mapping[str, Any]) -> Any:
        return json.loads(self.row_prompt(row))

    def prompt(self, value: Any) -> tuple[str, bool]:
        if isinstance(value, Mapping):
            value = value.get(self.columns[0])
        if isinstance(value, str) and not value.lstrip().startswith("["):
            value = [{"role": "user", "content": value}]
        turns = chat.conversation(value)
        # an input may be a row of the task, whose answer the model must not see
        if turns[-1]["role"] == "assistant":
            turns = chat.before_answer(turns)
        held = chat.fault(turns, asks=True) if turns else ("have no turn before an answer", "missing")
        if held is None or held[1] == "empty":
            return json.dumps(turns), held is not None
        raise TaskError(f"an input of this task is a conversation; some {held[0]}.")

    def prompt_ids(self, prompt: str, tokenizer: Any) -> list[int]:
        return chat.prompt_ids(tokenizer, json.loads(prompt))

    def answer(self, row: Mapping[str, Any]) -> str:
        turns, _ = self._turns(row)
        return turns[len(chat.before_answer(turns))].get("content", "")


class TurnPairForm(ChatForm):
    """Columns `prompt` and `completion` of turns; the loss is on the assistant's turns of the completion."""

    columns = ("prompt", "completion")

    def _turns(self, row: Mapping[str, Any]) -> tuple[chat.Conversation, int]:
        prompt, completion = chat.conversation(row["prompt"]), chat.conversation(row["completion"])
        return prompt + completion, len(prompt)


class TextPairForm(TemplateForm):
    """Columns `prompt` and `completion` of texts; the loss is on the completion and an end token."""

    def __init__(self) -> None:
        super().__init__(Template(prompt="{prompt}", answer="{completion}"))

    def faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        return column_faults(dataset, task, ("prompt", "completion"))


class TextForm(RowForm):
    """Texts in the column `text`; the loss is on every token and an end token."""

    has_answers = False
    cut_front = ""
    cut_end = "are longer than the limit and lose their end"

    def faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        return column_faults(dataset, task, ("text",))

    def encode(self, row: Mapping[str, Any], tokenizer: Any, ends: Sequence[int]) -> EncodedRow:
        ids = [*text_prompt_ids(tokenizer, row["text"] or "", False), tokenizer.eos_token_id]
        return EncodedRow(ids, list(ids), 0)

    def row_prompt(self, row: Mapping[str, Any]) -> str:
        return row["text"]

    def prompt(self, value: Any) -> tuple[str, bool]:
        if not isinstance(value, str):
            raise TaskError(f"an input of this task is a text that the model goes on with, not {value!r}.")
        return value, not value.strip()

    def prompt_ids(self, prompt: str, tokenizer: Any) -> list[int]:
        return text_prompt_ids(tokenizer, prompt, False)


def form_of(task: Task, prompts: Sequence[Any] = ()) -> RowForm:
    """Form of a task's rows.

    Args:
        task: a task of written text.
        prompts: values of the column `prompt`; lists among them are those of turns.
    """
    if task.template is not None:
        return TemplateForm(task.template)
    if "messages" in task.columns:
        return ChatForm()
    if "text" in task.columns:
        return TextForm()
    return TurnPairForm() if any(map(_are_turns, prompts)) else TextPairForm()


def _are_turns(value: Any) -> bool:
    """Test whether a prompt is a list of turns, or JSON text of one."""
    if isinstance(value, Mapping):
        value = value.get("prompt")
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith('[{"role"'))


def form_of_rows(task: Task, dataset: Dataset) -> RowForm:
    """Form of a data set with canonical columns.

    Raises:
        TaskError: prompts are texts and completions turns, or the other way round.
    """
    from datasets import Value

    if task.template is not None or "prompt" not in task.columns:
        return form_of(task)
    are_texts = [isinstance(dataset.features[name], Value) for name in ("prompt", "completion")]
    if len(set(are_texts)) > 1:
        raise TaskError(
            f'Task "{task.name}": the columns "{task.columns["prompt"]}" and "{task.columns["completion"]}" hold texts '
            "on one side and lists of turns on the other; write both as texts or both as turns."
        )
    return TextPairForm() if are_texts[0] else TurnPairForm()


def checked_prompts(form: RowForm, inputs: Sequence[Any]) -> list[tuple[str, bool]]:
    """Prompts of the inputs of a prediction, and True for blank ones; `TaskError` with the number of a wrong one."""
    found = []
    for number, value in enumerate(inputs, start=1):
        try:
            found.append(form.prompt(value))
        except TaskError as error:
            raise TaskError(f"{str(error).removesuffix('.')} (input {number}).") from error
    return found


def text_prompt_ids(tokenizer: Any, prompt: str, as_turn: bool) -> list[int]:
    """Token ids of a text, with a beginning and without an end.

    Args:
        tokenizer: the tokenizer.
        prompt: the text.
        as_turn: put it through the chat template as a turn of the user.
    """
    if as_turn:
        return chat.prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    # some tokenizers add an end token, after which a decoder would not go on writing
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def cut(row: EncodedRow, limit: int, bos: int | None) -> dict[str, list[int]]:
    """Arguments of a model's forward for a row of at most `limit` tokens.

    Tokens over it are cut from the front, then from the end of the answer.

    Returns:
        `input_ids`, `attention_mask` and `labels` of one length.
    """
    # the answer has room first, because the loss is taken on it
    end = min(len(row.ids), row.start + limit)
    kept = [*last_places(row.ids[: row.start], limit - (end - row.start), bos), *range(row.start, end)]
    ids = [row.ids[place] for place in kept]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [row.labels[place] for place in kept]}


def last_places(ids: Sequence[int], room: int, bos: int | None) -> list[int]:
    """Places of the last `room` tokens of a prompt, in training as in prediction.

    A decoder that was trained with a first token needs it, so that one is kept however long the prompt is.
    """
    if len(ids) <= room:
        return list(range(len(ids)))
    keeps_bos = room > 1 and ids[0] == bos
    return [0, *range(len(ids) - room + 1, len(ids))] if keeps_bos else list(range(len(ids) - room, len(ids)))


def _is_blank(values: Mapping[str, Any]) -> bool:
    """Test whether a text has nothing of a row's own in it."""
    return not any(str(value).strip() for value in values.values())
