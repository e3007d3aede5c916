"""BayesPrompt: prompts sampled from a distribution over the training data's domain.

Source: Li et al. 2024, BayesPrompt, arXiv:2401.14166. Written from the equations.

The prompts are not trained. A Gaussian mixture is fitted to the mean token of each training row, and Stein variational
gradient descent moves particles towards it. In training each prompt of each row is the mean of a few particles, sampled
anew for every forward; in evaluation it is the mean of all of them. Only the task head is trained.

The particles come from the training data before the first step, by `peft_lab.ReadTrainingData` (which `peft_lab.train`
adds by itself) or `peft_lab.domain_prompts`, and are saved with the adapter. Each prompt has particles of its own, so
that prompts differ in evaluation too.

This is `domain_draws` of stored prompts alone; other methods that store prompts take it too, and train what else they
have. The authors' code trains the whole backbone with the prompts, and overwrites the embeddings of two words of a
template.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from peft_lab.errors import ConfigError
from peft_lab.tuners import MethodInfo
from peft_lab.tuners.sequence import StaticConfig, StoredPrompts, register_static

METHOD = MethodInfo(
    name="bayes_prompt",
    title="BayesPrompt",
    paper="2401.14166",
    place="sequence",
    config="BayesPromptConfig",
    roles=("block",),
    capabilities=("mixed_batch",),
    learning_rate=1e-1,
)


@dataclass
class BayesPromptConfig(StaticConfig):
    """Configuration of BayesPrompt.

    Trainable: the task head alone. Saved: prompts x particles x width.

    Raises:
        ConfigError: no prompts, no `domain_components` or no `domain_draws`.
    """

    values_from_data = True

    deep = False
    num_prompts: int = field(default=4, metadata={"help": "Prompts in the sequence.", "other": 3})
    domain_components: int | None = field(
        default=8, metadata={"help": "Gaussians of the mixture; the paper takes the number of classes."}
    )
    domain_draws: int | None = field(
        default=8, metadata={"help": "Particles that a prompt is the mean of, for each row in training."}
    )

    def check(self) -> None:
        super().check()
        if self.num_prompts < 1:
            raise ConfigError(f"num_prompts={self.num_prompts} must be at least 1.")
        if self.domain_components is None or self.domain_draws is None:
            raise ConfigError(
                'Method "bayes_prompt" draws its prompts from data and needs domain_components and domain_draws; '
                '"soft_prompt" does without.'
            )


class BayesPromptLayer(StoredPrompts):
    """Block before which means of particles (prompts, particles, width) are written."""

    adapter_layer_names = ("bayes_prompt_particles",)

    def initial_values(self, adapter: str, config: BayesPromptConfig) -> dict[str, Tensor]:
        if self.depth not in config.prompted_block_indices(self.num_blocks):
            return {}
        # One value per prompt, whose shape tells the number of particles that replace it.
        return {"bayes_prompt_particles": torch.zeros(config.num_prompts, self.width)}


register_static(METHOD, BayesPromptConfig, BayesPromptLayer)
