"""IAPT: instruction-aware prompt tuning by prompt generators before the blocks.

Source: Zhu et al. 2024, IAPT, arXiv:2405.18203; Liu et al. 2022, Late Prompt Tuning, arXiv:2210.11292; Wu et al. 2022,
IDPG, arXiv:2204.04497. Written from the papers' equations.

Each generator projects the hidden states of the instruction down, pools them into a few vectors, applies a learned
activation and projects up to prompts, which stand at the left of the sequence. They are made once, when the text is
read, and live on in the KV cache. Other choices of pooling, activation and insertion make it LPT or IDPG: the presets.

Two things IAPT's paper leaves open, and the presets have neither. The projection up starts at zero (`init_zero`):
prompts of zero are keys and values of zero in front of a norm without bias, which disturb a decoder little, while small
random ones destroy its output (the perplexity of SmolLM2-135M on E2E: 14 without prompts, 25 with those of zero, more
than 10,000 with random ones). And hidden states are scaled to root mean square 1 before they are projected
(`normalize`), because decoders have some a hundred times larger than others, and then no learning rate fits.

The instruction is given by `instruction_mask`, an argument of the model's forward and of `generate`; else it is the
tokens before the first that has a label (other than -100); else the whole text but its padding. What `generate` writes
never belongs to it, with a KV cache or without. A second turn that goes on with the cache of the first keeps the
prompts of the first.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from peft_lab.errors import ConfigError
from peft_lab.tuners import MethodInfo, RowInput
from peft_lab.tuners.sequence import PromptState, SequenceConfig, SequenceLayer, register_sequence

METHOD = MethodInfo(
    name="iapt",
    title="IAPT",
    paper="2405.18203",
    place="sequence",
    config="IAPTConfig",
    roles=("block",),
    capabilities=("mixed_batch",),
    learning_rate=3e-4,
    budget=(1.25, 1.35),
    presets={
        # Late Prompt Tuning: prompts from pooled tokens before one block in the middle, kept by those behind it
        "lpt": {
            "num_prompts": 5,
            "bottleneck": 128,
            "pool": "max",
            "activation": "relu",
            "biases": True,
            "normalize": False,
            "init_zero": False,
            "layers_to_transform": ...,
        },
        # Instance-Dependent Prompt Generation: prompts from the first token's state, at the input; the paper reads
        # that state from a pass of its own through the whole backbone
        "idpg": {
            "num_prompts": 5,
            "bottleneck": 128,
            "pool": "first",
            "activation": "relu",
            "biases": True,
            "normalize": False,
            "init_zero": False,
            "layers_to_transform": 0,
        },
    },
)

#: Coefficients of P and Q in P(x) / (1 + |Q(x)|), degrees 6 and 5, Q from x^1 on: GeLU to 1.2e-4 on [-3, 3].
NUMERATOR = (
    *(2.8038687e-05, 0.5, 0.39850203610680796, 0.16230146359526576),
    *(0.06405232067409442, 0.018316872305839525, 0.0021004872596303986),
)
DENOMINATOR = (0.0, 0.32460293186935474, 0.0, 0.036633744384289235, 0.0)


@dataclass
class IAPTConfig(SequenceConfig):
    """Configuration of IAPT.

    Trainable for L blocks of width d: L (2 d m + m l + 12) with l prompts, bottleneck m.

    `layers_to_transform` says before which blocks prompts are made; in between they pass through the blocks.

    Raises:
        ConfigError: no prompts or no bottleneck.
    """

    num_prompts: int = field(default=4, metadata={"help": "Prompts made before each block.", "other": 3})
    bottleneck: int = field(default=64, metadata={"help": "Width between the projections.", "other": 8})
    pool: Literal["self_attention", "max", "average", "first", "last"] = field(
        default="self_attention",
        metadata={
            "help": "Tokens to prompts: learned queries, max or mean of equal parts, or all prompts from one token.",
            "other": "max",
        },
    )
    activation: Literal["rational", "relu", "gelu"] = field(
        default="rational", metadata={"help": "Activation; `rational` is learned and starts at GeLU.", "other": "relu"}
    )
    share: Literal["none", "down", "up", "both"] = field(
        default="none", metadata={"help": "Projections that all blocks have in common.", "other": "both"}
    )
    biases: bool = field(default=False, metadata={"help": "Biases in the projections.", "other": True})
    normalize: bool = field(
        default=True, metadata={"help": "Scale hidden states to root mean square 1 before projecting.", "other": False}
    )

    init_zero: bool = field(
        default=True, metadata={"help": "Start the projection up at zero, not as nn.Linear starts.", "other": False}
    )

    def row_inputs(self) -> tuple[RowInput, ...]:
        return (RowInput("instruction_mask", per_token=True),)

    def shares(self, projection: str) -> bool:
        """Test whether all blocks have a projection ("down" or "up") in common."""
        return self.share in (projection, "both")

    def check(self) -> None:
        super().check()
        for name in ("num_prompts", "bottleneck"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")


class IAPTLayer(SequenceLayer):
    """Block with a prompt generator before it."""

    adapter_layer_names = (
        *("iapt_down", "iapt_up", "iapt_down_bias", "iapt_up_bias"),
        *("iapt_queries", "iapt_numerator", "iapt_denominator"),
    )
    #: Parameters that `peft_lab.training.callbacks.bilevel` trains on other data than the rest.
    activation_names: ClassVar[tuple[str, ...]] = ("iapt_numerator", "iapt_denominator")

    def initial_values(self, adapter: str, config: IAPTConfig) -> dict[str, Tensor]:
        if not config.may_write(self.depth):
            return {}
        values: dict[str, Tensor] = {}
        for name in ("down", "up"):
            if not config.shares(name):
                values |= self._projection_start(name, config)
        if config.pool == "self_attention":
            queries = torch.empty(config.num_prompts, config.bottleneck)
            values["iapt_queries"] = nn.init.kaiming_uniform_(queries, math.sqrt(5))
        if config.activation == "rational":
            values |= {"iapt_numerator": torch.tensor(NUMERATOR), "iapt_denominator": torch.tensor(DENOMINATOR)}
        return values

    def share_key(self, config: IAPTConfig) -> Hashable:
        # Projections of one width are shared; blocks without prompts have none.
        return self.width if config.may_write(self.depth) else None

    def shared_values(self, adapter: str, config: IAPTConfig) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name in ("down", "up"):
            if config.shares(name) and self.share_key(config) is not None:
                values |= self._projection_start(name, config)
        return values

    def _projection_start(self, name: str, config: IAPTConfig) -> dict[str, Tensor]:
        """Start values of the projection "down" or "up", by nn.Linear's rule.

        With `init_zero` the projection up and all biases start at zero.
        """
        if name == "down":
            outputs, inputs = config.bottleneck, self.width
        else:
            # One pooled token makes all prompts at once, so this projection is wider.
            one_for_all = config.pool in ("first", "last")
            outputs, inputs = self.width * (config.num_prompts if one_for_all else 1), config.bottleneck
        weight, bias = torch.zeros(outputs, inputs), torch.zeros(outputs)
        if name == "down" or not config.init_zero:
            nn.init.kaiming_uniform_(weight, math.sqrt(5))
        values = {f"iapt_{name}": weight}
        if config.biases:
            values[f"iapt_{name}_bias"] = bias if config.init_zero else bias.uniform_(-1, 1) / math.sqrt(inputs)
        return values

    def prompts(self, adapter: str, tokens: Tensor, state: PromptState) -> Tensor | None:
        if not self.configs[adapter].may_write(self.depth):
            return None
        mask = self.instruction(tokens, state)
        with torch.autocast(tokens.device.type, enabled=False):  # powers of the pooled vectors want float32
            return self._generated(adapter, tokens, mask)

    def _generated(self, adapter: str, tokens: Tensor, mask: Tensor | None) -> Tensor:
        config = self.configs[adapter]
        down, up = (cast(Tensor, self.parameter(adapter, name)) for name in ("iapt_down", "iapt_up"))
        tokens = tokens.to(down.dtype).contiguous()  # one copy is kept for both uses
        hidden = nn.functional.linear(tokens, down).float()
        if config.normalize:  # behind the projection, so that no normalised copy is kept
            wide = torch.promote_types(tokens.dtype, torch.float32)
            norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=wide).float()
            hidden = hidden * (norms.square() / self.width + 1e-6).rsqrt()
        down_bias = self.parameter(adapter, "iapt_down_bias")
        if down_bias is not None:
            hidden = (hidden + down_bias).float()
        pooled = self._pooled(adapter, hidden, mask)
        if config.activation == "rational":
            pooled = rational(pooled, self.iapt_numerator[adapter].float(), self.iapt_denominator[adapter].float())
        else:
            pooled = getattr(nn.functional, config.activation)(pooled)
        made = nn.functional.linear(pooled.to(up.dtype), up, self.parameter(adapter, "iapt_up_bias"))
        return made.reshape(tokens.shape[0], config.num_prompts, self.width)

    def _pooled(self, adapter: str, x: Tensor, mask: Tensor | None) -> Tensor:
        """Pool the instruction's vectors to (batch, prompts or 1, bottleneck).

        `x` is (batch, tokens, bottleneck), `mask` bool (batch, tokens).
        """
        config = self.configs[adapter]
        mask = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        if config.pool == "self_attention":
            scores = x @ self.iapt_queries[adapter].float().T
            scores = scores.masked_fill(~mask[..., None], torch.finfo(scores.dtype).min)
            return scores.softmax(1).transpose(1, 2) @ x
        # Index of each token within the instruction, and the instruction's length.
        rank, count = mask.cumsum(1) - 1, mask.sum(1, keepdim=True)
        if config.pool in ("first", "last"):
            chosen = mask & (rank == (0 if config.pool == "first" else count - 1))
            return (x * chosen[..., None]).sum(1, keepdim=True)
        # Equal parts of the instruction; rounded outwards, so that they overlap where it is shorter than the prompts.
        part = torch.arange(config.num_prompts, device=x.device)
        begin, end = part * count // config.num_prompts, -((part + 1) * -count // config.num_prompts)
        member = mask[..., None] & (rank[..., None] >= begin[:, None]) & (rank[..., None] < end[:, None])
        if config.pool == "average":
            return (member.to(x.dtype).transpose(1, 2) @ x) / member.sum(1)[..., None].clamp(min=1)
        parts = [x.masked_fill(~inside[..., None], -torch.inf).amax(1) for inside in member.unbind(-1)]
        return torch.stack(parts, 1).where(mask.any(1)[:, None, None], 0)  # a row of padding alone has no largest


def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Rational activation P(x) / (1 + |Q(x)|).

    Coefficients are given from the lowest degree on; Q has no constant term.
    """
    # Horner's rule, from the highest degree down.
    top = torch.zeros_like(x)
    for coefficient in numerator.flip(0):
        top = top * x + coefficient
    bottom = torch.zeros_like(x)
    for coefficient in denominator.flip(0):
        bottom = (bottom + coefficient) * x
    return top / (1 + bottom.abs())


register_sequence(METHOD, IAPTConfig, IAPTLayer)
