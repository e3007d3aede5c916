"""scale_shift against the plain expression: values, first derivatives, what is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.functional_checks import assert_same, gradients, kept_bytes, parameters, plain, projection
from torch import Tensor, nn

from peft_lab.adapters.feature.ssf import kernels
from peft_lab.adapters.feature.ssf.kernels import recomputed, scale_shift, scale_shift_
from peft_lab.tuners.spectral.kernels import spectral_linear

SHAPES = {  # name: (shape of y, channel_dim)
    "tokens": ((3, 4, 5), -1),
    "rows": ((6, 5), -1),
    "vector": ((5,), -1),
    "image": ((3, 5, 2, 4), 1),
    "image, width = channels": ((3, 4, 2, 4), 1),
    "empty": ((0, 4, 5), -1),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("keep", ["output", "input"])
@pytest.mark.parametrize(
    ("case", "per_row"), [(case, rows) for case in SHAPES for rows in (False, True) if not (rows and case == "vector")]
)
def test_scale_shift_equals_the_plain_expression(case: str, per_row: bool, keep: Any) -> None:
    shape, dim = SHAPES[case]
    y = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    scale, shift = parameters(shape[dim], shape[0] if per_row else None)
    actual = gradients(lambda *a: scale_shift(*a, dim, keep=keep), y, scale, shift)
    assert_same(actual, gradients(lambda *a: plain(*a, dim), y, scale, shift))
    if y.numel():
        assert torch.autograd.gradcheck(lambda *a: scale_shift(*a, dim, keep=keep), (y, scale, shift))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 1e-5, -1e-3, 0.5, -2.0, 1e6])
def test_gradient_is_right_for_every_value_of_the_scale(value: float) -> None:
    y = torch.randn(4, 5, requires_grad=True)
    scale, shift = parameters(5, dtype=torch.float32)
    with torch.no_grad():
        scale[2], shift[3] = value, 100 * value
    assert_same(gradients(scale_shift, y, scale, shift), gradients(plain, y, scale, shift), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_scale_shift_with_frozen_inputs(frozen: tuple[int, ...]) -> None:
    inputs = [torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), *parameters(5)]
    for index in frozen:
        inputs[index] = inputs[index].detach()
    assert_same(gradients(scale_shift, *inputs), gradients(plain, *inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", ["output", "input"])
def test_half_activations_with_fp32_parameters(dtype: torch.dtype, keep: Any) -> None:
    y = torch.randn(64, 512, 8).to(dtype).requires_grad_()
    scale, shift = parameters(8, dtype=torch.float32)
    with torch.no_grad():
        scale.copy_(1 + 1e-3 * torch.randn(8))  # below the resolution of bf16: must not round to 1
    out, grad_y, grad_scale, grad_shift = gradients(lambda *a: scale_shift(*a, keep=keep), y, scale, shift)
    assert (out.dtype, grad_y.dtype, grad_scale.dtype) == (dtype, dtype, torch.float32)
    exact = gradients(plain, y.double(), scale.double(), shift.double(), weights=projection(out).double())
    torch.testing.assert_close(out, exact[0].to(dtype), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(grad_shift.double(), exact[3], rtol=1e-4, atol=1e-2)
    count = y.numel() / 8
    rounding = 4 * torch.finfo(dtype).eps * count**0.5 if keep == "output" else 1e-4 * count**0.5
    torch.testing.assert_close(grad_scale.double(), exact[2], rtol=0, atol=rounding)


def test_only_the_output_is_kept() -> None:
    y = torch.randn(64, 32, requires_grad=True).clone()
    scale, shift = parameters(32, dtype=torch.float32)
    result: list[Tensor] = []
    kept = kept_bytes(lambda: result.append(scale_shift(y, scale, shift)) or result[0])
    large = {address for address, size in kept.items() if size >= y.nbytes}
    assert large == {result[0].untyped_storage().data_ptr()}


def test_the_next_op_keeps_nothing_more() -> None:
    y = torch.randn(64, 32, requires_grad=True).clone()
    scale, shift = parameters(32, dtype=torch.float32)
    with_scale = sum(kept_bytes(lambda: F.gelu(scale_shift(y, scale, shift))).values())
    assert with_scale - sum(kept_bytes(lambda: F.gelu(y)).values()) <= scale.nbytes + shift.nbytes


@pytest.mark.parametrize("value", [0.0, 1e-4])
def test_a_scale_near_zero_keeps_the_input(value: float) -> None:
    y = torch.randn(64, 32, requires_grad=True).clone()
    scale, shift = torch.full((32,), value, requires_grad=True), torch.zeros(32, requires_grad=True)
    assert y.untyped_storage().data_ptr() in kept_bytes(lambda: scale_shift(y, scale, shift))


def test_frozen_scale_keeps_no_activation() -> None:
    y = torch.randn(64, 32, requires_grad=True).clone()
    kept = kept_bytes(lambda: scale_shift(y, torch.ones(32), torch.zeros(32, requires_grad=True)))
    assert sum(kept.values()) < y.nbytes


def test_output_changed_in_place() -> None:
    y = torch.randn(4, 5, requires_grad=True)
    scale, shift = parameters(5, dtype=torch.float32)
    out = scale_shift(y, scale, shift)
    out += 1
    with pytest.raises(RuntimeError, match="keep='input'"):
        out.sum().backward()
    out = scale_shift(y, scale, shift, keep="input")
    out += 1
    out.sum().backward()
    torch.testing.assert_close(scale.grad, y.detach().sum(0))


def test_layouts_and_double_use() -> None:
    scale, shift = parameters(5)
    base = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    twice = lambda f: lambda y, s, t: f(f(y.transpose(1, 2), s, t), s, t)  # noqa: E731
    assert_same(gradients(twice(scale_shift), base, scale, shift), gradients(twice(plain), base, scale, shift))
    image = torch.randn(2, 5, 4, 4).to(memory_format=torch.channels_last)
    out = scale_shift(image, scale.float(), shift.float(), 1)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_identity_is_exact_and_no_grad_builds_no_graph() -> None:
    y = torch.randn(4, 5, requires_grad=True)
    ones, zeros = torch.ones(5, requires_grad=True), torch.zeros(5, requires_grad=True)
    assert torch.equal(scale_shift(y, ones, zeros), y)
    with torch.no_grad():
        assert not scale_shift(y, ones, zeros).requires_grad
    with torch.inference_mode():
        assert torch.equal(scale_shift(y, ones, zeros), y)


@pytest.mark.parametrize(
    ("scale", "shift", "dim"),
    [((5,), (4,), -1), ((4,), (4,), -1), ((3, 5), (3, 5), -1), ((1, 1, 5), (1, 1, 5), -1), ((5,), (5,), 1)],
)
def test_wrong_shapes_are_refused(scale: tuple[int, ...], shift: tuple[int, ...], dim: int) -> None:
    with pytest.raises(ValueError, match="shape"):
        scale_shift(torch.randn(2, 4, 5), torch.ones(scale), torch.zeros(shift), dim)


def test_second_derivatives_are_refused() -> None:
    y = torch.randn(4, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(
        scale_shift(y, *parameters(5, dtype=torch.float32)).pow(2).sum(), y, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


class TestGuardOfDevices:
    """The check once per pass, on CPU tensors standing for those of a device."""

    def test_one_check_per_pass_sees_every_change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        guard, calls = kernels._ScaleGuard(), []
        stack = torch.stack
        monkeypatch.setattr(torch, "stack", lambda tensors: calls.append(len(tensors)) or stack(tensors))
        layers = [(nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))) for _ in range(3)]

        def forward() -> list[float]:
            return [guard.amplification(*layer) for layer in layers]

        assert forward() == [1.0] * 3
        assert calls == []
        layers[1][0].data[2] = 0.5  # a write that moves no version counter
        assert forward() == [1.0, 2.0, 1.0]
        assert calls == [3]
        layers[2][0].data[0] = 0
        assert forward() == [1.0, 2.0, float("inf")]
        assert calls == [3, 3]

    def test_scales_made_anew_for_each_call_are_not_waited_for(self) -> None:
        activations = SimpleNamespace(dtype=torch.float32, is_cuda=False)
        fresh = SimpleNamespace(device=torch.device("xpu"), is_leaf=False, numel=lambda: 4)
        assert not kernels._ScaleGuard().invertible(activations, fresh, fresh)

    def test_scales_out_of_use_and_deleted_are_forgotten(self) -> None:
        guard = kernels._ScaleGuard()
        used, idle, gone = (nn.Parameter(torch.ones(4)) for _ in range(3))
        for scale in (used, idle, gone):
            guard.amplification(scale, torch.zeros(4))
        del gone, scale
        for _ in range(3):
            guard.amplification(used, torch.zeros(4))
        assert len(guard._known) == 1
        idle.data.zero_()
        assert guard.amplification(idle, torch.zeros(4)) == float("inf")


@pytest.mark.full
def test_compiled_results_are_the_same() -> None:
    norm = nn.LayerNorm(16).requires_grad_(False)
    x, weight = torch.randn(40, 16, requires_grad=True), torch.randn(16, 16)
    u, _, vh = torch.linalg.svd(weight)
    delta = torch.randn(4, requires_grad=True)
    scale, shift = parameters(16, dtype=torch.float32)

    def block(x: Tensor, delta: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = recomputed(norm, x, scale, shift)
        x = spectral_linear(x, weight, None, u[:, :4], delta, vh[:4])
        return F.gelu(scale_shift(x, scale, shift))

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    arguments = (x, delta, scale, shift)
    assert_same(gradients(compiled, *arguments), gradients(block, *arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_shift_in_place_writes_only_where_nothing_is_lost(dtype):
    y, scale, shift = torch.randn(4, 3, 5).to(dtype), torch.randn(4, 5), torch.randn(4, 5)
    expected, before = scale_shift(y, scale, shift), y.clone()
    leaf = y.clone().requires_grad_()
    assert torch.equal(scale_shift_(leaf, scale, shift), expected)
    assert torch.equal(leaf, before)
    out = scale_shift_(y, scale, shift)
    assert torch.equal(out, expected)
    assert (out is y) == (dtype == torch.float32)
