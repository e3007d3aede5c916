"""Base of the kinds whose model predicts tokens: their log-probabilities, metrics, values for each row, baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from peft_lab.data.kind import Kind
from peft_lab.metrics import load_metric
from peft_lab.metrics.baselines import Baseline
from peft_lab.metrics.predictions import Predictions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction

    from peft_lab.data.task_schema import Task

IGNORED = -100


class TokenKind(Kind):
    """Base of the kinds whose labels are tokens, -100 where there is no loss.

    Attributes:
        shift: places by which a token is predicted before its own one: 1 of decoders, 0 of models that predict each
            token in its place.
        known: tokens that the baseline knows, in words.
    """

    predicts_tokens = True
    shift: ClassVar[int] = 0
    known: ClassVar[str] = "the frequencies of the training answers' tokens"

    def preprocess_logits_for_metrics(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        """Predicted tokens and the true tokens' log-probabilities, both (n, t - shift).

        `logits` have the shape (n, t, vocabulary).
        """
        import torch
        from torch.nn import functional

        # Trainer hands on a tuple where a model returns more than logits, such as hidden states
        logits = logits[0] if isinstance(logits, tuple) else logits
        # virtual tokens of a prompt method stand before the row's own
        logits, targets = logits[:, -labels.shape[1] :], labels[:, self.shift :]
        logits = logits[:, : logits.shape[1] - self.shift]
        # row by row, for log-probabilities of a whole batch over the vocabulary are as big as the logits
        losses = [
            functional.cross_entropy(row.float(), target, reduction="none", ignore_index=IGNORED)
            for row, target in zip(logits, targets, strict=True)
        ]
        return logits.argmax(-1), -torch.stack(losses)

    def compute_metrics(
        self, task: Task, labels: Sequence[str] | None, rows: Dataset | None = None
    ) -> Callable[[EvalPrediction], dict[str, float]]:
        perplexity, accuracy = load_metric("perplexity"), load_metric("accuracy")

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            predicted, log_probabilities, targets = self._shown(prediction)
            kept = targets != IGNORED
            found: dict[str, float] = {}
            if "perplexity" in task.metrics:
                found |= perplexity.compute(predictions=log_probabilities[kept])
            if "token_accuracy" in task.metrics:
                hits = accuracy.compute(predictions=predicted[kept], references=targets[kept])
                found["token_accuracy"] = hits["accuracy"]
            return found

        return compute

    def row_predictions(self, prediction: EvalPrediction, task: Task, rows: Dataset | None = None) -> Predictions:
        predicted, log_probabilities, targets = self._shown(prediction)
        # Trainer pads shorter batches with -100, in predictions as in labels
        kept = targets != IGNORED
        columns = {
            "loss": -(log_probabilities * kept).sum(-1),
            "tokens": kept.sum(-1),
            "hits": ((predicted == targets) & kept).sum(-1),
        }
        return Predictions(self.name, columns)

    def baseline(self, task: Task, labels: Sequence[str] | None, train: Dataset, rows: Dataset) -> Baseline:
        """Scores of a predictor that knows the frequencies of the training tokens."""
        import numpy as np

        known, wanted = self.training_tokens(train), self.scored_tokens(rows)
        # one more of each token, so that none of them is impossible
        counts = np.bincount(known, minlength=int(wanted.max()) + 1) + 1
        log_probabilities = np.log(counts / counts.sum())[wanted]
        found: dict[str, float] = {}
        if "perplexity" in task.metrics:
            found |= load_metric("perplexity").compute(predictions=log_probabilities)
        if "token_accuracy" in task.metrics:
            found["token_accuracy"] = float((wanted == counts.argmax()).mean())
        return Baseline(self.known, found)

    def training_tokens(self, rows: Dataset) -> Any:
        """Tokens of preprocessed training rows whose frequencies the baseline knows, (n,)."""
        return self.scored_tokens(rows)

    def scored_tokens(self, rows: Dataset) -> Any:
        """Tokens of preprocessed rows that have a loss, (n,)."""
        import numpy as np

        # a first token that none stands before is predicted by none
        tokens = np.concatenate([row[self.shift :] for row in rows["labels"][:]])
        return tokens[tokens != IGNORED]

    def _shown(self, prediction: EvalPrediction) -> tuple[Any, Any, Any]:
        """Predicted tokens, log-probabilities of the true ones, and these, all (n, t - shift)."""
        outputs: Any = prediction.predictions
        label_ids: Any = prediction.label_ids
        # the predictions are shifted already, the labels are not
        return *outputs, label_ids[:, self.shift :]
