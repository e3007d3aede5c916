"""Properties of every own method on every kind of op it declares, on single modules."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from support.cover import cover
from support.operations import OPS, One, make
from support.properties import ON_OPS, adapter_parameters, config, move
from torch import nn

from peft_lab import registry
from peft_lab.errors import ConfigError


def adapted(method: str, op: str, **fields: object) -> tuple[One, nn.Module, torch.Tensor]:
    base, x = make(op)
    model = get_peft_model(copy.deepcopy(base), config(method, target_modules=["op"], **fields)).eval()
    return base, model, x


CASES = [(m, op) for m in ON_OPS for op, (kind, *_) in OPS.items() if registry.method(m).can(kind)]
REFUSED = [(m, op) for m in ON_OPS for op, (kind, *_) in OPS.items() if not registry.method(m).can(kind)]
cases = pytest.mark.parametrize(("method", "op"), cover(CASES))
#: Methods, and their cases, that can be merged.
MERGEABLE = [m for m in ON_OPS if registry.method(m).can("merge")]
merge_cases = pytest.mark.parametrize(("method", "op"), cover([(m, op) for m, op in CASES if m in MERGEABLE]))


@cases
def test_start(method: str, op: str) -> None:
    base, model, x = adapted(method, op)
    same = torch.equal(model(x), base(x))
    assert same == registry.method(method).can("identity_start")


@merge_cases
@torch.no_grad()
def test_merge_and_unmerge(method: str, op: str) -> None:
    base, model, x = adapted(method, op)
    move(model)
    before = model(x)
    assert not torch.allclose(before, base(x), atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(model.base_model.model.op.base_layer(x), before, atol=2e-5, rtol=2e-5)
    model.unmerge_adapter()
    assert torch.equal(model(x), before)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), _base_parameters(model), strict=True))
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), before, atol=2e-5, rtol=2e-5)
    assert type(merged.op) is type(base.op)


def _base_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if "base_layer" in n]


@cases
def test_disable_is_base(method: str, op: str) -> None:
    base, model, x = adapted(method, op)
    move(model)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    if method in MERGEABLE:
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))


@cases
def test_gradients_reach_adapter_and_input(method: str, op: str) -> None:
    _, model, x = adapted(method, op)
    move(model)
    if x.is_floating_point():
        x.requires_grad_()
    model.train()(x).square().sum().backward()
    own = adapter_parameters(model)
    assert own
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.values())
    assert all(p.grad is None for p in _base_parameters(model))
    assert not x.is_floating_point() or x.grad is not None


@cases
def test_gradients_are_right(method: str, op: str) -> None:
    _, model, x = adapted(method, op)
    model = move(model).double()
    names, values = zip(*adapter_parameters(model).items(), strict=True)
    x = x.double() if x.is_floating_point() else x

    def run(*parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [v.detach().double().requires_grad_() for v in values]
    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-4, rtol=1e-3)


@cases
@torch.no_grad()
def test_mixed_batch_equals_single(method: str, op: str) -> None:
    base, model, x = adapted(method, op)
    model.add_adapter("other", config(method, target_modules=["op"]))
    move(model, "default", seed=1), move(model, "other", seed=2)
    rows = ["other", "__base__", "default", "other"]
    mixed = model(x, adapter_names=rows)
    single = {"__base__": base(x)}
    for name in ("default", "other"):
        model.set_adapter(name)
        single[name] = model(x)
    for i, name in enumerate(rows):
        torch.testing.assert_close(mixed[i], single[name][i], atol=2e-5, rtol=2e-5)
    assert not torch.allclose(mixed[0], mixed.new_tensor(0) + single["default"][0], atol=1e-4)


@merge_cases
@torch.no_grad()
def test_several_active_adapters_merge_as_they_run(method: str, op: str) -> None:
    _, model, x = adapted(method, op)
    model.add_adapter("other", config(method, target_modules=["op"]))
    move(model, "default", seed=1), move(model, "other", seed=2)
    model.base_model.set_adapter(["default", "other"])
    together = model(x)
    model.base_model.merge_adapter(["default", "other"])
    torch.testing.assert_close(model(x), together, atol=5e-5, rtol=5e-5)


@cases
def test_half_precision_base_keeps_float32_adapter(method: str, op: str) -> None:
    base, x = make(op)
    exact = get_peft_model(copy.deepcopy(base), config(method, target_modules=["op"])).eval()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = get_peft_model(base.to(torch.bfloat16), config(method, target_modules=["op"])).eval()
    move(exact), move(model)
    exact.load_state_dict({k: v for k, v in model.state_dict().items() if "base_layer" not in k}, strict=False)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    x16 = x.to(torch.bfloat16) if x.is_floating_point() else x
    out = model(x16)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact(x), atol=0.15, rtol=0.1)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter_parameters(model).values())


@cases
def test_features_are_those_of_the_base(method: str, op: str) -> None:
    base, model, x = adapted(method, op)
    layer = model.base_model.model.op
    weight, channels = layer.base_layer.weight, base(x).shape[layer.op.channel_dim]
    inputs = {"conv2d": x.shape[1], "embedding": weight.shape[0], "norm": channels}.get(layer.op.op_type, x.shape[-1])
    assert (layer.in_features, layer.out_features) == (inputs, channels)


@pytest.mark.parametrize(("method", "op"), REFUSED)
def test_undeclared_op_is_refused_with_reason(method: str, op: str) -> None:
    base, _ = make(op)
    with pytest.raises(ConfigError, match="cannot adapt"):
        get_peft_model(base, config(method, target_modules=["op"]))


@pytest.mark.parametrize("method", ON_OPS)
def test_quantised_weight_is_refused_with_reason(method: str) -> None:
    model = One(nn.Linear(4, 4))
    model.op.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantised"):
        get_peft_model(model, config(method, target_modules=["op"]))


@pytest.mark.parametrize("method", ON_OPS)
def test_overridden_forward_is_refused(method: str) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ConfigError, match="Doubled"):
        get_peft_model(One(Doubled(4, 4)), config(method, target_modules=["op"]))


@pytest.mark.parametrize("method", MERGEABLE)
def test_safe_merge_refuses_what_is_not_finite(method: str) -> None:
    _, model, _ = adapted(method, "linear")
    with torch.no_grad():
        next(iter(adapter_parameters(model).values())).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("method", MERGEABLE)
def test_tied_weight_is_not_changed_by_merging(method: str) -> None:
    _, model, _ = adapted(method, "linear")
    tied = model.base_model.model.op.base_layer.weight
    before = tied.detach().clone()
    move(model).merge_and_unload()
    assert torch.equal(tied, before)


@pytest.mark.full
@pytest.mark.parametrize("method", ON_OPS)
def test_compiled_equals_eager(method: str) -> None:
    _, model, x = adapted(method, "linear")
    move(model)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    expected.sum().backward()
    eager = {n: p.grad.clone() for n, p in adapter_parameters(model).items()}
    model.zero_grad()
    compiled(x).sum().backward()
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, eager[name], atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(compiled(x), expected, atol=1e-3)
