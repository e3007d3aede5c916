"""Prompt templates: column names in braces, filled from a row, never evaluated."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from peft_lab.errors import TaskError
from peft_lab.utils.schema import Schema

_FIELD = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


class Template(Schema):
    """Prompt template, which makes a prompt and an answer of a row.

    A field is a column name in braces, `{question}`, or a path into a nested one, `{instances.0.output}`; a literal
    brace is doubled.

    Attributes:
        prompt: what the model reads; no loss is taken on it.
        answer: what the model learns to write after it.
        reference: what a generated answer must equal for `exact_match`; `answer` if empty.
        extract: regular expression whose only group is compared instead of the whole text, in answer and reference.
        required: regular expression whose only group finds, in the prompt, what a generated answer must contain; for
            `coverage`.
        chat: put the prompt through the tokenizer's chat template as the user's turn.
    """

    prompt: str = ""
    answer: str = ""
    reference: str = ""
    extract: str = ""
    required: str = ""
    chat: bool = False

    @model_validator(mode="after")
    def _check(self) -> Template:
        for key in ("prompt", "answer"):
            if not fields(getattr(self, key)):
                raise TaskError(f'the template needs "{key}" with at least one column in braces, like "{{question}}".')
        # a reference may lack columns, so only its syntax is checked
        fields(self.reference)
        for key in ("extract", "required"):
            # an empty pattern has no group and is refused if it was written, while the default means none
            if key in self.model_fields_set:
                _check_one_group(key, getattr(self, key))
        return self

    def columns(self) -> tuple[str, ...]:
        """The columns that the template reads, in order of appearance."""
        names = [name for text in (self.prompt, self.answer, self.reference) for name in fields(text)]
        return tuple(dict.fromkeys(name.split(".")[0] for name in names))

    def inputs(self) -> tuple[str, ...]:
        """The columns that the prompt reads, in order of appearance."""
        return tuple(dict.fromkeys(name.split(".")[0] for name in fields(self.prompt)))

    def render(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Prompt and answer of a row."""
        return fill(self.prompt, row), fill(self.answer, row)

    def target(self, row: Mapping[str, Any]) -> str:
        """Text that a generated answer must equal.

        Raises:
            TaskError: `extract` does not match the row's own reference, so no model could ever be right.
        """
        text = fill(self.reference or self.answer, row)
        # a reference of its own is the bare result already, only an answer has more text around it
        if self.reference or not self.extract:
            return normalise(text)
        match = re.search(self.extract, text)
        if match is None:
            raise TaskError(f'Template: extract {self.extract!r} finds nothing in the reference "{text[:200]}".')
        return normalise(match[1])

    def found(self, text: str) -> str:
        """Part of a generated text that is compared with `target`.

        It is empty if `extract` finds nothing.
        """
        if not self.extract:
            return normalise(text)
        match = re.search(self.extract, text)
        return normalise(match[1]) if match else ""

    def demands(self, prompt: str) -> tuple[str, ...]:
        """Texts that `required` finds in a prompt, each once.

        Raises:
            TaskError: it finds nothing, so there is nothing that an answer could contain.
        """
        found = dict.fromkeys(normalise(text) for text in re.findall(self.required, prompt))
        if not any(found):
            raise TaskError(f'Template: required {self.required!r} finds nothing in the prompt "{prompt[:200]}".')
        return tuple(filter(None, found))

    def coverage(self, prompt: str, text: str) -> float:
        """Share of the `demands` of a prompt that a text contains.

        They count as whole words, in upper or lower case.
        """
        text, demands = normalise(text), self.demands(prompt)
        # \b would find no edge beside a demand that ends with a sign, such as C++
        return sum(re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None for part in demands) / len(demands)


def fields(text: str) -> list[str]:
    """The field names of a template text.

    Raises:
        TaskError: unbalanced braces, or anything but a plain name in them (conversions, formats, attributes, calls).
    """
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise TaskError(f'Template "{text[:80]}": {error}; write a literal brace twice.') from error
    names = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not _FIELD.fullmatch(name) or form or conversion:
            raise TaskError(f'Template "{text[:80]}": "{{{name}}}" must be a plain column name, like {{question}}.')
        names.append(name)
    return names


def values_in(text: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a row that a template text reads, by field."""
    return {name: _value(row, name) for name in fields(text)}


def fill(text: str, row: Mapping[str, Any]) -> str:
    """Fill a template text with a row's values; missing ones are empty.

    Raises:
        TaskError: a value is a list or an object, which could be written in several ways.
    """
    # str.format would follow attributes of the values, and a task file is not trusted
    parts = []
    for literal, name, _, _ in string.Formatter().parse(text):
        parts.append(literal)
        if name is not None:
            value = _value(row, name)
            if isinstance(value, (list, Mapping)):
                raise TaskError(
                    f'Template: "{{{name}}}" is a {type(value).__name__}; name one of its entries, like {{{name}.0}}.'
                )
            parts.append("" if value is None else str(value))
    return "".join(parts)


def normalise(text: str) -> str:
    """Normal form in which answers are compared.

    Trimmed, lower case, `1,234.00` as `1234`, no closing full stop.
    """
    text = " ".join(text.split()).casefold().removesuffix(".")
    # only a comma before three digits groups them: lists such as 1,2 stay as they are
    return re.sub(r"(?<=\d)\.0+(?!\d)", "", re.sub(r"(?<=\d),(?=\d{3})", "", text))


def _check_one_group(key: str, pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise TaskError(f'{key} "{pattern}" is no regular expression: {error}.') from error
    if groups != 1:
        raise TaskError(f'{key} "{pattern}" must have exactly one group, it has {groups}.')


def _value(row: Mapping[str, Any], name: str) -> Any:
    value: Any = row
    for step in name.split("."):
        try:
            value = value[int(step)] if isinstance(value, list) else value[step]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise TaskError(f'Template: the row has nothing at "{{{name}}}".') from error
    return value
