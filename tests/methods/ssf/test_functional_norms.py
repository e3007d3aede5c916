"""recomputed against the plain expression, for every kind of norm and along a residual stream."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.functional_checks import assert_same, gradients, kept_bytes, parameters, plain, projection
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from peft_lab.adapters.feature.ssf import kernels
from peft_lab.adapters.feature.ssf.kernels import recomputed, scale_shift
from peft_lab.training.step_cost import kept_activations


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
    "LayerNorm of two dimensions": (lambda: nn.LayerNorm((2, 6)), (4, 2, 6), -1),
    "LayerNorm, scaled along another": (lambda: nn.LayerNorm(6), (4, 6, 6), 1),
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


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm of Llama", "channels-first LayerNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_under_autocast(name: str, dtype: torch.dtype) -> None:
    norm, x, dim = build_norm(name, torch.float32)
    norm.requires_grad_(False)
    x = x.detach().to(dtype).requires_grad_()
    scale, shift = parameters(6, dtype=torch.float32)

    def under(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = function(*args)
            return out.float()

        return run

    actual = gradients(under(lambda *a: recomputed(norm, *a, dim)), x, scale, shift)
    expected = gradients(under(lambda x, *a: plain(norm(x), *a, dim)), x, scale, shift)
    assert_same(actual, expected, rtol=2e-2, atol=2e-2)


def test_the_norm_runs_again_under_the_autocast_of_the_forward() -> None:
    seen = []

    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(F.normalize(x, dim=-1), torch.eye(6))
            seen.append(y.dtype)
            return y

    x, (scale, shift) = torch.randn(4, 3, 6, requires_grad=True), parameters(6, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            out = recomputed(Mixing(), x, scale, shift)
        out.float().sum().backward()
        assert seen == [dtype, dtype]
        seen.clear()


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


class Residual(nn.Module):
    """Pre-norm blocks whose branches end in a scale and shift, as SSF leaves them."""

    def __init__(self, blocks: int = 3, norm: Callable[[int], nn.Module] = nn.LayerNorm, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(norm(width) for _ in range(2 * blocks)).requires_grad_(False)
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(2 * blocks)).requires_grad_(False)
        self.scales = nn.Parameter(1 + 0.1 * torch.randn(4 * blocks, width))
        self.shifts = nn.Parameter(0.1 * torch.randn(4 * blocks, width))
        self.checkpointing: bool | None = None  # use_reentrant

    def block(self, x: Tensor, index: int) -> Tensor:
        for i in (2 * index, 2 * index + 1):
            residual = x
            values = [(self.scales[2 * i + j], self.shifts[2 * i + j]) for j in (0, 1)]
            x = recomputed(self.norms[i], x, *values[0])
            x = scale_shift(self.linears[i](x), *values[1])
            x = residual + x if i % 3 else x + residual
        return x

    def forward(self, x: Tensor) -> Tensor:
        for index in range(len(self.norms) // 2):
            if self.checkpointing is None:
                x = self.block(x, index)
            else:
                x = checkpoint(self.block, x, index, use_reentrant=self.checkpointing)
        return x


@pytest.fixture
def stream() -> Tensor:
    return torch.randn(4, 32, 16, requires_grad=True)


@pytest.mark.parametrize("norm", [nn.LayerNorm, RMSNorm])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_residual_sums_added_up_again_give_the_same_bits(
    norm: Any, reentrant: bool | None, autocast: bool, stream: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Residual(norm=norm)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(2 * stream)
        (out.float() * projection(out.float())).sum().backward()
        found = [out.detach(), stream.grad, model.scales.grad, model.shifts.grad]
        stream.grad = model.scales.grad = model.shifts.grad = None
        return found

    monkeypatch.setattr(kernels, "_MAX_PARTS", 0)
    expected = run()
    monkeypatch.undo()
    model.checkpointing = reentrant
    for one, other in zip(run(), expected, strict=True):
        assert torch.equal(one, other)


def test_residual_sums_are_not_kept(stream: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Residual(blocks=4)

    def kept() -> float:
        with kept_activations(model, stream) as meter:
            loss = model(2 * stream).sum()
            size = meter.bytes()
        loss.backward()
        return size / stream.nbytes

    branches = 8
    assert (
        branches + 2 <= kept() < branches + 2.8
    )  # and an anchor for each four sums; the rest is the norms' statistics
    monkeypatch.setattr(kernels, "_MAX_PARTS", 0)
    assert kept() >= 2 * branches


@pytest.mark.parametrize("kind", ["alpha", "broadcast", "in place", "scalar", "not a sum"])
def test_sums_of_another_kind_are_kept_as_they_are(kind: str) -> None:
    norm = nn.LayerNorm(16).requires_grad_(False)
    start = torch.randn(1, 32, 16, requires_grad=True)
    scale, shift = parameters(16, dtype=torch.float32)

    def run(norm_of: Callable[..., Tensor], scaled: Callable[..., Tensor]) -> Tensor:
        x = 2 * start
        z = scaled(norm_of(norm, x, scale, shift), scale, shift)
        rows = z.expand(3, 32, 16)
        x = {
            "alpha": lambda: torch.add(x, z, alpha=2),
            "broadcast": lambda: x + rows.contiguous(),
            "in place": lambda: (x + z).mul_(3),
            "scalar": lambda: z + 1,
            "not a sum": lambda: x * z,
        }[kind]()
        return norm_of(norm, x, scale, shift)

    run(recomputed, scale_shift).sum().backward()
    found = [start.grad, scale.grad, shift.grad]
    for tensor in (start, scale, shift):
        tensor.grad = None
    run(lambda norm, x, *a: plain(norm(x), *a), plain).sum().backward()
    assert_same(found, [start.grad, scale.grad, shift.grad], rtol=1e-4, atol=1e-4)


def test_outputs_of_one_op_are_told_apart() -> None:
    norm = nn.LayerNorm(16).requires_grad_(False)
    start = torch.randn(4, 32, 32, dtype=torch.float64, requires_grad=True)
    scale, shift = parameters(16)

    def run(norm_of: Callable[..., Tensor], scaled: Callable[..., Tensor], start: Tensor, *values: Tensor) -> Tensor:
        left, right = (2 * start).chunk(2, dim=-1)
        branches = [scaled(norm_of(part, *values), *values) for part in (left, right)]
        return norm_of(left + branches[1], *values) * norm_of(right + branches[0], *values)

    norm.double()
    actual = gradients(partial(run, partial(recomputed, norm), scale_shift), start, scale, shift)
    assert_same(actual, gradients(partial(run, lambda x, *a: plain(norm(x), *a), plain), start, scale, shift))


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[StorageWeakRef]:
    """Weak references to all that scale_shift gave since."""
    found: list[StorageWeakRef] = []
    original = kernels._affine

    def watched(*args: Any) -> Tensor:
        out = original(*args)
        found.append(StorageWeakRef(out.untyped_storage()))
        return out

    monkeypatch.setattr(kernels, "_affine", watched)
    return found


def test_nothing_outlives_backward(stream: Tensor, outputs: list[StorageWeakRef]) -> None:
    loss = Residual()(2 * stream).sum()
    assert outputs
    assert not any(output.expired() for output in outputs)
    loss.backward()
    assert all(output.expired() for output in outputs)  # though the graph's nodes live as long as the loss


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_nothing_of_a_block(reentrant: bool, stream: Tensor, outputs: list[StorageWeakRef]) -> None:
    model = Residual()
    model.checkpointing = reentrant
    loss = model(2 * stream).sum()
    assert outputs
    assert all(output.expired() for output in outputs)
    loss.backward()


def test_saved_tensor_hooks_of_others_see_the_plain_way(stream: Tensor) -> None:
    model = Residual()
    expected = gradients(model, stream)
    with torch.autograd.graph.save_on_cpu():
        assert_same(gradients(model, stream), expected)


def test_residual_changed_in_place_is_noticed(stream: Tensor) -> None:
    model = Residual(blocks=1)
    start = 2 * stream
    out = model(start)
    with torch.no_grad():
        start.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()
