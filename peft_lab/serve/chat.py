"""Conversation with a causal language model and its adapter, its answers streamed token by token."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer, set_seed

from peft_lab.data import chat, prompt_column
from peft_lab.data.prompt_template import fill
from peft_lab.data.task_schema import PROMPT_IDS
from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.serve.sampling import MAX_NEW_TOKENS, Sampling
from peft_lab.tuners.forward_context import row_inputs
from peft_lab.utils.text import visible

if TYPE_CHECKING:
    from peft_lab.loading.load_language_model import LanguageModel

logger = logging.getLogger("peft_lab")

#: Tokens of an answer for which earlier turns are given up, where the context is full.
_ROOM = 64


class Chat:
    """Conversation, turn by turn.

    Turns go through the tokenizer's chat template and are remembered; an adapter of a task whose template is no chat
    gets each turn as a prompt of its own, as it was trained.

    Args:
        language_model: the model.
        system: text of the system, the first turn of a chat template.
        sampling: choice of the next token.
        prompt_value: value that chooses prompts, for methods that choose them by row.

    Raises:
        ConfigError: the template takes no system text, or the method needs a prompt value that is not given.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        system: str = "",
        sampling: Sampling | None = None,
        prompt_value: str | None = None,
    ) -> None:
        self._model: Any = language_model.model
        self._tokenizer = language_model.tokenizer
        self._task, self._system = language_model.task, system
        self._sampling = sampling or Sampling()
        template = self._task.template if self._task is not None else None
        self._template = template
        #: True if turns are remembered.
        self.remembers = bool(self._tokenizer.chat_template) and (template is None or template.chat)
        if system and not self.remembers:
            raise ConfigError(
                "A system text needs a chat template, and this model gets each turn as a prompt of its own; leave it "
                "out, or write it into the turns."
            )
        self._prompt_ids = self._ids_of(prompt_value)
        self._turns: list[dict[str, str]] = []
        if self._sampling.seed is not None:
            set_seed(self._sampling.seed)

    def reset(self) -> None:
        """Forget all turns; the system text stays."""
        self._turns = []

    def say(self, text: str, write: Callable[[str], Any] | None = None) -> str:
        """Answer a turn.

        Args:
            text: what the user says; for a template of several columns a JSON object of them.
            write: takes the pieces of the answer as they are written.

        Raises:
            ConfigError: the turn does not fit into the model's context, or lacks a column of the template.
        """
        turn = self._filled(text)
        tokens = self._tokens_of(turn)
        answer = self._generate(tokens, write)
        if self.remembers:
            self._turns += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        return answer

    def _filled(self, text: str) -> str:
        """Prompt of a turn by the task's template."""
        if self._template is None or not self._template.prompt:
            return text
        columns = self._template.inputs()
        row: dict[str, Any] = {columns[0]: text} if len(columns) == 1 else {}
        if not row:
            with contextlib.suppress(ValueError):
                row = json.loads(text)
        missing = [name for name in columns if not isinstance(row, dict) or name not in row]
        if missing:
            example = json.dumps(dict.fromkeys(columns, "..."))
            raise ConfigError(f"The template of this task has {len(columns)} columns; write a turn as {example}.")
        return fill(self._template.prompt, row)

    def _tokens_of(self, turn: str) -> list[int]:
        """Tokens of the conversation with a new turn, without earlier turns that do not fit."""
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        while True:
            tokens = self._encoded(turn)
            wanted = min(self._new_tokens(), _ROOM)
            if most is None or len(tokens) + wanted <= most:
                return tokens
            if not self._turns:
                break
            logger.warning("The context is full: the earliest turn is left out from here on.")
            self._turns = self._turns[2:]
        if len(tokens) >= most:
            raise ConfigError(f"The turn has {len(tokens)} tokens, and the model takes {most}; shorten it.")
        return tokens

    def _encoded(self, turn: str) -> list[int]:
        if self.remembers:
            system = [{"role": "system", "content": self._system}] if self._system else []
            turns = [*system, *self._turns, {"role": "user", "content": turn}]
            return chat.prompt_ids(self._tokenizer, turns)
        ids = list(self._tokenizer(turn)["input_ids"])
        # some tokenizers add an end token, after which a decoder would not go on writing
        return ids[:-1] if len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id else ids

    def _new_tokens(self) -> int:
        own = self._task.max_new_tokens if self._task is not None else None
        return self._sampling.max_new_tokens or own or MAX_NEW_TOKENS

    def _generate(self, tokens: list[int], write: Callable[[str], Any] | None) -> str:
        if not tokens:
            raise ConfigError("The turn has no token; write something.")
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        room = self._new_tokens() if most is None else min(self._new_tokens(), most - len(tokens))
        sampling = self._sampling
        # a base may bring values of its own, which transformers warns of where nothing is drawn
        options: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature:
            options = {"temperature": sampling.temperature, "top_p": sampling.top_p or 1.0, "top_k": 0}
        if self.remembers:
            # a template may end a turn by a token that the model's own config does not name
            options["eos_token_id"] = chat.stop_tokens(self._model, self._tokenizer)
        inputs = torch.tensor([tokens], device=self._model.device)
        prompts = contextlib.nullcontext() if self._prompt_ids is None else row_inputs(**{PROMPT_IDS: self._prompt_ids})
        # `generate` takes no arguments of ours, so the number of the prompts reaches the forward through a context
        with torch.no_grad(), prompts:
            generated = self._model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=room,
                do_sample=bool(sampling.temperature),
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
                streamer=_Streamer(self._tokenizer, write) if write is not None else None,
                **options,
            )
        # methods that put vectors in the place of tokens may return the new tokens alone
        repeated = generated[0, : len(tokens)].tolist() == tokens
        new = generated[0, len(tokens) :] if repeated else generated[0]
        return str(self._tokenizer.decode(new, skip_special_tokens=True)).strip()

    def _ids_of(self, prompt_value: str | None) -> torch.Tensor | None:
        config: Any = getattr(self._model, "active_peft_config", None)
        known = getattr(config, "prompt_values", None)
        if not known:
            if prompt_value is not None:
                raise ConfigError("This adapter does not choose prompts by a value; leave prompt_value out.")
            return None
        if prompt_value is None:
            raise ConfigError(
                f"This adapter has several sets of prompts; name one as prompt_value: {', '.join(known)}."
            )
        if prompt_value not in known:
            near = did_you_mean(prompt_value, known)
            raise ConfigError(f'Unknown prompt_value "{prompt_value}".{near} Known: {", ".join(known)}.')
        assert self._task is not None, "only an adapter of a task has prompts by value"
        ids = prompt_column.ids_of_inputs([{PROMPT_IDS: prompt_value}], self._model, self._task)
        return None if ids is None else torch.tensor(ids)


class _Streamer(TextStreamer):
    """Streamer that hands on visible characters alone; a model could write commands to the terminal."""

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on a piece of the answer."""
        if text:
            self._write(visible(text))
