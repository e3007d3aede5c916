"""Rows as a model sees them: tokens of a backbone's tokenizer, with its special ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from peft_lab.data import prompt_column
from peft_lab.data.task_registry import kind
from peft_lab.data.task_schema import PROMPT_IDS, Task
from peft_lab.errors import ConfigError, PeftLabError

if TYPE_CHECKING:
    from datasets import Dataset

#: Rows that are shown, and characters of a text of them.
_SHOWN, _CHARACTERS = 3, 400
#: Column of tokens of preprocessed rows.
_TOKENS = "input_ids"


class ModelView:
    """Processor and config of a backbone, which a kind of task preprocesses rows for.

    Args:
        task: the task.
        model_name_or_path: folder or Hub id of the backbone.
        name: its name in messages.

    Raises:
        ConfigError: there is no such backbone, or none for this kind of task.
    """

    def __init__(self, task: Task, model_name_or_path: str, name: str) -> None:
        from transformers import AutoConfig

        self.task, self.kind = task, kind(task.kind)
        try:
            self.processor = self.kind.load_processor(model_name_or_path, task)
            # limits of the rows stand in the config, and no weight is needed
            self.model = SimpleNamespace(config=AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False))
        except PeftLabError:
            raise
        # damaged files end transformers and tokenizers by errors of any type
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f'Backbone "{name}" cannot be loaded for kind "{task.kind}": {reason}') from error

    def preprocessed(self, rows: Dataset) -> Dataset:
        """Rows as the model takes them."""
        if {PROMPT_IDS, *self.task.number_columns} & {*rows.column_names}:
            rows = prompt_column.for_model(rows, self.model, self.task)
        return self.kind.preprocess(rows, self.processor, self.task, self.model)

    def lengths(self, rows: Dataset) -> list[int]:
        """Numbers of tokens of preprocessed rows; none for those without tokens."""
        if _TOKENS not in rows.column_names:
            return []
        return [len(_first(ids)) for ids in rows[_TOKENS][:]]

    def examples(self, rows: Dataset, labels: Sequence[str] | None) -> list[dict[str, Any]]:
        """First rows with their tokens written out; none for those without tokens."""
        if _TOKENS not in rows.column_names:
            return []
        found = []
        for row in rows.select(range(min(_SHOWN, len(rows)))):
            shown: dict[str, Any] = {"model reads": self._written(row[_TOKENS])}
            if "labels" in row:
                shown["model learns"] = self._answer(row["labels"], labels)
            found.append(shown)
        return found

    def _written(self, ids: Any) -> Any:
        """Text of tokens, or of each list of them, special ones included."""
        if ids and isinstance(ids[0], list):
            return [self._written(each) for each in ids]
        return _shortened(self.processor.decode(ids, skip_special_tokens=False))

    def _answer(self, answer: Any, labels: Sequence[str] | None) -> Any:
        """Answer of a row: the name of its class, or the text of the tokens that a loss is taken on."""
        if isinstance(answer, int) and labels is not None:
            return labels[answer]
        if not isinstance(answer, list) or not all(isinstance(each, int) for each in answer):
            return answer
        # -100 marks tokens without a loss
        kept = [each for each in answer if each >= 0]
        return [labels[each] for each in kept] if labels is not None else self._written(kept)


def plain_rows(task: Task, rows: Dataset) -> list[dict[str, Any]]:
    """First rows by their columns, or prompt and answer of a template."""
    from datasets import ClassLabel

    found = []
    for row in rows.select(range(min(_SHOWN, len(rows)))):
        if task.template is not None:
            prompt, answer = task.template.render(row)
            found.append({"prompt": _shortened(prompt), "answer": _shortened(answer)})
            continue
        shown = {}
        for name, value in row.items():
            feature = getattr(rows.features[name], "feature", rows.features[name])
            names = feature.names if isinstance(feature, ClassLabel) else None
            shown[name] = _as_text(value) if names is None else _named(value, names)
        found.append(shown)
    return found


def _named(value: Any, names: Sequence[str]) -> Any:
    """Name of a class, or names of several."""
    return [names[each] for each in value] if isinstance(value, list) else names[value]


def _first(ids: Sequence[Any]) -> Sequence[Any]:
    """Tokens of a row; of several lists, all of them."""
    return list(chain.from_iterable(ids)) if ids and isinstance(ids[0], list) else ids


def _as_text(value: Any) -> Any:
    if hasattr(value, "size") and hasattr(value, "mode"):
        return f"image of {value.size[0]} x {value.size[1]} pixels"
    if isinstance(value, str):
        return _shortened(value)
    return value if isinstance(value, (int, float, bool, type(None))) else _shortened(str(value))


def _shortened(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}..."
