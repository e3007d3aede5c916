"""Particles of a Gaussian mixture against the equations of score and descent, and torch's own densities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from peft_lab.errors import ConfigError
from peft_lab.tuners.sequence import particles as particles_module
from peft_lab.tuners.sequence.particles import Mixture, fit, particles, svgd


def _points(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Three clouds, most of them in a few directions."""
    random = np.random.default_rng(seed)
    centres = 3 * random.standard_normal((3, width))
    spread = random.standard_normal((width, width)) / np.sqrt(width) * np.linspace(1, 0.1, width)
    return centres[np.arange(count) % 3] + random.standard_normal((count, width)) @ spread


def _torch(mixture: Mixture) -> MixtureSameFamily:
    """The same density by torch's own classes, at full width."""
    basis, (size, width) = torch.from_numpy(mixture.basis), mixture.basis.shape
    covariance = torch.linalg.inv(torch.from_numpy(mixture.roots @ mixture.roots.transpose(0, 2, 1)))
    rest = mixture.rest * (torch.eye(width, dtype=torch.double) - basis.T @ basis) if size < width else 0.0
    means = torch.from_numpy(mixture.centre + mixture.means @ mixture.basis)
    normals = MultivariateNormal(means, basis.T @ covariance @ basis + rest)
    return MixtureSameFamily(Categorical(torch.from_numpy(mixture.weights)), normals)


@pytest.mark.parametrize(
    ("width", "dimensions", "scale"), [(3, None, 1), (8, 8, 1), (8, 3, 1), (70, None, 1), (200, 40, 1), (200, 40, 9)]
)
def test_score_is_the_gradient_of_the_log_density(width, dimensions, scale):
    mixture = fit(_points(150, width), 3, dimensions)
    x = torch.from_numpy(scale * _points(20, width, seed=1)).requires_grad_()
    log_density = _torch(mixture).log_prob(x)
    if width == 200:
        assert (log_density.exp() == 0).any(), "densities that underflow are a part of this test"
    (wanted,) = torch.autograd.grad(log_density.sum(), x)
    found = torch.from_numpy(mixture.score(x.detach().numpy()))
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    assert ((found - wanted).norm(dim=1) < 1e-6 * wanted.norm(dim=1)).all()


@pytest.mark.parametrize(("count", "width", "dimensions"), [(90, 6, 6), (12, 30, None)])
def test_principal_components_lose_nothing_where_there_are_enough(count, width, dimensions):
    """scikit-learn's own fit at full width gives the same density, also where points are fewer than directions."""
    points = _points(count, width)
    mixture = fit(points, 3, dimensions)
    plain = GaussianMixture(3, reg_covar=particles_module.REGULARISATION, random_state=0).fit(points)
    probes = torch.from_numpy(_points(10, width, seed=2))
    wanted = torch.from_numpy(plain.score_samples(probes.numpy()))
    torch.testing.assert_close(_torch(mixture).log_prob(probes), wanted, rtol=1e-8, atol=1e-8)


def test_a_fit_stays_small_at_any_width():
    assert fit(_points(40, 500), 4).roots.shape == (4, 40, 40)
    assert fit(_points(400, 100), 4).roots.shape == (4, particles_module.DIMENSIONS, particles_module.DIMENSIONS)
    few = np.repeat(_points(3, 5), 4, 0)
    assert len(fit(few, 8).weights) == 3, "no more Gaussians than different points"


@pytest.mark.parametrize("count", [6, 7])
def test_particles_are_those_of_an_independent_descent_of_fifty_steps(count):
    """By autograd and `torch.median`, which of an even number of distances takes the lower middle one."""
    mixture = fit(_points(60, 4), 2)
    density, x = _torch(mixture), torch.from_numpy(_points(count, 4, seed=1))
    history = None
    for _ in range(50):
        x.requires_grad_()
        (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
        x = x.detach()
        squares = torch.cdist(x, x) ** 2
        h2 = 0.5 * squares.median() / np.log(count + 1)
        kernel = torch.exp(-squares / (2 * h2))
        phi = (kernel @ score + (x * kernel.sum(1, keepdim=True) - kernel @ x) / h2) / count
        history = phi**2 if history is None else 0.9 * history + 0.1 * phi**2
        x = x + 0.01 * phi / (1e-6 + history.sqrt())
    found = torch.from_numpy(svgd(_points(count, 4, seed=1), mixture.score, steps=50))
    torch.testing.assert_close(found, x, atol=1e-6, rtol=0)


def test_svgd_is_its_equations():
    mixture = fit(_points(60, 4), 2)
    start = _points(7, 4, seed=1)
    x, history = start.copy(), None
    for _ in range(25):
        squares = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
        h2 = 0.5 * np.sort(squares.flatten())[(squares.size - 1) // 2] / np.log(len(x) + 1)
        score = mixture.score(x)
        phi = np.zeros_like(x)
        for i in range(len(x)):
            for j in range(len(x)):
                kernel = np.exp(-squares[i, j] / (2 * h2))
                phi[i] += (kernel * score[j] + kernel * (x[i] - x[j]) / h2) / len(x)
        history = phi**2 if history is None else 0.9 * history + 0.1 * phi**2
        x = x + 0.01 * phi / (1e-6 + np.sqrt(history))
    assert np.abs(svgd(start, mixture.score, steps=25) - x).max() < 1e-12
    assert np.abs(x - start).max() > 0.1


@pytest.mark.parametrize("width", [1, 2])
def test_particles_recover_mean_and_spread(width):
    """0.3 N(-2, 0.25) + 0.7 N(1, 1) in the first coordinate; 2 + 0.5 N in the second."""
    first = np.array([[-2.0], [1.0]])
    means, deviations = np.full((2, width), 2.0), np.full((2, width), 0.5)
    means[:, :1], deviations[:, :1] = first, [[0.5], [1.0]]
    roots = np.stack([np.diag(1 / d) for d in deviations])
    mixture = Mixture(np.array([0.3, 0.7]), means, roots, np.zeros(width), np.eye(width), 1.0)
    found = svgd(3 * np.random.default_rng(0).standard_normal((100, width)), mixture.score, rate=0.05)
    mean = 0.3 * -2 + 0.7 * 1
    variance = 0.3 * (0.25 + 4) + 0.7 * (1 + 1) - mean**2
    assert found[:, 0].mean() == pytest.approx(mean, abs=0.1)
    assert found[:, 0].var() == pytest.approx(variance, rel=0.15)
    if width == 2:
        assert found[:, 1].mean() == pytest.approx(2.0, abs=0.05)
        assert found[:, 1].std() == pytest.approx(0.5, rel=0.15)


def test_particles_go_by_seed_and_not_by_scale():
    points = _points(50, 6)
    found = particles(points, 8, 3)
    assert np.array_equal(found, particles(points, 8, 3))
    assert not np.allclose(found, particles(points, 8, 3, seed=1))
    assert np.allclose(particles(1e-3 * points + 5, 8, 3), 1e-3 * found + 5, atol=1e-6)
    assert np.abs(found.mean(0) - points.mean(0)).max() < points.std()
    assert 0.3 < found.std() / points.std() < 2


def test_more_particles_than_points_are_all_different():
    found = particles(_points(3, 4), 10, 2)
    apart = np.linalg.norm(found[:, None] - found, axis=-1)
    assert apart[~np.eye(10, dtype=bool)].min() > 1e-3
    assert particles(_points(3, 4), 1, 2).shape == (1, 4)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.ones((1, 3)), "at least 2 different points, got 1"),
        (np.ones((5, 3)), "at least 2 different points, got 1"),
        (np.full((5, 3), np.nan), "not finite"),
    ],
)
def test_points_without_a_mixture(points, message):
    with pytest.raises(ConfigError, match=message):
        particles(points, 2, 2)
