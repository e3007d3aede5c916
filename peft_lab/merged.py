"""Whether a merged model survives saving: an architecture rebuilds only the weights that its config asks for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_lab.errors import ConfigError

#: Config flags by which a family says that some of its linear layers have biases.
_BIAS_FLAGS = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "norm_bias", "classifier_bias")


def check_reloadable(model: PreTrainedModel) -> None:
    """Make sure that `save_pretrained` and `from_pretrained` give back every weight of a merged model.

    Merging a method that shifts features creates biases where there were none. Where the family has a flag for them it
    is set in `model.config`; else a reload would drop them without a word.

    Raises:
        ConfigError: the architecture has no place for a merged bias, naming it.
    """
    created = _extra(model, model.config)
    if not created:
        return
    config = copy.deepcopy(model.config)
    for flag in _BIAS_FLAGS:
        if getattr(config, flag, None) is False:
            setattr(config, flag, True)
            if _lacking(model, config):  # the flag also asks for biases that merging did not create
                setattr(config, flag, False)
    left = _extra(model, config)
    if left:
        raise ConfigError(
            f"{type(model).__name__} has no place for {len(left)} merged biases (the first is "
            f'"{left[0]}"), so they would be lost when the merged model is loaded again; keep the adapter as it is, or '
            "train it without shifts."
        )
    model.config = config


def _rebuilt(model: PreTrainedModel, config: Any) -> set[str]:
    with torch.device("meta"):
        return set(type(model)(copy.deepcopy(config)).state_dict())


def _extra(model: PreTrainedModel, config: Any) -> list[str]:
    return sorted(set(model.state_dict()) - _rebuilt(model, config))


def _lacking(model: PreTrainedModel, config: Any) -> list[str]:
    return sorted(_rebuilt(model, config) - set(model.state_dict()))
