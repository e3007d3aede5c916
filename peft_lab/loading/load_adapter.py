"""Loading of a saved adapter onto a model."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError

from peft_lab.adapter_files import base_fingerprint
from peft_lab.adapter_files.completeness import check_complete
from peft_lab.adapter_files.names import PRUNED_BASE
from peft_lab.backbones.quantized_weight import count_values, keep_layout
from peft_lab.errors import AdapterMismatchError, ConfigError, PeftLabError
from peft_lab.loading.adapter_folder import AdapterFolder
from peft_lab.loading.config_files import check_sizes
from peft_lab.loading.foreign_adapters import adapt_folder, check_record
from peft_lab.loading.pruned_base import prune_for
from peft_lab.tuners.adapter_names import check_adapter_name
from peft_lab.tuners.config import AdapterConfig
from peft_lab.utils.atomic_files import write_errors
from peft_lab.utils.verbosity import without_deprecations_of_peft

#: An adapter's file may be larger than its base by this many bytes: heads, embeddings of new tokens.
_SPARE_BYTES = 2**26
#: Errors of peft, torch and safetensors about an adapter that does not fit.
_OF_PEFT = (
    *(RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, NotImplementedError, AssertionError),
    *(ArithmeticError, OSError, ImportError, SafetensorError),
)


def load_adapter(
    model: Any,
    adapter: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    allow_other_base: bool = False,
    revision: str | None = None,
) -> PeftModel:
    """Put a saved adapter of any method on a model.

    Does all that `PeftModel.from_pretrained` does, and more: every file is checked before it is read, modules are found
    under the names of other versions and with or without a head, the base is compared with the one trained on, and
    the file must hold exactly the adapter. A base that was pruned for the training is pruned in the same way, in place.

    Args:
        model: the base, or a `PeftModel` that gets one more adapter.
        adapter: folder or Hub id.
        adapter_name, is_trainable: as in peft.
        allow_other_base: warn instead of refusing where the base's weights differ from those trained on.
        revision: branch, tag or commit of the adapter on the Hub.

    Raises:
        ConfigError: a file is not what it should be.
        AdapterMismatchError: the adapter does not fit this base.
    """
    folder = AdapterFolder.find(adapter, revision)
    return load_folder(model, folder, adapter_name, is_trainable=is_trainable, allow_other_base=allow_other_base)


def load_folder(
    model: Any,
    folder: AdapterFolder,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    allow_other_base: bool = False,
) -> PeftModel:
    """Put the adapter of a folder on a model.

    Arguments and errors are those of `load_adapter`.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    keep_layout(base)
    folder.check_weights(most_bytes(base))
    with tempfile.TemporaryDirectory() as scratch, base_fingerprint.any_base(allow_other_base):
        try:
            tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
            tuner = tuners[folder.config.peft_type]
            layer = getattr(tuner, "tuner_layer_cls", BaseTunerLayer)
            check_adapter_name(adapter_name, base, getattr(tuner, "prefix", ""), layer)
            if isinstance(folder.config, AdapterConfig):
                _check_sizes(folder, base)
                prune_for(model, folder.pruning, str(folder.path), allow_other_base=allow_other_base)
                return _inject(model, folder, adapter_name, is_trainable=is_trainable)
            # before the errors below, because a full disk is no fault of the adapter
            with write_errors(scratch):
                prune_for(model, folder.pruning, str(folder.path), allow_other_base=allow_other_base)
                return _load_foreign(model, base, folder, Path(scratch), adapter_name, is_trainable)
        # These are ValueErrors too, but say already what is wrong.
        except PeftLabError:
            raise
        except _OF_PEFT as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            # torch puts a headline before the mismatches that tells nothing about them.
            shown = next((line for line in lines if "size mismatch" in line), lines[0])
            raise AdapterMismatchError(
                f'The adapter in "{folder.path}" does not fit {type(base).__name__}: {shown}'
            ) from error


def most_bytes(base: Any) -> int:
    """Largest file of an adapter on a base, in bytes."""
    # A quantised weight takes less than the adapter that is made from its values.
    return 4 * sum(count_values(p) * max(p.element_size(), 2) for p in base.parameters()) + _SPARE_BYTES


def _load_foreign(
    model: Any, base: Any, folder: AdapterFolder, scratch: Path, adapter_name: str, is_trainable: bool
) -> PeftModel:
    """Load an adapter of peft's own tuners.

    peft itself checks neither its config nor its modules and weights.
    """
    _check_sizes(folder, base)
    source = adapt_folder(folder, base, scratch)
    check_record(base, source.record)
    options: dict[str, Any] = {"is_trainable": is_trainable}
    if not source.config.is_prompt_learning:
        # Nothing is allocated for the sizes in the config before they are known to be those of the file.
        options["low_cpu_mem_usage"] = True
    loaded = _inject(model, source, adapter_name, **options)
    _check_entries(loaded, source.header, adapter_name)
    return loaded


def _inject(model: Any, folder: AdapterFolder, adapter_name: str, **options: Any) -> PeftModel:
    if isinstance(model, PeftModel):
        with warnings.catch_warnings():
            # said to those who load without this package, which has pruned the base
            warnings.filterwarnings("ignore", rf"Unexpected keyword arguments \['{PRUNED_BASE}'\]", UserWarning)
            model.load_adapter(str(folder.path), adapter_name, **options)
        return model
    # With the checked config given, peft does not read the one in the folder again.
    with without_deprecations_of_peft():
        return PeftModel.from_pretrained(model, str(folder.path), adapter_name, config=folder.config, **options)


def _check_sizes(folder: AdapterFolder, base: Any) -> None:
    check_sizes(folder.config, max((size for p in base.parameters() for size in p.shape), default=1))


def _check_entries(model: PeftModel, header: Mapping[str, Any], adapter_name: str) -> None:
    """Check that a file has the entries of the adapter.

    peft only warns of those that it lacks, and ignores those that it does not know.
    """
    # By default peft would compare the vocabulary with that of the base, which may ask the Hub.
    wanted = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    # Resized embeddings come along.
    given = [key for key in header if key in wanted or "embed" not in key or "lora" in key]
    check_complete(wanted, given)
    buffers = {buffer.data_ptr() for buffer in model.buffers()}
    for key, value in wanted.items():
        # Integers are right in buffers only, and they are always finite.
        if not value.is_floating_point() and value.data_ptr() in buffers:
            continue
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ConfigError(f'Adapter entry "{key}" holds values that are not finite numbers; train it again.')
