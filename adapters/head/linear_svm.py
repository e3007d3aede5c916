"""Linear support vector machine on features that are averaged over jittered views of a row.

Readings: the first view is the row itself. Views of an image are shifted, with the border repeated, and brighter or
darker; those of a text are draws of the backbone's dropout. A row is predicted from one view, itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from peft_lab.tuners import MethodInfo
from peft_lab.tuners.estimators import (
    EstimatorConfig,
    LinearEstimatorHead,
    StandardisedClassifier,
    linear_arrays,
    register_head,
)

METHOD = MethodInfo(
    name="linear_svm",
    title="Linear support vector machine",
    paper="",
    place="head",
    config="LinearSVMConfig",
    roles=("head",),
    capabilities=("mixed_batch",),
    learning_rate=0.0,
    budget=(0.6, 0.1),
)


class LinearSVM(StandardisedClassifier):
    """scikit-learn's LinearSVC on standardised features.

    Args:
        C: inverse weight of the regulariser.
        tol: tolerance of the solver.
        max_iter: most iterations of the solver.
    """

    def __init__(self, C: float = 0.01, tol: float = 1e-4, max_iter: int = 1000) -> None:
        super().__init__(C, tol, max_iter)

    def _solver(self) -> LinearSVC:
        return LinearSVC(C=self.C, tol=self.tol, dual=False, max_iter=self.max_iter)


@dataclass
class LinearSVMConfig(EstimatorConfig):
    """Configuration of the linear support vector machine. No gradient steps; saved: K (d + 2) + 2 d numbers."""

    C: float = field(
        default=0.01, metadata={"range": (1e-12, 1e12), "help": "Inverse weight of the regulariser.", "other": 1.0}
    )
    views: int = field(
        default=4,
        metadata={
            "range": (1, 1000),
            "help": "Views of a training row whose features are averaged; the first is the row itself.",
            "untried": True,
        },
    )
    jitter: float = field(
        default=0.1,
        metadata={
            "range": (0, 0.5),
            "help": "Strength of the views: largest shift as a share of the side, and change of brightness.",
            "untried": True,
        },
    )

    estimator_class = LinearSVM


class LinearSVMLayer(LinearEstimatorHead):
    """Head with the arrays of `LinearSVM`."""

    other_param_names = linear_arrays("linear_svm")

    def runs_backbone(self, config: LinearSVMConfig) -> bool:
        return config.views > 1

    def read_rows(self, adapter: str, batches: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Tensor, Any]]:
        config = self.configs[adapter]
        for batch in batches:
            found = [self._view(adapter, batch)]
            for _ in range(config.views - 1):
                if "pixel_values" in batch:
                    images = jittered(batch["pixel_values"], config.jitter)
                    found.append(self._view(adapter, {**batch, "pixel_values": images}))
                else:
                    with _dropout(self.whole[0]):
                        found.append(self._view(adapter, batch))
            yield torch.stack(found).mean(0), batch.get("labels")

    def _view(self, adapter: str, batch: Mapping[str, Any]) -> Tensor:
        ((features, _),) = self.read_features([batch])
        return self.pool(adapter, features).float()


def jittered(images: Tensor, strength: float) -> Tensor:
    """Images (rows, channels, height, width), each shifted and of another brightness.

    Both are drawn for each image: shifts of at most `strength` of the side, and a factor from 1 - strength to
    1 + strength.
    """
    height, width = images.shape[-2:]
    most = round(strength * min(height, width))
    padded = nn.functional.pad(images, (most,) * 4, mode="replicate")
    views = []
    for image, (down, right) in zip(padded, torch.randint(2 * most + 1, (len(images), 2)).tolist(), strict=True):
        factor = 1 + strength * (2 * torch.rand(()).item() - 1)
        views.append(factor * image[:, down : down + height, right : right + width])
    return torch.stack(views)


@contextmanager
def _dropout(model: nn.Module) -> Iterator[None]:
    """Let the dropout layers of a model draw."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.train()
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.train(training)


register_head(METHOD, LinearSVMConfig, LinearSVMLayer)
