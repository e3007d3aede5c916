"""Scale-and-shift kernels with minimal activation memory.

Training keeps and computes no more than it must:

``scale_shift``       ``y * scale + shift`` that keeps its output, which the next op keeps anyway, instead of ``y``.
``recomputed``        ``norm(x) * scale + shift`` that keeps only the norm's own input.

Both equal the plain expression, in value and in first derivatives, and fall back to it under ``torch.compile``, whose
own partitioner chooses what to keep. Second derivatives are refused with an error rather than given wrongly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from peft_lab.tuners import sum_dtype

__all__ = [
    "recomputed",
    "scale_shift",
    "scale_shift_",
]

# How much dividing by the scale may enlarge a rounding error of the output before the input is kept instead.
_MAX_AMPLIFICATION = {torch.float64: 1e4, torch.float32: 1e2, torch.bfloat16: 4.0, torch.float16: 16.0}
_IN_PLACE = "the output was changed in place before backward; call it with keep='input' where the model does that."
# Norms that apply `weight` and `bias` per channel as their last step, so that a scale and shift fold into them exactly.
_FOLDABLE_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def scale_shift(
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    channel_dim: int = -1,
    *,
    keep: Literal["output", "input"] = "output",
) -> Tensor:
    """Compute ``y * scale + shift`` per channel.

    One activation is kept for backward, its own output. The next op (GELU, attention, a norm, a convolution) keeps that
    output anyway: no extra memory in training. Backward rebuilds what it needs of ``y`` from the output; where the
    scale is too near zero for that, or the shift too large beside it, ``y`` is kept instead, so the gradient is right
    for every value of the scale, zero included.

    Args:
        y: activations, channels at ``channel_dim``; any floating dtype, which is also the dtype of the result.
        scale: ``(C,)``, or ``(B, C)`` for one scale per row of the batch; any floating dtype, sums are at least fp32.
        shift: shape of ``scale``.
        channel_dim: -1 for features last, 1 for ``(B, C, H, W)``.
        keep: ``"input"`` keeps ``y``: for an output that is changed in place afterwards (``z += residual``).

    Raises:
        ValueError: scale and shift differ in shape, or do not match ``y`` at ``channel_dim``.

    Source: SSF (arXiv 2210.08823) for the map; the choice of what is kept is ours.
    """
    _check_channels(y, scale, shift, channel_dim)
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and scale.requires_grad):
        return _affine(y, scale, shift, channel_dim)
    keep_output = keep == "output" and _scale_guard.invertible(y, scale, shift)
    return _ScaleShift.apply(y, scale, shift, channel_dim, keep_output)


def scale_shift_(y: Tensor, scale: Tensor, shift: Tensor, channel_dim: int = -1) -> Tensor:
    """Compute ``scale_shift`` in place where no gradient needs ``y``.

    This saves a second large tensor. Args and errors as for :func:`scale_shift`. The result is the returned tensor,
    written over ``y`` or not.
    """
    # A result of a wider dtype does not fit into y.
    grad = torch.is_grad_enabled() and (y.requires_grad or scale.requires_grad or shift.requires_grad)
    if grad or y.dtype != torch.promote_types(y.dtype, scale.dtype) or torch.compiler.is_compiling():
        return scale_shift(y, scale, shift, channel_dim)
    _check_channels(y, scale, shift, channel_dim)
    shift, scale = _per_channel(shift, y, channel_dim), _per_channel(scale, y, channel_dim)
    return torch.addcmul(shift, y, scale, out=y)


class _ScaleShift(torch.autograd.Function):
    """Scale and shift with a backward from its output or input."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor, channel_dim: int, keep_output: bool) -> Tensor:
        z = _affine(y, scale, shift, channel_dim)
        ctx.channel_dim, ctx.keep_output = channel_dim, keep_output
        ctx.save_for_backward(z if keep_output else y, scale, shift)
        ctx.kept = z.detach() if keep_output and _saved_is_kept() else None
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # autograd's own message for a tensor changed in place does not name the way out.
        try:
            kept, scale, shift = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(f"scale_shift: {_IN_PLACE}") from error
        # No later norm needs the output as a part of its sum; products are summed in float32 or wider.
        ctx.kept = None
        wide = grad.to(sum_dtype(grad, scale))
        grad_y = grad_scale = grad_shift = None
        if ctx.needs_input_grad[0]:
            grad_y = (wide * _per_channel(scale, kept, ctx.channel_dim)).to(kept.dtype)
        total = _sum_channels(wide, scale, ctx.channel_dim)
        if ctx.needs_input_grad[1]:
            grad_scale = _sum_channels(wide * kept, scale, ctx.channel_dim)
            if ctx.keep_output:  # sum(g * y) = (sum(g * z) - shift * sum(g)) / scale: no pass to rebuild y itself
                grad_scale = (grad_scale - shift * total) / scale
            grad_scale = grad_scale.to(scale.dtype)
        if ctx.needs_input_grad[2]:
            grad_shift = total.to(shift.dtype)
        return grad_y, grad_scale, grad_shift, None, None


class _ScaleGuard:
    """Cached test for rebuilding ``y`` from ``y * scale + shift``.

    It takes one device synchronisation per forward pass. A scale that is asked about a second time means a new pass:
    then all scales of the pass before are checked together. Nothing rests on version counters, which writes through
    ``.data`` (ZeRO, some optimisers) do not move.
    """

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()  # scale -> [shift, amplification, asked since the last check]
        self._lock = threading.Lock()

    def invertible(self, y: Tensor, scale: Tensor, shift: Tensor) -> bool:
        limit = _MAX_AMPLIFICATION.get(y.dtype, 0.0)
        if scale.device.type == "meta" or scale.numel() == 0:
            return True
        if scale.device.type == "cpu":  # no queue to wait for: look at the values of this very call
            return _amplification(scale, shift).item() <= limit
        if not scale.is_leaf or (y.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False  # a fresh tensor per call, or a graph that will be replayed with other values
        return self.amplification(scale, shift) <= limit

    def amplification(self, scale: Tensor, shift: Tensor) -> float:
        """Cached amplification of a scale, computed anew once per pass."""
        with self._lock:
            entry = self._known.get(scale)
            if entry is None:
                entry = self._known[scale] = [shift, _amplification(scale, shift).item(), False]
            elif entry[2]:
                self._check_all()
            entry[2] = True
            return entry[1]

    def _check_all(self) -> None:
        """Compute the amplifications of all scales that the last pass asked for."""
        # One transfer per device instead of one per scale.
        by_device: dict[torch.device, list[tuple[Tensor, list[Any]]]] = {}
        for scale, entry in list(self._known.items()):
            if entry[2]:
                by_device.setdefault(scale.device, []).append((scale, entry))
            else:  # out of use since the last pass: it is checked by itself if it comes back
                del self._known[scale]
        for pairs in by_device.values():
            values = torch.stack([_amplification(scale, entry[0]) for scale, entry in pairs]).tolist()
            for (_, entry), value in zip(pairs, values, strict=True):
                entry[1:] = [value, False]


_scale_guard = _ScaleGuard()


def _amplification(scale: Tensor, shift: Tensor) -> Tensor:
    """Enlargement of z's rounding error in ``(z - shift) / scale``.

    It is for inputs near 1, and inf if a scale is 0.
    """
    return ((1 + shift.detach().abs()) / scale.detach().abs()).amax().float()


def _check_channels(y: Tensor, scale: Tensor, shift: Tensor, channel_dim: int) -> None:
    if scale.shape != shift.shape or scale.ndim not in (1, 2):
        raise ValueError(
            f"scale {tuple(scale.shape)} and shift {tuple(shift.shape)} must have one shape, "
            "(channels,) or (batch, channels)."
        )
    if scale.shape[-1] != y.shape[channel_dim] or (scale.ndim == 2 and scale.shape[0] != y.shape[0]):
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} does not match activations of shape {tuple(y.shape)} "
            f"with channels at dimension {channel_dim}."
        )


def _per_channel(value: Tensor, y: Tensor, channel_dim: int) -> Tensor:
    """View of a ``(C,)`` or ``(B, C)`` tensor that broadcasts against y."""
    shape = [1] * y.ndim
    shape[channel_dim] = value.shape[-1]
    if value.ndim == 2:
        shape[0] = value.shape[0]
    return value.view(shape)


def _sum_channels(value: Tensor, like: Tensor, channel_dim: int) -> Tensor:
    """Sum over all that ``like``, ``(C,)`` or ``(B, C)``, was broadcast over."""
    kept = {channel_dim % value.ndim} | ({0} if like.ndim == 2 else set())
    dims = [dim for dim in range(value.ndim) if dim not in kept]
    return (value.sum(dims) if dims else value).reshape(like.shape)  # sum([]) would sum over everything


def _affine(y: Tensor, scale: Tensor, shift: Tensor, channel_dim: int) -> Tensor:
    shift, scale = _per_channel(shift, y, channel_dim), _per_channel(scale, y, channel_dim)
    return torch.addcmul(shift, y, scale).to(y.dtype)  # mixed dtypes are computed in the wider one


def recomputed(module: nn.Module, x: Tensor, scale: Tensor, shift: Tensor, channel_dim: int = -1) -> Tensor:
    """Compute ``module(x) * scale + shift`` for a norm, keeping only ``x``.

    The norm itself keeps ``x`` anyway. LayerNorm, GroupNorm and BatchNorm (evaluation and training) take the scale and
    shift into their own affine step: nothing is computed twice, and the result equals that of the merged norm bit for
    bit. Any other deterministic module of one tensor (RMS norms, channels-first norms) runs again in backward, under
    the autocast state of the forward. Where ``x`` is a residual sum of tensors that are kept anyway (the input of an
    earlier norm and the outputs of ``scale_shift`` added to it since), not even ``x`` is kept: backward adds them up
    again, to the same bits.

    The plain expression, which keeps the norm's output as well, is used where hooks watch the module, where a norm that
    cannot be folded has parameters that require grad or running statistics to update, and under ``torch.compile``.

    Args:
        module: the norm, called with ``x`` alone.
        x: its input, of any floating dtype.
        scale: ``(C,)`` or ``(B, C)``, as for :func:`scale_shift`.
        shift: shape of ``scale``.
        channel_dim: dimension of the channels in the norm's output.

    Raises:
        ValueError: scale and shift differ in shape, or do not match the norm's output.
    """
    foldable, repeatable = _foldable(module, x, scale, channel_dim), _repeatable(module)
    if foldable:
        _check_channels(x, scale, shift, channel_dim)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not repeatable:
        if foldable:
            return _folded(module, x, scale, shift)
        return scale_shift(module(x), scale, shift, channel_dim, keep="input")
    # autograd's own backward keeps x and nothing else: as good as recomputing, unless x is a sum of kept tensors.
    parts = _residual_parts(x)
    if foldable and (len(parts) == 1 or isinstance(module, _NormBase)):
        return _folded(module, x, scale, shift)
    return _Recomputed.apply(x, scale, shift, module, channel_dim, foldable, parts)


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _repeatable(module: nn.Module) -> bool:
    """Test whether a module can run again without side effects."""
    updates_statistics = isinstance(module, _NormBase) and module.training
    return not (updates_statistics or _hooked(module) or any(p.requires_grad for p in module.parameters()))


def _foldable(module: Any, x: Tensor, scale: Tensor, channel_dim: int) -> bool:
    """Test whether scale and shift fold into a norm's own affine step.

    Exact types only, since a subclass may do anything; offloaded modules (accelerate) change weights when called.
    """
    if type(module) not in _FOLDABLE_NORMS or hasattr(module, "_hf_hook") or _hooked(module):
        return False
    # functional_call replaces only a bias that is there, and mixed dtypes or devices compute otherwise than the norm.
    weight = module.weight
    if isinstance(module, _NormBase) and module.bias is None:
        return False
    if weight is None or scale.ndim != 1 or not (weight.dtype == scale.dtype == x.dtype):
        return False
    if torch.compiler.is_compiling() or weight.device != scale.device:
        return False
    if isinstance(module, nn.LayerNorm):
        return bool(weight.ndim == 1 and channel_dim % x.ndim == x.ndim - 1)
    return channel_dim % x.ndim == 1


def _folded(module: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    weight = module.weight * scale
    bias = shift if module.bias is None else torch.addcmul(shift, module.bias, scale)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, weight, bias, module.eps)
    return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))  # updates its statistics, too


class _Recomputed(torch.autograd.Function):
    """Norm, scale and shift that run again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        module: nn.Module,
        channel_dim: int,
        foldable: bool,
        parts: tuple[Tensor, ...],
    ) -> Tensor:
        # Backward runs outside of autocast, so the state of the forward is kept for the second run.
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.module, ctx.channel_dim, ctx.foldable = module, channel_dim, foldable
        ctx.save_for_backward(scale, shift, *(parts if len(parts) > 1 else (x,)))
        if foldable:
            return _folded(module, x, scale, shift)
        y = module(x)
        _check_channels(y, scale, shift, channel_dim)
        return _affine(y, scale, shift, channel_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, shift, x, *added = ctx.saved_tensors
        # From the left, as the residual stream was summed, so that the bits are the same.
        for part in added:
            x = x + part
        device, dtype, enabled = ctx.autocast
        needed = ctx.needs_input_grad[:3]
        leaves = [t.detach().requires_grad_(need) for t, need in zip((x, scale, shift), needed, strict=True)]
        x, scale, shift = leaves
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            if ctx.foldable:
                z = _folded(ctx.module, x, scale, shift)
            else:  # forward, not __call__: global hooks must see one call per step
                z = _affine(ctx.module.forward(x), scale, shift, ctx.channel_dim)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(z, wanted, grad))
        grads: list[Tensor | None] = []
        for need in needed:
            grads.append(next(found) if need else None)
        return *grads, None, None, None, None


_MAX_PARTS = 5  # each part is one more addition in backward

Recipe = tuple[Callable[[], "Tensor | None"], ...]


def _residual_parts(x: Tensor) -> tuple[Tensor, ...]:
    """Kept tensors of the graph whose sum, from the left, is x.

    (x,) if none are known.
    """
    node: Any = x.grad_fn
    if node is None or not _saved_is_kept():
        return (x,)
    key = _recipe_key(x.output_nr)
    recipe: Recipe = node.metadata.get(key) or _residual_recipe(node)
    # A part may be gone (freed by its own backward): then x itself is the recipe, held weakly like all parts.
    called = [call() for call in recipe]
    parts = [part for part in called if part is not None]
    if not parts or len(parts) < len(recipe):
        recipe, parts = (TensorWeakRef(x),), [x]
    node.metadata[key] = recipe
    return tuple(part.detach() for part in parts)


def _residual_recipe(node: Any) -> Recipe:
    """Recipe of a residual sum that ends in an output of scale_shift.

    It is the value's recipe and that output; () for any other node.
    """
    if node.name() != "AddBackward0" or node._saved_alpha != 1 or len(node.next_functions) != 2:
        return ()
    one, other = node.next_functions
    for (before, output_nr), (added, _) in ((one, other), (other, one)):
        if before is not None and isinstance(added, _ScaleShift._backward_cls):
            recipe: Recipe = before.metadata.get(_recipe_key(output_nr), ())
            if 0 < len(recipe) < _MAX_PARTS:
                return (*recipe, partial(getattr, added, "kept"))
    return ()


def _recipe_key(output_nr: int) -> str:
    """Key of an output's recipe in the metadata of its graph node."""
    return f"peft_lab.recipe.{output_nr}"


def _saved_is_kept() -> bool:
    """Test whether autograd keeps saved tensors as they are.

    Hooks of checkpointing or offloading take them elsewhere, so that no tensor is kept "anyway".
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        return False
    hooks = top(True)
    return hooks is None or getattr(hooks[0], "keeps_storage", False)
