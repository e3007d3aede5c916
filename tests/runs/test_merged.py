"""A merged model that is saved and loaded again answers as before, or merging it is refused."""

from __future__ import annotations

import itertools

import pytest
from support.backbones import TINY, tiny_inputs
from support.cover import cover
from support.properties import OWN, adapt, assert_close, move, output

from peft_lab import registry
from peft_lab.errors import ConfigError
from peft_lab.export.merge import check_reloadable

MERGED = [name for name in OWN if registry.method(name).can("merge")]
FAMILIES = ["bert", "vit", "llama", "gpt2", "t5", "clip", "swin", "resnet", "qwen3", "whisper"]


@pytest.mark.parametrize(("method", "family"), cover(itertools.product(MERGED, FAMILIES)))
def test_reload_answers_as_before_or_is_refused(method, family, tmp_path):
    base = TINY[family]()
    inputs = tiny_inputs(base)
    merged = move(adapt(method, base), scale=0.1).merge_and_unload()
    created = set(merged.state_dict()) - set(base.state_dict())
    refusal = _refusal(merged)
    if refusal:
        assert min(created).split(".")[-1] in refusal
        return
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert_close(output(again, inputs), output(merged, inputs), 1e-4)
    assert set(again.state_dict()) == set(merged.state_dict())


def _refusal(model) -> str:
    try:
        check_reloadable(model)
    except ConfigError as error:
        return str(error)
    return ""


def test_llama_gets_its_bias_flags():
    merged = adapt("ssf", TINY["llama"]()).merge_and_unload()
    check_reloadable(merged)
    assert merged.config.attention_bias
    assert merged.config.mlp_bias


def test_a_bias_without_a_place_is_refused():
    with pytest.raises(ConfigError, match=r"patch_embedding\.bias"):
        check_reloadable(adapt("ssf", TINY["clip"]()).merge_and_unload())
