"""spectral_linear by each of its plans against the plain expression, in value, derivatives, FLOPs and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.functional_checks import assert_same, gradients, kept_bytes, projection
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from peft_lab.training.step_cost import count_flops
from peft_lab.tuners.spectral import kernels
from peft_lab.tuners.spectral.kernels import (
    spectral_conv2d,
    spectral_delta,
    spectral_flops,
    spectral_linear,
    spectral_plan,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# tokens, in, out, rank: one case at least for each plan
SPECTRAL = [(2, 6, 5, 3), (40, 6, 5, 2), (40, 6, 5, 5), (9, 6, 6, 6), (12, 4, 9, 4), (0, 6, 5, 3), (200, 8, 4, 3)]


def spectral_case(
    tokens: int, in_features: int, out_features: int, rank: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    weight = torch.randn(out_features, in_features, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    return {
        "x": torch.randn(tokens, in_features).to(dtype).requires_grad_(),
        "weight": weight.to(dtype),
        "bias": torch.randn(out_features).to(dtype),
        "u": u[:, :rank].to(dtype).contiguous(),
        "delta": torch.randn(rank, dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_(),
        "vh": vh[:rank].to(dtype).contiguous(),
    }


def plain_spectral(x: Tensor, weight: Tensor, bias: Tensor, u: Tensor, delta: Tensor, vh: Tensor) -> Tensor:
    return x @ (weight + u @ torch.diag(delta) @ vh).T + bias


def test_the_cases_reach_every_plan() -> None:
    assert {spectral_plan(*case, fusable=True) for case in SPECTRAL} == {"factored", "projected", "materialised"}
    assert {spectral_plan(*case, fusable=False) for case in SPECTRAL} == {"factored", "materialised"}


@pytest.mark.parametrize("case", SPECTRAL)
@pytest.mark.parametrize("frozen", ["", "x", "delta"])
def test_spectral_linear_equals_the_plain_expression(case: tuple[int, int, int, int], frozen: str) -> None:
    tensors = spectral_case(*case)
    if frozen:
        tensors[frozen] = tensors[frozen].detach()
    assert_same(gradients(spectral_linear, *tensors.values()), gradients(plain_spectral, *tensors.values()))
    free = {name: value for name, value in tensors.items() if value.requires_grad}
    if case[0]:
        check = lambda *values: spectral_linear(**{**tensors, **dict(zip(free, values, strict=True))})  # noqa: E731
        assert torch.autograd.gradcheck(check, tuple(free.values()))


@pytest.mark.parametrize("case", SPECTRAL)
def test_spectral_delta_is_the_difference(case: tuple[int, int, int, int]) -> None:
    tensors = spectral_case(*case)
    x, u, delta, vh = (tensors[name] for name in ("x", "u", "delta", "vh"))
    assert_same(
        gradients(spectral_delta, x, u, delta, vh),
        gradients(lambda x, u, d, v: x @ (u @ d.diag() @ v).T, x, u, delta, vh),
    )


@pytest.mark.parametrize("plan", ["factored", "projected", "materialised"])
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tokens", [1, 33])  # products with one row round otherwise in another layout
def test_zero_delta_gives_the_bits_of_the_base(
    plan: str, layout: str, grad: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "spectral_plan", lambda *_args, **_options: plan)
    tensors = spectral_case(tokens, 96, 80, 24, torch.float32)
    tensors["delta"] = torch.zeros(24, requires_grad=True)
    if layout == "columns":
        tensors["weight"] = tensors["weight"].t().contiguous().t()
    elif layout == "strided":
        tensors["weight"] = torch.randn(160, 192)[::2, ::2]
    with torch.set_grad_enabled(grad):
        actual = spectral_linear(**tensors)
    assert torch.equal(actual, F.linear(tensors["x"], tensors["weight"], tensors["bias"]))


@pytest.mark.parametrize("case", SPECTRAL)
@pytest.mark.parametrize("input_grad", [False, True])
@pytest.mark.parametrize(
    ("plan", "fusable", "train"),
    [
        (plan, fusable, train)
        for plan in ("factored", "materialised")
        for fusable in (False, True)
        for train in (False, True)
    ]
    + [("projected", True, True)],
)
def test_flop_formulas_are_what_is_counted(
    case: tuple[int, int, int, int],
    input_grad: bool,
    fusable: bool,
    train: bool,
    plan: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "spectral_plan", lambda *_args, **_options: plan)
    tensors = spectral_case(*case)
    tensors["x"] = tensors["x"].detach().requires_grad_(input_grad)

    def run() -> None:
        if fusable:
            out = spectral_linear(**tensors)
        else:
            base = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
            out = base + spectral_delta(tensors["x"], tensors["u"], tensors["delta"], tensors["vh"])
        if train:
            out.sum().backward()

    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        run()
    tokens, in_features, out_features, _ = case
    base = 2 * tokens * in_features * out_features * (1 + (train and input_grad))
    extra = spectral_flops(plan, *case, fusable=fusable, train=train, input_grad=input_grad)
    assert counter.get_total_flops() == base + extra


@pytest.mark.parametrize(
    "case", [(512, 64, 64, 4), (512, 64, 64, 32), (512, 64, 64, 64), (16, 64, 64, 8), (300, 32, 96, 8)]
)
def test_never_dearer_than_a_lora_of_the_same_rank(case: tuple[int, int, int, int]) -> None:
    tokens, in_features, out_features, rank = case
    lora = 6 * tokens * rank * (in_features + out_features)  # B A x: forward, both weight gradients, input gradient
    plan = spectral_plan(*case, fusable=True)
    assert spectral_flops(plan, *case, fusable=True, train=True, input_grad=True) < lora


@pytest.mark.parametrize(("rank", "plan"), [(4, "projected"), (64, "materialised")])
def test_what_a_spectral_layer_keeps(rank: int, plan: str) -> None:
    tokens, width = 512, 64
    assert spectral_plan(tokens, width, width, rank, fusable=True) == plan
    tensors = spectral_case(tokens, width, width, rank, torch.float32)
    tensors["x"] = tensors["x"].clone()
    frozen = {tensors[name].untyped_storage().data_ptr() for name in ("weight", "bias", "u", "delta", "vh")}
    kept = kept_bytes(lambda: spectral_linear(**tensors))
    size = sum(size for address, size in kept.items() if address not in frozen)
    expected = tokens * rank if plan == "projected" else tokens * width + width * width
    assert size <= 4 * expected + 64


@pytest.mark.parametrize("rank", [8, 48])
def test_half_weights_keep_deltas_below_their_resolution(rank: int) -> None:
    tensors = spectral_case(256, 48, 48, rank, torch.bfloat16)
    base = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
    with torch.no_grad():
        tensors["delta"].fill_(1e-3)
        tensors["weight"].mul_(64)  # W + delta would round to W
    exact = tensors["x"].double() @ (1e-3 * tensors["u"].double() @ tensors["vh"].double()).T
    delta = spectral_delta(*(tensors[name] for name in ("x", "u", "delta", "vh")))
    assert delta.dtype == torch.bfloat16
    torch.testing.assert_close(delta.double(), exact, rtol=0.03, atol=2e-5)
    out, grad_x, grad_delta = gradients(spectral_linear, *tensors.values())
    assert (out.dtype, grad_x.dtype, grad_delta.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    wide = [value.detach().double().requires_grad_(value.requires_grad) for value in tensors.values()]
    expected = gradients(plain_spectral, *wide, weights=projection(base).double())
    assert (grad_delta - expected[2]).norm() < 0.02 * expected[2].norm()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [False, True])
def test_wide_bases_under_half_activations_keep_no_casts(autocast: bool, rows: bool) -> None:
    tensors = spectral_case(96, 32, 24, 4, torch.float32)
    u, vh = tensors["u"], tensors["vh"]
    x = torch.randn(4, 24, 32, requires_grad=True)
    x = x if autocast else x.detach().bfloat16().requires_grad_()
    delta = torch.randn((4, 4) if rows else (4,), requires_grad=True)
    held = {tensor.untyped_storage().data_ptr() for tensor in (u, vh, delta)}

    def run(x: Tensor, delta: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return spectral_delta(x, u, delta, vh)

    kept = kept_bytes(lambda: run(x, delta))
    assert sum(size for address, size in kept.items() if address not in held) == 4 * 24 * 4 * 2  # the projection
    spread = (lambda delta: delta[:, None]) if rows else (lambda delta: delta)
    weights = projection(run(x, delta))
    wide = (x.detach().double().requires_grad_(), delta.detach().double().requires_grad_())
    exact = gradients(lambda x, d: x @ vh.double().T * spread(d) @ u.double().T, *wide, weights=weights.double())
    for one, other in zip(gradients(run, x, delta), exact, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_spectral_linear_under_autocast() -> None:
    tensors = spectral_case(64, 16, 12, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = spectral_linear(**tensors)
        assert out.dtype == F.linear(tensors["x"], tensors["weight"]).dtype == torch.bfloat16
    out.float().sum().backward()
    assert tensors["delta"].grad.dtype == torch.float32
    expected = gradients(plain_spectral, *tensors.values(), weights=torch.ones(64, 12))
    torch.testing.assert_close(tensors["delta"].grad, expected[2], rtol=0.05, atol=0.3)


@pytest.mark.parametrize("case", SPECTRAL[1:4])
def test_a_trainable_weight_gets_its_gradient(case: tuple[int, int, int, int]) -> None:
    tensors = spectral_case(*case)
    tensors["weight"].requires_grad_()
    assert_same(gradients(spectral_linear, *tensors.values()), gradients(plain_spectral, *tensors.values()))


def convolution(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(6, 8, 3, **options).double().requires_grad_(False)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"padding": "same", "bias": False}, {"padding": 1, "padding_mode": "reflect"}],
)
@pytest.mark.parametrize("frozen_input", [False, True])
def test_spectral_conv2d_equals_the_plain_expression(rank: int, options: dict[str, Any], frozen_input: bool) -> None:
    conv = convolution(**options)
    u, _, vh = torch.linalg.svd(conv.weight.flatten(1), full_matrices=False)
    u, vh = u[:, :rank], vh[:rank]
    x = torch.randn(4, 6, 10, 9, dtype=torch.float64, requires_grad=not frozen_input)
    delta = torch.randn(rank, dtype=torch.float64, requires_grad=True)

    def naive(x: Tensor, delta: Tensor) -> Tensor:
        weight = conv.weight + (u @ delta.diag() @ vh).view_as(conv.weight)
        return conv._conv_forward(x, weight, conv.bias)

    assert_same(gradients(lambda x, d: spectral_conv2d(x, conv, u, d, vh), x, delta), gradients(naive, x, delta))
    zero = torch.zeros(rank, dtype=torch.float64, requires_grad=True)
    assert torch.equal(spectral_conv2d(x, conv, u, zero, vh), conv(x))
    with torch.no_grad():
        torch.testing.assert_close(spectral_conv2d(x, conv, u, delta, vh), naive(x, delta))


def test_spectral_conv2d_takes_the_cheaper_plan() -> None:
    conv, x = convolution(), torch.randn(4, 6, 20, 20, dtype=torch.float64, requires_grad=True)
    u, _, vh = torch.linalg.svd(conv.weight.flatten(1), full_matrices=False)
    base = count_flops(lambda: conv(x).sum().backward())
    for rank in (1, 8):
        delta = torch.zeros(rank, dtype=torch.float64, requires_grad=True)
        step = count_flops(
            lambda delta=delta: spectral_conv2d(x, conv, u[:, : len(delta)], delta, vh[: len(delta)]).sum().backward()
        )
        assert step < base * (1.2 if rank == 1 else 1.6)


def test_spectral_conv2d_per_row_in_half_and_with_groups() -> None:
    conv = convolution().float()
    u, _, vh = torch.linalg.svd(conv.weight.flatten(1), full_matrices=False)
    x, deltas = torch.randn(3, 6, 9, 9), torch.randn(3, 8)
    together = spectral_conv2d(x, conv, u, deltas, vh)
    torch.testing.assert_close(together[1:2], spectral_conv2d(x[1:2], conv, u, deltas[1], vh), rtol=1e-4, atol=1e-5)
    half = spectral_conv2d(x.bfloat16(), conv.bfloat16(), u, deltas, vh)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), together, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="groups"):
        spectral_conv2d(x, nn.Conv2d(6, 6, 3, groups=2), u, deltas, vh)


def test_one_delta_per_row() -> None:
    tensors = spectral_case(0, 6, 5, 3)
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    deltas = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    together = spectral_linear(x, tensors["weight"], None, tensors["u"], deltas, tensors["vh"])
    each = [spectral_linear(x[i], tensors["weight"], None, tensors["u"], deltas[i], tensors["vh"]) for i in range(4)]
    torch.testing.assert_close(together, torch.stack(each))
    (one,) = torch.autograd.grad(together.square().sum(), deltas)
    (other,) = torch.autograd.grad(torch.stack(each).square().sum(), deltas)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rank", [2, 6])
@pytest.mark.parametrize("reentrant", [False, True])
def test_spectral_linear_inside_checkpoint_with_a_trainable_bias(rank: int, reentrant: bool) -> None:
    tensors = spectral_case(40, 6, 6, rank)
    tensors["bias"].requires_grad_()
    block = lambda *a: F.gelu(spectral_linear(*a))  # noqa: E731
    expected = gradients(lambda *a: F.gelu(plain_spectral(*a)), *tensors.values())
    assert_same(gradients(lambda *a: checkpoint(block, *a, use_reentrant=reentrant), *tensors.values()), expected)
