"""Shared by the tests of prompts in the sequence: families by sort, two adapters on one model, padded texts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_lab.tuners.registration import config_class
from support.backbones import TINY
from support.properties import SEQUENCE, adapt, config, move

DECODERS = ["gpt2", "opt", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3"]
ENCODERS = ["bert", "roberta", "distilbert", "deberta-v2", "modernbert", "mpnet", "albert", "electra"]
VISION = ["vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "beit"]
GENERATE = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


methods = pytest.mark.parametrize("method", SEQUENCE)
#: transformers itself has no sdpa for these.
EAGER = ("gemma2", "deberta-v2", "mpnet")


def with_attention(families: list[str], attentions: tuple[str, ...] = ("sdpa", "eager")) -> list[tuple[str, str]]:
    """Each family with each kind of attention that it has."""
    return [(f, a) for f in families for a in attentions if a == "eager" or f not in EAGER]


def spread(families: list[str], attentions: tuple[str, ...] = ("eager",)) -> pytest.MarkDecorator:
    """Parametrise over families, the kinds of attention that they have, and methods by turns.

    For what the mechanism does by itself: every family and every method has its turn, not every pair of them.
    """
    found = with_attention(families, attentions)
    cases = [(SEQUENCE[i % len(SEQUENCE)], *case) for i, case in enumerate(found)]
    return pytest.mark.parametrize(("method", "family", "attention"), cases)


@cache
def two_adapters(method: str, family: str, attention: str = "eager") -> Any:
    """A model with two adapters that differ; the second one writes its prompts before the first block only."""
    base = TINY[family]().eval()
    base.set_attn_implementation(attention)
    model = adapt(method, base)
    other = {"num_virtual_tokens": 5} if "num_virtual_tokens" in _fields(method) else {"num_prompts": 5}
    model.add_adapter("other", config(method, layers_to_transform=[0], **other))
    move(model, "default", seed=1), move(model, "other", seed=2)
    return model.eval()


def _fields(method: str) -> set[str]:
    return set(config_class(method).__dataclass_fields__)


@cache
def padded_texts() -> dict[str, Tensor]:
    """Two texts of 5 and 9 tokens, padded at the left."""
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)
