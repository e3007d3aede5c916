"""Quantised forms that a backbone is loaded in, by the configs of transformers. Imports nothing heavy."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

from peft_lab.errors import ConfigError, did_you_mean

_LOG = logging.getLogger("peft_lab")

#: Name of a form -> the distribution that quantises to it.
FORMS = {
    "nf4": "bitsandbytes",
    "int8": "bitsandbytes",
    "torchao-int8": "torchao",
    "torchao-float8": "torchao",
}
#: Short flags, as in the example scripts of transformers, and the form that each stands for.
SHORT_FORMS = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}


def check_form(name: str) -> None:
    """Check the name of a quantised form, and that its library is installed.

    Raises:
        ConfigError: there is no such form, or its library is missing, with the line that installs it.
    """
    if name not in FORMS:
        raise ConfigError(f'quantization "{name}" must be one of {", ".join(FORMS)}.{did_you_mean(name, FORMS)}')
    if find_spec(FORMS[name]) is None:
        raise ConfigError(f'quantization "{name}" needs a package that is not installed: pip install {FORMS[name]}')


def spell_out(values: dict[str, Any]) -> None:
    """Replace a short flag among a run's options by `quantization`, so that a run has one spelling.

    Raises:
        ConfigError: the flags ask for two forms.
    """
    asked = [form for flag, form in SHORT_FORMS.items() if values[flag]]
    asked += [values["quantization"]] if values["quantization"] is not None else []
    if len({*asked}) > 1:
        raise ConfigError(f"The backbone has one quantised form, and the options ask for {' and '.join(asked)}.")
    values |= {"quantization": asked[0] if asked else None, **dict.fromkeys(SHORT_FORMS, False)}


def quantization_config(auto_class: Any, path: str, form: str, dtype: Any, **hub_kwargs: Any) -> Any:
    """Config of transformers that quantises a checkpoint to a form as it is loaded.

    Task heads and output embeddings stay as they are, because they are trained, or start at random. So do layers that
    bitsandbytes would read wrongly on a CPU, which is said.

    Args:
        auto_class: class of transformers that loads the checkpoint.
        path: folder or Hub id.
        form: one of `FORMS`.
        dtype: dtype of everything that is not quantised; quantised weights are multiplied in it too.
        hub_kwargs: such as `revision`.

    Raises:
        ConfigError: the form or its library is missing, or the checkpoint is quantised already.
    """
    check_form(form)
    from transformers import AutoConfig, BitsAndBytesConfig, TorchAoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False, **hub_kwargs)
    if getattr(config, "quantization_config", None):
        raise ConfigError(f'"{path}" is quantised already; load it without quantization="{form}".')
    skipped = _unquantised(auto_class, config, form)
    if form == "nf4":
        # As in QLoRA (arXiv 2305.14314): the scales are quantised too.
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=_compute_dtype(dtype, config),
            llm_int8_skip_modules=skipped,
        )
    if form == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    weights = Int8WeightOnlyConfig() if form == "torchao-int8" else Float8WeightOnlyConfig()
    return TorchAoConfig(weights, modules_to_not_convert=skipped)


def _compute_dtype(dtype: Any, config: Any) -> Any:
    """Dtype that "auto" stands for, or `dtype` itself."""
    wanted = getattr(config, "dtype", None) if dtype in (None, "auto") else dtype
    return wanted or "float32"


def _unquantised(auto_class: Any, config: Any, form: str) -> list[str]:
    """Names of the modules that are left as they are."""
    import torch
    from torch import nn

    from peft_lab.backbones.module_roles import head_modules
    from peft_lab.backbones.quantized_weight import has_wrong_scales

    # On the meta device the model takes no memory.
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=False)
    output = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if output is not None and module is output]
    names += head_modules(model)
    if form != "nf4":
        return sorted({*names})
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    odd = [name for name, layer in layers.items() if name not in names and has_wrong_scales(layer)]
    if odd:
        _LOG.warning(
            'On a CPU bitsandbytes would read 4-bit weights of "%s" and %d more layers by wrong scales, because their '
            "number of inputs is no multiple of 64; they are not quantised.",
            odd[0],
            len(odd) - 1,
        )
    return sorted({*names, *odd})
