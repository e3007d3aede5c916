"""Cost of a training step: FLOPs, kept activations, peak memory, time.

The frozen floor stands beside it. FLOPs and bytes are deterministic, so they can be limits in tests; time is not.
"""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

__all__ = [
    "Cost",
    "KeptActivations",
    "count_flops",
    "floor",
    "frozen_floor",
    "kept_activations",
    "measure_step",
    "peak_memory",
    "training_step",
]

LossFn = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Cost:
    """Cost of one training step: forward, loss, backward, optimiser.

    The optimiser's step counts where one is given.

    Attributes:
        flops: floating-point operations of matrix products, convolutions and attention; pointwise ops count nothing.
        saved_bytes: activations that autograd keeps between forward and backward, see :func:`kept_activations`.
        peak_bytes: most memory held by tensors during the step beyond what was held before it.
        seconds: median wall time of the repeats.
    """

    flops: int
    saved_bytes: int
    peak_bytes: int
    seconds: float


def measure_step(
    model: nn.Module,
    inputs: Any,
    loss_fn: LossFn | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    repeats: int = 3,
) -> Cost:
    """Measure one training step of a model.

    Its mode, trainable parameters and adapters are taken as they are. Each meter has a run of its own, after one run to
    warm up. Gradients are cleared afterwards; norms in training mode update their statistics, and the optimiser, if
    given, its parameters.

    Args:
        model: any module with something to train.
        inputs: a mapping (keyword arguments), a tuple (positional ones) or one tensor.
        loss_fn: model output -> scalar; by default the output's ``loss``, else the mean square of its first tensor.
        optimizer: its step is counted in peak and time.
        repeats: timed runs.
    """
    step = training_step(model, inputs, loss_fn, optimizer)
    step()  # the first step also allocates gradients and optimiser states
    flops = count_flops(step)
    with kept_activations(model, inputs) as kept:
        loss = _loss(_call(model, inputs), loss_fn)
        saved = kept.bytes()
    # frees the graph, which would otherwise be held while the peak is measured
    del loss
    peak = peak_memory(step)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return Cost(flops, saved, peak, statistics.median(times))


def training_step(
    model: nn.Module, inputs: Any, loss_fn: LossFn | None = None, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """Function that makes one training step and waits for the device."""
    cuda = any(parameter.is_cuda for parameter in model.parameters())

    def step() -> None:
        loss = _loss(_call(model, inputs), loss_fn)
        # a model without anything to train has a forward alone
        if loss.requires_grad:
            loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        # CUDA runs asynchronously, so a clock would otherwise time only the launch of the work
        if cuda:
            torch.cuda.synchronize()

    return step


def count_flops(function: Callable[[], Any]) -> int:
    """Count the FLOPs of a call by torch's table.

    Two entries are mended: attention on CPUs, and gradients of grouped convolutions.
    """
    aten = torch.ops.aten
    mended = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        aten.convolution_backward: _convolution_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=mended) as counter:
        function()
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _convolution_backward_flops(grad: Any, x: Any, weight: Any, *arguments: Any, **_: Any) -> int:
    """FLOPs of the gradients of input and weight that are asked for.

    Each takes the products of the forward once more.
    """
    # the counter passes aten's arguments by position, with shapes in place of tensors
    transposed, mask = arguments[4], arguments[7]
    # a transposed convolution multiplies at each position of its input, others at each of the output
    positions = x if transposed else grad
    return 2 * math.prod(weight) * positions[0] * math.prod(positions[2:]) * (mask[0] + mask[1])


class KeptActivations:
    """Tensors that autograd keeps, as its hooks see them."""

    def __init__(self, excluded: set[int]) -> None:
        self._excluded = excluded
        # weak references, because strong ones would keep tensors alive that autograd has released
        self._handles: weakref.WeakSet[_Handle] = weakref.WeakSet()

    def bytes(self) -> int:
        """Bytes of the storages that are kept now."""
        return sum(self.storages().values())

    def storages(self) -> dict[int, int]:
        """Identity and size in bytes of each storage that is kept now."""
        sizes: dict[int, int] = {}
        for handle in self._handles:
            # views of one tensor share its storage
            storage = handle.tensor.untyped_storage()
            if storage._cdata not in self._excluded:
                sizes[storage._cdata] = storage.nbytes()
        return sizes

    def pack(self, tensor: Tensor) -> _Handle:
        """Hook that autograd calls for each tensor it keeps."""
        handle = _Handle(tensor)
        self._handles.add(handle)
        return handle

    pack.keeps_storage = True  # type: ignore[attr-defined]  # functional.recomputed asks hooks for this


class _Handle:
    """Handle that lives as long as autograd keeps the tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def kept_activations(model: nn.Module, inputs: Any = None) -> Iterator[KeptActivations]:
    """Watch the tensors that autograd keeps for backward inside the block.

    Ask ``bytes()`` while the loss is alive.

    Counted: each storage that saved tensors point into, once, with its whole size (a view keeps its base alive).
    Not counted: storages of the model's parameters and buffers, of plain tensors its modules hold as attributes (frozen
    bases, also inside lists, dicts and dataclasses), and of the inputs, all of which stay without autograd too. What a
    function keeps outside autograd's saved tensors is not seen.
    """
    kept = KeptActivations({tensor.untyped_storage()._cdata for tensor in _held_tensors(model, inputs)})
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda handle: handle.tensor):
        yield kept


def _held_tensors(model: nn.Module, inputs: Any) -> Iterable[Tensor]:
    for module in model.modules():
        for value in vars(module).values():
            yield from _tensors(value)
    yield from _tensors(inputs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors(getattr(value, name, None))


def peak_memory(function: Callable[[], Any]) -> int:
    """Peak bytes of tensors during a call beyond those before it.

    They come from CUDA's allocator, else from the profiler.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        # a model on the CPU allocates nothing there; it is profiled
        if torch.cuda.max_memory_allocated() > before:
            return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    # each event is an allocation or, with negative bytes, a release
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def frozen_floor(model: nn.Module) -> Iterator[nn.Module]:
    """Freeze all parameters, yet let the gradient flow through all layers.

    This is the floor of every adapter's cost. The outputs of the first layers with parameters (embeddings, stem) are
    made to require grad, so backward goes down to them and computes no weight gradient. Frozen state and hooks are
    restored at the end.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def require_grad(_module: nn.Module, _args: Any, output: Any) -> None:
        # an output that is no leaf has a gradient flowing through it already
        if isinstance(output, Tensor) and output.is_floating_point() and output.is_leaf and torch.is_grad_enabled():
            output.requires_grad_(True)

    # only leaf modules with parameters: outputs of others require grad by what they are computed from
    handles = []
    for module in model.modules():
        has_children = next(module.children(), None) is not None
        if not has_children and next(module.parameters(), None) is not None:
            handles.append(module.register_forward_hook(require_grad))
    model.requires_grad_(False)
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def floor(model: nn.Module, inputs: Any, loss_fn: LossFn | None = None, *, repeats: int = 3) -> Cost:
    """Cost of the frozen floor: gradient through all layers, none to train."""
    with frozen_floor(model):
        return measure_step(model, inputs, loss_fn, repeats=repeats)


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _loss(output: Any, loss_fn: LossFn | None) -> Tensor:
    if loss_fn is not None:
        return loss_fn(output)
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    first = output if isinstance(output, Tensor) else output[0]
    return first.float().square().mean()
