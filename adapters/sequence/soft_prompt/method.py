"""Prompt tuning and P-tuning v2: trainable tokens, or keys and values, in front of a text.

Source: Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv:2104.08691; keys and values,
Liu et al. 2021, P-Tuning v2, arXiv:2110.07602, and Li and Liang 2021, Prefix-Tuning, arXiv:2101.00190, which has the
MLP too. Written from the papers.

Tokens are put in at the input, or new ones before every block (`deep`), which the frozen projections turn into keys and
values. With `key_values` the keys and values themselves are trained, in every block: that is prefix tuning, also called
P-tuning v2, as peft's `PrefixTuningConfig` has it; a text with positions then begins behind them. Prompts that are
tokens take no position: the text keeps the positions it has without them. Both are right where peft's own prompt and
prefix tuning are not: in batches padded at the left (peft gives text the positions of the padding), with
`generate(inputs_embeds=...)`, with `use_cache=False`, under gradient checkpointing, and where the rows of a batch have
different adapters (peft ignores `adapter_names`).

With `prefix_projection` a small MLP makes them from embeddings, and is trained and saved along: for the embeddings e
(tokens, width), the prompts before block i are U_i tanh(W e + b) + c_i, with e, W and b the same for all blocks. Of
keys and values U_i makes both.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_lab.adapters.sequence.soft_prompt.text_init import states_before
from peft_lab.errors import ConfigError
from peft_lab.tuners import MethodInfo, register
from peft_lab.tuners.sequence import PromptState, StaticConfig, StaticTuner, StoredPrompts, chosen_stack, projections

METHOD = MethodInfo(
    name="soft_prompt",
    title="Soft prompts",
    paper="2104.08691",
    place="sequence",
    config="SoftPromptConfig",
    roles=("block",),
    capabilities=("mixed_batch",),
    learning_rate=1e-1,
    budget=(1.4, 1.5),
)


@dataclass
class SoftPromptConfig(StaticConfig):
    """Configuration of soft prompts.

    Trainable: `num_virtual_tokens` x width for each block that writes prompts.

    With `prefix_projection`, for n tokens, width d, m hidden units and L such blocks: n d + m (d + 1) + L d (m + 1).
    With `key_values`: 2 x blocks x `num_virtual_tokens` x width of the keys; in the formula of the MLP L d becomes 2 L
    times that width.

    The names are those of peft's `PromptTuningConfig` and `PrefixTuningConfig`. A text is turned into token ids when
    the config is made, and saved as such: loading an adapter never looks for a tokenizer.

    Raises:
        ConfigError: no tokens, a start value without what it is made of, two of them, one together with an MLP, hidden
            units without an MLP, or a file that names a tokenizer.
    """

    num_virtual_tokens: int = field(default=20, metadata={"help": "Prompts of each block.", "other": 3})
    deep: bool = field(default=False, metadata={"help": "New prompts before every block.", "other": True})
    key_values: bool = field(
        default=False,
        metadata={"help": "Train keys and values of every block, as prefix tuning and P-tuning v2 do.", "other": True},
    )
    prompt_tuning_init: Literal["RANDOM", "TEXT", "SAMPLE_VOCAB"] = field(
        default="RANDOM",
        metadata={
            "help": "Start: uniform numbers, a text, or tokens sampled from the vocabulary.",
            "other": "SAMPLE_VOCAB",
            "family": "gpt2",
        },
    )
    prompt_tuning_init_text: str | list[int] | None = field(
        default=None,
        metadata={
            "help": "The text of `TEXT`, repeated or cut to the number of prompts; or its token ids.",
            "other": [5, 6, 7],
            "family": "gpt2",
            "with": {"prompt_tuning_init": "TEXT"},
        },
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "The tokenizer that turns the text into ids.", "untried": "needs its files"}
    )

    prefix_projection: bool = field(
        default=False,
        metadata={"help": "Make the prompts from embeddings by a trained MLP of two layers.", "other": True},
    )
    encoder_hidden_size: int | None = field(
        default=None,
        metadata={
            "help": "Hidden units of that MLP; nothing means the width of the backbone.",
            "other": 8,
            "with": {"prefix_projection": True},
        },
    )

    def __post_init__(self) -> None:
        # Only a file gives a type, and no tokenizer is fetched because a file names it.
        if self.tokenizer_name_or_path is not None and self.peft_type is not None:
            raise ConfigError("An adapter file must not name a tokenizer; remove tokenizer_name_or_path from it.")
        super().__post_init__()

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read an adapter_config.json; `__post_init__` knows a file by its type."""
        return {"peft_type": cls.peft_method_type, **super().from_json_file(path_json_file, **kwargs)}

    def check(self) -> None:
        super().check()
        text, tokenizer = self.prompt_tuning_init_text, self.tokenizer_name_or_path
        if self.num_virtual_tokens < 1:
            raise ConfigError(f"num_virtual_tokens={self.num_virtual_tokens} must be at least 1.")
        if (text is not None) != (self.prompt_tuning_init == "TEXT"):
            raise ConfigError('prompt_tuning_init="TEXT" and prompt_tuning_init_text go together.')
        if (tokenizer is not None) != isinstance(text, str):
            raise ConfigError("tokenizer_name_or_path is for a prompt_tuning_init_text that is no list of token ids.")
        if self.key_values and (self.domain_components is not None or self.prompt_tuning_init != "RANDOM"):
            raise ConfigError(
                "key_values=True trains keys and values, and domain_components and prompt_tuning_init give tokens to "
                "start from; leave one out."
            )
        if self.domain_components is not None and self.prompt_tuning_init != "RANDOM":
            raise ConfigError(
                f"domain_components={self.domain_components} and prompt_tuning_init={self.prompt_tuning_init!r} both "
                "say where prompts start; leave one out."
            )
        self._check_projection()
        # The ids are saved in place of the text, so that loading needs no tokenizer.
        if tokenizer is not None:
            from transformers import AutoTokenizer

            read = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
            self.prompt_tuning_init_text = read(text)["input_ids"]
            self.tokenizer_name_or_path = None
        if self.prompt_tuning_init_text is not None and not self.prompt_tuning_init_text:
            raise ConfigError("prompt_tuning_init_text has no tokens.")

    @property
    def key_value_tokens(self) -> int:
        return self.num_virtual_tokens if self.key_values else 0

    def prompted_block_indices(self, num_blocks: int) -> list[int]:
        if self.key_values:
            return [depth for depth in range(num_blocks) if self.may_write(depth)]
        return super().prompted_block_indices(num_blocks)

    def _check_projection(self) -> None:
        """Check the fields of the MLP and their conflicts with other starts."""
        hidden = self.encoder_hidden_size
        if hidden is not None and not self.prefix_projection:
            raise ConfigError(f"encoder_hidden_size={hidden} has no effect without prefix_projection=True; give both.")
        if hidden is not None and hidden < 1:
            raise ConfigError(f"encoder_hidden_size={hidden} must be at least 1.")
        for name, usual in (("prompt_tuning_init", "RANDOM"), ("domain_components", None)):
            if self.prefix_projection and getattr(self, name) != usual:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} says where prompts start, and with prefix_projection=True an MLP "
                    "makes them; leave one out."
                )


class SoftPromptLayer(StoredPrompts):
    """Block before which prompts (tokens, width) are written.

    With an MLP, the blocks share the embeddings (tokens, width) and the MLP's first layer, and each one has its own
    part of the second.
    """

    adapter_layer_names = (
        *("soft_prompt_tokens", "soft_prompt_in_weight", "soft_prompt_in_bias"),
        *("soft_prompt_out_weight", "soft_prompt_out_bias", "soft_prompt_keys", "soft_prompt_values"),
    )

    def initial_values(self, adapter: str, config: SoftPromptConfig) -> dict[str, Tensor]:
        if self.depth not in config.prompted_block_indices(self.num_blocks):
            return {}
        width = self.width
        if config.key_values:
            width = projections(self.base_layer, self.stack.settings.model_type)[0].width
        if config.prefix_projection:
            hidden, outputs = self._hidden_units(config), (1 + config.key_values) * width
            shapes = {"soft_prompt_out_weight": (outputs, hidden), "soft_prompt_out_bias": (outputs,)}
            return {name: _as_torch_starts(shape, hidden) for name, shape in shapes.items()}
        if config.key_values:
            names = ("soft_prompt_keys", "soft_prompt_values")
            return {name: torch.randn(config.num_virtual_tokens, width) for name in names}
        start = getattr(config, "starts", {}).get(self.depth)
        if start is None:
            start = torch.empty(config.num_virtual_tokens, self.width).uniform_(-0.5, 0.5)
        return {"soft_prompt_tokens": start}

    def share_key(self, config: SoftPromptConfig) -> Hashable:
        # All blocks that write prompts share the embeddings and the first layer of the MLP.
        return self.depth in config.prompted_block_indices(self.num_blocks)

    def shared_values(self, adapter: str, config: SoftPromptConfig) -> dict[str, Tensor]:
        if not config.prefix_projection or not self.share_key(config):
            return {}
        hidden = self._hidden_units(config)
        return {
            "soft_prompt_tokens": torch.randn(config.num_virtual_tokens, self.width),
            "soft_prompt_in_weight": _as_torch_starts((hidden, self.width), self.width),
            "soft_prompt_in_bias": _as_torch_starts((hidden,), self.width),
        }

    def _hidden_units(self, config: SoftPromptConfig) -> int:
        """Hidden units of the MLP, by default the first prompted block's width."""
        first = config.prompted_block_indices(self.num_blocks)[0]
        return config.encoder_hidden_size or self.stack.widths[first]

    def values(self, adapter: str, rows: int | None = None) -> Tensor | None:
        config = self.configs[adapter]
        if not self.share_key(config):
            return None
        # Keys and values need a place in the sequence, whatever stands there.
        if config.key_values:
            return torch.zeros(config.num_virtual_tokens, self.width, device=self.base_weight.device)
        # With an MLP the stored values are the embeddings, which one block stores for all.
        if config.prefix_projection:
            return self.parameter(adapter, "soft_prompt_tokens")
        return super().values(adapter, rows)

    def make_prompts(self, adapter: str, values: Tensor, state: PromptState) -> Tensor:
        config = self.configs[adapter]
        return self._project(adapter, values) if config.prefix_projection and not config.key_values else values

    def key_values(self, adapter: str) -> tuple[Tensor, Tensor]:
        embeddings = self.parameter(adapter, "soft_prompt_tokens")
        if embeddings is None:
            return self.soft_prompt_keys[adapter], self.soft_prompt_values[adapter]
        keys, values = self._project(adapter, embeddings).chunk(2, -1)
        return keys, values

    def _project(self, adapter: str, values: Tensor) -> Tensor:
        """Apply the MLP to embeddings (tokens, width)."""
        weight = self.parameter(adapter, "soft_prompt_in_weight")
        assert weight is not None, "the MLP is there as a whole"
        # Each block computes it anew, because one that is recomputed in the backward pass must not look at another's.
        hidden = nn.functional.linear(values, weight, self.parameter(adapter, "soft_prompt_in_bias")).tanh()
        return nn.functional.linear(hidden, self.soft_prompt_out_weight[adapter], self.soft_prompt_out_bias[adapter])


def _as_torch_starts(shape: tuple[int, ...], inputs: int) -> Tensor:
    """Start values of a linear layer by torch's rule for its inputs."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(shape).uniform_(-bound, bound)


class SoftPromptTuner(StaticTuner):
    """Tuner that can initialise prompts from a text.

    They start at the backbone's hidden states of the text before the block that they are for.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter and discard its start values."""
        # They are tensors, which the config must not save.
        config: Any = self.peft_config[adapter_name]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            config.__dict__.pop("starts", None)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        # Before anything is injected, so that a refused adapter leaves the model as it was.
        path, blocks = chosen_stack(self.model, peft_config.stack)
        for block in blocks if peft_config.key_values else ():
            module = self.model.get_submodule(block)
            projections(getattr(module, "base_layer", module), self.model.get_submodule(path).config.model_type)
        prepared = super()._prepare_adapter_config(peft_config, model_config)
        # An adapter for inference brings its prompts along; the config of a trained one may start another.
        if not peft_config.inference_mode and peft_config.prompt_tuning_init != "RANDOM":
            prepared.starts = self._states(prepared)
        return prepared

    def _states(self, config: SoftPromptConfig) -> dict[int, Tensor]:
        """Start values of prompts by block index, from text or random tokens."""
        path, blocks = chosen_stack(self.model, config.stack)
        stack: Any = self.model.get_submodule(path)
        vocabulary = getattr(stack.config, "vocab_size", None)
        if vocabulary is None or stack.main_input_name != "input_ids":
            raise ConfigError(
                f'{type(stack).__name__} has no vocabulary; take prompt_tuning_init="RANDOM", '
                f'not "{config.prompt_tuning_init}".'
            )
        ids = torch.randint(0, vocabulary, (config.num_virtual_tokens,))
        if isinstance(config.prompt_tuning_init_text, list):
            given = torch.tensor(config.prompt_tuning_init_text)
            if int(given.min()) < 0 or int(given.max()) >= vocabulary:
                raise ConfigError(f"prompt_tuning_init_text has token ids outside of the vocabulary of {vocabulary}.")
            # Repeated or cut to the number of prompts.
            ids = given.repeat(math.ceil(len(ids) / len(given)))[: len(ids)]
        return states_before(self.model, stack, blocks, ids)


register(METHOD, SoftPromptConfig, SoftPromptLayer, SoftPromptTuner)
