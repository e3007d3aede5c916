"""Prompt tuning and P-tuning v2: trainable tokens in front of a text.

Source: Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv:2104.08691; per block, Liu
et al. 2021, P-Tuning v2, arXiv:2110.07602; the MLP, Li and Liang 2021, Prefix-Tuning, arXiv:2101.00190. Written from
the papers.

They are put in at the input, or new ones before every block. Prompts are tokens of the sequence and take no position:
the text keeps the positions it has without them. So they are right where peft's own prompt tuning is not: in batches
padded at the left (peft gives text the positions of the padding), with `generate(inputs_embeds=...)`, with
`use_cache=False`, under gradient checkpointing, and where the rows of a batch have different adapters (peft ignores
`adapter_names`).

With `prefix_projection` a small MLP makes them from embeddings, and is trained and saved along: for the embeddings e
(tokens, width), the prompts before block i are U_i tanh(W e + b) + c_i, with e, W and b the same for all blocks.
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
from peft_lab.tuners.sequence import PromptState, StaticConfig, StaticTuner, StoredPrompts, chosen_stack

METHOD = MethodInfo(
    name="soft_prompt",
    title="Soft prompts",
    paper="2104.08691",
    place="sequence",
    config="SoftPromptConfig",
    roles=("block",),
    capabilities=("mixed_batch",),
    learning_rate=1e-2,
    budget=(1.4, 1.5),
)


@dataclass
class SoftPromptConfig(StaticConfig):
    """Configuration of soft prompts.

    Trainable: `num_virtual_tokens` x width for each block that writes prompts.

    With `prefix_projection`, for n tokens, width d, m hidden units and L such blocks: n d + m (d + 1) + L d (m + 1).

    The names are those of peft's `PromptTuningConfig` and `PrefixTuningConfig`. A text is turned into token ids when
    the config is made, and saved as such: loading an adapter never looks for a tokenizer.

    Raises:
        ConfigError: no tokens, a start value without what it is made of, two of them, one together with an MLP, hidden
            units without an MLP, or a file that names a tokenizer.
    """

    num_virtual_tokens: int = field(default=20, metadata={"help": "Prompts of each block.", "other": 3})
    deep: bool = field(
        default=False, metadata={"help": "New prompts before every block, as in P-tuning v2.", "other": True}
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
        *("soft_prompt_out_weight", "soft_prompt_out_bias"),
    )

    def initial_values(self, adapter: str, config: SoftPromptConfig) -> dict[str, Tensor]:
        if self.depth not in config.prompted_block_indices(self.num_blocks):
            return {}
        if config.prefix_projection:
            hidden = self._hidden_units(config)
            shapes = {"soft_prompt_out_weight": (self.width, hidden), "soft_prompt_out_bias": (self.width,)}
            return {name: _as_torch_starts(shape, hidden) for name, shape in shapes.items()}
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
        # With an MLP the stored values are the embeddings, which one block stores for all.
        config = self.configs[adapter]
        if config.prefix_projection and self.share_key(config):
            return self.parameter(adapter, "soft_prompt_tokens")
        return super().values(adapter, rows)

    def make_prompts(self, adapter: str, values: Tensor, state: PromptState) -> Tensor:
        if adapter not in self.soft_prompt_out_weight:
            return values
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
        # A loaded adapter brings its prompts along, so no text is run for it.
        fresh = peft_config.fingerprints is None and not peft_config.inference_mode
        prepared = super()._prepare_adapter_config(peft_config, model_config)
        if fresh and peft_config.prompt_tuning_init != "RANDOM":
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
