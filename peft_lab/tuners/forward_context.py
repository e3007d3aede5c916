"""State of one forward call: row inputs and shared values.

A method declares a `RowInput`: an argument of the model's forward that holds one value, or one row of values, for each
row of the batch. The forward of the model is wrapped, so that `model.forward(...)` works as `model(...)` does: the
wrapper takes the declared arguments out, opens a `ForwardContext` that every layer can read, and closes it again. The
state of a call is in its context and not on a module, because two forwards before one backward, recomputed blocks and
threads must not share it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.tuners.loss_terms import LossTerm, with_loss_terms
from peft_lab.tuners.row_input import RowInput
from peft_lab.tuners.tokens import parameter_names

#: Key in `ForwardContext.shared`: True if the frozen backbone is in evaluation mode during this call.
EVALUATED = "evaluated"
#: Arguments by which the number of rows of a call is known, the first that is there.
_BATCHED = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "hidden_states")


@dataclass
class ForwardContext:
    """State of one forward call of a model.

    Attributes:
        model: the model, or the stack of blocks that was called alone.
        arguments: the model's own arguments by name.
        inputs: declared row inputs by name, as the call gave them.
        declared: every row input that an adapter on the model declares, by name.
        shared: values that one layer hands on to another in this call, by a key of the method's choice.
        loss_terms: terms that adapters add to the loss of this call.
        chosen: number of rows of the batch, and numbers of those that a layer runs on just now, int64; None for all.
    """

    model: nn.Module
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    declared: Mapping[str, RowInput] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)
    loss_terms: list[LossTerm] = field(default_factory=list)
    chosen: tuple[int, Tensor] | None = None

    @staticmethod
    def current() -> ForwardContext | None:
        """Context of the running call; None outside of a call."""
        return _CURRENT.get()

    def row_input(self, name: str, rows: int | None = None) -> Tensor | None:
        """Value of a declared row input for a layer's rows.

        Args:
            name: name of the input.
            rows: number of rows that the layer sees; windows or beams of one row of the batch lie next to each other.

        Raises:
            ConfigError: the input is bound to a column and was not given, or it has another number of rows.
        """
        found = self.inputs.get(name)
        spec = self.declared.get(name)
        if found is None and spec is not None:
            # Computed at the first layer that asks and kept for the others.
            if spec.compute is not None:
                found = self.inputs[name] = spec.check(spec.compute(self.arguments))
            elif spec.column is not None:
                raise ConfigError(
                    f'The call gives no {name}, which the adapter reads from the column "{spec.column}": pass '
                    f"{name}=tensor, one value per row (in a Trainer, keep the column; for generate, use "
                    f"peft_lab.row_inputs({name}=tensor))."
                )
        if found is None or rows is None:
            return found
        # A tensor that all rows share, such as DeBERTa's relative positions, can take a value that all rows have.
        if rows % max(found.shape[0], 1) and bool((found == found[:1]).all()):
            found = found[:1]
        # A layer that runs on some rows alone sees fewer than the batch has: expand to all, then choose.
        if self.chosen is not None:
            total, index = self.chosen
            return expand_rows(found, total, name)[index]
        return expand_rows(found, rows, name)


@dataclass
class _Given:
    """Row inputs given around calls, and whether a forward has read them."""

    values: Mapping[str, Tensor]
    was_read: bool = False


#: Context of the running call, and row inputs given around calls. Context variables are not shared between threads.
_CURRENT: ContextVar[ForwardContext | None] = ContextVar("peft_lab_forward_context", default=None)
_GIVEN: ContextVar[_Given | None] = ContextVar("peft_lab_row_inputs", default=None)


@contextmanager
def on_rows(rows: int, index: Tensor) -> Iterator[None]:
    """Restrict row inputs to some rows of the batch inside the block.

    A mixed batch in its general form runs adapter by adapter.

    Args:
        rows: number of rows that the layer sees.
        index: numbers of the rows that run inside the block, int64.
    """
    context = ForwardContext.current()
    if context is None:
        yield
        return
    outer, context.chosen = context.chosen, (rows, index)
    try:
        yield
    finally:
        context.chosen = outer


def expand_rows(values: Tensor, rows: int, name: str = "adapter_names") -> Tensor:
    """Repeat row values for a layer's windows or beams.

    Args:
        values: (batch, ...).
        rows: number of rows that the layer sees, a multiple of the batch; those of one row lie next to each other.
        name: name of the values, for the message.

    Raises:
        ConfigError: `rows` is no multiple of the batch.
    """
    batch = values.shape[0]  # len() would fix a size that torch.export leaves open
    if batch == rows:
        return values
    if not batch or rows % batch:
        raise ConfigError(f"{name} has {batch} rows, but the batch has {rows}; pass one per row of the batch.")
    return values.repeat_interleave(rows // batch, 0)


@contextmanager
def row_inputs(**inputs: Tensor) -> Iterator[None]:
    """Give row inputs to every forward inside the block.

    For calls that cannot take them as arguments, such as `generate`.

    Args:
        inputs: tensors by the name of the input, one value or row of values for each row of the batch; beams are
            counted in. One value per token is padded with zeros at the right for tokens that are written later.

    Raises:
        ConfigError: a value is no tensor, or no model that was called inside the block has an adapter that declares it.
    """
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"{name} must be a tensor, got {type(value).__name__}.")
    outer = _GIVEN.get()
    given = _Given({**(outer.values if outer else {}), **inputs})
    token = _GIVEN.set(given)
    try:
        yield
    finally:
        _GIVEN.reset(token)
    # A model without such an adapter is not wrapped, so only here it shows that nobody has read the values.
    if not given.was_read:
        raise ConfigError(
            f"No forward inside row_inputs({', '.join(inputs)}) was one of a model with an adapter that declares row "
            "inputs; put the adapter on, or leave row_inputs out."
        )
    if outer:
        outer.was_read = True


#: Code that runs around the forward of one module: (module, forward, arguments) -> output.
Around = Callable[[nn.Module, Callable[..., Any], dict[str, Any]], Any]
#: Code that runs before it: (module, arguments) -> changed arguments, or None.
Before = Callable[[nn.Module, dict[str, Any]], dict[str, Any] | None]


class WrappedForward:
    """Forward of one module instance with a `ForwardContext` around it.

    It stands in the instance's `forward`, so calls of `module(...)` and of `module.forward(...)` both go through it. A
    deep copy or a pickle of the module takes its own along.

    Attributes:
        module: the module.
        opens: True for a whole model, whose call always gets a context of its own; a stack of blocks takes the one that
            is open.
        declared: adapter name -> row inputs that it declares.
        around: code that runs around the module's own forward; None for none.
        prepare: code that runs before each call of a whole model; None for none.
        before: code that runs before the module's own forward and may change the arguments, in this order.
    """

    def __init__(self, module: nn.Module, opens: bool) -> None:
        self.module, self.opens = module, opens
        self.declared: dict[str, tuple[RowInput, ...]] = {}
        self.around: Around | None = None
        self.prepare: Callable[[ForwardContext], None] | None = None
        self.before: list[Before] = []
        # Another library (accelerate's hooks) may have wrapped the instance before.
        self._inner: Callable[..., Any] | None = module.__dict__.get("forward")
        self.__name__ = "forward"
        self.__doc__ = type(module).forward.__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        """Signature of the module's own forward with the declared inputs.

        Trainer chooses columns by it.
        """
        own = inspect.signature(self._inner or MethodType(type(self.module).forward, self.module))
        known = list(own.parameters.values())
        names = {parameter.name for parameter in known}
        extra = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in self._specs()
            if name not in names
        ]
        # New keywords go before **kwargs, which must stay the last parameter.
        at = len(known) - sum(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known)
        return own.replace(parameters=[*known[:at], *extra, *known[at:]])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # accelerate binds what it unwraps to the module once more
            args = args[1:]
        for hook in self.before:
            changed = hook(self.module, self._named(args, kwargs))
            args, kwargs = (args, kwargs) if changed is None else ((), changed)
        # The module's own forward does not know the declared inputs.
        specs = self._specs()
        given = {name: kwargs.pop(name) for name in [*specs] if name in kwargs}
        # A stack that is called within its model joins the open context instead of hiding the model's arguments.
        context = _CURRENT.get()
        if context is not None and not self.opens:
            context.inputs |= _checked(given, specs, None)
            return self._run(args, kwargs)
        arguments = self._named(args, kwargs)
        # The main input tells the number of rows, against which every row input is checked.
        like = next((arguments[name] for name in _BATCHED if arguments.get(name) is not None), None)
        rows = None if like is None else like.shape[0]
        inputs = {**_given_around(specs, like), **_checked(given, specs, rows)}
        self._keep_context_in_checkpoints()
        context, training = ForwardContext(self.module, arguments, inputs, specs), self.module.training
        token = _CURRENT.set(context)
        try:
            if self.prepare is not None:
                self.prepare(context)
            return with_loss_terms(self.module, self._run(args, kwargs), context.loss_terms, arguments)
        finally:
            _CURRENT.reset(token)
            if self.module.training != training:
                self.module.training = training

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self._inner or MethodType(type(self.module).forward, self.module)
        if self.around is None:
            return forward(*args, **kwargs)
        return self.around(self.module, forward, self._named(args, kwargs))

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name."""
        return {**dict(zip(parameter_names(type(self.module).forward), args, strict=False)), **kwargs}

    def _specs(self) -> dict[str, RowInput]:
        """Declared row inputs of all adapters by name."""
        found: dict[str, RowInput] = {}
        for inputs in self.declared.values():
            found |= {spec.name: spec for spec in inputs}
        return found

    def _keep_context_in_checkpoints(self) -> None:
        """Run recomputed blocks in the context of their forward."""
        # Without gradients nothing is recomputed.
        if not (self.module.training and torch.is_grad_enabled()):
            return
        module: Any
        for module in self.module.modules():
            if getattr(module, "gradient_checkpointing", False):
                function = module.__dict__.get("_gradient_checkpointing_func")
                if function is not None and not isinstance(function, _CheckpointInContext):
                    module._gradient_checkpointing_func = _CheckpointInContext(function, module)


class _CheckpointInContext:
    """Checkpointing function whose recomputation runs in the context of the forward."""

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.function, self.module = function, module

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Backward recomputes the block when the forward's context is closed, so the block takes it along.
        context = _CURRENT.get()
        if context is not None:
            run = partial(_in_context, context, self.module, run)
        return self.function(run, *args, **kwargs)


def _in_context(context: ForwardContext, module: nn.Module, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    token, training = _CURRENT.set(context), module.training
    # A frozen block is in training mode so that it is checkpointed; its own dropout looks at the mode in here.
    module.training = training and not context.shared.get(EVALUATED, False)
    try:
        return run(*args, **kwargs)
    finally:
        _CURRENT.reset(token)
        module.training = training


def wrap_forward(module: nn.Module, opens: bool) -> WrappedForward:
    """Wrap the forward of a module instance; an existing wrapper is returned."""
    found = module.__dict__.get("forward")
    # A stack that is itself the whole model is wrapped for both.
    if isinstance(found, WrappedForward):
        found.opens = found.opens or opens
        return found
    wrapper = WrappedForward(module, opens)
    module.forward = wrapper
    return wrapper


def before_forward(module: nn.Module, hook: Before) -> None:
    """Run a function before each forward of a module instance; one that is there already stays.

    A pre-hook of torch does not run in `module.forward(...)`, which some libraries call in place of `module(...)`.
    """
    wrapper = wrap_forward(module, opens=False)
    if hook not in wrapper.before:
        wrapper.before.append(hook)


def remove_before(module: nn.Module, hook: Before) -> None:
    """Undo `before_forward`; a wrapper that has no other use is removed."""
    wrapper = module.__dict__.get("forward")
    if isinstance(wrapper, WrappedForward) and hook in wrapper.before:
        wrapper.before.remove(hook)
        if not (wrapper.before or wrapper.declared or wrapper.around or wrapper.prepare):
            _unwrap(module, wrapper)


def wrap_model(model: nn.Module) -> list[WrappedForward]:
    """Wrap the forward of a model, and of every transformers model inside it.

    Those inside are called alone by `generate`, which runs an encoder once, and by `get_image_features` and its like.
    """
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]
    return [wrap_forward(model, opens=True), *(wrap_forward(module, opens=False) for module in inside)]


def unwrap_forwards(model: nn.Module) -> None:
    """Remove the wrappers of a model's forwards and of its checkpointing."""
    module: Any
    for module in model.modules():
        wrapper = module.__dict__.get("forward")
        if isinstance(wrapper, WrappedForward):
            _unwrap(module, wrapper)
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, _CheckpointInContext):
            module._gradient_checkpointing_func = function.function


def _unwrap(module: Any, wrapper: WrappedForward) -> None:
    if wrapper._inner is None:
        del module.forward
    else:
        module.forward = wrapper._inner


def _checked(given: Mapping[str, Any], specs: Mapping[str, RowInput], rows: int | None) -> dict[str, Tensor]:
    """Checked inputs of a call by name, without those that are None."""
    found = {}
    for name, value in given.items():
        if value is not None:
            found[name] = specs[name].check(value, rows)
    return found


def _given_around(specs: Mapping[str, RowInput], like: Tensor | None) -> dict[str, Tensor]:
    """Row inputs given around the call, fitted to its main input `like`.

    They get as many rows (beams) and tokens as `like` has now.
    """
    given = _GIVEN.get()
    if not given or not given.values:
        return {}
    unknown = next((name for name in given.values if name not in specs), None)
    if unknown is not None:
        raise ConfigError(
            f'No adapter on this model declares the row input "{unknown}".{did_you_mean(unknown, specs)} '
            f"Declared: {', '.join(specs) or 'none'}."
        )
    given.was_read = True
    found = {}
    for name, value in _checked(given.values, specs, None).items():
        if like is not None:
            value = expand_rows(value, like.shape[0], name)
            # Tokens that were written since the call count as zero.
            if specs[name].per_token:
                value = nn.functional.pad(value, (0, max(like.shape[1] - value.shape[1], 0)))
        found[name] = value
    return found
