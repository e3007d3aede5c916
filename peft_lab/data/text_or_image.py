"""Kinds of task that read texts or images, as the columns of the task say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft_lab.data.classification_kind import LabelledKind
from peft_lab.data.image_inputs import ImageInputs
from peft_lab.data.model_inputs import ModelInputs
from peft_lab.data.text_inputs import TextInputs
from peft_lab.errors import TaskError

if TYPE_CHECKING:
    from peft_lab.data.task_schema import Task

_TEXTS, _IMAGES = TextInputs(), ImageInputs()

#: Keys of a task and columns that belong to inputs of one sort.
_OF_TEXTS, _OF_IMAGES = ("text_pair", "max_length"), ("image_size",)


class TextOrImageKind(LabelledKind):
    """Base of the kinds that read the column `text` (and `text_pair`), or the column `image`.

    Their cards have both in `one_of`.
    """

    def inputs_of(self, task: Task) -> ModelInputs:
        return _IMAGES if "image" in task.columns else _TEXTS

    def check(self, task: Task) -> None:
        read, others = ("images", _OF_TEXTS) if "image" in task.columns else ("texts", _OF_IMAGES)
        given = {*task.columns, *task.model_fields_set}
        unread = next((name for name in others if name in given), None)
        if unread is not None:
            raise TaskError(f'"{unread}" has no meaning for a task that reads {read}; remove it.')

    def task_type(self, task: Task) -> str | None:
        return self.inputs_of(task).task_type

    def pipeline_tag(self, task: Task) -> str:
        return self.inputs_of(task).pipeline_tag
