"""SLCA: a linear head, aligned on features drawn from a Gaussian for each class.

Source: Zhang et al. 2023, SLCA: Slow Learner with Classifier Alignment, arXiv:2303.05118. Written from the equations.

Readings: this is the alignment alone, on a frozen backbone; the slow rate of the backbone is an option of a run. The
head of each task starts as a logistic regression on the task's own classes, on features standardised by those of the
first task; the authors train it by gradient steps together with the backbone. They align from the second task on and
forget the result before the next one; here every task is aligned, and the next starts from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import cross_entropy

from peft_lab.tuners import MethodInfo
from peft_lab.tuners.estimators import (
    Array,
    EstimatorConfig,
    LinearClassifier,
    LinearEstimatorHead,
    linear_arrays,
    register_head,
)

METHOD = MethodInfo(
    name="slca",
    title="SLCA",
    paper="2303.05118",
    place="head",
    config="SLCAConfig",
    roles=("head",),
    capabilities=("mixed_batch",),
    learning_rate=0.0,
    budget=(0.6, 0.1),
)

#: Added to the diagonal of each class's covariance.
_RIDGE = 1e-4


class SLCA(LinearClassifier):
    """Linear head with Gaussian classifier alignment.

    Rows of class c are drawn from N(mean_c (0.9 + 0.1 (t_c + 1) / (T + 1)), covariance_c), with the class's task t_c
    and the current one T. The loss is the cross entropy of logits / (mean over tasks of the task's norm) / temperature.
    The estimator keeps width² numbers for each class; a saved head does not.

    Args:
        samples_per_class: rows that are drawn for each class and epoch.
        epochs: passes over the drawn rows.
        alignment_rate: rate of SGD with momentum 0.9 and weight decay 5e-4, with a cosine schedule.
        batch_size: drawn rows in a step.
        temperature: of the loss; the authors take 0.05 for Cars.
        random_state: seed of the draws.
    """

    def __init__(
        self,
        samples_per_class: int = 256,
        epochs: int = 5,
        alignment_rate: float = 0.01,
        batch_size: int = 128,
        temperature: float = 0.1,
        random_state: int = 0,
    ) -> None:
        self.samples_per_class = samples_per_class
        self.epochs = epochs
        self.alignment_rate = alignment_rate
        self.batch_size = batch_size
        self.temperature = temperature
        self.random_state = random_state

    def fit(self, X: Array, y: Array) -> SLCA:
        """Fit to features (rows, width) of the first task, and align."""
        X, y = self._labelled(X, y)
        self.scaler_ = StandardScaler().fit(X)
        width = X.shape[1]
        self.classes_, self.tasks_ = y[:0], np.zeros(0, dtype=int)
        self.means_, self.covariances_ = np.zeros((0, width)), np.zeros((0, width, width))
        self._set_linear(np.zeros((0, width)), np.zeros(0), self.scaler_.mean_, 1 / self.scaler_.scale_)
        return self._add_task(X, y)

    def partial_fit(self, X: Array, y: Array, classes: Array | None = None) -> SLCA:
        """Add a task, whose rows replace what is known of their classes, and align."""
        if not hasattr(self, "scaler_"):
            return self.fit(X, y)
        return self._add_task(*self._labelled(X, y, reset=False))

    def _add_task(self, X: Array, y: Array) -> SLCA:
        rows, labels = self.scaler_.transform(X), np.unique(y)
        task = self.tasks_.max(initial=-1) + 1
        coef, intercept = _head(rows, y, labels)
        means = [rows[y == label].mean(0) for label in labels]
        covariances = [_covariance(rows[y == label]) for label in labels]
        old = ~np.isin(self.classes_, labels)
        classes = np.concatenate([self.classes_[old], labels])
        order = np.argsort(classes)
        self.classes_ = classes[order]
        self.tasks_ = np.concatenate([self.tasks_[old], np.full(len(labels), task)])[order]
        self.means_ = np.concatenate([self.means_[old], means])[order]
        self.covariances_ = np.concatenate([self.covariances_[old], covariances])[order]
        head = [np.concatenate([self.coef_[old], coef]), np.concatenate([self.intercept_[old], intercept])]
        aligned = self._align(*(torch.from_numpy(values[order]) for values in head))
        self.coef_, self.intercept_ = (values.numpy() for values in aligned)
        return self

    def _align(self, coef: Tensor, intercept: Tensor) -> list[Tensor]:
        """Train the head on drawn rows."""
        random = np.random.default_rng(self.random_state)
        # the caller may read its data without gradients
        with torch.inference_mode(False), torch.enable_grad():
            parameters = [coef.clone().requires_grad_(), intercept.clone().requires_grad_()]
            optimizer = torch.optim.SGD(parameters, self.alignment_rate, momentum=0.9, weight_decay=5e-4)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(self.epochs, 1))
            for _ in range(self.epochs):
                rows, classes = self.draw(random)
                for part in torch.from_numpy(random.permutation(len(rows))).split(self.batch_size):
                    loss = cross_entropy(self._normalised(rows[part] @ parameters[0].T + parameters[1]), classes[part])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                schedule.step()
        return [parameter.detach() for parameter in parameters]

    def draw(self, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draw standardised rows (classes x samples, width) and the indices of their classes."""
        tasks = self.tasks_
        shrunk = self.means_ * (0.9 + 0.1 * (tasks + 1) / (tasks.max() + 1))[:, None]
        rows = []
        for mean, covariance in zip(shrunk, self.covariances_, strict=True):
            noise = random.standard_normal((self.samples_per_class, len(mean)))
            rows.append(mean + noise @ np.linalg.cholesky(covariance).T)
        classes = np.repeat(np.arange(len(tasks)), self.samples_per_class)
        return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(classes)

    def _normalised(self, logits: Tensor) -> Tensor:
        """Logits divided by the mean over tasks of the norm of a task's logits, and by the temperature."""
        norms = []
        for task in np.unique(self.tasks_):
            norms.append(logits[:, torch.from_numpy(self.tasks_ == task)].norm(dim=1, keepdim=True))
        return logits / (torch.cat(norms, 1).mean(1, keepdim=True) + 1e-7) / self.temperature


def _head(rows: Array, y: Array, labels: Array) -> tuple[Array, Array]:
    """Logistic regression of a task: weights (classes, width) and biases; zeros for a task of one class."""
    if len(labels) == 1:
        return np.zeros((1, rows.shape[1])), np.zeros(1)
    solver = LogisticRegression(C=0.1, max_iter=1000).fit(rows, y)
    coef, intercept = solver.coef_, solver.intercept_
    # Of two classes there is the difference alone.
    if len(labels) == 2:
        coef, intercept = np.concatenate([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
    return coef, intercept


def _covariance(rows: Array) -> Array:
    """Covariance (width, width) of a class's rows, with a ridge; of one row the ridge alone."""
    width = rows.shape[1]
    spread = np.cov(rows, rowvar=False).reshape(width, width) if len(rows) > 1 else np.zeros((width, width))
    return spread + _RIDGE * np.eye(width)


@dataclass
class SLCAConfig(EstimatorConfig):
    """Configuration of SLCA's classifier alignment. No gradient passes the backbone; saved: K (d + 2) + 2 d numbers."""

    samples_per_class: int = field(
        default=256, metadata={"range": (1, 1e6), "help": "Rows that are drawn for each class and epoch.", "other": 16}
    )
    epochs: int = field(default=5, metadata={"range": (0, 1e4), "help": "Passes over the drawn rows.", "other": 1})
    alignment_rate: float = field(
        default=0.01,
        metadata={"range": (0, 1e3), "help": "Rate of the alignment's own SGD, on drawn features.", "other": 0.1},
    )
    batch_size: int = field(
        default=128, metadata={"range": (1, 1e6), "help": "Drawn rows in a step of the alignment.", "other": 16}
    )
    temperature: float = field(
        default=0.1, metadata={"range": (1e-6, 1e4), "help": "Of the loss of the alignment.", "other": 1.0}
    )
    random_state: int = field(default=0, metadata={"range": (0, 2**32 - 1), "help": "Seed of the draws.", "other": 1})

    estimator_class = SLCA


class SLCALayer(LinearEstimatorHead):
    """Head with the arrays of `SLCA`."""

    other_param_names = linear_arrays("slca")


register_head(METHOD, SLCAConfig, SLCALayer)
