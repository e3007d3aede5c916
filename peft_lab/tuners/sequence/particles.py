"""Particles of a Gaussian mixture, by Stein variational gradient descent.

Source: Li et al. 2024, BayesPrompt, arXiv:2401.14166, written from its equations. The score is computed by log-sum-exp:
the plain quotient of densities underflows to a score of zero at a few hundred dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from peft_lab.errors import ConfigError

Points = NDArray[np.float64]

#: Added to every variance of the mixture.
REGULARISATION = 0.1
#: Principal directions of the points in which the mixture has full covariances, unless told otherwise.
DIMENSIONS = 64
#: Most rounds of expectation and maximisation; the tolerance of scikit-learn ends most fits after a few.
_ROUNDS = 200


@dataclass(frozen=True)
class Mixture:
    """Gaussian mixture with full covariances within a subspace.

    Outside of the subspace all directions have one variance.

    Attributes:
        weights: (components,).
        means: (components, q), in coordinates of the subspace.
        roots: (components, q, q), R with inverse covariance R R^T.
        centre: (width,), the origin of the subspace.
        basis: (q, width), orthonormal rows that span it.
        rest: the variance outside.
    """

    weights: Points
    means: Points
    roots: Points
    centre: Points
    basis: Points
    rest: float

    def score(self, points: Points) -> Points:
        """Gradient of the log density at points (count, width)."""
        # In white coordinates of a component its log density falls with the squared length.
        inside = (points - self.centre) @ self.basis.T
        white = (inside - self.means[:, None]) @ self.roots
        volumes = np.log(np.diagonal(self.roots, axis1=1, axis2=2)).sum(1)
        logits = (np.log(self.weights) + volumes)[:, None] - 0.5 * (white**2).sum(-1)
        # Responsibilities of the components; softmax works on logarithms, which do not underflow.
        shares = softmax(logits, axis=0)
        pull = (shares[..., None] * (white @ self.roots.transpose(0, 2, 1))).sum(0)
        outside = points - self.centre - inside @ self.basis
        return -pull @ self.basis - outside / self.rest


def fit(
    points: Points,
    components: int,
    dimensions: int | None = None,
    regularisation: float = REGULARISATION,
    seed: int = 0,
) -> Mixture:
    """Fit a mixture to points (count, width) by scikit-learn's `GaussianMixture`.

    Principal components come first, so that the cost of a fit does not grow with the square of the width. They lose
    nothing where `dimensions` is at least the rank of the points: directions in which these do not vary have the
    regularising variance alone, as in a fit at full width.

    Args:
        components: number of Gaussians; at most as many as there are different points.
        dimensions: number of principal directions with full covariances; None for `DIMENSIONS`.
        regularisation: added to every variance.

    Raises:
        ConfigError: fewer than two different points, or a value that is not finite.
    """
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    points = np.asarray(points, dtype=np.float64)
    if not np.isfinite(points).all():
        raise ConfigError("A mixture cannot be fitted to values that are not finite numbers.")
    different = len(np.unique(points, axis=0))
    if different < 2:
        raise ConfigError(f"A mixture needs at least 2 different points, got {different}.")
    size = min(*points.shape, dimensions or DIMENSIONS)
    # The points outside of the subspace share one variance, the mean square of what the projection leaves.
    axes = PCA(size, random_state=seed).fit(points)
    inside = axes.transform(points)
    outside = points - axes.inverse_transform(inside)
    spread = (outside**2).sum() / (len(points) * max(points.shape[1] - size, 1))
    found = GaussianMixture(
        min(components, different), reg_covar=regularisation, max_iter=_ROUNDS, random_state=seed
    ).fit(inside)
    return Mixture(
        found.weights_, found.means_, found.precisions_cholesky_, axes.mean_, axes.components_, spread + regularisation
    )


def svgd(start: Points, score: Callable[[Points], Points], steps: int = 1000, rate: float = 0.01) -> Points:
    """Move points (count, width) by Stein variational gradient descent.

    They end as particles of a density.

    The kernel is Gaussian with the median bandwidth, for which the lower of two middle distances counts, as for
    `torch.median` in the authors' code. The step is that of Adagrad with a decay of 0.9.

    Args:
        score: gradient of the log density at points (count, width).
        steps, rate: number and size of the steps.
    """
    points, history = np.array(start, dtype=np.float64), np.zeros(np.shape(start))
    count = len(points)
    for step in range(steps):
        # Median heuristic; the smallest positive number stands in where all points are equal.
        squares = _squares(points)
        median = float(np.quantile(squares, 0.5, method="lower"))
        width = max(0.5 * median / np.log(count + 1), np.finfo(np.float64).tiny)
        kernel = np.exp(-squares / (2 * width))
        # The gradient of the kernel drives the points apart, the score draws them to the density.
        apart = points * kernel.sum(1, keepdims=True) - kernel @ points
        move = (kernel @ score(points) + apart / width) / count
        history = 0.9 * history + 0.1 * move**2 if step else move**2
        points = points + rate * move / (1e-6 + np.sqrt(history))
    return points


def _squares(points: Points) -> Points:
    """Squared distances of all pairs of points, exactly 0 on the diagonal."""
    # Centred first, because the expanded square loses digits far from the origin.
    points = points - points.mean(0)
    norms = (points**2).sum(1)
    squares = np.maximum(norms[:, None] + norms - 2 * points @ points.T, 0.0)
    np.fill_diagonal(squares, 0.0)
    return squares


def particles(points: Points, count: int, components: int, dimensions: int | None = None, seed: int = 0) -> Points:
    """Fit a mixture to points (n, width); return particles (count, width).

    They start at different points; where there are more particles than points, the further ones start beside a point,
    at a distance of the regularising variance. Centre and scale are taken out first (one number for all directions, the
    root of the mean variance), so that regularisation and steps mean the same whatever the size of the values.

    Raises:
        ConfigError: as `fit`.
    """
    points = np.asarray(points, dtype=np.float64)
    random = np.random.default_rng(seed)
    centre, scale = points.mean(0), np.sqrt(points.var(0).mean())
    points = (points - centre) / (scale or 1.0)
    mixture = fit(points, components, dimensions, seed=seed)
    # Whole rounds through the points in random order, until there are enough starts.
    order = np.concatenate([random.permutation(len(points)) for _ in range(-(-count // len(points)))])[:count]
    start = points[order]
    start[len(points) :] += np.sqrt(REGULARISATION) * random.standard_normal(start[len(points) :].shape)
    return centre + scale * svgd(start, mixture.score)
