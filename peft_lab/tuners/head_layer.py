"""Layer and tuner of methods that replace the task head of a classifier.

A head adapter gives the class logits itself, from the pooled feature that the base's head reads and from the tokens of
the last hidden states. The base's head is neither used nor trained while the adapter is active, and answers again when
it is disabled. An adapter holds trained parameters, arrays that an estimator has found in the training data, or both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_lab.adapter_files.base_fingerprint import reference_weight
from peft_lab.adapter_files.module_matching import record_modules
from peft_lab.backbones import module_roles
from peft_lab.backbones.head_features import HeadFeatures, head_features
from peft_lab.backbones.heads import PEFT_HEADS
from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo
from peft_lab.tuners.config import AdapterConfig
from peft_lab.tuners.forward_context import ForwardContext, wrap_model
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.mixed_batch import BASE, RowAdapters
from peft_lab.tuners.registration import register
from peft_lab.tuners.tuner import BlockTuner

#: Keys in `ForwardContext.shared`: input of the head's first layer, output of the backbone, logits by layer.
_POOLED, _OUTPUT, _LOGITS = "head_input", "backbone_output", "head_logits"
#: Stands in `modules_to_save` for text classification, because peft's model for it fails where that is empty.
_NO_MODULE = "no-head"
#: Head inputs of the calls inside `HeadLayer.read_features`. A context variable, so that threads do not share it.
_READING: ContextVar[list[HeadInput] | None] = ContextVar("peft_lab_head_inputs", default=None)


@dataclass(frozen=True)
class HeadInput:
    """Features that a head reads of a batch, in the dtype of the backbone.

    Attributes:
        pooled: feature that the base's head reads, (rows, width).
        tokens: last hidden states behind the final norm, (rows, tokens, token width): patches without class and
            register tokens, cells of a feature map, or all tokens of a text; None if the backbone gives none.
        mask: bool (rows, tokens), False at padding; None if every token counts.
        class_token: first of the tokens in front of the patches, behind the final norm, (rows, token width); None
            without such tokens.
    """

    pooled: Tensor
    tokens: Tensor | None = None
    mask: Tensor | None = None
    class_token: Tensor | None = None

    def rows(self, index: Tensor) -> HeadInput:
        """Choose rows by their numbers, int64."""
        parts = (self.pooled, self.tokens, self.mask, self.class_token)
        return HeadInput(*(None if part is None else part[index] for part in parts))  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> HeadInput:
        """Cast the features to a dtype."""
        tokens = None if self.tokens is None else self.tokens.to(dtype)
        class_token = None if self.class_token is None else self.class_token.to(dtype)
        return HeadInput(self.pooled.to(dtype), tokens, self.mask, class_token)


@dataclass
class HeadConfig(AdapterConfig):
    """Base of the configs of methods that replace the task head.

    Raises:
        ConfigError: modules or blocks are chosen; the model has no head over the classes of whole texts or images; its
            head is named in `modules_to_save`.
    """

    replaces_head: ClassVar[bool] = True

    def check(self) -> None:
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None:
                raise ConfigError(self.no_choice(name))

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if values["modules_to_save"] == [_NO_MODULE]:
            values["modules_to_save"] = []
        return values

    def no_choice(self, name: str) -> str:
        """Error message for a field that chooses modules."""
        return f'Method "{self.info.name}" replaces the task head of the model and takes no {name}; leave it out.'


class HeadLayer(AdapterLayer):
    """Task head whose logits an adapter gives.

    A method supplies `logits` and, for what it stores, `initial_values` (trained, named in `adapter_layer_names`) or
    `initial_buffers` (arrays of an estimator, named in `other_param_names`); all names start with the method's prefix.
    Both are saved in the adapter's file. Of several heads (a distilled DeiT has two) the first holds them, and all give
    the same logits.

    Attributes:
        facts: modules, classes and widths of the model's head.
    """

    #: True if the method reads the tokens, and not the pooled feature alone.
    reads_tokens: ClassVar[bool] = False
    general_forms: ClassVar[Mapping[str, str]] = {"mixed": "logits"}

    facts: HeadFeatures
    first: list[HeadLayer]  # lists, so that torch does not take them for parts of this module
    whole: list[nn.Module]
    norm: list[nn.Module]

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        for buffers in self.other_param_names:
            setattr(self, buffers, BufferDict(persistent=True))

    def read_base(self, name: str) -> None:
        """Accept any head; the tuner has chosen it."""

    def placed(self, model: nn.Module, facts: HeadFeatures, heads: Sequence[HeadLayer]) -> None:
        """Set a new layer's model, its facts, and the heads already in it."""
        self.facts, self.whole, self.first = facts, [model], [*heads[:1]] or [self]
        self.norm = [model.get_submodule(facts.norm)] if facts.norm else []

    # What a method supplies -------------------------------------------------------------------------------------

    def initial_values(self, adapter: str, config: Any) -> dict[str, Tensor]:
        return {}

    def initial_buffers(self, adapter: str, config: Any) -> dict[str, Tensor]:
        """Start values of an adapter's arrays by name, kept in their dtype and not trained."""
        return {}

    def logits(self, adapter: str, features: HeadInput) -> Tensor:
        """Class logits (rows, classes) of an adapter; the features have the dtype of its values."""
        raise NotImplementedError

    def runs_backbone(self, config: Any) -> bool:
        """Test whether an adapter runs the backbone again for a row, as further views of it do."""
        return False

    # What is the same for all -----------------------------------------------------------------------------------

    def update_layer(self, adapter: str, config: Any) -> None:
        if self.first[0] is not self:
            self.configs[adapter] = config
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            return
        for name, value in self.initial_buffers(adapter, config).items():
            getattr(self, name)[adapter] = value.to(self.base_weight.device)
        super().update_layer(adapter, config)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        acting = [name for name in names if name in self.configs]
        if len(acting) > 1:
            raise ConfigError(
                f'Method "{self.info.name}" gives the logits of one adapter at a time, got {", ".join(acting)}.'
            )
        super().set_adapter(adapter_names, inference_mode)

    def move_adapter(self, adapter_name: str, device: torch.device) -> None:
        super().move_adapter(adapter_name, device)
        for name in self.other_param_names:
            buffers = getattr(self, name)
            if adapter_name in buffers and not buffers[adapter_name].is_meta:
                buffers[adapter_name] = buffers[adapter_name].to(device)

    def value_dtype(self, adapter: str) -> torch.dtype:
        """Dtype in which an adapter computes: that of its values, float32 unless they were cast."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            values = getattr(self, name)
            if adapter in values and values[adapter].is_floating_point():
                dtype: torch.dtype = values[adapter].dtype
                return dtype
        return torch.float32

    # Calls ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Tensor:
        """Logits of the active adapter, or of each row's own."""
        reading = _READING.get()
        if reading is None:
            return super().forward(x, *args, adapter_names=adapter_names, **kwargs)
        if self.first[0] is self:
            reading.append(self.head_input(x))
        return self.base_layer(x, *args, **kwargs)

    def adapted(self, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        context = self._context()
        owner, key = self.first[0], (self.first[0], _LOGITS)
        # Further heads repeat the logits of the first, so that a mean over the heads is the same.
        if owner is self or key not in context.shared:
            context.shared[key] = owner.adapter_logits(adapters[0], owner.head_input(x))
        return self._like_base(context.shared[key].to(x.dtype), x)

    def mixed(self, x: Tensor, rows: RowAdapters, *args: Any, **kwargs: Any) -> Tensor:
        out, owner = self.base_layer(x, *args, **kwargs), self.first[0]
        features = owner.head_input(x)
        for name in rows.names:
            # Rows without an adapter keep the logits of the base's head.
            if name != BASE and name in self.configs:
                index = rows.of_adapter(name, len(x), x.device)
                logits = owner.adapter_logits(name, features.rows(index)).to(out.dtype)
                out = out.index_copy(0, index, self._like_base(logits, x))
        return out

    def adapter_logits(self, adapter: str, features: HeadInput) -> Tensor:
        """Logits of one adapter, computed in the dtype of its values."""
        return self.logits(adapter, features.to(self.value_dtype(adapter)))

    def head_input(self, x: Tensor) -> HeadInput:
        """Features of the running call, where the head itself reads `x`.

        Raises:
            ConfigError: the head was called outside of its model.
        """
        context, facts = self._context(), self.facts
        pooled = x if facts.first == facts.heads[0] else context.shared.get(_POOLED, x)
        if x.ndim > 2 and pooled.ndim > 2:
            pooled = pooled[torch.arange(len(x), device=x.device), self._last_tokens(context, x)]
        return HeadInput(pooled, *self._tokens(context))

    @torch.no_grad()
    def other_view(self, **changes: Any) -> HeadInput:
        """Features of a second run of the backbone on the running call's arguments, some of them changed.

        Dropout draws anew. No gradient passes through the backbone.
        """
        arguments = {**self._context().arguments, **changes}
        for name in ("labels", "num_items_in_batch"):
            arguments.pop(name, None)
        with _reading() as found:
            self.whole[0](**arguments)
        return found[0]

    def _context(self) -> ForwardContext:
        context = ForwardContext.current()
        if context is None:
            raise ConfigError("A head that an adapter replaces was called without its model; call the whole model.")
        return context

    def _last_tokens(self, context: ForwardContext, x: Tensor) -> Tensor:
        """Index of each row's last token that is no padding, int64 (rows,), as transformers' decoders find it."""
        ids, pad = context.arguments.get("input_ids"), self.facts.pad_token_id
        if ids is None or pad is None:
            return torch.full((len(x),), x.shape[1] - 1, device=x.device)
        positions = torch.arange(ids.shape[1], device=ids.device)
        return (positions * (ids != pad)).argmax(-1).to(x.device)

    def _tokens(self, context: ForwardContext) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Tokens of the running call, their mask, and the class token."""
        output = context.shared.get(_OUTPUT) if self.reads_tokens else None
        tokens = output if output is None else getattr(output, "last_hidden_state", None)
        if tokens is None and isinstance(output, tuple):
            tokens = output[0]
        if tokens is None:
            return None, None, None
        if tokens.ndim == 4:  # (rows, channels, height, width) of a convolutional net
            return tokens.flatten(2).mT, None, None
        for norm in self.norm:
            tokens = norm(tokens)
        mask, prefix = context.arguments.get("attention_mask"), self.facts.prefix_tokens
        class_token = tokens[:, 0] if prefix else None
        tokens, count = tokens[:, prefix:], tokens.shape[1]
        if mask is None or mask.ndim != 2 or mask.shape[1] != count:
            return tokens, None, class_token
        return tokens, mask.bool(), class_token

    def _like_base(self, logits: Tensor, x: Tensor) -> Tensor:
        """Logits in the shape of the base head's output, which decoders read at one token of each row."""
        return logits if x.ndim == 2 else logits[:, None].expand(-1, x.shape[1], -1)

    # Training data ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read_features(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[HeadInput, Tensor]]:
        """Yield the features of batches with their labels, computed by the base.

        A method whose arrays come from the training data calls this in its `read_data(batches, epoch)`.

        Raises:
            ConfigError: a batch has no labels.
        """
        for batch in batches:
            if not isinstance(batch.get("labels"), Tensor):
                raise ConfigError(f'Method "{self.info.name}" reads the training data by class: batches need labels.')
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with _reading() as found:
                self.whole[0](**inputs)
            yield found[0], batch["labels"]


@contextmanager
def _reading() -> Iterator[list[HeadInput]]:
    found: list[HeadInput] = []
    token = _READING.set(found)
    try:
        yield found
    finally:
        _READING.reset(token)


class HeadTuner(BlockTuner):
    """Tuner that wraps the linear maps to the class logits in `HeadLayer`s."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        loaded = peft_config.fingerprints is not None
        facts, targets = self.head_facts(), self.targets()
        if not loaded:
            given = peft_config.target_modules
            if given is not None and sorted(given) != sorted(targets):
                raise ConfigError(peft_config.no_choice("target_modules"))
        peft_config.modules_to_save = self._without_head(peft_config, facts)
        peft_config.target_modules = targets
        config = super()._prepare_adapter_config(peft_config, model_config)
        # What is recorded are blocks of the backbone, which carry no adapter.
        config.target_modules = targets
        if config.task_type == "SEQ_CLS" and not config.modules_to_save:
            config.modules_to_save = [_NO_MODULE]
        return config

    def targets(self) -> list[str]:
        """Paths of the modules that carry an adapter."""
        return [*self.head_facts().heads]

    def head_facts(self) -> HeadFeatures:
        """Facts of the model's head, wrapped or not.

        Raises:
            ConfigError: the model has no head over the classes of whole texts or images.
        """
        layers = [module for module in self.model.modules() if isinstance(module, HeadLayer)]
        found = layers[0].facts if layers else head_features(self.model)
        if found is None:
            raise ConfigError(
                f'Method "{self.info.name}" replaces the head of a classifier of whole texts or images, and '
                f"{type(self.model).__name__} has none; load the backbone with AutoModelForSequenceClassification or "
                "AutoModelForImageClassification."
            )
        return found

    def _without_head(self, config: Any, facts: HeadFeatures) -> list[str]:
        """Modules to save without the head, which peft adds by itself.

        Raises:
            ConfigError: the head is named by the user.
        """
        given, usual = [*(config.modules_to_save or ())], [*PEFT_HEADS["SEQ_CLS"]]
        given = [name for name in given if name != _NO_MODULE]
        # peft puts its two names behind those of the user.
        if given[-2:] == usual:
            given = given[:-2]
        for name in given:
            if any(f".{name}." in f".{path}." for path in (*facts.heads, facts.first)):
                raise ConfigError(
                    f'modules_to_save holds {name}, which method "{self.info.name}" replaces; leave the head out.'
                )
        # An empty list, because None would let the shared tuner add the task head.
        return given

    def new_layer(self, target: nn.Module, path: str) -> AdapterLayer:
        facts = self.head_facts()
        heads = [module for module in self.model.modules() if isinstance(module, HeadLayer)]
        layer = super().new_layer(target, path)
        if not isinstance(layer, HeadLayer):
            return layer
        layer.placed(self.model, facts, heads)
        if not heads:
            self.model.get_submodule(facts.backbone).register_forward_hook(_keep_output)
            if facts.first not in facts.heads:
                self.model.get_submodule(facts.first).register_forward_pre_hook(_keep_pooled)
        return layer

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        wrap_model(model)

    def record_base(self, model: nn.Module, adapter_name: str) -> dict[str, dict[str, Any]]:
        """Record the blocks of the backbone, because the base's head has no part in an adapter's answers."""
        facts = self.head_facts()
        blocks = module_roles.modules_by_role(model, "block") or [facts.backbone]
        return record_modules(model, {path: reference_weight(model.get_submodule(path)) for path in blocks})

    def unload(self) -> Any:
        """Return the base model without hooks."""
        model = super().unload()
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if hook in (_keep_pooled, _keep_output):
                        del cast(Any, hooks)[key]
        return model


def _keep_pooled(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Keep the input of the head's first layer."""
    context = ForwardContext.current()
    if context is not None:
        context.shared[_POOLED] = args[0]


def _keep_output(module: nn.Module, args: Any, output: Any) -> None:
    """Keep the output of the backbone."""
    context = ForwardContext.current()
    if context is not None:
        context.shared[_OUTPUT] = output


def register_head(info: MethodInfo, config_cls: Any, layer_cls: Any) -> None:
    """`peft_lab.tuners.register` for a method that replaces the task head."""
    register(info, config_cls, layer_cls, HeadTuner)
