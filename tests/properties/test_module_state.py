"""State of every method lies where torch looks for it: it moves, is cast, copied, pickled and left out of files."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.backbones import MODELS, tiny_inputs
from support.properties import (
    EVERY_OWN,
    KEEPS_HEAD,
    OWN,
    UNTRAINED,
    adapt,
    adapter_parameters,
    as_read,
    assert_close,
    config,
    equal_weights,
    main_tensor,
    move,
    output,
    text_or_image,
)
from torch import Tensor, nn

import peft_lab
from peft_lab import registry
from peft_lab.training.read_training_data import reads_training_data
from peft_lab.tuners import AdapterLayer

MERGED = [name for name in OWN if registry.method(name).can("merge")]
#: Fields by which a method keeps more state than by its defaults.
FIELDS: dict[str, list[dict[str, Any]]] = {name: [{}] for name in [*EVERY_OWN, *KEEPS_HEAD]}
for _method, _fields in FIELDS.items():
    _known = registry.config_fields(_method)
    _fields += [{name: value} for name, value in (("sparsity", 0.5), ("save_bases", True)) if name in _known]


def base_of(method: str) -> Any:
    return MODELS["vit" if method in KEEPS_HEAD else text_or_image(method)]()


def hidden(model: nn.Module) -> set[str]:
    """Tensors and modules that belong to modules of a model, and that torch does not know of."""
    inside, found = {*model.modules()}, set()
    for module in inside:
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            for path, reached in reach(value, f"{type(module).__name__}.{name}", set()):
                if isinstance(reached, Tensor) or reached not in inside:
                    found.add(path)
    return found


def reach(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Tensors and modules that a value refers to, by path."""
    if isinstance(value, Tensor | nn.Module):
        yield path, value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    parts: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        parts = [(str(key), item) for key, item in value.items()] + [("key", key) for key in value]
    elif isinstance(value, list | tuple | set | frozenset):
        parts = [(str(index), item) for index, item in enumerate(value)]
    elif isinstance(value, functools.partial):
        parts = [("partial", (value.func, value.args, value.keywords))]
    elif hasattr(value, "__self__"):
        parts = [("self", value.__self__)]
    elif getattr(value, "__closure__", None):
        parts = [("closure", [cell.cell_contents for cell in value.__closure__])]
    elif type(value).__module__.startswith("peft_lab") or dataclasses.is_dataclass(value):
        parts = [*getattr(value, "__dict__", {}).items()]
    for name, part in parts:
        yield from reach(part, f"{path}.{name}", seen)


def train_step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    loss = main_tensor(model.train()(**as_read(model, inputs))).square().mean()
    # an estimator has nothing to train
    if any(parameter.requires_grad for parameter in model.parameters()):
        loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all()
                parameter -= 1e-3 * parameter.grad
                parameter.grad = None


CASES = [(method, fields) for method, several in FIELDS.items() for fields in several]
every = pytest.mark.parametrize(("method", "fields"), CASES)


@every
def test_no_tensor_is_hidden_from_torch(method, fields):
    base = base_of(method)
    inputs, known = tiny_inputs(base), hidden(base)
    model = adapt(method, base, **fields)
    assert hidden(model) <= known, "attached"
    train_step(model, inputs)
    assert hidden(model) <= known, "trained"
    with torch.inference_mode():
        output(model, inputs)
    assert hidden(model) <= known, "used"
    if method in MERGED:
        model.merge_adapter()
        assert hidden(model) <= known, "merged"
        # No parameters of the model either, which exporters write and optimizers read.
        assert not [name for name, _ in model.named_parameters() if "unmerged" in name]
        assert not [name for name in model.state_dict() if "unmerged" in name]
        model.unmerge_adapter()
    copied = copy.deepcopy(model)
    assert hidden(copied) <= known, "copied"
    assert not {*copied.modules()} & {*model.modules()}
    copied.to("meta")
    tensors = itertools.chain(copied.parameters(), copied.buffers())
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@every
@torch.no_grad()
def test_copies_are_equal_and_independent(method, fields):
    base = base_of(method)
    inputs, model = tiny_inputs(base), move(adapt(method, base, **fields))
    for merged in (False, True) if method in MERGED else (False,):
        if merged:
            model.merge_adapter()
        expected = output(model, inputs)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert equal_weights(copied, model)
            assert torch.equal(output(copied, inputs), expected)
            with copied.disable_adapter():
                plain = output(copied, inputs)
            for tensor in (*copied.parameters(), *copied.buffers()):
                tensor.zero_()
            assert torch.equal(output(model, inputs), expected)
            assert not torch.equal(plain, expected)


@every
@torch.no_grad()
def test_a_cast_model_is_cast_as_a_whole(method, fields):
    base = base_of(method)
    inputs, model = tiny_inputs(base), move(adapt(method, base, **fields))
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    plain, expected = output(copy.deepcopy(base).double(), wide), output(copy.deepcopy(model).double(), wide)
    if method in MERGED:
        model.merge_adapter()
    assert_close(output(model.double(), wide), expected, 1e-5)
    if method in MERGED:
        model.unmerge_adapter()
        assert torch.equal(output(model, wide), expected)
    with model.disable_adapter():
        assert_close(output(model, wide), plain, 1e-12)
    if method in KEEPS_HEAD:
        model.delete_adapter("default")
    assert_close(output(model.unload(), wide), plain, 1e-12)


@pytest.mark.parametrize("method", MERGED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_unmerging_gives_the_base_in_its_present_dtype(method, dtype):
    base = base_of(method)
    model = move(adapt(method, base))
    expected = copy.deepcopy(model).to(dtype)
    model.merge_adapter()
    model.to(dtype).unmerge_adapter()
    assert equal_weights(model, expected)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in expected.parameters()]


@every
def test_training_goes_on_after_inference_mode(method, fields):
    base = base_of(method)
    inputs = tiny_inputs(base)
    model = adapt(method, base, **fields)
    train_step(model, inputs)
    with torch.inference_mode():
        trained = output(model, inputs)
        if method in MERGED:
            model.merge_adapter()
            assert_close(output(model, inputs), trained, 1e-4)
        with model.disable_adapter():
            output(model, inputs)
        assert_close(output(model, inputs), trained, 1e-4)
        if method in MERGED:
            model.merge_adapter()
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    # While the adapter is merged, the head goes on.
    train_step(model, inputs)
    if method in MERGED:
        model.unmerge_adapter()
    before = {name: parameter.clone() for name, parameter in adapter_parameters(model).items()}
    train_step(model, inputs)
    after = adapter_parameters(model)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved or method in UNTRAINED


@pytest.mark.parametrize("method", EVERY_OWN)
@torch.inference_mode()
def test_a_model_of_inference_mode_takes_an_adapter(method):
    """Its tensors count no changes, so nothing may ask them for their version."""
    base = base_of(method)
    model = move(adapt(method, base))
    expected = output(model, tiny_inputs(base))
    if method in MERGED:
        model.merge_adapter()
        assert_close(output(model, tiny_inputs(base)), expected)
        model.unmerge_adapter()
    assert torch.equal(output(model, tiny_inputs(base)), expected)


@pytest.mark.parametrize("method", MERGED)
def test_processes_do_not_send_each_other_what_they_derive_from_the_base(method):
    """Buffers that DistributedDataParallel would send at each step are those of the base."""
    base = base_of(method)
    known = {name for name, _ in base.named_buffers()}
    model: Any = adapt(method, base)
    left_out = {*model._ddp_params_and_buffers_to_ignore}
    for start, whole in (("base_model.model.", model), ("", model.get_base_model())):
        derived = {name.removeprefix(start) for name, _ in whole.named_buffers() if name not in left_out}
        assert {name.replace(".base_layer", "") for name in derived} <= known
    assert not hasattr(model.unload(), "_ddp_params_and_buffers_to_ignore")
    assert get_peft_model(base, config(method))


def frozen_arrays(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the arrays that adapters save and do not train, by path."""
    found = {}
    for path, layer in model.named_modules():
        for name in layer.other_param_names if isinstance(layer, AdapterLayer) else ():
            found |= {f"{path}.{name}.{adapter}": value.clone() for adapter, value in getattr(layer, name).items()}
    return found


@pytest.mark.parametrize("method", [*EVERY_OWN, *KEEPS_HEAD])
def test_arrays_that_training_rows_change_are_among_those_that_processes_share(method):
    base = base_of(method)
    fields = {"blocks": 1} if "blocks" in registry.config_fields(method) else {}
    torch.manual_seed(0)
    model = get_peft_model(base, config(method, base, **fields))
    inputs = as_read(model, tiny_inputs(base, batch=12, labels=True))
    before = frozen_arrays(model)
    peft_lab.read_training_data(model, [inputs])
    train_step(model, tiny_inputs(base, batch=12, labels=True))
    after = frozen_arrays(model)
    changed = {name for name, value in after.items() if name in before and not torch.equal(value, before[name])}
    shared = set()
    for path, layer in model.named_modules():
        for name in layer.data_param_names if isinstance(layer, AdapterLayer) else ():
            shared |= {f"{path}.{name}.{adapter}" for adapter in getattr(layer, name)}
    assert changed <= shared


class CountedRows(list):
    """A list that counts how often it is read."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


@pytest.mark.parametrize("method", [*EVERY_OWN, *KEEPS_HEAD])
def test_training_rows_are_drawn_by_adapters_that_want_them_alone(method):
    base = base_of(method)
    reading = {"blocks": 1, "domain_components": 2, "mapping": "iterative", "support": "bip"}
    chosen = [{name: value} for name, value in reading.items() if name in registry.config_fields(method)]
    for fields in ({}, *chosen):
        model = get_peft_model(copy.deepcopy(base), config(method, base, **fields))
        rows = CountedRows([as_read(model, tiny_inputs(base, batch=12, labels=True))] * 2)
        model.disable_adapter_layers()
        assert not reads_training_data(model)
        model.enable_adapter_layers()
        wants = reads_training_data(model)
        assert wants or not fields
        peft_lab.read_training_data(model, rows)
        assert bool(rows.reads) == wants
