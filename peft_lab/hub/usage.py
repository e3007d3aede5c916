"""Lines of code that load a saved adapter or model, as cards and `peft-lab info` state them.

Imports nothing heavy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from peft_lab.adapter_files.names import ADAPTER_WEIGHTS
from peft_lab.registry import MethodInfo
from peft_lab.utils.safetensors_header import read_header
from peft_lab.utils.text import json_line

#: peft's classes that load a base with its head, by task type.
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
#: peft's class that loads the class that the base was.
_ANY_CLASS = "AutoPeftModel"


@dataclass(frozen=True)
class Usage:
    """Lines of code that load a saved model.

    Attributes:
        module, name: the import.
        call: expression that gives the model.
        registers: True if `import peft_lab` has to come first, because peft does not know the method by itself.
    """

    module: str
    name: str
    call: str
    registers: bool = False

    @property
    def lines(self) -> list[str]:
        """The lines, imports first."""
        first = ["import peft_lab  # makes the method known to peft"] if self.registers else []
        return [*first, f"from {self.module} import {self.name}", f"model = {self.call}"]


def of_adapter(
    source: str, info: MethodInfo, task_type: str | None, labels: int | None, uses_source_head: bool
) -> Usage:
    """Lines for an adapter of a run, by peft.

    Args:
        source: folder of the run, or its Hub id.
        info: its method.
        task_type: peft's type of the kind of task; None where peft has none.
        labels: number of classes, which the base model must be told of; None for generation.
        uses_source_head: True if the base keeps the head that it was trained with.
    """
    options = "" if labels is None or uses_source_head else f", num_labels={labels}"
    auto = _ANY_CLASS
    if task_type is not None:
        auto = _AUTO_CLASSES.get(task_type, _ANY_CLASS)
    elif options:
        # peft loads the class that the base was; a head for other labels is replaced by the saved one
        options += ", ignore_mismatched_sizes=True"
    return _by_peft(auto, source, options, info)


def of_foreign_adapter(source: str, info: MethodInfo | None, task_type: str | None, labels: int | None) -> Usage:
    """Lines for an adapter that peft-lab did not train.

    Arguments are as for `of_adapter`; `info` is None for a head alone, which peft knows.
    """
    # the base's own head has other outputs, which transformers refuses unless told to replace it
    options = "" if labels is None else f", num_labels={labels}, ignore_mismatched_sizes=True"
    return _by_peft(_AUTO_CLASSES.get(task_type or "", _ANY_CLASS), source, options, info)


def of_model(source: str, class_name: str, module: str = "transformers") -> Usage:
    """Lines for a whole model, by a class of transformers or of peft-lab."""
    return Usage(module, class_name, f"{class_name}.from_pretrained({_literal(source)})")


def own_class(dotted: object) -> tuple[str, str] | None:
    """Name and module of a class of peft-lab; None for any other text, because metrics may come from elsewhere."""
    module, _, name = str(dotted).rpartition(".")
    return (name, module) if re.fullmatch(r"peft_lab(\.[a-z_]+)+", module) and name.isidentifier() else None


def by_peft_lab(source: str) -> Usage:
    """Lines for an adapter whose base peft cannot find or load as it was in training."""
    return Usage("peft_lab.loading.load_run", "load", f"load({_literal(source)}).model")


def head_outputs(folder: Path) -> int | None:
    """Number of outputs of a saved classifier; None without one."""
    header = read_header(folder / ADAPTER_WEIGHTS)
    heads = [key for key in header if re.search(r"\.(classifier|score)(\.\w+)?\.weight$", key)]
    return next(iter(header[heads[-1]][1]), None) if heads else None


def _by_peft(auto: str, source: str, options: str, info: MethodInfo | None) -> Usage:
    # peft-lab has to register its own methods with peft
    registers = info is not None and info.place != "baseline" and not info.module.startswith("peft.")
    return Usage("peft", auto, f"{auto}.from_pretrained({_literal(source)}{options})", registers)


def _literal(name: str) -> str:
    """Name as a literal in a block of code, which it cannot leave."""
    return json_line(name).replace("`", "\\u0060")
