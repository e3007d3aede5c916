"""Merging of an adapter into its base, saved for transformers alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_lab.adapter_files.names import ADAPTER_CONFIG
from peft_lab.backbones.family_table import declared_names
from peft_lab.errors import ConfigError
from peft_lab.loading.load_run import load
from peft_lab.runs.run_folder import refuse_filled, write_labels
from peft_lab.utils.atomic_files import new_folder


def merge(
    adapter: str | Path, out: str | Path, model_name_or_path: str | None = None, *, allow_other_base: bool = False
) -> Path:
    """Merge an adapter into its base and save the result.

    It loads with transformers alone.

    Raises:
        ConfigError: the method cannot be merged, there is no adapter, the merged model would lose weights when loaded
            again, or `out` already holds something.
        WriteError: `out` cannot be written; then nothing of it is left.
    """
    out = Path(out).expanduser()
    refuse_filled(out)
    loaded = load(adapter, None, model_name_or_path, allow_other_base=allow_other_base)
    adapted: Any = loaded.model
    if not (loaded.folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(f'"{adapter}" is a whole model: there is no adapter to merge.')
    try:
        # With safe_merge, peft refuses a merge that gives NaN instead of leaving broken weights.
        merged = adapted.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError) as error:
        reason = str(error) or "peft has no merge for it"
        raise ConfigError(f'The adapter in "{adapter}" cannot be merged: {reason}') from error
    check_reloadable(merged)
    with new_folder(out) as place:
        merged.save_pretrained(place)
        loaded.processor.save_pretrained(place)
        if loaded.labels:
            write_labels(place, loaded.labels)
    return out


def check_reloadable(model: PreTrainedModel) -> None:
    """Check that a saved merged model reloads every weight.

    Merging a method that shifts features creates biases where there were none. Where the family has a config flag for
    them, it is set in `model.config`; else a reload would drop them silently.

    Raises:
        ConfigError: the architecture has no place for a merged bias, naming it.
    """
    created = _extra(model, model.config)
    if not created:
        return
    # A copy, because the model must keep its config if a bias has no place.
    config = copy.deepcopy(model.config)
    for flag in declared_names(config.model_type, "bias_flags"):
        if getattr(config, flag, None) is False:
            setattr(config, flag, True)
            # The flag may also ask for biases that merging did not create.
            if _lacking(model, config):
                setattr(config, flag, False)
    # Biases without a flag, or with one that the whole family shares.
    left = _extra(model, config)
    if left:
        raise ConfigError(
            f"{type(model).__name__} has no place for {len(left)} merged biases (the first is "
            f'"{left[0]}"), so they would be lost when the merged model is loaded again; keep the adapter as it is, or '
            "train it without shifts."
        )
    model.config = config


def _rebuilt(model: PreTrainedModel, config: Any) -> set[str]:
    """Return the weight names of the model's class with this config."""
    # On the meta device the second model takes no memory.
    with torch.device("meta"):
        return set(type(model)(copy.deepcopy(config)).state_dict())


def _extra(model: PreTrainedModel, config: Any) -> list[str]:
    """Return weights that a reload with this config would drop."""
    return sorted(set(model.state_dict()) - _rebuilt(model, config))


def _lacking(model: PreTrainedModel, config: Any) -> list[str]:
    """Return weights that a reload with this config would miss."""
    return sorted(_rebuilt(model, config) - set(model.state_dict()))
