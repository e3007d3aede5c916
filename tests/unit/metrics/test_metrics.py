"""The shipped metrics: equal to scikit-learn and scipy, and loaded without a network."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from peft_lab.errors import TaskError
from peft_lab.metrics import METRICS, greater_is_better, load_metric, metric_path

DRAW = np.random.default_rng(0)
BINARY = DRAW.integers(0, 2, 200), DRAW.integers(0, 2, 200)
CLASSES = DRAW.integers(0, 5, 200), DRAW.integers(0, 5, 200)
LABELS = DRAW.integers(0, 2, (200, 4)), DRAW.integers(0, 2, (200, 4))
NUMBERS = DRAW.normal(size=200), DRAW.normal(size=200)

CASES = [
    ("accuracy", CLASSES, lambda p, y: reference.accuracy_score(y, p)),
    ("f1", CLASSES, lambda p, y: reference.f1_score(y, p, average="macro")),
    ("f1", BINARY, lambda p, y: reference.f1_score(y, p)),
    ("matthews_correlation", CLASSES, lambda p, y: reference.matthews_corrcoef(y, p)),
    ("matthews_correlation", BINARY, lambda p, y: reference.matthews_corrcoef(y, p)),
    ("pearsonr", NUMBERS, lambda p, y: np.corrcoef(p, y)[0, 1]),
    ("spearmanr", NUMBERS, lambda p, y: np.corrcoef(stats.rankdata(p), stats.rankdata(y))[0, 1]),
    ("f1_micro", LABELS, lambda p, y: 2 * (p & y).sum() / (p.sum() + y.sum())),
    ("f1_macro", LABELS, lambda p, y: np.mean(2 * (p & y).sum(0) / (p.sum(0) + y.sum(0)))),
    ("mae", NUMBERS, lambda p, y: np.abs(p - y).mean()),
    ("rmse", NUMBERS, lambda p, y: np.linalg.norm(p - y) / np.sqrt(len(y))),
    ("r2", NUMBERS, lambda p, y: 1 - ((p - y) ** 2).mean() / y.var()),
    ("exact_match", CLASSES, lambda p, y: np.mean(p == y)),
]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a shipped metric must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(("name", "data", "expected"), CASES)
def test_a_shipped_metric_equals_its_reference(name: str, data: Any, expected: Any, no_network: None) -> None:
    predictions, references = data
    truth = expected(predictions, references)
    if name == "exact_match":
        predictions, references = [str(p) for p in predictions], [str(y) for y in references]
    found = load_metric(name).compute(predictions=predictions, references=references)
    assert found == {name: pytest.approx(truth, abs=1e-12)}
    assert found[name] != pytest.approx(expected(data[0], data[0]), abs=0.05), "the case must be able to fail"


def test_every_metric_has_a_case_or_a_test_of_its_own() -> None:
    elsewhere = {"bleu", "ece", "map", "mean_iou", "perplexity", "pixel_accuracy", "rouge_l"}
    assert {name for name, _, _ in CASES} | elsewhere == set(METRICS)


def test_mean_average_precision_by_hand(no_network: None) -> None:
    references = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    scores = np.array([[0.9, 0.8, 0.1], [0.5, 0.4, 0.2], [0.1, 0.2, 0.3]])
    # ranks 1 and 3 of the first label, 2 and 3 of the second; no row has the third, which does not count
    expected = ((1 / 1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    assert load_metric("map").compute(predictions=scores, references=references) == {"map": pytest.approx(expected)}
    assert load_metric("map").compute(predictions=scores, references=0 * references) == {"map": 0.0}


def test_perplexity_counts_every_token_the_same(no_network: None) -> None:
    probabilities = DRAW.uniform(0.01, 1, 50)
    found = load_metric("perplexity").compute(predictions=np.log(probabilities))
    assert found["perplexity"] == pytest.approx(np.prod(probabilities) ** (-1 / 50))
    uniform = load_metric("perplexity").compute(predictions=[np.log(1 / 7)] * 9)
    assert uniform["perplexity"] == pytest.approx(7)


def test_calibration_error_equals_a_loop_over_bins(no_network: None) -> None:
    probabilities = DRAW.dirichlet(np.full(5, 0.3), 200).astype(np.float32)
    references = CLASSES[1]
    sure, right = probabilities.max(1), probabilities.argmax(1) == references
    for bins in (15, 4):
        error = 0.0
        for lower in range(bins):
            inside = (sure * bins >= lower) & (sure * bins < lower + 1 + (lower == bins - 1))
            if inside.any():
                error += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
        found = load_metric("ece").compute(predictions=probabilities, references=references, bins=bins)
        assert found == {"ece": pytest.approx(error, abs=1e-6)}
    assert load_metric("ece").compute(predictions=np.eye(5), references=range(5)) == {"ece": 0.0}
    assert load_metric("ece").compute(predictions=np.eye(5), references=[1, 2, 3, 4, 0]) == {"ece": 1.0}


def test_a_constant_prediction_has_no_correlation() -> None:
    for name in ("pearsonr", "spearmanr"):
        assert load_metric(name).compute(predictions=[1.0] * 5, references=[1, 2, 3, 4, 5]) == {name: 0.0}


def test_macro_f1_over_given_labels_counts_absent_classes() -> None:
    found = load_metric("f1").compute(predictions=[0, 1], references=[0, 1], average="macro", labels=[0, 1, 2])
    assert found["f1"] == pytest.approx(2 / 3)


def test_exact_match_can_ignore_case() -> None:
    metric = load_metric("exact_match")
    assert metric.compute(predictions=["Yes", "no"], references=["yes", "no"]) == {"exact_match": 0.5}
    assert metric.compute(predictions=["Yes", "no"], references=["yes", "no"], ignore_case=True) == {"exact_match": 1.0}


@pytest.mark.parametrize(
    ("written", "truth", "score"),
    [
        ("The cat sat on the mat.", "the cat sat on the mat", 1.0),
        ("The cat sat on the mat", "the cat lay on a mat", 4 / 6),
        ("mat the on", "the cat sat on the mat", 2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6)),
        ("cats", "cat", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_rouge_l_is_f1_of_the_longest_common_subsequence(
    written: str, truth: str, score: float, no_network: None
) -> None:
    pytest.importorskip("rouge_score")
    metric = load_metric("rouge_l")
    assert metric.compute(predictions=[written], references=[truth]) == {"rouge_l": pytest.approx(score)}
    both = metric.compute(predictions=[written, "a"], references=[truth, "a"])
    assert both == {"rouge_l": pytest.approx((score + 1) / 2)}


def test_a_metric_whose_package_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "rouge_score" else find(name, *a))
    with pytest.raises(TaskError, match=r"needs the package rouge_score: pip install 'peft-lab\[text\]'"):
        load_metric("rouge_l")


def test_a_metric_of_the_users_own(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "half.py").write_text(
        "import datasets\nimport evaluate\n\n"
        "class Half(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        whole = datasets.Value('int64')\n"
        "        values = datasets.Features({'predictions': whole, 'references': whole})\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=values)\n\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'half': 0.5}\n"
    )
    path = metric_path("./half", tmp_path)
    assert path == metric_path("half/half.py", tmp_path) == tmp_path / "half" / "half.py"
    assert load_metric(str(path)).compute(predictions=[1], references=[1]) == {"half": 0.5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acuracy", 'Did you mean "accuracy"'),
        ("rogue", 'Did you mean "rouge"'),
        ("someone/metric", "What strangers keep on the Hub is not run"),
        ("nowhere.py", "no metric file or folder"),
    ],
)
def test_an_unknown_metric_is_refused(name: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_metric(name)


def test_a_metric_of_evaluate_that_cannot_be_fetched_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    def offline(name: str, **kwargs: Any) -> None:
        raise FileNotFoundError(f"Couldn't find {name}\non the Hub")

    monkeypatch.setattr(evaluate, "load", offline)
    with pytest.raises(TaskError, match='Metric "rouge" cannot be loaded: Couldn\'t find rouge on the Hub'):
        load_metric("rouge")


def test_the_better_direction() -> None:
    assert greater_is_better("eval_accuracy")
    assert greater_is_better("my_own")
    assert not greater_is_better("eval_perplexity")
    assert not greater_is_better("eval_ece")
    assert not greater_is_better("loss")
