"""The tuner of methods that act on the sequence: wraps every block of one stack and hooks the stack itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from peft_lab.backbones import module_roles
from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.registry import MethodInfo
from peft_lab.tuners.config import AdapterConfig
from peft_lab.tuners.forward_context import begin, can_continue, drop_inputs, end, read_out, replace_logits, take_inputs
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.registration import register
from peft_lab.tuners.sequence import window_attention
from peft_lab.tuners.sequence.layer import SequenceLayer
from peft_lab.tuners.sequence.supported_models import check_room
from peft_lab.tuners.tuner import AdapterTuner

#: Which stack gets the prompts where a model has several, the first that is there.
_PREFERRED = ("vision", "encoder")
_HOOKS = (take_inputs, begin, end, read_out, drop_inputs, replace_logits, *window_attention.HOOKS)
#: Arguments of `generate` with which text is read in pieces, or with drafts of what is to be written.
_NO_WHOLE_TEXT = ("prefill_chunk_size", "assistant_model", "prompt_lookup_num_tokens")
#: What an embedding of patches calls the tokens that it puts before them.
_PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
#: Models with a class token whose head reads the patches alone.
_PATCH_HEADS = ("CLIPForImageClassification", "MetaClip2ForImageClassification")


@dataclass
class SequenceConfig(AdapterConfig):
    """Base of the configs of prompts in the sequence.

    Raises:
        ConfigError: `target_modules` or `exclude_modules` are given; prompts are for whole blocks.
    """

    stack: str | None = field(
        default=None,
        metadata={"help": "Path of the stack of blocks to prompt; nothing means the vision tower or the encoder."},
    )

    def check(self) -> None:
        if self.exclude_modules is not None:
            raise ConfigError(self.no_choice("exclude_modules"))

    def no_choice(self, name: str) -> str:
        """Why a field that chooses modules is refused, as a message."""
        return (
            f'Method "{self.info.name}" adapts whole blocks and takes no {name}; choose blocks by layers_to_transform.'
        )

    def reads_out(self) -> bool:
        """Whether the head reads the mean of the slots and the class token in the place of that token."""
        return False

    def writes(self, depth: int) -> bool:
        """Whether prompts may be written before the block of this index."""
        layers = self.layers_to_transform
        return layers is None or depth in ([layers] if isinstance(layers, int) else layers)


class SequenceTuner(AdapterTuner):
    """Puts `SequenceLayer`s around all blocks of a stack: those that get no prompts carry the slots along."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        loaded = peft_config.fingerprints is not None
        path, blocks = chosen_stack(self.model, peft_config.stack)
        if self.info.can("images") and self.model.get_submodule(path).main_input_name != "pixel_values":
            raise ConfigError(
                f'Method "{self.info.name}" is made for images, and {type(self.model).__name__} reads none there.'
            )
        check_room(self.model, self.model.get_submodule(path))
        if peft_config.reads_out():
            self._check_readout(path)
        depths = len(blocks)
        layers = peft_config.layers_to_transform
        for layer in [layers] if isinstance(layers, int) else layers or ():
            if not 0 <= layer < depths:
                raise ConfigError(f"layers_to_transform holds {layer}; the stack has blocks 0 to {depths - 1}.")
        if not loaded:
            given = peft_config.target_modules
            if given is not None and (
                isinstance(given, str) or sorted(module_roles.rename_targets(self.model, given)) != sorted(blocks)
            ):
                raise ConfigError(peft_config.no_choice("target_modules"))
            peft_config.target_modules = blocks
        if self.info.can("image_logits"):
            self._leave_head(peft_config, loaded)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _check_readout(self, path: str) -> None:
        """There must be a class token with a norm behind the blocks, and a head that reads it."""
        none = not prefix_tokens(self.model, path) or type(self.model).__name__ in _PATCH_HEADS
        if none or "norm.final" not in self._norms(path):
            raise ConfigError(
                f"{type(self.model).__name__} reads no class token behind a final norm, so it cannot read prompts in "
                "its place."
            )

    def _leave_head(self, config: Any, loaded: bool) -> None:
        """Keep the head untrained where the slots give the logits in its place."""
        heads = module_roles.class_heads(self.model)
        if not heads:
            raise ConfigError(
                f'Method "{self.info.name}" gives class logits in place of the head of an image classifier, and '
                f"{type(self.model).__name__} has none; load the backbone with AutoModelForImageClassification."
            )
        if loaded:
            return
        given = config.modules_to_save or []
        taken = [name for name in given if any(f".{name}." in f".{head}." for head in heads)]
        if taken:
            raise ConfigError(
                f'modules_to_save holds {taken[0]}, which method "{self.info.name}" does not use: its prompts give the '
                "class logits; leave the head out."
            )
        config.modules_to_save = given

    def new_layer(self, target: nn.Module, path: str) -> AdapterLayer:
        layer = super().new_layer(target, path)
        assert isinstance(layer, SequenceLayer)
        stacks = stacks_of(self.model)
        stack, blocks = next((stack, blocks) for stack, blocks in stacks.items() if path in blocks)
        layer.depth, layer.depths = blocks.index(path), len(blocks)
        layer.settings = settings = self.model.get_submodule(stack).config
        modules = [self.model.get_submodule(block) for block in blocks]
        layer.widths = [
            window_attention.width(m) if window_attention.has_windows(m) else settings.hidden_size for m in modules
        ]
        layer.downsample = None
        before = window_attention.stage_of(blocks[layer.depth - 1]) if layer.depth else ""
        if window_attention.has_windows(layer) and before and before != window_attention.stage_of(path):
            layer.downsample = (self.model.get_submodule(before), "downsample")
        layer.norms = self._norms(stack)
        layer.prefix_tokens = prefix_tokens(self.model, stack)
        layer.classes = getattr(getattr(self.model, "config", None), "num_labels", 0)
        said = [[m.is_causal for m in block.modules() if hasattr(m, "is_causal")] for block in modules]
        layer.attends = bool(said[layer.depth]) or not any(said)
        layer.causal = any(map(any, said)) if any(said) else self._continues(stack)
        return layer

    def _continues(self, path: str) -> bool:
        """Whether a stack whose attention does not say so reads no token before those to its left."""
        stack: Any = self.model.get_submodule(path)
        is_text = stack.main_input_name == "input_ids" and not self.model.config.is_encoder_decoder
        return is_text and can_continue(self.model)

    def _norms(self, stack: str) -> dict[str, tuple[nn.Module, str]]:
        """The norms around the blocks of a stack, which stand in it or, as DINOv2's, in a module around it."""
        found = {}
        for role in ("norm.stem", "norm.final"):
            homes = [name.rpartition(".") for name in module_roles.modules_by_role(self.model, role)]
            around = [(home, name) for home, _, name in homes if f"{stack}.".startswith(f"{home}.") or not home]
            if around:
                home, name = max(around, key=lambda found: len(found[0]))
                found[role] = (self.model.get_submodule(home), name)
        return found

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # peft's own looks for the weight of the module; the layer has already put its parameters on the right device
        setattr(parent, child_name, new_module)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        path, blocks = chosen_stack(model, config.stack)
        stack = model.get_submodule(path)
        for block in blocks:
            if window_attention.has_windows(model.get_submodule(block)):
                window_attention.hook_stage(model.get_submodule(window_attention.stage_of(block)))
        for module, before, after in ((model, take_inputs, drop_inputs), (stack, begin, end)):
            if before not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(before, with_kwargs=True)
                module.register_forward_hook(after, always_call=True)
        if config.reads_out():
            norm = getattr(*self._norms(path)["norm.final"])
            if read_out not in norm._forward_hooks.values():
                norm.register_forward_hook(read_out)
        for path in module_roles.class_heads(model) if self.info.can("image_logits") else ():
            head = model.get_submodule(path)
            if replace_logits not in head._forward_hooks.values():
                head.register_forward_hook(replace_logits)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        settings = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        given = [n for n in _NO_WHOLE_TEXT if kwargs.get(n) is not None or getattr(settings, n, None) is not None]
        if given and any(isinstance(m, SequenceLayer) and not m.disable_adapters for m in self.modules()):
            raise ConfigError(f"Prompts are made for a whole text, and then tokens come singly: leave out {given[0]}.")
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def unload(self) -> Any:
        """The base model without blocks wrapped and without hooks."""
        model = super().unload()
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if hook in _HOOKS or _of_layer(hook)]:
                    del hooks[key]
        return model


def register_sequence(info: MethodInfo, config_cls: Any, layer_cls: Any) -> None:
    """`peft_lab.tuners.register` for a method that acts on the sequence."""
    register(info, config_cls, layer_cls, SequenceTuner)


def stacks_of(model: nn.Module) -> dict[str, list[str]]:
    """Paths of the blocks of each stack, by the path of the stack: the innermost model around them."""
    found: dict[str, list[str]] = {}
    for block in module_roles.modules_by_role(model, "block"):
        parts = block.split(".")
        parents = (".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1))
        stack = next((p for p in parents if isinstance(model.get_submodule(p), PreTrainedModel)), "")
        found.setdefault(stack, []).append(block)
    return found


def chosen_stack(model: nn.Module, name: str | None) -> tuple[str, list[str]]:
    """Path of the stack that gets the prompts, and of its blocks.

    Raises:
        ConfigError: the model has no blocks, or no stack of that name.
    """
    stacks = {path: blocks for path, blocks in stacks_of(model).items() if _is_transformer(model.get_submodule(path))}
    if not stacks:
        raise ConfigError(f"{type(model).__name__} has no stack of transformer blocks, so prompts have no place in it.")
    if name is not None:
        found = next((path for path in stacks if path == name or path.endswith(f".{name}")), None)
        if found is None:
            shown = ", ".join(path or "the model itself" for path in stacks)
            raise ConfigError(f'stack="{name}" is none of {shown}.{did_you_mean(name, stacks)}')
        return found, stacks[found]
    preferred = (path for word in _PREFERRED for path in stacks if word in path.lower())
    path = next(preferred, next(iter(stacks)))
    return path, stacks[path]


def prefix_tokens(model: nn.Module, path: str) -> int:
    """Tokens that the embedding of a stack of vision puts before the patches; 0 for text."""
    if getattr(cast(Any, model.get_submodule(path)).config, "patch_size", None) is None:
        return 0
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        around = model.get_submodule(".".join(parts[:depth]))
        if any("patch" in name for name, _ in around.named_modules()):
            found = {n.rpartition(".")[2]: p for n, p in around.named_parameters() if "embed" in n}
            return sum(found[name].numel() // found[name].shape[-1] for name in _PREFIX if name in found)
    return 0


def _of_layer(hook: Any) -> bool:
    """Whether a hook was put there by the layer of a block."""
    return isinstance(getattr(hook, "__self__", None), SequenceLayer)


def _is_transformer(stack: nn.Module) -> bool:
    return hasattr(stack.config, "hidden_size") and hasattr(stack.config, "num_attention_heads")
