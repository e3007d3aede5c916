"""Interface of the kinds of task.

Torch, transformers and datasets are imported inside the methods, so that checking a task file needs none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from peft_lab.data import labels as label_column
from peft_lab.data.row_checks import RowFault, column_faults
from peft_lab.data.task_schema import PROMPT_IDS
from peft_lab.errors import ConfigError
from peft_lab.metrics.baselines import Baseline
from peft_lab.metrics.predictions import Predictions
from peft_lab.registry import KindInfo

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedModel

    from peft_lab.data.profile import DataProfile, Proposal
    from peft_lab.data.task_schema import Task


class Kind:
    """Base of all kinds of task.

    A subclass sets `info`, its card, and implements the methods that raise here.

    Attributes:
        info: the card.
        text_columns: canonical columns of texts, in which a blank one is a fault.
        answer_images: keys of answers that are PIL images, which the command writes as files.
        ranks_labels: `predict` takes `top_k`, the number of labels in an answer.
        labelled: the head has an output for each label name, which the data say if the task does not.
        trainer_labels: columns of preprocessed rows that hold the answers, `Trainer`'s `label_names`.
        preprocess_logits_for_metrics: `Trainer`'s hook, for kinds whose logits are too big to be kept.
        raw_baseline: its baselines read rows before preprocessing, such as words and texts.
        keeps_labels: the metrics need the answers of all rows at once; False where `preprocess_logits_for_metrics` has
            compared them already, and they would take much memory, such as masks.
        predicts_tokens: `preprocess_logits_for_metrics` gives predicted tokens and log-probabilities of the true ones,
            so that a comparison can measure its loss for each token.
        scores_tokens: its predictions are predicted tokens and log-probabilities of the true ones, both (n, t - 1); a
            loss in chunks gives them without the hook.
    """

    info: ClassVar[KindInfo]
    text_columns: ClassVar[tuple[str, ...]] = ()
    ranks_labels: ClassVar[bool] = False
    answer_images: ClassVar[tuple[str, ...]] = ()
    labelled: ClassVar[bool] = False
    trainer_labels: ClassVar[tuple[str, ...]] = ("labels",)
    raw_baseline: ClassVar[bool] = False
    predicts_tokens: ClassVar[bool] = False
    scores_tokens: ClassVar[bool] = False
    keeps_labels: ClassVar[bool] = True
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None

    @property
    def name(self) -> str:
        """Name of the kind."""
        return self.info.name

    def check(self, task: Task) -> None:
        """Raise `TaskError` if the values of a task do not fit together.

        The schema has been checked already.
        """

    def propose(self, profile: DataProfile) -> Proposal | None:
        """Proposal of this kind for somebody's data; None if their columns do not fit it.

        Imports nothing heavy, as `check`.
        """
        return None

    def cast(self, dataset: Dataset, task: Task) -> Dataset:
        """Cast the canonical columns to their types.

        Raises `TaskError` if they cannot have them.
        """
        return dataset

    def row_faults(self, dataset: Dataset, task: Task) -> list[RowFault]:
        """Rows that no model can learn from, such as those without a text; `label` has a check of its own.

        What becomes of them is said by `empty_rows` of the task.
        """
        return column_faults(dataset, task, self.text_columns)

    def class_names(self, task: Task, train: Dataset, skip: Collection[int] = ()) -> tuple[str, ...] | None:
        """Names of the classes in the order of the model's outputs; None without classes.

        By default they are those of the column `label`.

        Args:
            task: the task.
            train: all rows of train with canonical columns; the first ones of a stream.
            skip: positions of rows that do not count.
        """
        return label_column.names_of(task, train, skip)

    def encode_labels(
        self, task: Task, split: str, dataset: Dataset, labels: tuple[str, ...] | None, skip: Collection[int]
    ) -> Dataset:
        """Data set whose answers are numbers of classes or values; by default those of the column `label`.

        Rows at the positions `skip` are going to be dropped. Raises `TaskError` for an answer that is none.
        """
        return label_column.encode(task, split, dataset, labels, skip)

    def reads_texts(self, task: Task) -> bool:
        """Test whether an input of a prediction is a text, so that the name of a file is a mistake."""
        return False

    def input_files(self, task: Task) -> tuple[str, ...]:
        """Endings of the files that are inputs of a prediction, such as ".png"; empty where inputs are no files."""
        return ()

    def smooths_labels(self, task: Task) -> bool:
        """Test whether labels are numbers of classes, which `label_smoothing_factor` can spread."""
        return self.trainer_labels == ("labels",) and task.problem_type == "single_label_classification"

    def task_type(self, task: Task) -> str | None:
        """Task type of a model in peft; None where peft has none."""
        return self.info.task_type

    def pipeline_tag(self, task: Task) -> str:
        """Name of a model's purpose on the Hub."""
        return self.info.pipeline_tag

    def auto_class(self, task: Task) -> Any:
        """Auto class of transformers that loads a backbone with this kind's head."""
        raise NotImplementedError

    def load_processor(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> Any:
        """Tokenizer or image processor of a backbone, set as the task wants."""
        raise NotImplementedError

    def load_model(
        self, model_name_or_path: str, task: Task, labels: Sequence[str] | None, **hub_kwargs: Any
    ) -> PreTrainedModel:
        """The backbone with a head for the task."""
        raise NotImplementedError

    def load_classifier(self, model_name_or_path: str, task: Task, **hub_kwargs: Any) -> PreTrainedModel:
        """Backbone with the head that it was trained with.

        Raises `ConfigError` if it has none.
        """
        raise ConfigError(f'A method that keeps the head of an image classifier does not go with kind "{self.name}".')

    def check_processor(self, processor: Any, task: Task, model: PreTrainedModel) -> None:
        """Raise `ConfigError` if the model cannot take what the processor makes."""

    def adapter_settings(self, processor: Any, task: Task, labels: Sequence[str] | None) -> dict[str, Any]:
        """Config fields of a method that processor and labels decide."""
        return {}

    def preprocess(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        """Data set as `Trainer` takes it.

        Its columns are arguments of the model's forward, and `labels`.

        A column `prompt_ids` of numbers, which is there for methods that choose prompts by row, is left as it is.
        """
        raise NotImplementedError

    def rows_to_score(self, dataset: Dataset, processor: Any, task: Task, model: Any) -> Dataset:
        """Rows before preprocessing, with further columns that `compute_metrics` needs; by default as they are.

        Args:
            dataset: the rows that `preprocess` gets, of a split that is scored.
            processor, task, model: as for `preprocess`.
        """
        return dataset

    def evaluation_rows(self, rows: Dataset, processor: Any, task: Task) -> Dataset:
        """Preprocessed rows as an evaluation takes them.

        A kind whose training draws at random, such as which tokens are masked, draws here once and for all, so that
        each evaluation of each run scores the same.
        """
        return rows

    def packed_length(self, processor: Any, task: Task, model: Any) -> int | None:
        """Tokens of a packed sequence; None for kinds whose rows cannot be packed.

        Their rows have `input_ids`, `labels` of the same length, and `attention_mask`.
        """
        return None

    def data_collator(self, processor: Any, task: Task, model: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Function that joins preprocessed rows into a batch."""
        raise NotImplementedError

    def compute_metrics(
        self, task: Task, labels: Sequence[str] | None, rows: Dataset | None = None
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        """`Trainer`'s function from predictions to the task's metrics, by name.

        Args:
            task, labels: the task and the names of its classes.
            rows: the scored rows before preprocessing, as `rows_to_score` gives them, for metrics that need more than
                numbers, such as texts.
        """
        raise NotImplementedError

    def row_predictions(
        self, prediction: EvalPrediction, task: Task, rows: Dataset | None = None
    ) -> Predictions | None:
        """Predictions for each row of an evaluation; None without any.

        Args:
            prediction: outputs and answers of all rows.
            task, rows: as for `compute_metrics`.
        """
        return None

    def baseline(self, task: Task, labels: Sequence[str] | None, train: Dataset, rows: Dataset) -> Baseline | None:
        """Scores of a predictor that sees no input; None if undefined.

        Args:
            task, labels: as for `compute_metrics`.
            train: preprocessed training rows, whose answers the predictor knows; with `raw_baseline`, as they were
                before.
            rows: rows that it is scored on, likewise.
        """
        return None

    def chance(self, task: Task, labels: Sequence[str] | None, rows: Dataset) -> Baseline | None:
        """Scores of guessing among the answers; None where they are not counted.

        Args:
            task, labels, rows: as for `baseline`.
        """
        return None

    def tunes(self, task: Task) -> bool:
        """Test whether the task leaves some of its options to be chosen on the validation rows."""
        return False

    def tune(self, task: Task, labels: Sequence[str] | None, prediction: EvalPrediction) -> dict[str, Any]:
        """Options of the task that are chosen on validation rows, after training; empty if none are.

        A run keeps them, and its evaluations and predictions take them.

        Args:
            task, labels: as for `compute_metrics`.
            prediction: outputs and answers of all validation rows.
        """
        return {}

    def generation_scores(
        self, model: Any, processor: Any, dataset: Dataset, task: Task, batch_size: int = 16
    ) -> dict[str, list[float]]:
        """Columns of the metrics of the written text, with a number for each row.

        Empty for kinds of task in which it writes none. `peft_lab.metrics.per_row.written_metrics` makes the metrics
        of them.

        `rows` are not preprocessed.
        """
        return {}

    def generation_metrics(
        self, model: Any, processor: Any, dataset: Dataset, task: Task, batch_size: int = 16
    ) -> dict[str, float]:
        """Metrics of the written text over all rows."""
        from peft_lab.metrics.per_row import written_metrics

        return written_metrics(self.generation_scores(model, processor, dataset, task, batch_size))

    def predict(self, model: Any, processor: Any, inputs: Sequence[Any], task: Task, batch_size: int = 32) -> list[Any]:
        """Answers to raw inputs, in order."""
        raise NotImplementedError

    def predict_with_prompts(
        self,
        model: Any,
        processor: Any,
        inputs: Sequence[Any],
        task: Task,
        batch_size: int,
        ids: Sequence[int] | None,
        **options: Any,
    ) -> list[Any]:
        """Answers to raw inputs, in order, each with its own prompts.

        Args:
            model, processor, inputs, task, batch_size: as for `predict`.
            ids: number of the prompts of each input; None if the method chooses none by row.
            options: what `predict` of this kind takes besides, such as `top_k` where it `ranks_labels`.
        """
        if ids is None:
            return self.predict(model, processor, inputs, task, batch_size, **options)
        import torch

        from peft_lab.tuners.forward_context import row_inputs

        found: list[Any] = []
        for start in range(0, len(inputs), batch_size):
            chosen = slice(start, start + batch_size)
            # `generate` takes no arguments of ours, so the numbers reach the forward through a context
            with row_inputs(**{PROMPT_IDS: torch.tensor(ids[chosen])}):
                found += self.predict(model, processor, inputs[chosen], task, batch_size, **options)
        return found
