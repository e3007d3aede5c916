"""Out-of-distribution scores against their formulas in plain lines, and their intervals by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.covariance import LedoitWolf

from peft_lab.comparison.stats.ood_intervals import ood_interval, weighted_auroc, weighted_false_positive_rate
from peft_lab.metrics.out_of_distribution import (
    HeadOutputs,
    all_scores,
    auroc,
    energy_score,
    false_positive_rate,
    knn_score,
    mahalanobis_score,
    maximum_softmax,
)

DRAW = np.random.default_rng(0)
TRAIN, LABELS, ROWS = DRAW.normal(size=(40, 5)) + 1, DRAW.integers(0, 3, 40), DRAW.normal(size=(7, 5))


def test_knn_is_the_distance_of_unit_vectors_to_the_kth_neighbour():
    for k in (1, 4):
        wanted = []
        for row in ROWS:
            unit = [value / math.sqrt(sum(v * v for v in row)) for value in row]
            distances = []
            for other in TRAIN:
                norm = math.sqrt(sum(v * v for v in other))
                distances.append(math.sqrt(sum((a - b / norm) ** 2 for a, b in zip(unit, other, strict=True))))
            wanted.append(-sorted(distances)[k - 1])
        assert knn_score(TRAIN, ROWS, k) == pytest.approx(wanted)
    # the scale of the features does not count
    assert knn_score(3 * TRAIN, 5 * ROWS) == pytest.approx(knn_score(TRAIN, ROWS))


def test_mahalanobis_has_one_covariance_and_the_nearest_mean():
    means = {c: TRAIN[c == LABELS].mean(0) for c in range(3)}
    centred = np.stack([x - means[c] for x, c in zip(TRAIN, LABELS, strict=True)])
    inverse = np.linalg.inv(LedoitWolf(assume_centered=True).fit(centred).covariance_)
    wanted = [-min((x - m) @ inverse @ (x - m) for m in means.values()) for x in ROWS]
    assert mahalanobis_score(TRAIN, LABELS, ROWS) == pytest.approx(wanted)
    # names of classes are any numbers
    assert mahalanobis_score(TRAIN, 10 * LABELS + 7, ROWS) == pytest.approx(wanted)


def test_energy_and_maximum_softmax_by_hand():
    logits = np.array([[1.0, 2.0, 0.5], [800.0, 0.0, 0.0]])
    total = math.exp(1) + math.exp(2) + math.exp(0.5)
    assert energy_score(logits) == pytest.approx([math.log(total), 800.0])
    assert maximum_softmax(logits) == pytest.approx([math.exp(2) / total, 1.0])


def test_rates_by_counting_pairs_and_rows():
    own, other = np.round(DRAW.normal(size=60), 1) + 1, np.round(DRAW.normal(size=50), 1)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in own for b in other]
    assert auroc(own, other) == pytest.approx(sum(pairs) / len(pairs))
    threshold = max(t for t in own if (own >= t).mean() >= 0.95)
    assert false_positive_rate(own, other) == pytest.approx((other >= threshold).mean())
    assert (auroc(own, own - 100), false_positive_rate(own, own - 100)) == (1.0, 0.0)
    # with every row once, the resampled values are the same
    once = [np.full((1, len(part)), 1 / len(part)) for part in (own, other)]
    assert weighted_auroc(own, other, *once)[0] == pytest.approx(auroc(own, other))
    assert weighted_false_positive_rate(own, other, *once)[0] == pytest.approx(false_positive_rate(own, other))


def test_a_resampled_value_is_that_of_the_drawn_rows():
    own, other = np.round(DRAW.normal(size=30), 1) + 1, np.round(DRAW.normal(size=25), 1)
    counts = [DRAW.multinomial(n, np.full(n, 1 / n)) for n in (30, 25)]
    drawn = [np.repeat(part, count) for part, count in zip((own, other), counts, strict=True)]
    weights = [counts[0][None] / 30, counts[1][None] / 25]
    assert weighted_auroc(own, other, *weights)[0] == pytest.approx(auroc(*drawn))
    assert weighted_false_positive_rate(own, other, *weights)[0] == pytest.approx(false_positive_rate(*drawn))


def test_intervals_hold_the_truth_and_need_two_seeds():
    """Eight seeds of rows one deviation apart: about 95 of 100 intervals hold the area that such rows have."""
    truth, held = 0.5 * (1 + math.erf(1 / 2)), 0
    for number in range(60):
        draw = np.random.default_rng(number)
        rows = [draw.normal(size=60) + 1, draw.normal(size=60)]
        seeds = [[part + 0.3 * draw.normal(size=60) for part in rows] for _ in range(8)]
        low, high = ood_interval([own for own, _ in seeds], [other for _, other in seeds], weighted_auroc)
        noisy = 0.5 * (1 + math.erf(1 / math.sqrt(1.09) / 2))
        held += low <= noisy <= high
    assert 0.85 * 60 <= held <= 60
    assert truth != noisy
    assert ood_interval([rows[0]], [rows[1]], weighted_auroc) is None
    assert ood_interval([rows[0], rows[0][:9]], [rows[1], rows[1]], weighted_auroc) is None


def test_scores_are_high_for_rows_like_those_of_the_training():
    centres = 4 * np.eye(3)

    def draw(count, far=0.0):
        labels = DRAW.integers(0, 3, count)
        features = centres[labels] * (1 - far) + 0.5 * DRAW.normal(size=(count, 3)) - 3 * far
        return HeadOutputs(features, features, labels)

    train, own, other = draw(100), draw(50), draw(50, far=1.0)
    scores = [all_scores(train, rows) for rows in (own, other)]
    assert {name: auroc(scores[0][name], scores[1][name]) > 0.9 for name in scores[0]} == dict.fromkeys(scores[0], True)
