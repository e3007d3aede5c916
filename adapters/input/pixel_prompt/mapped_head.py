"""Label mapping for frozen heads: source classes stand for target classes.

The map from target to source classes is injective.

`MappedHead` wraps the head that an image classifier was trained with. An adapter's logits are those of the source
classes it maps to, so the model's own loss, metrics and pipelines see the target classes; without the adapter the model
is what it was, down to its label names. What the adapter does to the images is the method's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_lab.backbones import module_roles
from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.tuners import AdapterConfig, AdapterLayer, AdapterTuner, MethodInfo, before_forward, register
from peft_lab.tuners.pruning import ReversiblePruning

#: Ways to choose source classes, and whether they read the training data.
MAPPINGS = {"random": False, "first": False, "frequency": True, "iterative": True}


def greedy_mapping(counts: np.ndarray) -> list[int]:
    """Map every target class to a distinct source class, greedily by counts.

    A count says how often images of the target class are predicted as the source class. The pair with the largest count
    is taken first, of equal ones that of the lowest source and then target class; both are then out of the choice. A
    target class without images gets the lowest source class that is left.

    Args:
        counts: int (source classes, target classes), at least as many source classes as targets.

    Returns:
        The source class of each target class.
    """
    # Rows and columns that are out of the choice are set to -1, below every count.
    left = counts.astype(np.int64)
    mapping = [0] * left.shape[1]
    for _ in mapping:
        source, target = divmod(int(left.argmax()), left.shape[1])
        mapping[target] = source
        left[source], left[:, target] = -1, -1
    return mapping


@dataclass
class MappedHeadConfig(AdapterConfig):
    """Base config of methods that keep an image classifier's head.

    Raises:
        ConfigError: an unknown mapping, labels that are not distinct, a sparsity out of range, or modules are chosen.
    """

    labels: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the target classes in order; training fills them in. Nothing: those of the base."},
    )
    mapping: str = field(
        default="iterative",
        metadata={
            "help": "Source class of each target: `iterative` (by counts on the training data, anew at each epoch), "
            "`frequency` (once, without the prompt), `random`, or `first` (target k is source k)."
        },
    )
    sparsity: float = field(
        default=0.0,
        metadata={
            "help": "Share of the base's linear and convolution weights set to zero while the adapter is on it, the "
            "smallest ones; the head is spared."
        },
    )

    @property
    def prunes_base(self) -> bool:
        """True if the base is pruned while the adapter is on it."""
        return self.sparsity > 0

    def check(self) -> None:
        if self.mapping not in MAPPINGS:
            raise ConfigError(
                f'mapping="{self.mapping}" must be one of {", ".join(MAPPINGS)}.{did_you_mean(self.mapping, MAPPINGS)}'
            )
        if self.labels is not None and len({*self.labels}) < max(len(self.labels), 2):
            raise ConfigError(f"labels must name at least two classes, each once, got {self.labels[:5]}.")
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"sparsity={self.sparsity} must be at least 0 and below 1.")
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None:
                raise ConfigError(self.no_choice(name))

    def no_choice(self, name: str) -> str:
        """Error message for a field that chooses modules."""
        return f'Method "{self.info.name}" acts on the whole model and takes no {name}.'


class MappedHead(AdapterLayer):
    """Head with one logit per target class.

    The first head of a model holds an adapter's parameters and its mapping, which is saved with them. A method supplies
    `start` and `prompted`, which changes the images.

    Attributes:
        first: the first head of the model, this one or (a distilled DeiT has two) another.
        settings: the model's config, whose label names follow the active adapter.
    """

    first: list[MappedHead]  # a list, so that torch does not take it for a part of this module
    whole: list[nn.Module]
    settings: Any
    pruning: ReversiblePruning

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.unread: dict[str, float | None] = {}  # and the sum of the parameters at the last step
        for buffers in self.other_param_names:
            setattr(self, buffers, BufferDict(persistent=True))

    def start(self, adapter: str, config: Any) -> dict[str, Tensor]:
        """Start values of an adapter's parameters by name."""
        raise NotImplementedError

    def prompted(self, adapter: str, images: Tensor) -> Tensor:
        """Transform images (batch, channels, height, width) to the model's input."""
        raise NotImplementedError

    def initial_values(self, adapter: str, config: Any) -> dict[str, Tensor]:
        # The images are changed once per call, whatever the number of heads.
        return self.start(adapter, config) if self.first[0] is self else {}

    def read_base(self, name: str) -> None:
        if getattr(getattr(self.base_layer, "weight", None), "ndim", 0) != 2:
            raise ConfigError(f'"{name}", a {type(self.base_layer).__name__}, is no linear head with a row per class.')

    def placed(self, model: Any, heads: list[MappedHead]) -> None:
        """Set a new layer's model and the heads already in it."""
        # In lists, so that torch does not take the model for a part of its own head.
        self.first = heads[:1] or [self]
        self.whole, self.settings = [model], model.config
        # What the base was before the first adapter, for `leave` to give back.
        if not heads:
            self.own_labels = (dict(model.config.id2label), dict(model.config.label2id))
            self.pruning = ReversiblePruning(model, [model.get_submodule(path) for path in class_heads(model)])

    @property
    def source_classes(self) -> int:
        """Number of classes of the base's head."""
        return self.base_weight.shape[0]

    @property
    def mappings(self) -> BufferDict:
        """Mapping of each adapter from target to source class, int64 (target classes,)."""
        return getattr(self, self.other_param_names[0])

    @property
    def current(self) -> str | None:
        """Active adapter; None if none is active."""
        active = [name for name in self.active_adapters if name in self.configs]
        return active[0] if active and not self.disable_adapters else None

    # Life of an adapter -----------------------------------------------------------------------------------------

    def update_layer(self, adapter: str, config: Any) -> None:
        if self.first[0] is self:
            self._begin_mapping(adapter, config)
        super().update_layer(adapter, config)

    def _begin_mapping(self, adapter: str, config: MappedHeadConfig) -> None:
        """Initialise a mapping with random or with the first source classes."""
        targets = len(config.labels or self.own_labels[0])
        order = torch.randperm if config.mapping == "random" else torch.arange
        self.mappings[adapter] = order(self.source_classes)[:targets].to(self.base_weight.device)
        # The other ways start there too, until they have read the training data.
        if MAPPINGS[config.mapping]:
            self.unread[adapter] = None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        # Two adapters would need two images and two sets of labels at once.
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if len([name for name in names if name in self.configs]) > 1:
            raise ConfigError(f'Method "{self.info.name}" takes one adapter at a time, got {", ".join(names)}.')
        super().set_adapter(adapter_names, inference_mode)
        self._follow()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._follow()

    def delete_adapter(self, adapter_name: str) -> None:
        self.unread.pop(adapter_name, None)
        super().delete_adapter(adapter_name)
        self._follow()

    def _follow(self) -> None:
        """Set the model's label names and sparsity to the active adapter's."""
        if self.first[0] is not self:
            return
        config = self.configs.get(self.current or "")
        self.pruning.set(config.sparsity if config else 0.0)
        id2label, label2id = self.own_labels
        if config and config.labels:
            id2label = dict(enumerate(config.labels))
            label2id = {name: index for index, name in id2label.items()}
        self.settings.id2label, self.settings.label2id = dict(id2label), dict(label2id)

    def leave(self) -> None:
        """Restore label names and dense weights before the head is removed."""
        self._disable_adapters = True
        self._follow()

    def check_values(self, adapter: str, values: Mapping[str, Tensor]) -> None:
        found = values.get(self.other_param_names[0])
        if found is not None and (
            int(found.min()) < 0 or int(found.max()) >= self.source_classes or len(found.unique()) < len(found)
        ):
            raise ConfigError(
                f'The mapping of adapter "{adapter}" must name distinct source classes from 0 to '
                f"{self.source_classes - 1}; its file is damaged or belongs to another base."
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # A loaded mapping has read its data.
        start = f"{prefix}{self.other_param_names[0]}."
        self.unread = {name: begun for name, begun in self.unread.items() if start + name not in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if adapter_name in self.mappings:
            target = device if device is not None else self.base_weight.device
            self.mappings[adapter_name] = self.mappings[adapter_name].to(target)

    # Calls ------------------------------------------------------------------------------------------------------

    def before(self, model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Change the images before the forward of the whole model."""
        adapter = self.current
        if adapter is None or arguments.get("pixel_values") is None:
            return None
        # The first step may come before the data are read; after it, training goes on with a mapping of no meaning.
        if self.training and not self.counting and adapter in self.unread and self._has_moved(adapter):
            raise ConfigError(
                f'mapping="{self.configs[adapter].mapping}" reads the training data, and nobody has handed them over: '
                "add peft_lab.ReadTrainingData() to the callbacks of the Trainer, or call "
                "peft_lab.read_training_data(model, batches, epoch) at the start of each epoch."
            )
        return {**arguments, "pixel_values": self.prompted(adapter, arguments["pixel_values"])}

    def _has_moved(self, adapter: str) -> bool:
        """Test whether the adapter's parameters have changed since the last step."""
        now = sum(float(getattr(self, name)[adapter].detach().abs().sum()) for name in self.adapter_layer_names)
        before, self.unread[adapter] = self.unread[adapter], now
        return before not in (None, now)

    def forward(self, x: Tensor, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Tensor:
        first = self.first[0]
        logits, adapter = self.base_layer(x, *args, **kwargs), first.current
        # Counting reads the logits of the source classes themselves.
        if adapter is None or first.counting:
            return logits
        return logits[..., first.mappings[adapter].to(logits.device)]

    # Training data ----------------------------------------------------------------------------------------------

    counting = False

    def wants_data(self) -> bool:
        """Test whether the active adapter chooses its source classes on training images."""
        return self.current is not None and self.first[0] is self and MAPPINGS[self.configs[self.current].mapping]

    def read_data(self, batches: Iterable[Mapping[str, Tensor]], epoch: int) -> None:
        """Choose the source classes by the base's predictions on training images.

        `peft_lab.ReadTrainingData` calls this before each epoch.
        """
        adapter = self.current
        assert adapter is not None, "only an active adapter wants data"
        way = self.configs[adapter].mapping
        if way == "frequency" and epoch > 0:
            return
        parameters = [getattr(self, name)[adapter] for name in self.adapter_layer_names]
        kept = [parameter.data for parameter in parameters]
        # "frequency" counts without the prompt: parameters of zero for the time of the pass.
        if way == "frequency":
            for parameter in parameters:
                parameter.data = torch.zeros_like(parameter)
        try:
            counts = self._count(adapter, batches)
        finally:
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data = value
        self.mappings[adapter].copy_(torch.tensor(greedy_mapping(counts)))
        self.unread.pop(adapter, None)

    @torch.no_grad()
    def _count(self, adapter: str, batches: Iterable[Mapping[str, Tensor]]) -> np.ndarray:
        """Count predictions by class, int64 (source classes, target classes)."""
        # One bin per pair of classes, counted in one pass over a batch.
        targets = len(self.mappings[adapter])
        counts = torch.zeros(self.source_classes * targets, dtype=torch.int64)
        self.counting = True
        try:
            for batch in batches:
                # A Trainer's autocast is around the whole adapter only.
                images = batch["pixel_values"].to(self.base_dtype)
                labels = self._class_indices(batch.get("labels"), targets).to(images.device)
                logits = self.whole[0](pixel_values=images).logits
                counts += (logits.argmax(-1) * targets + labels).cpu().bincount(minlength=len(counts))
        finally:
            self.counting = False
        return counts.reshape(self.source_classes, targets).numpy()

    def _class_indices(self, labels: Any, targets: int) -> Tensor:
        """Labels of a batch as class indices (batch,), int64.

        Raises:
            ConfigError: they are not one class index for each row.
        """
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype.is_floating_point:
            got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        elif labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < targets:
            got = f"values from {int(labels.min())} to {int(labels.max())}"
        else:
            return labels.long()
        raise ConfigError(
            f'Method "{self.info.name}" counts training images by class: labels must be whole numbers from 0 to '
            f"{targets - 1}, one for each image, got {got}."
        )


class MappedHeadTuner(AdapterTuner):
    """Tuner that replaces each head with class logits by a `MappedHead`.

    The heads stay untrained.
    """

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        loaded = peft_config.fingerprints is not None
        heads = class_heads(self.model)
        if getattr(self.model, "main_input_name", "") != "pixel_values":
            raise ConfigError(
                f'Method "{self.info.name}" is made for images, and {type(self.model).__name__} reads none.'
            )
        if not heads:
            raise ConfigError(
                f'Method "{self.info.name}" keeps the linear head of an image classifier, and '
                f"{type(self.model).__name__} has none; load the backbone with AutoModelForImageClassification."
            )
        if not loaded:
            if peft_config.target_modules is not None and [*peft_config.target_modules] != heads:
                raise ConfigError(peft_config.no_choice("target_modules"))
            for name in peft_config.modules_to_save or ():
                if any(f".{name}." in f".{head}." for head in heads):
                    raise ConfigError(
                        f'modules_to_save holds {name}, which method "{self.info.name}" keeps as it is; leave it out.'
                    )
            peft_config.target_modules = heads
            peft_config.modules_to_save = peft_config.modules_to_save or []
        # The mapping is injective, so every target class needs a source class of its own.
        head: Any = self.model.get_submodule(heads[0])
        if len(peft_config.labels or ()) > head.weight.shape[0]:
            raise ConfigError(
                f'Method "{self.info.name}" needs a head with at least as many classes as the task: '
                f"{type(self.model).__name__} tells {head.weight.shape[0]} apart, the task {len(peft_config.labels)}."
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def new_layer(self, target: nn.Module, path: str) -> AdapterLayer:
        heads = [module for module in self.model.modules() if isinstance(module, MappedHead)]
        layer = super().new_layer(target, path)
        assert isinstance(layer, MappedHead)
        layer.placed(self.model, heads)
        return layer

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # One function per model serves all adapters: it asks which one is active.
        first: Any = model.get_submodule(class_heads(model)[0])
        before_forward(model, first.before)

    def unload(self) -> Any:
        """Return the base model with its dense weights and label names."""
        for head in [module for module in self.model.modules() if isinstance(module, MappedHead)]:
            if head.first[0] is head:
                head.leave()
        return super().unload()


def class_heads(model: nn.Module) -> list[str]:
    """Paths of an image classifier's heads, wrapped or not."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, MappedHead)]
    return wrapped or module_roles.class_heads(model)


def register_mapped_head(info: MethodInfo, config_cls: Any, layer_cls: Any) -> None:
    """`peft_lab.tuners.register` for a method that keeps the head of an image classifier."""
    register(info, config_cls, layer_cls, MappedHeadTuner)
