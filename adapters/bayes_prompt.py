"""BayesPrompt: prompts drawn from a distribution over the domain of the training data, not trained.

A Gaussian mixture is fitted to the mean token of each training row, and particles are drawn towards it by Stein
variational gradient descent. In training each prompt of each row is the mean of a few particles, drawn anew for every
forward; in evaluation it is the mean of all of them. Only the task head is trained.

The particles come from the training data before the first step, by `peft_lab.ReadTrainingData` (which `peft_lab.train`
adds by itself) or `peft_lab.domain_prompts`, and are saved with the adapter. Each prompt has particles of its own, so
that prompts differ in evaluation too. The draws are of torch's generator, as dropout's are: a run that is repeated or
resumed, and a forward that checkpointing repeats, draw the same.

The authors' code trains the whole backbone with them, and overwrites the embeddings of two words of a template; other
prompts start from such particles by `domain_components`.

Source: Li et al. 2024, BayesPrompt, arXiv:2401.14166. Written from the equations.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_lab.call import Call
from peft_lab.config import AdapterConfig
from peft_lab.errors import ConfigError
from peft_lab.registry import MethodInfo
from peft_lab.static_prompts import StaticConfig, StaticPrompts, register_static

METHOD = MethodInfo(
    name="bayes_prompt",
    title="BayesPrompt",
    paper="2401.14166",
    kind="sequence",
    config="BayesPromptConfig",
    roles=("block",),
    capabilities=("mixed_batch", "untrained"),
    learning_rate=1e-2,
)


@dataclass
class BayesPromptConfig(StaticConfig):
    """Configuration of BayesPrompt. Trainable: nothing but the task head. Saved: prompts x particles x width.

    Raises:
        ConfigError: a number below 1, no `domain_components`, or more draws than a prompt has particles.
    """

    deep = False
    num_prompts: int = field(default=4, metadata={"help": "Prompts in the sequence.", "other": 3})
    num_particles: int = field(default=16, metadata={"help": "Particles of each prompt.", "other": 24})
    draws: int = field(
        default=8, metadata={"help": "Particles that a prompt is the mean of, for each row in training.", "other": 1}
    )
    domain_components: int | None = field(
        default=8, metadata={"help": "Gaussians of the mixture; the paper takes the number of classes."}
    )

    def check(self) -> None:
        super().check()
        for name in ("num_prompts", "num_particles", "draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.domain_components is None:
            raise ConfigError('Method "bayes_prompt" is made from data and needs a number of domain_components.')
        if self.draws > self.num_particles:
            raise ConfigError(f"draws={self.draws} must be at most num_particles={self.num_particles}.")

    def domain_share(self, prompts: int) -> int:
        return 1  # what is stored are particles


class BayesPromptLayer(StaticPrompts):
    """A block before which means of particles (prompts, particles, width) are written; all zero until data are read."""

    adapter_layer_names = ("bayes_prompt_particles",)

    def initial_values(self, adapter: str, config: BayesPromptConfig) -> dict[str, Tensor]:
        if self.depth not in config.writing(self.depths):
            return {}
        return {"bayes_prompt_particles": torch.zeros(config.num_prompts, config.num_particles, self.width)}

    def update_layer(self, adapter: str, config: AdapterConfig) -> None:
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter: self.adapter_layer_names}
        super().update_layer(adapter, config)

    def begin_unread(self, adapter: str) -> None:
        """Nothing to say: particles that are not there are refused, and those that are need no data."""

    def stored(self, adapter: str, call: Call) -> Tensor | None:
        particles = self._particles(adapter)
        return None if particles is None else particles.mean(1)

    def prompts(self, adapter: str, tokens: Tensor, call: Call) -> Tensor | None:
        particles = self._particles(adapter)
        if particles is None or not self.training:
            return super().prompts(adapter, tokens, call)
        draws = self.configs[adapter].draws
        chosen = torch.rand(len(tokens), *particles.shape[:2], device=tokens.device).topk(draws).indices
        weights = particles.new_zeros(len(tokens), *particles.shape[:2]).scatter(-1, chosen, 1 / draws)
        return torch.einsum("rpm,pmd->rpd", weights, particles)

    def _particles(self, adapter: str) -> Tensor | None:
        particles = self.bayes_prompt_particles.get(adapter)
        if particles is not None and not bool(particles.any()):
            raise ConfigError(
                'Method "bayes_prompt" has read no training data: train by peft_lab.train, add the callback '
                "peft_lab.ReadTrainingData to the Trainer, or call peft_lab.domain_prompts(model, batches) first."
            )
        return particles


register_static(METHOD, BayesPromptConfig, BayesPromptLayer)
