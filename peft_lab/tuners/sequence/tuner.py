"""Tuner of sequence methods, which wraps the blocks of one stack.

The forward of the stack is wrapped too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peft_lab.backbones import module_roles
from peft_lab.backbones.family_table import FAMILIES
from peft_lab.backbones.prefix_tokens import prefix_tokens
from peft_lab.backbones.prompt_support import PROMPT_SUPPORT
from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo
from peft_lab.tuners.config import AdapterConfig
from peft_lab.tuners.forward_context import wrap_forward
from peft_lab.tuners.layer import AdapterLayer
from peft_lab.tuners.registration import register
from peft_lab.tuners.residual_layer import ResidualBranches, remove_stream_hooks
from peft_lab.tuners.sequence import key_values, window_attention
from peft_lab.tuners.sequence.generation import unwrap_generate, wrap_generate
from peft_lab.tuners.sequence.layer import SequenceLayer
from peft_lab.tuners.sequence.prompt_state import read_out, replace_logits, run_with_prompts
from peft_lab.tuners.sequence.relative_bias import unwrap_biases
from peft_lab.tuners.sequence.stack import StackInfo, chosen_stack, norms_around, stack_info, stacks_of
from peft_lab.tuners.sequence.supported_models import check_supported
from peft_lab.tuners.tuner import BlockTuner

#: Every hook that a tuner puts in, by which it finds them again.
_HOOKS = (read_out, replace_logits, *window_attention.HOOKS)


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
        """Error message for a field that chooses modules."""
        return (
            f'Method "{self.info.name}" adapts whole blocks and takes no {name}; choose blocks by layers_to_transform.'
        )

    @property
    def key_value_tokens(self) -> int:
        """Number of trained keys and values before each block's own; 0 for prompts that are tokens."""
        return 0

    def reads_out(self) -> bool:
        """Test whether the head reads the mean of prompts and class token."""
        return False

    def may_write(self, depth: int) -> bool:
        """Test whether prompts may be written before the block of an index."""
        layers = self.layers_to_transform
        return layers is None or depth in ([layers] if isinstance(layers, int) else layers)


class SequenceTuner(BlockTuner):
    """Tuner that wraps all blocks of a stack in `SequenceLayer`s.

    Blocks that get no prompts of their own hand on those of the block before.
    """

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        loaded = peft_config.fingerprints is not None
        path, blocks = chosen_stack(self.model, peft_config.stack)
        if self.info.can("images") and self.model.get_submodule(path).main_input_name != "pixel_values":
            raise ConfigError(
                f'Method "{self.info.name}" is made for images, and {type(self.model).__name__} reads none there.'
            )
        check_supported(self.model, self.model.get_submodule(path))
        if peft_config.reads_out():
            self._check_readout(path)
        layers = peft_config.layers_to_transform
        for layer in [layers] if isinstance(layers, int) else layers or ():
            if not 0 <= layer < len(blocks):
                raise ConfigError(f"layers_to_transform holds {layer}; the stack has blocks 0 to {len(blocks) - 1}.")
        # All blocks are wrapped, so a choice of targets is refused unless it names just these.
        if not loaded:
            given = peft_config.target_modules
            if given is not None and (
                isinstance(given, str) or sorted(module_roles.rename_targets(self.model, given)) != sorted(blocks)
            ):
                raise ConfigError(peft_config.no_choice("target_modules"))
            peft_config.target_modules = blocks
        if peft_config.produces_logits:
            self._leave_head(peft_config, loaded)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _check_readout(self, path: str) -> None:
        """Check that the head reads a class token behind a final norm.

        Raises:
            ConfigError: there is no class token, no final norm, or a head that reads the patches.
        """
        model_type = self.model.get_submodule(path).config.model_type
        known = FAMILIES.get(model_type) or PROMPT_SUPPORT.get(model_type)
        reads_patches = known is not None and type(self.model).__name__ in known.patch_heads
        if not prefix_tokens(self.model, path) or reads_patches or "norm.final" not in norms_around(self.model, path):
            raise ConfigError(
                f"{type(self.model).__name__} reads no class token behind a final norm, so it cannot read prompts in "
                "its place."
            )

    def _leave_head(self, config: Any, loaded: bool) -> None:
        """Keep the head untrained if the prompts give the logits."""
        heads = module_roles.class_heads(self.model)
        if not heads:
            raise ConfigError(
                f'Method "{self.info.name}" gives class logits in place of the head of an image classifier, and '
                f"{type(self.model).__name__} has none; load the backbone with AutoModelForImageClassification."
            )
        if loaded:
            return
        given = config.modules_to_save or []
        for name in given:
            if any(f".{name}." in f".{head}." for head in heads):
                raise ConfigError(
                    f'modules_to_save holds {name}, which method "{self.info.name}" does not use: its prompts give the '
                    "class logits; leave the head out."
                )
        # An empty list, because None would let the shared tuner add the task head.
        config.modules_to_save = given

    def new_layer(self, target: nn.Module, path: str) -> AdapterLayer:
        layer = super().new_layer(target, path)
        assert isinstance(layer, SequenceLayer)
        blocks, layer.stack = self._stack_of(path)
        layer.depth = blocks.index(path)
        layer.downsample = None
        # The first block of a later stage merges the prompts that come from the stage before.
        before = window_attention.stage_of(blocks[layer.depth - 1]) if layer.depth else ""
        if isinstance(layer, ResidualBranches):
            layer.hook_sub_layers(self.model, path)
        if window_attention.has_windows(layer) and before and before != window_attention.stage_of(path):
            layer.downsample = window_attention.downsample_of(self.model.get_submodule(before))
        return layer

    def _stack_of(self, block: str) -> tuple[list[str], StackInfo]:
        """Paths of all blocks in a block's stack, and its facts."""
        # Collected once for all blocks, in __dict__ because the tuner looks up missing attributes in the model.
        known: dict[str, tuple[list[str], StackInfo]] = self.__dict__.setdefault("stack_of_block", {})
        if block not in known:
            path, blocks = next((path, blocks) for path, blocks in stacks_of(self.model).items() if block in blocks)
            found = (blocks, stack_info(self.model, path, blocks))
            known.update(dict.fromkeys(blocks, found))
        return known[block]

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        path, blocks = chosen_stack(model, config.stack)
        for block in blocks if config.key_value_tokens else ():
            key_values.hook(model.get_submodule(block))
        for block in blocks:
            if window_attention.has_windows(model.get_submodule(block)):
                window_attention.hook_stage(model.get_submodule(window_attention.stage_of(block)))
        # The model's wrapper opens the context of a call, the stack's makes the state of the prompts in it.
        wrap_forward(model, opens=True)
        wrap_generate(model)
        stack = wrap_forward(model.get_submodule(path), opens=not path)
        stack.around = run_with_prompts
        stack.declared[adapter_name] = config.row_inputs()
        # Hooks are registered once, however many adapters use them.
        if config.reads_out():
            norm = getattr(*norms_around(model, path)["norm.final"])
            if read_out not in norm._forward_hooks.values():
                norm.register_forward_hook(read_out)
        for head_path in module_roles.class_heads(model) if config.produces_logits else ():
            head = model.get_submodule(head_path)
            if replace_logits not in head._forward_hooks.values():
                head.register_forward_hook(replace_logits)

    def unload(self) -> Any:
        """Return the base model without wrapped blocks and without hooks."""
        model = super().unload()
        remove_stream_hooks(model)
        unwrap_biases(model)
        unwrap_generate(model)
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if hook in _HOOKS or _of_layer(hook):
                        del hooks[key]
        return model


def register_sequence(info: MethodInfo, config_cls: Any, layer_cls: Any) -> None:
    """`peft_lab.tuners.register` for a method that acts on the sequence."""
    register(info, config_cls, layer_cls, SequenceTuner)


def _of_layer(hook: Any) -> bool:
    """Test whether a hook is a method of a block's layer."""
    return isinstance(hook, key_values.WriteKeyValues) or isinstance(getattr(hook, "__self__", None), SequenceLayer)
