"""The autograd functions against the plain expressions: values, first derivatives, what is kept, what is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from peft_lab import functional
from peft_lab.functional import (
    recomputed,
    scale_shift,
    spectral_delta,
    spectral_flops,
    spectral_linear,
    spectral_plan,
)

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


def broadcast(value: Tensor, y: Tensor, channel_dim: int) -> Tensor:
    """Independent of the code under test: moves the channels last instead of building a shape."""
    if value.ndim == 2:
        value = value.reshape(value.shape[0], *[1] * (y.ndim - 2), value.shape[1]) if y.ndim > 2 else value
    expanded = value.expand_as(y.movedim(channel_dim, -1))
    return expanded.movedim(-1, channel_dim)


def plain(y: Tensor, scale: Tensor, shift: Tensor, channel_dim: int = -1) -> Tensor:
    return y * broadcast(scale, y, channel_dim) + broadcast(shift, y, channel_dim)


def projection(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view(out.shape)


def gradients(function: Callable[..., Tensor], *inputs: Tensor, weights: Tensor | None = None) -> list[Tensor]:
    """Output and gradients of a fixed random projection of it."""
    leaves = [value.detach().clone().requires_grad_(value.requires_grad) for value in inputs]
    out = function(*leaves)
    weights = projection(out) if weights is None else weights
    (out * weights).sum().backward()  # not autograd.grad, which the reentrant checkpoint refuses
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


def assert_same(actual: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def kept_bytes(function: Callable[[], Tensor]) -> dict[int, int]:
    """Address and size of each storage that autograd keeps for the graph of the function."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return storages


def parameters(channels: int, rows: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    shape = (channels,) if rows is None else (rows, channels)
    scale = (1 + 0.3 * torch.randn(shape, dtype=dtype)).requires_grad_()
    return scale, torch.randn(shape, dtype=dtype).requires_grad_()


# ------------------------------------------------------------------------------------------------- scale and shift


@pytest.mark.parametrize("keep", ["output", "input"])
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("per_row", [False, True])
def test_scale_shift_equals_the_plain_expression(case: str, per_row: bool, keep: Any) -> None:
    shape, dim = SHAPES[case]
    if per_row and len(shape) == 1:
        pytest.skip("a vector has no rows")
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
        guard, calls = functional._ScaleGuard(), []
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

    def test_scales_out_of_use_and_deleted_are_forgotten(self) -> None:
        guard = functional._ScaleGuard()
        used, idle, gone = (nn.Parameter(torch.ones(4)) for _ in range(3))
        for scale in (used, idle, gone):
            guard.amplification(scale, torch.zeros(4))
        del gone, scale
        for _ in range(3):
            guard.amplification(used, torch.zeros(4))
        assert len(guard._known) == 1
        idle.data.zero_()
        assert guard.amplification(idle, torch.zeros(4)) == float("inf")


# ---------------------------------------------------------------------------------------------------- after a norm


class RMSNorm(nn.Module):
    """As the Llama family computes it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class ChannelsFirstNorm(nn.LayerNorm):
    """As ConvNeXt computes it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "LayerNorm": (lambda: nn.LayerNorm(6), (4, 3, 6), -1),
    "LayerNorm without bias": (lambda: nn.LayerNorm(6, bias=False), (4, 3, 6), -1),
    "LayerNorm without affine": (lambda: nn.LayerNorm(6, elementwise_affine=False), (4, 3, 6), -1),
    "channels-first LayerNorm": (lambda: ChannelsFirstNorm(6), (4, 6, 3, 2), 1),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (4, 6, 3, 2), 1),
    "SyncBatchNorm, eval": (lambda: nn.SyncBatchNorm(6).eval(), (4, 6, 3, 2), 1),
    "BatchNorm2d, eval": (lambda: nn.BatchNorm2d(6).eval(), (4, 6, 3, 2), 1),
    "BatchNorm1d, eval": (lambda: nn.BatchNorm1d(6).eval(), (4, 6), -1),
    "BatchNorm2d without affine": (lambda: nn.BatchNorm2d(6, affine=False), (4, 6, 3, 2), 1),
    "InstanceNorm with statistics": (lambda: nn.InstanceNorm2d(6, track_running_stats=True), (4, 6, 3, 2), 1),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (4, 6, 3, 2), 1),
    "GroupNorm of tokens": (lambda: nn.GroupNorm(3, 3), (4, 3, 6), -1),  # its weight is not on the scale's channels
    "RMSNorm of Llama": (lambda: RMSNorm(6), (4, 3, 6), -1),
    "RMSNorm of torch": (lambda: nn.RMSNorm(6), (4, 3, 6), -1),
}


def build_norm(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, int]:
    build, shape, dim = NORMS[name]
    norm = build().to(dtype)
    with torch.no_grad():
        for value in (*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())):
            value.add_(torch.rand_like(value))
    return norm, (3 * torch.randn(shape) + 1).to(dtype).requires_grad_(), dim


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_recomputed_equals_the_plain_expression(name: str, trainable: bool, per_row: bool) -> None:
    norm, x, dim = build_norm(name)
    norm.requires_grad_(trainable)
    scale, shift = parameters(6, x.shape[0] if per_row else None)
    other = copy.deepcopy(norm)

    def run(module: nn.Module, function: Callable[..., Tensor]) -> list[Tensor]:
        out = gradients(function, x, scale, shift)
        if trainable:
            function(x, scale, shift).square().sum().backward()
            out += [parameter.grad for parameter in module.parameters()]
        return out + [buffer.double() for buffer in module.buffers()]

    actual = run(norm, lambda *a: recomputed(norm, *a, dim))
    assert_same(actual, run(other, lambda x, *a: plain(other(x), *a, dim)))
    assert norm.state_dict().keys() == other.state_dict().keys()


@pytest.mark.parametrize("name", [name for name in NORMS if "statistics" not in name])
def test_recomputed_passes_gradcheck(name: str) -> None:
    norm, x, dim = build_norm(name)
    norm.requires_grad_(False)
    scale, shift = parameters(6)
    assert torch.autograd.gradcheck(lambda *a: recomputed(norm, *a, dim), (x, scale, shift))
    assert torch.autograd.gradcheck(lambda *a: recomputed(norm, x.detach(), *a, dim), (scale, shift))


@pytest.mark.parametrize("name", [name for name in NORMS if not name.endswith("affine") and "statistics" not in name])
def test_recomputed_keeps_only_the_input_of_the_norm(name: str) -> None:
    build, shape, dim = NORMS[name]
    norm = build().requires_grad_(False)
    x = torch.randn((128 * shape[0], *shape[1:]), requires_grad=True).clone()
    scale, shift = parameters(x.shape[dim], dtype=torch.float32)
    large = [
        a for a, size in kept_bytes(lambda: recomputed(norm, x, scale, shift, dim)).items() if size >= x.nbytes // 2
    ]
    assert large == [x.untyped_storage().data_ptr()]


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm of Llama", "BatchNorm2d, eval", "channels-first LayerNorm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_inside_checkpoint(name: str, reentrant: bool) -> None:
    norm, x, dim = build_norm(name)
    norm.requires_grad_(False)
    scale, shift = parameters(6)
    block = lambda *a: F.gelu(scale_shift(recomputed(norm, *a, dim), *a[1:], dim))  # noqa: E731
    expected = gradients(block, x, scale, shift)
    assert_same(gradients(lambda *a: checkpoint(block, *a, use_reentrant=reentrant), x, scale, shift), expected)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm of Llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_under_autocast(name: str, dtype: torch.dtype) -> None:
    norm, x, _ = build_norm(name, torch.float32)
    norm.requires_grad_(False)
    x = x.detach().to(dtype).requires_grad_()
    scale, shift = parameters(6, dtype=torch.float32)

    def under(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = function(*args)
            return out.float()

        return run

    actual = gradients(under(lambda *a: recomputed(norm, *a)), x, scale, shift)
    expected = gradients(under(lambda x, *a: plain(norm(x), *a)), x, scale, shift)
    assert_same(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm of Llama"])
def test_half_norm_with_fp32_scale(name: str) -> None:
    norm, x, _ = build_norm(name, torch.bfloat16)
    norm.requires_grad_(False)
    scale, shift = parameters(6, dtype=torch.float32)
    out, grad_x, grad_scale, _ = gradients(lambda *a: recomputed(norm, *a), x, scale, shift)
    assert (out.dtype, grad_x.dtype, grad_scale.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    expected = gradients(lambda x, *a: plain(norm(x), *a).bfloat16(), x, scale, shift)
    torch.testing.assert_close(grad_scale, expected[2], rtol=1e-2, atol=1e-2)


def test_hooks_of_the_norm_are_heard() -> None:
    norm, x, _ = build_norm("LayerNorm")
    scale, shift = parameters(6)
    for module in (norm.requires_grad_(False), build_norm("RMSNorm of Llama")[0].requires_grad_(False)):
        seen: list[Tensor] = []
        module.register_forward_hook(lambda _module, _args, out, seen=seen: seen.append(out) or 2 * out)
        out = recomputed(module, x, scale, shift)
        torch.testing.assert_close(out, plain(2 * seen[0], scale, shift))


def test_folding_equals_the_merged_norm_bit_for_bit() -> None:
    norm, x, _ = build_norm("LayerNorm", torch.float32)
    scale, shift = parameters(6, dtype=torch.float32)
    merged = copy.deepcopy(norm)
    merged.weight.data, merged.bias.data = norm.weight * scale, torch.addcmul(shift, norm.bias, scale)
    assert torch.equal(recomputed(norm, x, scale, shift), merged(x))
    assert torch.equal(recomputed(norm, x, torch.ones(6), torch.zeros(6)), norm(x))


# ---------------------------------------------------------------------------------------------- spectral low-rank delta

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
def test_zero_delta_gives_the_bits_of_the_base(
    plan: str, layout: str, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "spectral_plan", lambda *_args, **_options: plan)
    tensors = spectral_case(33, 48, 40, 24, torch.float32)
    tensors["delta"] = torch.zeros(24, requires_grad=True)
    if layout == "columns":
        tensors["weight"] = tensors["weight"].t().contiguous().t()
    elif layout == "strided":
        tensors["weight"] = torch.randn(80, 96)[::2, ::2]
    with torch.set_grad_enabled(grad):
        actual = spectral_linear(**tensors)
    assert torch.equal(actual, F.linear(tensors["x"], tensors["weight"], tensors["bias"]))


@pytest.mark.parametrize("case", SPECTRAL)
@pytest.mark.parametrize("input_grad", [False, True])
@pytest.mark.parametrize("fusable", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("plan", ["factored", "projected", "materialised"])
def test_flop_formulas_are_what_is_counted(
    case: tuple[int, int, int, int],
    input_grad: bool,
    fusable: bool,
    train: bool,
    plan: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if plan == "projected" and not (fusable and train):
        pytest.skip("the projected plan is one of training through the weight")
    monkeypatch.setattr(functional, "spectral_plan", lambda *_args, **_options: plan)
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
    assert spectral_plan(tokens, width, width, rank, True) == plan
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


def test_compiled_results_are_the_same() -> None:
    norm = nn.LayerNorm(16).requires_grad_(False)
    tensors = spectral_case(40, 16, 16, 4, torch.float32)
    scale, shift = parameters(16, dtype=torch.float32)

    def block(x: Tensor, delta: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = recomputed(norm, x, scale, shift)
        x = spectral_linear(x, tensors["weight"], tensors["bias"], tensors["u"], delta, tensors["vh"])
        return F.gelu(scale_shift(x, scale, shift))

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    arguments = (tensors["x"], tensors["delta"], scale, shift)
    assert_same(gradients(compiled, *arguments), gradients(block, *arguments), rtol=1e-4, atol=1e-5)
