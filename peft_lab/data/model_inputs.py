"""Interface of what a model reads: columns of texts, images or sound, and their processor.

A kind of task joins it with answers, so that labels of texts and of images are one kind's code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from peft_lab.data.row_checks import RowFault
from peft_lab.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from peft_lab.data.task_schema import Task


class ModelInputs:
    """Base of the inputs of a model.

    Attributes:
        columns: canonical columns that hold the inputs.
        texts: an input of a prediction is a text, so that the name of a file is a mistake.
        files: endings of the files that an input of a prediction may be, such as ".png".
        task_type: peft's `TaskType` of a model with a head over labels of such inputs; None where peft has none.
        pipeline_tag: the Hub's name for what such a model does.
    """

    columns: tuple[str, ...] = ()
    texts: bool = False
    files: tuple[str, ...] = ()
    task_type: str | None = None
    pipeline_tag: str = ""

    def auto_class(self) -> Any:
        """Auto class of transformers that loads a backbone with a head over labels of such inputs."""
        raise NotImplementedError

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        """Cast the input columns to their types.

        Raises `TaskError` if they cannot have them.
        """
        raise NotImplementedError

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        """Rows whose inputs are missing, blank or damaged."""
        raise NotImplementedError

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        """Tokenizer, image processor or feature extractor of a backbone, set as the task wants."""
        raise NotImplementedError

    def prepare_model(self, model: PreTrainedModel) -> None:
        """Set what a loaded model needs for such inputs, such as a padding token."""

    def load_classifier(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> PreTrainedModel:
        """Backbone with the head that it was trained with.

        Raises `ConfigError` if it has none.
        """
        raise ConfigError(f'A method that keeps the head of an image classifier does not go with kind "{task.kind}".')

    def check_processor(self, processor: Any, model: PreTrainedModel) -> None:
        """Raise `ConfigError` if the model cannot take what the processor makes."""

    def adapter_settings(self, processor: Any) -> dict[str, Any]:
        """Config fields of a method that the processor decides."""
        return {}

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        """Data set whose input columns are replaced by arguments of the model's forward.

        Other columns stay as they are.
        """
        raise NotImplementedError

    def data_collator(self, processor: Any, model: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Function that joins preprocessed rows into a batch."""
        raise NotImplementedError

    def encoder(self, inputs: Sequence[Any], processor: Any, task: Task, model: Any) -> Callable[[Sequence[int]], Any]:
        """Check raw inputs of a prediction, and return a function from consecutive positions to an encoded batch.

        Raises `TaskError` for an input that is none.
        """
        raise NotImplementedError
