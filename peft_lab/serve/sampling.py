"""Choice of the next token of a conversation. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from peft_lab.errors import ConfigError

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token.

    Attributes:
        max_new_tokens: tokens of an answer at most; None for the task's number, else `MAX_NEW_TOKENS`.
        temperature: 0 takes the most likely token; above, tokens are drawn, the more evenly the higher it is.
        top_p: share of the probability, from the most likely token on, that tokens are drawn from.
        seed: of the draws; None for another one each time.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f'"max_new_tokens" must be at least 1, got {self.max_new_tokens}.')
        if self.temperature < 0:
            raise ConfigError(f'"temperature" must not be negative, got {self.temperature:g}.')
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f'"top_p" must be above 0 and at most 1, got {self.top_p:g}.')
        # without draws, neither of them would have an effect
        unused = next((name for name in ("top_p", "seed") if getattr(self, name) is not None), None)
        if unused and not self.temperature:
            raise ConfigError(f'"{unused}" has an effect only with a "temperature" above 0; set one.')
