"""Export and compilation of a model with an adapter on it, by torch itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.backbones import tiny, tiny_inputs
from support.properties import EVERY, FITTED, UNTRAINED, adapt, as_read, move, text_or_image

from peft_lab.errors import ConfigError


@pytest.mark.integration(library="torch", use="`torch.export.export` of a model with its adapter unmerged")
@pytest.mark.parametrize("method", EVERY)
def test_the_exported_program_answers_as_the_model(method: str, refused: Callable[[str], None]) -> None:
    model = move(adapt(method, tiny(text_or_image(method))))
    inputs = as_read(model, tiny_inputs(model))
    if method in UNTRAINED and method not in FITTED:
        with pytest.raises(ConfigError, match="cannot be exported"):
            torch.export.export(model, (), inputs)
        refused("it looks at its values in each call")
        return
    with torch.no_grad():
        expected = model(**inputs).logits
        program = torch.export.export(model, (), inputs)
        torch.testing.assert_close(program.module()(**inputs).logits, expected)


@pytest.mark.integration(library="torch", use="`torch.compile` of training (aot_eager), the gradients of eager mode")
@pytest.mark.parametrize("method", [name for name in EVERY if name not in FITTED])
def test_the_compiled_model_has_the_gradients_of_the_eager_one(method: str) -> None:
    gradients = []
    for compiled in (False, True):
        model = move(adapt(method, tiny(text_or_image(method))))
        call = torch.compile(model, backend="aot_eager") if compiled else model
        call(**as_read(model, tiny_inputs(model))).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0])
