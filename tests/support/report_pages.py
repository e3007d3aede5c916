"""Pages of comparisons: made-up results of two tasks, and a parser of what a page holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from peft_lab.comparison.records.results import RESULTS
from peft_lab.comparison.records.run import Record
from peft_lab.metrics.predictions import Predictions, write_predictions
from peft_lab.runs.run_folder import write_labels
from support.compare_helpers import record

ACCURACY = {"svfit rank=8": 0.9, "lora r=8": 0.905, "head": 0.6}
ROWS = 120


def comparison(folder: Path, records: list[Record] | None = None) -> Path:
    """A folder of a comparison: two tasks, three arms, three seeds, a search, one failed run; or the given records."""
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 2, ROWS).astype(float)
    made = [] if records is None else records
    for task in ("words", "signs") if records is None else ():
        for arm, accuracy in ACCURACY.items():
            made += [record(arm, 0, "search", task, rate, score=accuracy - 0.1 * rate) for rate in (1e-4, 1e-3, 1e-2)]
            for seed in (0, 1, 2):
                if (task, arm, seed) == ("signs", "head", 2):
                    made.append(record(arm, seed, task=task, score=None))
                    continue
                right = rng.random(ROWS) < accuracy
                made.append(record(arm, seed, task=task, score=float(right.mean())))
                run = folder / made[-1].folder
                run.mkdir(parents=True)
                (run / "metrics.json").write_text("{}")
                prediction = np.where(right, reference, 1 - reference)
                columns = {"reference": reference, "prediction": prediction, "confidence": np.linspace(0.5, 1, ROWS)}
                write_predictions(run, Predictions("classification", columns))
                write_labels(run, ["no", "yes"])
                guessed = {"predictor": "uniform guessing", "metrics": {"test": {"accuracy": 0.5}}}
                made[-1].metrics["baselines"] = [guessed]
    folder.mkdir(exist_ok=True)
    (folder / RESULTS).write_text("".join(json.dumps(asdict(one)) + "\n" for one in made))
    return folder


class Page(HTMLParser):
    """What a page holds: its elements, ids, addresses and text; checks that elements are closed in order."""

    VOID = frozenset({"meta", "img", "source", "link", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.elements if attribute in attributes]
