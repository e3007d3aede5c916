"""`module.forward(...)` does the same as `module(...)`, because libraries such as sentence-transformers call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.backbones import tiny_inputs
from support.cover import MAIN, each_place
from support.properties import DRAWS, HEADS, KEEPS_HEAD, METHODS, adapt, as_read, main_tensor, move, pairs

from peft_lab.errors import ConfigError
from peft_lab.serve.tenants import load_many
from peft_lab.training.head_outputs import called_head


@pairs([*METHODS, *DRAWS, *HEADS], ("vit", "bert"), each_place)
def test_the_head_that_is_called_is_found(method: str, family: str, base: Any) -> None:
    """Also where an adapter stands in the head's place and gives the logits itself."""
    model = move(adapt(method, base)).eval()
    read: list[Any] = []
    with called_head(model).register_forward_pre_hook(lambda _, args: read.append(args[0])), torch.no_grad():
        model(**as_read(model, tiny_inputs(base)))
    assert len(read) == 1
    assert read[0].shape[-1] == base.config.hidden_size


@pairs([*METHODS, *KEEPS_HEAD, *DRAWS, *HEADS], MAIN, each_place)
def test_a_call_of_forward_is_a_call_of_the_module(method: str, family: str, base: Any) -> None:
    model = move(adapt(method, base)).eval()
    inputs = as_read(model, tiny_inputs(base))
    for module in (model, model.base_model, model.base_model.model):
        with torch.no_grad():
            called, direct = main_tensor(module(**inputs)), main_tensor(module.forward(**inputs))
        assert torch.equal(called, direct), type(module).__name__
    with torch.no_grad(), model.disable_adapter():
        assert not torch.equal(called, main_tensor(model.base_model.model.forward(**tiny_inputs(base)))), (
            "no adapter was in use"
        )


@pytest.mark.parametrize("family", ["resnet"])
def test_frozen_norms_keep_their_statistics_in_a_call_of_forward(family: str, base: Any) -> None:
    model = adapt("ssf", base).train()
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    model.base_model.model.forward(**tiny_inputs(base))
    assert before
    for name, value in model.named_buffers():
        assert "running" not in name or torch.equal(value, before[name]), name


@pytest.mark.parametrize("family", ["bert"])
def test_a_wrong_number_of_names_is_refused_in_a_call_of_forward(family: str, base: Any, tmp_path: Any) -> None:
    move(adapt("ssf", base)).save_pretrained(tmp_path)
    tenants = load_many(base.eval(), {"a": tmp_path})
    try:
        for call in (base, base.forward):
            with tenants.rows(["a"]), pytest.raises(ConfigError, match="1 names, but the batch has 2 rows"):
                call(**tiny_inputs(base))
    finally:
        tenants.unload()
    assert "forward" not in vars(base)
