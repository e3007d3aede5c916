"""Merging of an adapter into its base, saved for transformers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_lab.adapter_files.names import ADAPTER_CONFIG
from peft_lab.errors import ConfigError
from peft_lab.loading.load_run import load
from peft_lab.runs.run_folder import read_origin, read_tuned, refuse_filled, write_labels
from peft_lab.utils.atomic_files import new_folder


def merge(
    adapter: str | Path,
    out: str | Path,
    model_name_or_path: str | None = None,
    *,
    allow_other_base: bool = False,
    method_args: Mapping[str, Any] | None = None,
) -> Path:
    """Merge an adapter into its base and save the result.

    It loads with transformers alone. A quantised base is merged by its values, and the result is not quantised.

    Args:
        adapter: folder of a run or adapter, or a Hub id.
        out: a folder that is not there yet or empty.
        model_name_or_path: the base to load instead of the one that the adapter names.
        allow_other_base: warn of a base with other weights instead of refusing it.
        method_args: config fields that choose what a merge stands for, where the method has some.

    Raises:
        ConfigError: the method cannot be merged, or has no such field, there is no adapter, the merged model would lose
            weights when loaded again, or `out` already holds something.
        WriteError: `out` cannot be written; then nothing of it is left.
    """
    out = Path(out).expanduser()
    refuse_filled(out)
    loaded = load(adapter, None, model_name_or_path, dequantised=True, allow_other_base=allow_other_base)
    adapted: Any = loaded.model
    if not (loaded.folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(f'"{adapter}" is a whole model: there is no adapter to merge.')
    if method_args:
        config = adapted.active_peft_config
        if not hasattr(config, "set_merge_fields"):
            raise ConfigError(f"A merge of a tuner of peft takes no method_args; leave out {', '.join(method_args)}.")
        config.set_merge_fields(method_args)
    try:
        # With safe_merge, tuners of peft refuse a merge that gives NaN too.
        merged = adapted.merge_and_unload(safe_merge=True)
    except (NotImplementedError, AttributeError, ValueError) as error:
        reason = str(error) or "peft has no merge for it"
        raise ConfigError(f'The adapter in "{adapter}" cannot be merged: {reason}') from error
    if read_origin(loaded.folder).get("quantization"):
        # Its values came in float32; what is written has the dtype that the base was loaded in.
        merged.to(merged.config.dtype)
    with new_folder(out) as place:
        merged.save_pretrained(place)
        loaded.processor.save_pretrained(place)
        if loaded.labels:
            write_labels(place, loaded.labels, read_tuned(loaded.folder))
    return out
