"""Table of the metrics that ship with peft-lab. Imports nothing heavy.

Each function imports what it computes with, because checking a task file needs the names alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: name in task files and results.
        function: (predictions, references, **options) -> float.
        takes_probabilities: predictions are probabilities of the classes, (n, classes), instead of classes, (n,).
        greater_is_better: False for an error, such as perplexity.
        package: package that the function needs and that is not installed with peft-lab itself.
        extra: extra of peft-lab that installs the package.
    """

    name: str
    function: Callable[..., float]
    takes_probabilities: bool = False
    greater_is_better: bool = True
    package: str = ""
    extra: str = ""

    def compute(self, predictions: Any, references: Any = None, **options: Any) -> dict[str, float]:
        """Compute the metric, called and returned as by an `evaluate` module."""
        return {self.name: float(self.function(predictions, references, **options))}

    @property
    def takes_weights(self) -> bool:
        """True if rows can be weighted (`sample_weight`), so that the metric follows from counts of pairs."""
        return "sample_weight" in inspect.signature(self.function).parameters


def accuracy(predictions: ArrayLike, references: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
    """Share of predictions that equal their reference; class indices, (n,)."""
    from sklearn.metrics import accuracy_score

    return accuracy_score(references, predictions, sample_weight=sample_weight)


def f1(
    predictions: ArrayLike,
    references: ArrayLike,
    average: str = "auto",
    labels: Sequence[int] | None = None,
    sample_weight: ArrayLike | None = None,
) -> float:
    """F1 score of class indices, (n,).

    A class that is never predicted counts as 0.

    Args:
        predictions: predicted classes.
        references: true classes.
        average: average of scikit-learn; `auto` is `binary` (of class 1) while all values are 0 or 1, else `macro`.
        labels: classes that a macro average is taken over, absent ones included.
        sample_weight: weights of the rows, (n,).
    """
    import numpy as np
    from sklearn.metrics import f1_score

    if average == "auto":
        found = np.union1d(predictions, references)
        average = "binary" if set(found.tolist()) <= {0, 1} else "macro"
    # scikit-learn takes `labels` of a binary average for a selection and warns
    labels = None if average == "binary" else labels
    return f1_score(
        references, predictions, average=average, labels=labels, sample_weight=sample_weight, zero_division=0
    )


def f1_micro(predictions: ArrayLike, references: ArrayLike) -> float:
    """F1 of all labels of all rows together; 0 or 1 for each label, (n, labels)."""
    from sklearn.metrics import f1_score

    return f1_score(references, predictions, average="micro", zero_division=0)


def f1_macro(predictions: ArrayLike, references: ArrayLike) -> float:
    """Mean of the F1 of each label; 0 or 1 for each label, (n, labels)."""
    from sklearn.metrics import f1_score

    return f1_score(references, predictions, average="macro", zero_division=0)


def mean_average_precision(predictions: ArrayLike, references: ArrayLike) -> float:
    """Mean of the average precision of each label that some row has; 0 without any.

    Args:
        predictions: scores, (n, labels).
        references: 0 or 1, (n, labels).
    """
    import numpy as np
    from sklearn.metrics import average_precision_score

    scores, references = np.asarray(predictions), np.asarray(references)
    known = np.flatnonzero(references.sum(0))
    found = [average_precision_score(references[:, label], scores[:, label]) for label in known]
    return float(np.mean(found)) if found else 0.0


def matthews_correlation(
    predictions: ArrayLike, references: ArrayLike, sample_weight: ArrayLike | None = None
) -> float:
    """Matthews correlation coefficient of class indices, (n,); 0 by chance."""
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(references, predictions, sample_weight=sample_weight)


def ece(predictions: ArrayLike, references: ArrayLike, bins: int | None = None) -> float:
    """Expected calibration error of probabilities, (n, classes), with 15 equal bins."""
    import numpy as np

    from peft_lab.metrics.calibration import BINS, expected_calibration_error

    probabilities = np.asarray(predictions, dtype=np.float32)
    correct = probabilities.argmax(-1) == np.asarray(references)
    return expected_calibration_error(probabilities.max(-1), correct.astype(float), bins or BINS)


def pearsonr(predictions: ArrayLike, references: ArrayLike) -> float:
    """Pearson's linear correlation of numbers, (n,); 0 where one side is constant."""
    from scipy import stats

    return _correlation(stats.pearsonr, predictions, references)


def spearmanr(predictions: ArrayLike, references: ArrayLike) -> float:
    """Spearman's rank correlation of numbers, (n,); 0 where one side is constant."""
    from scipy import stats

    return _correlation(stats.spearmanr, predictions, references)


def _correlation(function: Callable[..., Any], predictions: ArrayLike, references: ArrayLike) -> float:
    import numpy as np

    x, y = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
    # undefined then; as 0, so that a model that predicts one value is never the best checkpoint
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return function(y, x).statistic


def mae(predictions: ArrayLike, references: ArrayLike) -> float:
    """Mean absolute error of numbers, (n,), in their own unit."""
    from sklearn.metrics import mean_absolute_error

    return mean_absolute_error(references, predictions)


def rmse(predictions: ArrayLike, references: ArrayLike) -> float:
    """Root of the mean squared error of numbers, (n,), in their own unit."""
    from sklearn.metrics import root_mean_squared_error

    return root_mean_squared_error(references, predictions)


def r2(predictions: ArrayLike, references: ArrayLike) -> float:
    """Coefficient of determination of numbers, (n,); 0 for their mean.

    Constant references give 1 where every prediction is right, else 0, as in scikit-learn.
    """
    import numpy as np
    from sklearn.metrics import r2_score

    # scikit-learn leaves one row undefined
    if len(np.atleast_1d(references)) < 2:
        return 0.0
    return r2_score(references, predictions)


def perplexity(predictions: ArrayLike, references: None = None) -> float:
    """Exponential of the mean negative log-probability; every token counts the same.

    Args:
        predictions: natural log-probabilities of the reference tokens, (n,).
        references: none; the probabilities are those of the reference tokens already.
    """
    import numpy as np

    return np.exp(-np.mean(np.asarray(predictions, dtype=np.float64)))


def exact_match(predictions: Sequence[str], references: Sequence[str], ignore_case: bool = False) -> float:
    """Share of texts that equal their reference, character by character."""
    change = str.casefold if ignore_case else str
    hits = [change(found) == change(wanted) for found, wanted in zip(predictions, references, strict=True)]
    return sum(hits) / len(hits)


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """ROUGE-L (Lin 2004) by Google Research's `rouge_score`.

    Mean F1 of the longest common subsequence of words.

    Lower case, letters a-z and digits alone, no stemming.
    """
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    pairs = list(zip(predictions, references, strict=True))
    return sum(scorer.score(wanted, found)["rougeL"].fmeasure for found, wanted in pairs) / len(pairs)


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """BLEU (Papineni et al. 2002) of a corpus by sacrebleu, from 0 to 100; one reference a text, 13a tokens."""
    from peft_lab.metrics.bleu import bleu_of_counts, counts

    return bleu_of_counts(counts(predictions, references).sum(0, keepdims=True))[0]


def mean_iou(predictions: Sequence[ArrayLike], references: Sequence[ArrayLike]) -> float:
    """Mean intersection over union of the classes, over the pixels of all masks; 255 does not count."""
    from peft_lab.metrics import segmentation

    return segmentation.mean_iou(predictions, references)


def pixel_accuracy(predictions: Sequence[ArrayLike], references: Sequence[ArrayLike]) -> float:
    """Share of right pixels in all masks; 255 does not count."""
    from peft_lab.metrics import segmentation

    return segmentation.pixel_accuracy(predictions, references)


_TABLE = (
    Metric("accuracy", accuracy),
    Metric("bleu", bleu, package="sacrebleu", extra="text"),
    Metric("ece", ece, takes_probabilities=True, greater_is_better=False),
    Metric("exact_match", exact_match),
    Metric("f1", f1),
    Metric("f1_macro", f1_macro),
    Metric("f1_micro", f1_micro),
    Metric("mae", mae, greater_is_better=False),
    Metric("map", mean_average_precision, takes_probabilities=True),
    Metric("matthews_correlation", matthews_correlation),
    Metric("mean_iou", mean_iou),
    Metric("pearsonr", pearsonr),
    Metric("perplexity", perplexity, greater_is_better=False),
    Metric("r2", r2),
    Metric("rmse", rmse, greater_is_better=False),
    Metric("pixel_accuracy", pixel_accuracy),
    Metric("rouge_l", rouge_l, package="rouge_score", extra="text"),
    Metric("spearmanr", spearmanr),
)

#: The metrics that ship with peft-lab, by name.
METRICS = {metric.name: metric for metric in _TABLE}
