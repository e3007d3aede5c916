"""Chats: conversations of rows, templates for tokenizers without one, and the tokens of the assistant's turns.

A conversation is a list of turns `{"role": ..., "content": ...}`. `render` and `prompt_ids` are for whoever asks a
trained model, `encode` is for training rows.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft_lab.errors import TaskError, did_you_mean

logger = logging.getLogger("peft_lab")

Conversation = list[dict[str, Any]]

ROLES = ("system", "developer", "user", "assistant", "tool")
#: Roles of turns that may stand before the first one of the user.
_BEFORE_USER = ("system", "developer")

_ASSISTANT = "message['role'] == 'assistant'"
#: Templates for tokenizers that have none. An answer ends with the tokenizer's own end token, because the marks of
#: ChatML would be several tokens where the vocabulary lacks them, and no generation would stop at these.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' }}"
        f"{{% if {_ASSISTANT} %}}"
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}"
        "{{ message['role'] | capitalize + ': ' }}"
        f"{{% if {_ASSISTANT} %}}"
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
}
DEFAULT_TEMPLATE = "chatml"

#: Backbones whose default was said already.
_said: set[str] = set()

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: Content of a turn by which its end is found in a rendered conversation.
_SENTINEL = "Fine weather today"


def check_template_name(name: str) -> None:
    """Raise `TaskError` if no template of ours has the name."""
    if name not in TEMPLATES:
        raise TaskError(
            f'"chat_template" must be one of {", ".join(TEMPLATES)}, not "{name}".{did_you_mean(name, TEMPLATES)}'
        )


def set_template(tokenizer: Any, name: str, source: str) -> None:
    """Give a tokenizer one of `TEMPLATES`; it is saved with the tokenizer.

    Args:
        tokenizer: with an end token.
        name: name of the template; "" keeps the tokenizer's own one, or gives it the default if it has none.
        source: name of the backbone, for the log.
    """
    if not name and tokenizer.chat_template:
        return
    chosen = name or DEFAULT_TEMPLATE
    if not name and source not in _said:
        _said.add(source)
        logger.warning(
            'The tokenizer of "%s" has no chat template; it gets "%s", which is saved with the adapter (set '
            '"chat_template" in the task file to choose another one: %s).',
            source,
            chosen,
            ", ".join(TEMPLATES),
        )
    # a chat template writes all special tokens, also the first one that the tokenizer puts before other texts
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" * begins + TEMPLATES[chosen]


def conversation(value: Any) -> Conversation:
    """Conversation of a cell: a list of turns, or JSON text of one.

    Keys without a value, which tables add to turns that lack them, are left out.

    Raises:
        TaskError: the value is none.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise TaskError("a conversation is a list of turns with role and content, or JSON text of one.") from error
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise TaskError("a conversation is a list of turns with role and content.")
    turns = [_without_empty_keys(turn) for turn in value]
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            held = f", but {', '.join(turn)}" if isinstance(turn, Mapping) else ""
            raise TaskError(f'turn {number} has no text in "role"{held}; write "role" and "content".')
        if not isinstance(turn.get("content", ""), str):
            raise TaskError(f"the content of turn {number} is no text; only texts are read.")
    return turns


def _without_empty_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_empty_keys(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_empty_keys(part) for part in value]
    return value


def fault(turns: Conversation, asks: bool = False) -> tuple[str, str] | None:
    """First fault of a conversation, as verb and object, and its level; None without one.

    Args:
        turns: the conversation.
        asks: it is one that a model is to go on with, so that it needs no answer.
    """
    role = next((turn["role"] for turn in turns if turn["role"] not in ROLES), None)
    if role is not None:
        return f'have a turn of the role "{role}", which is none of {", ".join(ROLES)}', "missing"
    first = next((turn["role"] for turn in turns if turn["role"] not in _BEFORE_USER), None)
    if first != "user":
        return "do not begin with a turn of the user, after those of the system", "missing"
    if not asks and not any(turn["role"] == "assistant" for turn in turns):
        return "have no turn of the assistant, on which the loss is taken", "missing"
    # a call of a tool has no text of its own
    if any(not turn.get("content", "").strip() and "tool_calls" not in turn for turn in turns):
        return "have a turn without a text", "empty"
    return None


def before_answer(turns: Conversation) -> Conversation:
    """Turns before the last one of the assistant; all of them if there is none."""
    last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=len(turns))
    return turns[:last]


def render(tokenizer: Any, messages: Conversation, add_generation_prompt: bool = True) -> str:
    """Text of a conversation by the tokenizer's chat template.

    Args:
        tokenizer: with a chat template.
        messages: the turns.
        add_generation_prompt: end with the beginning of an answer of the assistant.

    Raises:
        TaskError: the template refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, KeyError) as error:
        raise TaskError(f"the chat template refuses the conversation: {' '.join(str(error).split())}.") from error


def prompt_ids(tokenizer: Any, messages: Conversation) -> list[int]:
    """Token ids of a conversation that the model is to answer."""
    # a chat template writes the special tokens itself, and the tokenizer would add them again
    return tokenizer(render(tokenizer, messages), add_special_tokens=False, verbose=False)["input_ids"]


def end_tokens(tokenizer: Any) -> list[int]:
    """Special token with which the template ends a turn of the assistant; empty if it has none of its own."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _SENTINEL}]
    tail = render(tokenizer, turns, add_generation_prompt=False).rpartition(_SENTINEL)[2]
    ids = tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"] if tail else []
    special = {*tokenizer.all_special_ids}
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [ids[0]] if ids and ids[0] in special else []


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer in a chat: those of the model, of the tokenizer and of its chat template."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    tokens = [*found, tokenizer.eos_token_id, *end_tokens(tokenizer)]
    return list(dict.fromkeys(token for token in tokens if token is not None))


def encode(tokenizer: Any, messages: Conversation, first: int = 0) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and True for those of the assistant's turns.

    They are those that the template's `{% generation %}` marks. Of a template without marks, a turn is the difference
    between the conversation up to the request for it and the one up to its end.

    Args:
        tokenizer: a fast one, with a chat template.
        messages: the turns.
        first: position of the first turn that counts.

    Raises:
        TaskError: the template writes earlier turns otherwise once later ones follow, or marks no token.
    """
    if not tokenizer.is_fast:
        raise TaskError(f"{type(tokenizer).__name__} does not say which text its tokens stand for; take a fast one.")
    whole = render(tokenizer, messages, add_generation_prompt=False)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    if _MARKED.search(tokenizer.get_chat_template()):
        start = len(_beginning(tokenizer, messages[:first], whole, True)) if first else 0
        spans = [span for span in _marked(tokenizer, messages) if span[1] > start]
    else:
        learnt = [turn for turn in range(first, len(messages)) if messages[turn]["role"] == "assistant"]
        spans = [_span(tokenizer, messages, turn, whole) for turn in learnt]
    answers = [_overlaps(begin, stop, spans) for begin, stop in places]
    if not any(answers):
        raise TaskError("the chat template marks no token of the assistant's turns.")
    return ids, answers


def _marked(tokenizer: Any, messages: Conversation) -> list[tuple[int, int]]:
    """Characters that the template marks in the whole text."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # not by the mask that `apply_chat_template` gives, which runs to the end of the row where a mark ends with a space
    # that is part of no token
    rendered: Any = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return rendered[1][0]


def _span(tokenizer: Any, messages: Conversation, turn: int, whole: str) -> tuple[int, int]:
    """Characters of a turn in the whole text."""
    start = _beginning(tokenizer, messages[:turn], whole, True)
    return len(start), len(_beginning(tokenizer, messages[: turn + 1], whole, False))


def _beginning(tokenizer: Any, messages: Conversation, whole: str, asks: bool) -> str:
    """Text of the first turns, which the whole one must begin with."""
    text = render(tokenizer, messages, add_generation_prompt=asks)
    if not whole.startswith(text):
        raise TaskError(
            f"the chat template writes the first {len(messages)} turns otherwise once more turns follow, so the tokens "
            'of the assistant are not known; set "chat_template" in the task file, or mark them in the template by '
            "{% generation %}."
        )
    return text


def _overlaps(begin: int, stop: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Test whether a token's characters overlap one of the spans."""
    return any(begin < end and stop > start for start, end in spans)
