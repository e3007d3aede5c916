"""Loading of a checkpoint, with a warning of missing backbone weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from peft_lab.backbones.checkpoint_limits import bounded_build, check_files
from peft_lab.backbones.heads import backbone_weights
from peft_lab.backbones.quantized_loading import quantization_config
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("peft_lab")

#: Weights that are named; of more the number is said.
_SHOWN = 3


def load_checkpoint(
    auto_class: Any, name: str, *, quantization: str | None = None, **options: Any
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """`auto_class.from_pretrained(name, ...)` and its loading info.

    Code that the checkpoint brings is never run, and no more is built than its weights account for. A new task head is
    what every fine-tuning starts with, so the reports that transformers prints of it are left out. Weights of the
    backbone that start at random, which no adapter would mend, are warned of; those of the head are named in the
    model's attribute `new_head_weights`. `quantization` is one of `peft_lab.backbones.quantized_loading.FORMS`.

    Raises:
        ConfigError: its config asks for a model far larger than its weights, or for code from the Hub, or it cannot be
            quantised so.
    """
    revision = options.get("revision")
    check_files(name, revision)
    from peft_lab.backbones.quantized_weight import keep_layout

    if quantization is not None:
        hub = {"revision": revision} if revision else {}
        # a limit of its own, because it builds the model a first time
        with bounded_build(name, revision):
            form = quantization_config(auto_class, name, quantization, options.get("dtype"), **hub)
        options["quantization_config"] = form
    with _without_report(), bounded_build(name, revision):
        model, info = auto_class.from_pretrained(name, output_loading_info=True, trust_remote_code=False, **options)
    keep_layout(model)
    # A new head is missing too.
    missing = [str(key) for key in info.get("missing_keys", ())]
    absent = backbone_weights(model, missing)
    # transformers lists a key, or a key with its two shapes
    wrong = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get("mismatched_keys", ())]
    model.new_head_weights = tuple(sorted({*missing, *wrong} - {*backbone_weights(model, [*missing, *wrong])}))
    if absent:
        more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        logger.warning(
            '"%s" does not bring all weights of its backbone; these start at random and stay so where the backbone is '
            "frozen: %s%s.",
            name,
            ", ".join(absent[:_SHOWN]),
            more,
        )
    return model, info


def load_with_head(auto_class: Any, name: str, **options: Any) -> PreTrainedModel:
    """`load_checkpoint` of a model whose head may be replaced by one of other shapes.

    Raises:
        ConfigError: as `load_checkpoint`.
        TaskError: the checkpoint has weights of other shapes below the head, which would start at random.
    """
    model, info = load_checkpoint(auto_class, name, ignore_mismatched_sizes=True, **options)
    # any weight of another shape than the head's means a wrong checkpoint;
    # transformers lists a key, or a key with its two shapes
    keys = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in info.get("mismatched_keys", ())]
    wrong = backbone_weights(model, keys)
    if wrong:
        raise TaskError(f'"{name}": the shape of its weight {wrong[0]} does not fit its own config.')
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    sources = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "configuration_utils")]
    # A filter hides these reports; a higher level would hide every other warning as well.
    for source in sources:
        source.addFilter(_is_no_report)
    try:
        yield
    finally:
        for source in sources:
            source.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    # the second is about the labels of the head that the new one replaces
    return "LOAD REPORT" not in message and not message.startswith("You passed `num_labels=")
