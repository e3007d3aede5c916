"""Dtype of adapters on a base of half precision, at every door."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.backbones import TINY, tiny_inputs
from support.cover import cover, each_place
from support.properties import (
    EVERY_OWN,
    FITTED,
    adapt,
    adapter_parameters,
    adapter_values,
    as_read,
    backward,
    config,
    main_tensor,
    move,
    text_or_image,
)

from peft_lab import registry


def _dtypes(model, adapter="default"):
    return {parameter.dtype for parameter in adapter_parameters(model, adapter).values()}


def _arrays_are_float32(model, adapter="default"):
    """What an estimator found keeps its precision, whatever the parameters are cast to."""
    values = [value for value in adapter_values(model, adapter).values() if not isinstance(value, torch.nn.Parameter)]
    return all(value.dtype == torch.float32 for value in values if value.is_floating_point())


@pytest.mark.parametrize("method", cover(EVERY_OWN, each_place))
def test_adapters_have_the_dtype_of_the_base_where_asked_for(method, tmp_path):
    base = TINY[text_or_image(method)]().to(torch.bfloat16)
    move(adapt(method, base)).save_pretrained(tmp_path)
    for cast, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        wanted = set() if method in FITTED else {dtype}
        made = get_peft_model(copy.deepcopy(base), config(method), autocast_adapter_dtype=cast)
        assert _dtypes(made) == wanted
        made.add_adapter("second", config(method), autocast_adapter_dtype=cast)
        made.load_adapter(tmp_path, "third", autocast_adapter_dtype=cast)
        for lazy in (False, True):
            loaded = PeftModel.from_pretrained(
                copy.deepcopy(base), tmp_path, autocast_adapter_dtype=cast, low_cpu_mem_usage=lazy
            )
            assert _dtypes(loaded) == wanted
            assert _arrays_are_float32(loaded)
            # A cast does not thaw what was loaded frozen.
            assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert _arrays_are_float32(made)
        assert _dtypes(made, "second") == _dtypes(made, "third") == wanted
        # Heads are copies of the base's, as peft leaves them.
        assert {p.dtype for n, p in made.named_parameters() if "modules_to_save" in n} <= {torch.bfloat16}


@pytest.mark.parametrize("method", EVERY_OWN)
def test_adapters_in_half_precision_run_and_train(method):
    base = TINY[text_or_image(method)]().to(torch.bfloat16)
    model = adapt(method, base)
    model.base_model._cast_adapter_dtype("default", autocast_adapter_dtype=False)
    move(model)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in tiny_inputs(base).items()}
    out = main_tensor(model(**as_read(model, inputs)))
    assert out.dtype == torch.bfloat16
    backward(method, out.float().square().mean())
    trained = [parameter for parameter in adapter_parameters(model).values() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    if registry.method(method).can("merge"):
        model.merge_and_unload()
