"""Heads that hold the arrays of an estimator, and compute its scores in torch.

The features of the training rows are read once, the estimator is fitted to them in float64, and its arrays are kept as
float32 buffers, in rows by class. Nothing is trained by gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_lab.errors import ConfigError
from peft_lab.tuners.estimators.classifiers import LinearClassifier
from peft_lab.tuners.head_layer import HeadInput, HeadLayer

#: Arrays of a linear estimator, without the method's prefix.
_LINEAR = ("center", "scale", "coef", "intercept", "counts")
#: How far the score of a class without training rows lies below the lowest other one.
_BELOW = 100.0


class EstimatorHead(HeadLayer):
    """Head with the arrays of an estimator.

    A method supplies `shapes` of the arrays, `arrays` of a fitted estimator, and `scores` in torch. Every head holds
    `counts` (classes,), the training rows of each class, which are zeros until it is fitted.
    """

    reads_tokens = True

    def __init__(self, base_layer: Any, name: str) -> None:
        super().__init__(base_layer, name)
        self.data_param_names = self.other_param_names
        #: Adapters whose arrays say nothing yet.
        self.unfitted: set[str] = set()
        #: Estimator of each adapter as its config makes it, for facts that hold before it is fitted.
        self.plain: dict[str, Any] = {}

    # What a method supplies -------------------------------------------------------------------------------------

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays by name without prefix, without `counts`."""
        raise NotImplementedError

    def arrays(self, estimator: Any, config: Any) -> dict[str, Any]:
        """Arrays of a fitted estimator by name without prefix, without `counts`."""
        raise NotImplementedError

    def scores(self, adapter: str, features: Tensor) -> Tensor:
        """Scores (rows, classes) of features (rows, width)."""
        raise NotImplementedError

    def fit(self, adapter: str, rows: Any, labels: Any, unlabelled: Any) -> Any:
        """Fit the array estimator of an adapter to features (rows, width) and labels (rows,).

        `unlabelled` are the features of rows without a label; None if there are none.
        """
        config = self.configs[adapter]
        more = {} if unlabelled is None else {config.unlabelled_rows: unlabelled}
        return config.estimator().fit(rows, labels, **more)

    # What is the same for all -----------------------------------------------------------------------------------

    def feature_width(self, config: Any) -> int:
        """Width of the features that an adapter reads."""
        return self.facts.token_width if self.pooling(config) == "mean" else self.facts.width

    def pooling(self, config: Any) -> str:
        """Feature that an adapter reads, "head" or "mean"."""
        if config.pooling != "auto":
            return str(config.pooling)
        # The pooler of a text encoder is made for another task, while images have a class token or a mean of their own.
        return "head" if getattr(self.whole[0], "main_input_name", "") == "pixel_values" else "mean"

    def value(self, adapter: str, name: str) -> Tensor:
        """Array of an adapter by its name without prefix."""
        found: Tensor = getattr(self, f"{self.info.name}_{name}")[adapter]
        return found

    def initial_buffers(self, adapter: str, config: Any) -> dict[str, Tensor]:
        self.unfitted.add(adapter)
        self.plain[adapter] = config.estimator()
        shapes = {**self.shapes(config), "counts": (self.facts.classes,)}
        return {f"{self.info.name}_{name}": torch.zeros(shape) for name, shape in shapes.items()}

    def _get_available_adapters(self) -> set[str]:
        # peft's own goes by parameters.
        return set(self.configs)

    def delete_adapter(self, adapter_name: str) -> None:
        self.unfitted.discard(adapter_name)
        self.plain.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def logits(self, adapter: str, features: HeadInput) -> Tensor:
        # Loaders of several packages write the arrays in ways of their own, so they are looked at once.
        if adapter in self.unfitted and bool(self.value(adapter, "counts").any()):
            self.unfitted.discard(adapter)
        if adapter in self.unfitted:
            raise ConfigError(
                f'Adapter "{adapter}" of method "{self.info.name}" is not fitted: it has no answers before it has read '
                "training data. Call peft_lab.read_training_data(model, batches), or train it with peft_lab.train."
            )
        scores = self.scores(adapter, self.pool(adapter, features))
        # A class without training rows is never the answer, and the loss stays finite.
        return torch.where(self.known_classes(adapter), scores, scores.amin(-1, keepdim=True) - _BELOW)

    def known_classes(self, adapter: str) -> Tensor:
        """Classes that may be the answer, bool (classes,): those with training rows."""
        return self.value(adapter, "counts") != 0

    def pool(self, adapter: str, features: HeadInput) -> Tensor:
        """Feature (rows, width) that an adapter reads of each row.

        Raises:
            ConfigError: the backbone gives no tokens to take the mean of.
        """
        if self.pooling(self.configs[adapter]) == "head":
            return features.pooled
        tokens, mask = features.tokens, features.mask
        if tokens is None:
            raise ConfigError('pooling="mean" reads the last hidden states, and this backbone gives its head none.')
        if mask is None:
            return tokens.mean(1)
        weights = mask.to(tokens)[..., None]
        return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)

    # Training data ----------------------------------------------------------------------------------------------

    def wants_data(self) -> bool:
        """Test whether an adapter is active, which is fitted to the training data."""
        return self.first[0] is self and bool(self._active())

    def read_data(self, batches: Iterable[Mapping[str, Any]], epoch: int) -> None:
        """Fit the active adapter to the training data; `peft_lab.read_training_data` calls this."""
        active = self._active()
        if epoch > 0:
            return
        rows, labels = [], []
        for features, given in self.read_rows(active[0], batches):
            rows.append(features.float().cpu().numpy())
            labels.append(self._class_indices(given))
        if not rows:
            raise ConfigError(f'Method "{self.info.name}" is fitted to training data, and there are no rows.')
        self.fit_rows(active[0], np.concatenate(rows), np.concatenate(labels))

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.configs]

    def read_rows(self, adapter: str, batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Tensor, Any]]:
        """Yield features (rows, width) and labels of batches."""
        for features, labels in self.read_features(batches):
            yield self.pool(adapter, features), labels

    def fit_rows(self, adapter: str, rows: Any, labels: Any) -> Any:
        """Fit an adapter to features (rows, width) and labels (rows,), negative where there is none.

        Returns the array estimator.

        Raises:
            ConfigError: no row has a label, the method takes no rows without labels, or the estimator refuses them.
        """
        config, known = self.configs[adapter], labels >= 0
        if not known.any():
            raise ConfigError(f'Method "{self.info.name}" is fitted to labelled rows, and none has a label.')
        if not known.all() and not config.unlabelled_rows:
            raise ConfigError(
                f'Method "{self.info.name}" takes no rows without labels: {int((~known).sum())} of {len(labels)} rows '
                "have a negative one; leave them out."
            )
        unlabelled = None if known.all() else rows[~known]
        try:
            estimator = self.fit(adapter, rows[known], labels[known], unlabelled)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f'Method "{self.info.name}" cannot be fitted to these rows: {error}') from error
        counts = np.bincount(labels[known], minlength=self.facts.classes)
        self.store(adapter, {**self.arrays(estimator, config), "counts": counts})
        return estimator

    @torch.no_grad()
    def store(self, adapter: str, arrays: Mapping[str, Any]) -> None:
        """Store arrays by name without prefix."""
        for name, values in arrays.items():
            buffers = getattr(self, f"{self.info.name}_{name}")
            before = buffers[adapter]
            found = torch.as_tensor(values).to(before)
            # In place where the shape is the same, because a compiled model has the tensor itself.
            if found.shape == before.shape:
                before.copy_(found)
            else:
                buffers[adapter] = found
        self.unfitted.discard(adapter)

    def by_class(self, estimator: Any, values: Any) -> Any:
        """Array with a row for each class of the head, zeros where the estimator has seen none."""
        whole = np.zeros((self.facts.classes, *values.shape[1:]))
        whole[estimator.classes_] = values
        return whole

    def _class_indices(self, labels: Tensor) -> Any:
        """Labels of a batch as class indices, int64 (rows,); negative ones are rows without a label."""
        if labels.ndim != 1 or labels.dtype.is_floating_point:
            got = f"{labels.dtype} {list(labels.shape)}"
        elif labels.numel() and int(labels.max()) >= self.facts.classes:
            got = f"{int(labels.max())}"
        else:
            return labels.cpu().numpy().astype(np.int64)
        raise ConfigError(
            f'Method "{self.info.name}" is fitted by class: labels must be whole numbers below {self.facts.classes}, '
            f"one for each row, got {got}."
        )


class LinearEstimatorHead(EstimatorHead):
    """Head with the arrays of a `LinearClassifier`."""

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        classes, width = self.facts.classes, self.feature_width(config)
        return {"center": (width,), "scale": (width,), "coef": (classes, width), "intercept": (classes,)}

    def arrays(self, estimator: LinearClassifier, config: Any) -> dict[str, Any]:
        return {
            "center": estimator.center_,
            "scale": estimator.scale_,
            "coef": self.by_class(estimator, estimator.coef_),
            "intercept": self.by_class(estimator, estimator.intercept_),
        }

    def scores(self, adapter: str, features: Tensor) -> Tensor:
        z = (features - self.value(adapter, "center")) * self.value(adapter, "scale")
        estimator = self.plain[adapter]
        if estimator.unit_norm:
            z = torch.nn.functional.normalize(z, dim=-1)
        scores = z @ self.value(adapter, "coef").T + self.value(adapter, "intercept")
        return scores - (z**2).sum(-1, keepdim=True) / 2 if estimator.squared_distance else scores


def linear_arrays(name: str) -> tuple[str, ...]:
    """Names of a linear estimator's arrays with a method's prefix."""
    return tuple(f"{name}_{part}" for part in _LINEAR)
