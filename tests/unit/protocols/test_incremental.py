"""Incremental protocols: sessions, metrics against plain lines, options, journal and report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.base import is_classifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import OneClassSVM
from support.incremental import CentroidEstimator, FeatureLearner, blobs
from support.tiny_runs import make_backbone, make_task
from typer.testing import CliRunner

from peft_lab import registry
from peft_lab.cli.app import app
from peft_lab.errors import ConfigError, TaskError
from peft_lab.protocols import incremental as protocol
from peft_lab.protocols.incremental import Part, incremental, read_records, run_sessions
from peft_lab.protocols.incremental_metrics import over_orders, step_metrics, summary
from peft_lab.protocols.incremental_options import HELP, IncrementalOptions
from peft_lab.protocols.incremental_report import summary_rows, write_report
from peft_lab.protocols.learners import EstimatorLearner, FeatureReader, is_estimator, keeps_features, make_estimator
from peft_lab.protocols.sessions import Session, order_of, sessions_of

PROTOCOLS = sorted((Path(__file__).parents[3] / "benchmarks" / "studies" / "incremental").glob("*.yaml"))
BASE = {"task": "snips", "model_name_or_path": "minilm", "method": "lora", "steps": 3, "output_dir": "-"}


@pytest.mark.parametrize("file", PROTOCOLS, ids=lambda file: file.stem)
def test_a_shipped_protocol_is_validated_without_the_data(file, monkeypatch):
    monkeypatch.delenv("PEFT_LAB_DATA", raising=False)
    found = CliRunner().invoke(app, ["validate", "--json", str(file)])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["is"] == "protocol"


def test_a_name_that_no_option_has_is_refused_with_a_near_one():
    with pytest.raises(ConfigError, match='Did you mean "base_classes"'):
        IncrementalOptions.from_mapping({**BASE, "base_clases": 2})


# Sessions -----------------------------------------------------------------------------------------------------------


def test_orders_are_those_that_numpy_draws_by_the_published_seeds():
    for seed in (1993, 1996, 1997):
        np.random.seed(seed)
        wanted = np.arange(100)
        np.random.shuffle(wanted)
        assert order_of(100, str(seed)) == wanted.tolist()
    assert order_of(5, "natural") == [0, 1, 2, 3, 4]
    for name in ("first", "-1", "1.5"):
        with pytest.raises(ConfigError, match="natural or a seed"):
            order_of(5, name)


@pytest.mark.parametrize(
    ("classes", "steps", "base", "sizes"),
    [
        (100, 10, None, [10] * 10),  # CIFAR-100 of SLCA
        (196, 10, None, [20] * 9 + [16]),  # Cars-196 of SLCA
        (100, 9, 60, [60] + [5] * 8),  # CIFAR-100 of TEEN
        (200, 11, 100, [100] + [10] * 10),  # CUB of TEEN
        (100, 6, 50, [50] + [10] * 5),  # T = 5 of FeTrIL, whose first state is one more
        (100, 61, 40, [40] + [1] * 60),  # T = 60 of FeTrIL
        (10, 6, None, [2, 2, 2, 2, 1, 1]),
        (77, 7, None, [11] * 7),
    ],
)
def test_sessions_have_the_published_sizes(classes, steps, base, sizes):
    found = sessions_of(order_of(classes, "1993"), steps, base)
    assert [len(session.groups) for session in found] == sizes
    assert sorted(label for session in found for label in session.groups) == list(range(classes))


@pytest.mark.parametrize(
    ("classes", "steps", "base", "message"),
    [(5, 1, None, "at least 2"), (5, 6, None, "5 are left for 6"), (5, 3, 5, "from 1 to 4"), (5, 4, 3, "2 are left")],
)
def test_sessions_that_cannot_be_are_refused(classes, steps, base, message):
    with pytest.raises(ConfigError, match=message):
        sessions_of(list(range(classes)), steps, base)


# Metrics ------------------------------------------------------------------------------------------------------------


def test_metrics_by_plain_lines():
    """Three sessions of classes {0, 1}, {2} and {3}; rows are right or wrong as written."""
    seen = [(0, 1), (2,), (3,)]
    first = step_metrics(np.array([1, 1, 0, 1], bool), np.array([0, 0, 1, 1]), seen[:1])
    assert first == {"accuracy": 0.75, "by_session": [0.75], "base": 0.75, "new": None, "harmonic": None}
    second = step_metrics(np.array([1, 0, 0, 1, 1, 1], bool), np.array([0, 0, 1, 1, 2, 2]), seen[:2])
    assert second["accuracy"] == pytest.approx(4 / 6)
    assert second["by_session"] == [0.5, 1.0]
    assert second["harmonic"] == pytest.approx(2 * 0.5 * 1 / 1.5)
    third = step_metrics(np.array([0, 0, 0, 1, 1, 0, 1], bool), np.array([0, 0, 1, 1, 2, 2, 3]), seen)
    assert (third["base"], third["new"]) == (0.25, pytest.approx(2 / 3))
    found = summary([first, second, third])
    assert found["average"] == pytest.approx((0.75 + 4 / 6 + 3 / 7) / 3)
    assert found["last"] == pytest.approx(3 / 7)
    # session 1 fell from its best 0.75 to 0.25, session 2 from 1.0 to 0.5
    assert found["forgetting"] == pytest.approx(((0.75 - 0.25) + (1.0 - 0.5)) / 2)
    assert found["drop"] == pytest.approx(0.75 - 3 / 7)
    nothing = step_metrics(np.zeros(2, bool), np.array([0, 2]), seen[:2])
    assert nothing["harmonic"] == 0


def test_intervals_over_orders_are_those_of_student():
    values = [0.5, 0.6, 0.9]
    mean, low, high = over_orders(values)
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    assert (mean, low, high) == pytest.approx((np.mean(values), mean - half, min(1.0, mean + half)))
    assert over_orders(values, (-2.0, 2.0))[2] == pytest.approx(mean + half)
    assert over_orders([0.4]) == (0.4, None, None)
    assert over_orders([0.4, 0.4]) == (0.4, 0.4, 0.4)


# Learning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [CentroidEstimator, GaussianNB])
def test_an_estimator_that_keeps_what_it_knows_forgets_little(estimator):
    train, test = blobs(6, 30), blobs(6, 20, seed=1)
    learner = FeatureLearner(estimator() if estimator is CentroidEstimator else _AllClasses(6))
    steps = run_sessions(learner, train, test, sessions_of(order_of(6, "1993"), 3, None))
    found = summary(steps)
    assert found["last"] > 0.9
    assert found["forgetting"] < 0.1
    # each session brings the rows of its classes alone, and they have not been there before
    drawn = [place for places, _ in learner.given for place in places]
    assert sorted(drawn) == list(range(180))
    assert [len(seen) for _, seen in learner.given] == [2, 4, 6]


class _AllClasses(GaussianNB):
    """Naive Bayes of scikit-learn, which wants all classes at the first call."""

    def __init__(self, count: int = 0) -> None:
        super().__init__()
        self.count = count

    def partial_fit(self, X, y, classes=None):
        return super().partial_fit(X, y, classes=np.arange(self.count) if not hasattr(self, "classes_") else None)


def test_one_that_keeps_nothing_forgets_everything():
    class Newest(CentroidEstimator):
        def partial_fit(self, X, y, classes=None):
            self.means = {}
            return super().partial_fit(X, y)

    found = summary(
        run_sessions(FeatureLearner(Newest()), blobs(6, 20), blobs(6, 20, 1), sessions_of(range(6), 3, None))
    )
    assert found["last"] == pytest.approx(1 / 3, abs=0.05)
    assert found["forgetting"] == pytest.approx(1.0, abs=0.05)


def test_shots_are_drawn_by_the_seed_in_all_sessions_but_the_first():
    train, test = blobs(4, 30), blobs(4, 10, 1)

    def places(seed):
        learner = FeatureLearner(CentroidEstimator())
        run_sessions(learner, train, test, sessions_of(range(4), 3, 2), shots=5, seed=seed)
        return [given for given, _ in learner.given]

    first = places(1993)
    assert [len(given) for given in first] == [60, 5, 5]
    assert places(1993) == first
    assert places(1996)[1:] != first[1:]


def test_domains_come_by_a_group_of_their_own():
    """Two domains of the same three classes: after each session the rows of the domains seen are scored."""
    whole, tests = blobs(3, 40), blobs(3, 20, 1)
    domains = [Part(part.rows, np.arange(len(part.labels)) % 2, part.labels) for part in (whole, tests)]
    learner = FeatureLearner(CentroidEstimator())
    steps = run_sessions(learner, *domains, [Session((1,)), Session((0,))])
    assert [seen for _, seen in learner.given] == [[0, 1, 2], [0, 1, 2]]
    assert [len(places) for places, _ in learner.given] == [60, 60]
    assert len(steps[1]["by_session"]) == 2


def test_an_estimator_of_one_call_is_fitted_to_the_features_of_all_sessions():
    class Features:
        def features(self, rows, places):
            return rows.values[places]

    train, test = blobs(4, 30), blobs(4, 20, 1)
    learner = EstimatorLearner(LogisticRegression(), Features())
    assert learner.keeps_features
    assert not EstimatorLearner(CentroidEstimator(), Features()).keeps_features
    steps = run_sessions(learner, train, test, sessions_of(range(4), 2, None))
    joint = LogisticRegression().fit(train.rows.values, train.labels)
    assert steps[-1]["accuracy"] == joint.score(test.rows.values, test.labels)
    with pytest.raises(ConfigError, match=r"refuses the rows of a session.*class"):
        run_sessions(EstimatorLearner(LogisticRegression(), Features()), train, test, sessions_of(range(4), 4, None))


def test_sessions_without_rows_and_estimators_without_classes_are_refused():
    with pytest.raises(ConfigError, match="Session 2 has no training rows"):
        run_sessions(FeatureLearner(CentroidEstimator()), blobs(2, 5), blobs(3, 5), [Session((0,)), Session((2,))])
    with pytest.raises(ConfigError, match='"OneClassSVM" does not tell classes apart'):
        EstimatorLearner(OneClassSVM(), FeatureReader(None, 1))


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 1}, "steps.* at least 2"),
        ({"method": ["lora", "lora"]}, 'names "lora" twice'),
        ({"orders": ["1993", "x"]}, "natural or a seed"),
        ({"adapt": "last"}, "adapt"),
        ({"method": "lorra"}, "Did you mean"),
        ({"adapter": "lorra"}, "Did you mean"),
        ({"adapter_args": "r=8"}, "no effect without adapter"),
        ({"method": ["lora", "ssf"], "method_args": {"r": 8}}, "for one method"),
        ({"domain_column": "d", "base_classes": 2}, "leave one out"),
        ({"early_stopping_patience": 2}, "no validation rows"),
        ({"setps": 3}, 'Unknown option "setps"'),
        ({"task": "glue-stsb"}, "no single class"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(changes, message):
    with pytest.raises((ConfigError, TaskError), match=message):
        IncrementalOptions.from_mapping({**BASE, **changes})


def test_the_command_line_gives_the_same_options_as_a_file(tmp_path):
    from peft_lab.cli.incremental import own_parser, read_arguments

    (tmp_path / "run.yaml").write_text("task: snips\nmodel_name_or_path: minilm\nmethod: [lora]\nsteps: 3\nseed: 5\n")
    flags = f"{tmp_path / 'run.yaml'} --method ssf lora --orders 1 natural --output-dir out --max_steps 4 --shots 5"
    found = IncrementalOptions.from_mapping(read_arguments(flags.split()))
    assert found.own.method == ["ssf", "lora"]
    assert (found.own.steps, found.own.shots, found.own.orders) == (3, 5, ["1", "natural"])
    config = found.run_config("ssf")
    assert (config.method, config.training_arguments) == ("ssf", {"max_steps": 4, "seed": 5})
    assert IncrementalOptions.from_mapping({**found.to_dict(), "output_dir": "out"}) == found
    assert set(HELP) == {action.dest for action in own_parser()._actions} - {"help"}
    with pytest.raises(ConfigError, match="Unknown option --setps"):
        read_arguments(["--setps", "3"])


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("incremental")
    task = make_task(folder / "data", rows=48)
    for split in ("train", "validation", "test"):
        path = folder / "data" / f"{split}.csv"
        rows = list(csv.DictReader(path.open()))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["sentence", "topic", "source"])
            writer.writeheader()
            for number, row in enumerate(rows):
                writer.writerow({**row, "source": "mail" if number < len(rows) / 2 else "web"})
    return {"task": str(task), "model_name_or_path": str(make_backbone(folder / "bert")), "use_cpu": True}


def values(place, out, **changes):
    flags = {"max_steps": 3, "per_device_train_batch_size": 8, "disable_tqdm": True, "learning_rate": 1e-2}
    return {
        **place,
        "method": ["lora"],
        "steps": 3,
        "orders": ["natural", "7"],
        "output_dir": str(out),
        **flags,
        **changes,
    }


@pytest.mark.full
def test_a_protocol_that_was_stopped_goes_on(place, tmp_path, monkeypatch):
    def short(name, **changes):
        return values(place, tmp_path / name, **{"steps": 2, "max_steps": 1, "method": ["head"], **changes})

    whole = incremental(short("whole"))
    assert [(record["method"], record["order"]) for record in whole.records] == [("head", "natural"), ("head", "7")]
    run, count = protocol._Protocol.run, [0]

    def once(self, method, order):
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return run(self, method, order)

    monkeypatch.setattr(protocol._Protocol, "run", once)
    with pytest.raises(KeyboardInterrupt):
        incremental(short("out"))
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"method": "he')  # as a kill leaves it
    count[0] = -10
    again = incremental(short("out"))
    assert count[0] == -9
    for mine, other in zip(again.records, whole.records, strict=True):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    # a method more joins what is done, other options do not
    more = incremental(short("out", method=["head", "nearest_mean"]))
    assert len(more.records) == 4
    with pytest.raises(ConfigError, match=r"other options \(steps\)"):
        incremental(short("out", steps=3))
    assert len(incremental(short("out", steps=3, overwrite_output_dir=True)).records) == 2


@pytest.mark.full
def test_a_trained_head_forgets_and_the_adapter_of_the_first_session_stays(place, tmp_path):
    found = incremental(values(place, tmp_path / "out", max_steps=15, orders=["natural"]))
    (record,) = found.records
    assert record["steps"][0]["accuracy"] == 1.0  # of one class
    assert record["forgetting"] > 0.3
    assert [len(part) for part in record["sessions"]] == [1, 1, 1]


def estimators() -> list[str]:
    """Methods that stand on the head without a training, and tell classes apart."""
    found = []
    for info in registry.builtin_methods():
        if info.place == "head" and is_estimator(info.name) and is_classifier(make_estimator(info.name, {})):
            found.append(info.name)
    return found


def test_estimators_are_found_by_their_cards():
    assert {"nearest_mean", "teen", "fetril", "slca", "gda"} <= set(estimators())
    assert not {"gaussian_anomaly", "moment_probing", "lora"} & set(estimators())


@pytest.mark.parametrize(("method", "args"), [("linear_svm", {"views": 2}), ("gda", {"text_templates": ["a {}."]})])
def test_fields_of_a_models_head_are_refused(method, args):
    with pytest.raises(ConfigError, match=f"{next(iter(args))} of method .* acts on the head of a model"):
        make_estimator(method, args)


@pytest.mark.full
def test_every_estimator_learns_session_by_session(place, tmp_path):
    changes = {"steps": 2, "base_classes": 2, "orders": ["natural"], "method": estimators()}
    found = incremental(values(place, tmp_path, **changes))
    for record in found.records:
        assert record["keeps_features"] == keeps_features(make_estimator(record["method"], {}))
        assert record["steps"][0]["accuracy"] >= 0.4, record["method"]
        assert record["steps"][1]["new"] is not None


@pytest.mark.full
def test_an_estimator_reads_the_features_of_an_adapter(place, tmp_path):
    changes = {"steps": 2, "base_classes": 2, "orders": ["natural"], "method": ["nearest_mean"]}
    frozen, adapted = (
        incremental(values(place, tmp_path / str(adapter), adapter=adapter, **changes)) for adapter in (None, "ssf")
    )
    assert adapted.records[0]["steps"] != frozen.records[0]["steps"]


def test_estimators_of_an_order_share_the_adapter_of_the_first_session(place, tmp_path):
    """It is trained once for them, and each has the results that it has alone."""
    changes = {"steps": 2, "base_classes": 2, "orders": ["natural"], "adapter": "ssf"}
    both = incremental(values(place, tmp_path / "both", method=["nearest_mean", "gda"], **changes))
    alone = incremental(values(place, tmp_path / "alone", method=["gda"], **changes))
    assert both.records[1]["steps"] == alone.records[0]["steps"]
    made = protocol._Protocol(IncrementalOptions.from_mapping(values(place, tmp_path, **changes)))
    first, second, other = (made.learner("nearest_mean", order) for order in ("1", "1", "2"))
    assert first.adapter is second.adapter
    assert first.adapter is not other.adapter


@pytest.mark.full
def test_domain_sessions_of_a_column(place, tmp_path):
    found = incremental(values(place, tmp_path / "out", steps=2, domain_column="source", orders=["natural"]))
    assert found.records[0]["sessions"] == [[0], [1]]
    assert "Domain-incremental" in (tmp_path / "out" / "report.md").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["groups"] == ["mail", "web"]
    with pytest.raises(TaskError, match=r'no column "sauce" for "domain".*Did you mean "source"'):
        incremental(values(place, tmp_path / "wrong", steps=2, domain_column="sauce"))


@pytest.mark.full
def test_features_are_those_of_the_head_and_read_once(place, tmp_path):
    """Of the frozen backbone all rows are read once; an adapter that is trained moves them."""
    options = IncrementalOptions.from_mapping(values(place, tmp_path))
    made = protocol._Protocol(options)
    reader = made.reader
    before = reader.features(made.test.rows, np.arange(4))
    assert reader.features(made.test.rows, np.arange(2)) == pytest.approx(before[:2])
    assert len(reader._kept) == 1
    adapter = made.learner("lora", "natural")
    learner = EstimatorLearner(CentroidEstimator(), adapter=adapter)
    untouched = FeatureReader(adapter.loaded, 8).features(made.test.rows, np.arange(4))
    assert untouched == pytest.approx(before, abs=1e-5)
    learner.learn(made.train.rows, np.arange(24), [0, 1, 2])
    moved = learner.reader.features(made.test.rows, np.arange(4))
    assert np.abs(moved - before).max() > 1e-3
    weights = {name: value.clone() for name, value in adapter.loaded.model.named_parameters()}
    learner.learn(made.train.rows, np.arange(24), [0, 1, 2])
    assert all(value.equal(weights[name]) for name, value in adapter.loaded.model.named_parameters())
    each = EstimatorLearner(CentroidEstimator(), adapter=adapter, each=True)
    each.learn(made.train.rows, np.arange(24), [0, 1, 2])
    assert not all(value.equal(weights[name]) for name, value in adapter.loaded.model.named_parameters())


def test_the_report_has_what_the_records_have(tmp_path):
    records = []
    for order, shift in (("1", 0.0), ("2", 0.1)):
        for method, level in (("a", 0.5), ("b", 0.7)):
            steps = [
                step_metrics(np.arange(10) < 10 * (level + shift), np.zeros(10, int), [(0,)]),
                step_metrics(np.arange(10) < 10 * level, np.arange(10) % 2, [(0,), (1,)]),
            ]
            records.append({"method": method, "order": order, "sessions": [[0], [1]], "steps": steps, "seconds": 1.0})
            records[-1] |= summary(steps)
    facts = {"groups": ["x", "y"], "rows": {"train": 10, "test": 10}}
    options = {"task": "t", "model_name_or_path": "m", "steps": 2, "adapter": "ssf", "adapt": "first"}
    rows = write_report(tmp_path, records, options, facts)
    assert [row["method"] for row in rows] == ["b", "a"]
    assert rows == summary_rows(records)
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(lines) == 8
    assert {line["method"]: line["accuracy"] for line in lines if line["order"] == "2" and line["session"] == "1"} == {
        "a": "0.6",
        "b": "0.8",
    }
    text = (tmp_path / "report.md").read_text()
    assert "with ssf, trained on the first session" in text
    assert "| b | 0.725 " in text
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert json.loads((tmp_path / "report.json").read_text())["summary"][0]["orders"] == 2


def test_records_that_are_none_are_named(tmp_path):
    (tmp_path / "results.jsonl").write_text("no record\n")
    with pytest.raises(ConfigError, match="no record"):
        read_records(tmp_path)
