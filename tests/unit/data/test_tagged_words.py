"""Token classification: words, tags and their tokens, on examples written by hand."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from support.letter_models import write_letter_model
from transformers import EvalPrediction

from peft_lab.data.profile import profile_rows
from peft_lab.data.splits import fingerprint, load_splits
from peft_lab.data.task_registry import kind, parse_task, validate_task
from peft_lab.data.words import words_and_marks, words_at_spaces
from peft_lab.errors import TaskError

LABELS = ("O", "B-city", "I-city", "B-time")
RULE = kind("token_classification")


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_letter_model(tmp_path_factory.mktemp("letters"))


def make_task(folder: Path | None = None, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Any:
    """Task over rows in a file of JSON lines, or over a file that is not there; a change to None removes a key."""
    if folder is not None and rows is not None:
        (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = {"builder": "json", "files": {"train": str((folder or Path("/nowhere")) / "train.jsonl")}}
    values = {"name": "t", "kind": "token_classification", "data": data, "columns": {"tokens": "words", "tags": "tags"}}
    values = {**values, "validation_fraction": 0.5, **changes}
    return parse_task({name: value for name, value in values.items() if value is not None})


def encoded(tokens: list[list[str]], tags: list[list[int]]) -> Dataset:
    features = Features(tokens=List(Value("string")), tags=List(ClassLabel(names=list(LABELS))))
    return Dataset.from_dict({"tokens": tokens, "tags": tags}, features=features)


# Words and spans ------------------------------------------------------------------------------------------------------


def test_marks_are_words_of_a_text_with_spans() -> None:
    text = "to  Paris, l'été!"
    assert [word.text for word in words_and_marks(text)] == ["to", "Paris", ",", "l", "'", "été", "!"]
    assert [word.text for word in words_at_spaces(text)] == ["to", "Paris,", "l'été!"]
    # vowel signs of Hindi are no letters of their own, and a word has all of them
    assert [word.text for word in words_and_marks("हिन्दी में")] == ["हिन्दी", "में"]


@settings(max_examples=100, deadline=None)
@given(st.text("ab ,.'\t\u00e9\u0301\u200b", max_size=12))
def test_words_stand_at_their_places(text: str) -> None:
    for split in (words_at_spaces, words_and_marks):
        words = split(text)
        assert [text[word.start : word.end] for word in words] == [word.text for word in words]
        assert "".join(word.text for word in words) == "".join(text.split())


def test_words_in_ascii_are_those_of_any_text() -> None:
    text = "".join(map(chr, range(128))) * 2
    # a letter with an accent takes the general way
    general = words_and_marks(text + " é")[:-1]
    assert words_and_marks(text) == general


def test_spans_become_tags_of_the_words_they_touch(tmp_path: Path) -> None:
    rows = [
        {"text": "fly to New York.", "spans": [{"start": 7, "end": 15, "label": "city"}]},
        {"text": "New York Rome", "spans": [s(9, 13), s(0, 8)]},
        # as csv holds them
        {"text": "Rome", "spans": json.dumps([s(0, 4)])},
        {"text": "nowhere", "spans": "[]"},
    ]
    (tmp_path / "t.csv").write_text(
        "text,spans\n" + "\n".join(f'{json.dumps(r["text"])},"{as_cell(r["spans"])}"' for r in rows)
    )
    columns = {"text": "text", "spans": "spans"}
    data = {"builder": "csv", "files": {"train": str(tmp_path / "t.csv"), "validation": str(tmp_path / "t.csv")}}
    found = load_splits(make_task(columns=columns, data=data, validation_fraction=None))
    assert found.labels == ("O", "B-city", "I-city")
    names = np.array(found.labels)
    assert [names[tags].tolist() for tags in found.train["tags"][:]] == [
        ["O", "O", "B-city", "I-city", "O"],
        ["B-city", "I-city", "B-city"],
        ["B-city"],
        ["O"],
    ]
    assert found.train["tokens"][:][0] == ["fly", "to", "New", "York", "."]


def s(start: int, end: int, label: str = "city") -> dict[str, Any]:
    return {"start": start, "end": end, "label": label}


def as_cell(spans: Any) -> str:
    return (spans if isinstance(spans, str) else json.dumps(spans)).replace('"', '""')


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([s(0, 3), s(2, 6)], r"2 train rows have spans that overlap.*\(rows 2, 3 of 4\)"),
        ([s(4, 40)], r"have a span that is empty or ends outside the text \(rows 2, 3 of 4\)"),
        ([s(4, 4)], "have a span that is empty"),
        ([{"start": 0, "label": "city"}], r"2 rows have no list of spans in column \"spans\" \(rows 2, 3 of 4\)"),
        (None, 'have no value in column "spans"'),
    ],
)
def test_spans_that_are_none_are_refused_by_row(tmp_path: Path, spans: Any, said: str) -> None:
    good = {"text": "to Rome", "spans": [s(3, 7)]}
    bad = {"text": "to Rome", "spans": spans}
    task = make_task(tmp_path, [good, bad, bad, good], columns={"text": "text", "spans": "spans"})
    with pytest.raises(TaskError, match=said) as raised:
        load_splits(task)
    assert "\n" not in str(raised.value)


def test_a_span_within_a_word_takes_the_word_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "to Rome", "spans": [s(3, 7)]}, {"text": "to Romeward", "spans": [s(3, 7)]}] * 2
    found = load_splits(make_task(tmp_path, rows, columns={"text": "text", "spans": "spans"}))
    assert all(tags == [0, 1] for tags in found.train["tags"][:] + found.validation["tags"][:])
    assert "2 train rows have a span that begins or ends within a word, and takes all of it (rows 2, 4" in caplog.text


# Columns of words and tags --------------------------------------------------------------------------------------------


def test_lists_and_texts_of_words_are_read_alike(tmp_path: Path) -> None:
    lists = [{"words": ["a", "b"], "tags": ["O", "B-x"]}, {"words": ["c"], "tags": ["I-x"]}] * 2
    texts = [{name: " ".join(value) for name, value in row.items()} for row in lists]
    first, second = (load_splits(make_task(tmp_path, rows)) for rows in (lists, texts))
    assert first.labels == ("O", "B-x", "I-x"), "O first, the others sorted"
    assert first.fingerprints == second.fingerprints


def test_numbers_are_positions_of_labels_and_declared_classes_have_names(tmp_path: Path) -> None:
    rows = [{"words": ["a", "b"], "tags": [0, 2]}, {"words": ["c"], "tags": [1]}] * 2
    found = load_splits(make_task(tmp_path, rows, labels=["O", "x", "y"]))
    assert sorted(map(tuple, found.train["tags"][:] + found.validation["tags"][:])) == [(0, 2), (0, 2), (1,), (1,)]
    features = Features(words=List(Value("string")), tags=List(ClassLabel(names=["O", "x", "y"])))
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "t.parquet")
    data = {"builder": "parquet", "files": {"train": str(tmp_path / "t.parquet")}}
    declared = load_splits(make_task(data=data))
    assert declared.labels == ("O", "x", "y")
    assert declared.fingerprints == found.fingerprints
    renamed = found.train.cast_column("tags", List(ClassLabel(names=["O", "x", "z"])))
    assert fingerprint(renamed) != fingerprint(found.train), "names of tags count"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"words": ["a"], "tags": ["O", "O"]}, 'have another number of tags in "tags" than words in "words"'),
        ({"words": [], "tags": []}, 'have no word in column "words"'),
        ({"words": ["a", " "], "tags": ["O", "O"]}, "have an empty word, or a word without a tag"),
        ({"words": ["a"], "tags": None}, 'have no value in column "tags"'),
        ({"words": ["a"], "tags": ["B-y"]}, r'tag "B-y" of the train rows is not one of O, B-x \(1 of 4.*rows? 3'),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_number(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    rows = [{"words": ["a", "b"], "tags": ["O", "B-x"]}] * 4
    with pytest.raises(TaskError, match=said) as raised:
        load_splits(make_task(tmp_path, [*rows[:2], row, rows[3]], labels=["O", "B-x"]))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"columns": {"tokens": "words"}}, 'must name "tokens" and "tags", or "text" and "spans"'),
        ({"columns": {"text": "t", "tags": "tags"}}, 'must name "tokens" and "tags", or "text" and "spans"'),
        ({"columns": {"tags": "tags"}}, 'either "tokens" or "text"'),
        ({"metrics": ["seqeval"]}, 'metric "seqeval" does not fit'),
        ({"streaming": True, "validation_rows": 1, "validation_fraction": None}, "list them in"),
    ],
)
def test_a_task_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    rows = [{"words": ["a", "b"], "tags": ["O", "B-x"]}] * 4
    with pytest.raises(TaskError, match=said):
        load_splits(make_task(tmp_path, rows, **changes))


# Tokens -------------------------------------------------------------------------------------------------------------


def test_the_first_token_of_a_word_has_its_tag(letters: Path) -> None:
    task = make_task()
    tokenizer, model = RULE.load_processor(str(letters), task), RULE.load_model(str(letters), task, LABELS)
    assert model.classifier.out_features == 4
    (row,) = RULE.preprocess(encoded([["to", "new", "york"]], [[0, 1, 2]]), tokenizer, task, model)
    assert tokenizer.decode(row["input_ids"]) == "[CLS] t o n e w y o r k [SEP]"
    assert row["labels"] == [-100, 0, -100, 1, -100, -100, 2, -100, -100, -100, -100]
    short = {name: values[:3] for name, values in row.items()} | {"labels": [-100, 3, -100]}
    batch = RULE.data_collator(tokenizer, task, model)([row, short])
    assert batch["labels"][1].tolist() == [-100, 3, *[-100] * 9]


def test_words_behind_the_limit_are_counted_and_scored_as_outside(
    letters: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = make_task(max_length=8, metrics=list(RULE.info.metrics))
    tokenizer, model = RULE.load_processor(str(letters), task), RULE.load_model(str(letters), task, LABELS)
    rows = encoded([["to", "rome", "at", "noon"], ["rome"]], [[0, 1, 0, 3], [1]])
    with caplog.at_level(logging.WARNING):
        ready = RULE.preprocess(rows, tokenizer, task, model)
    assert "1 of 2 rows are longer than the limit, and 2 words at their ends are tagged O" in caplog.text
    assert 'the first begins "to rome at noon"' in caplog.text
    assert [len(row["input_ids"]) for row in ready] == [8, 6]
    # the model is right wherever it sees a word
    labels = np.array([row["labels"] + [-100] * (8 - len(row["labels"])) for row in ready])
    prediction = EvalPrediction(labels.copy(), labels)
    found = RULE.compute_metrics(task, LABELS, rows)(prediction)
    assert found == {
        "seqeval_f1": pytest.approx(2 * 2 / (3 + 2)),
        "seqeval_precision": 1.0,
        "seqeval_recall": pytest.approx(2 / 3),
        "token_accuracy": pytest.approx(4 / 5),
    }
    columns = RULE.row_predictions(prediction, task, rows).columns
    assert {name: values.tolist() for name, values in columns.items()} == {
        "true_entities": [2, 1],
        "predicted_entities": [1, 1],
        "correct_entities": [1, 1],
        "tokens": [4, 1],
        "hits": [3, 1],
    }


def test_a_word_without_a_token_is_read_as_unknown(letters: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = make_task()
    tokenizer, model = RULE.load_processor(str(letters), task), RULE.load_model(str(letters), task, LABELS)
    (row,) = RULE.preprocess(encoded([["a", "\u200b", "b"]], [[0, 1, 3]]), tokenizer, task, model)
    assert tokenizer.decode(row["input_ids"]) == "[CLS] a [UNK] b [SEP]"
    assert row["labels"] == [-100, 0, 1, 3, -100]
    assert "1 words have no token and are read as [UNK] (row 1)" in caplog.text


def test_a_slow_tokenizer_is_refused(letters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(TaskError, match="has no fast tokenizer"):
        RULE.load_processor(str(letters), make_task())


def test_byte_level_tokens_know_where_words_begin(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["rome to new york"] * 3, vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"]
    )
    trained.save_model(str(tmp_path))
    tokenizer = RobertaTokenizerFast(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    RobertaModel(RobertaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    task = make_task()
    loaded = RULE.load_processor(str(tmp_path), task)
    (row,) = RULE.preprocess(encoded([["to", "new", "york"]], [[0, 1, 2]]), loaded, task, None)
    assert loaded.decode(row["input_ids"], skip_special_tokens=True).strip() == "to new york"
    assert [label for label in row["labels"] if label != -100] == [0, 1, 2]


# Answers ------------------------------------------------------------------------------------------------------------


class Forced(torch.nn.Module):
    """Model that gives each token the class of its letter: `r` begins a city, `y` goes on with it, `n` is a time."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.config, self.device = model.config, model.device
        self.table = torch.zeros(len(tokenizer), 4)
        self.table[:, 0] = 1.0
        for letter, label in (("r", 1), ("y", 2), ("n", 3)):
            self.table[tokenizer.convert_tokens_to_ids(letter)] = torch.eye(4)[label] * 2

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import TokenClassifierOutput

        return TokenClassifierOutput(logits=self.table[input_ids])


def test_entities_of_texts_and_of_lists(letters: Path) -> None:
    task = make_task()
    tokenizer, model = RULE.load_processor(str(letters), task), RULE.load_model(str(letters), task, LABELS)
    forced = Forced(model, tokenizer)
    texts, lists = RULE.predict(forced, tokenizer, ["to rome  york at noon", ["rome", "noon", "noon"]], task)
    score = pytest.approx(float(torch.tensor([0, 2.0, 0, 0]).softmax(-1)[1]))
    assert texts == [
        {"label": "city", "score": score, "text": "rome  york", "start": 3, "end": 13},
        {"label": "time", "score": score, "text": "noon", "start": 17, "end": 21},
    ]
    assert lists == [
        {"label": "city", "score": score, "text": "rome", "start": 0, "end": 4},
        {"label": "time", "score": score, "text": "noon", "start": 5, "end": 9},
        {"label": "time", "score": score, "text": "noon", "start": 10, "end": 14},
    ]
    spans = make_task(columns={"text": "text", "spans": "spans"})
    assert [entity["text"] for entity in RULE.predict(forced, tokenizer, ["rome,noon"], spans)[0]] == ["rome", "noon"]
    for wrong, said in ((7, "a text or a list of words, not 7 \\(input 1\\)"), (" ", "1 inputs have no word")):
        with pytest.raises(TaskError, match=said):
            RULE.predict(forced, tokenizer, [wrong], task)


def test_the_baseline_is_the_usual_tag_of_each_word() -> None:
    task = make_task(metrics=["seqeval_f1", "token_accuracy"])
    train = encoded([["to", "rome"], ["rome", "rome"], ["at", "noon"]], [[0, 1], [1, 0], [0, 3]])
    rows = encoded([["rome", "noon", "york"]], [[1, 0, 1]])
    found = RULE.baseline(task, LABELS, train, rows)
    assert found.predictor == "the most frequent training tag of each word"
    assert found.scores == {"seqeval_f1": pytest.approx(0.5), "token_accuracy": pytest.approx(1 / 3)}


def test_it_proposes_itself_for_lists_and_spans() -> None:
    lists = [{"id": str(n), "tokens": ["a", "b"], "ner_tags": [0, n % 2]} for n in range(6)]
    found = RULE.propose(profile_rows(lists))
    assert (found.confidence, found.columns) == (0.9, {"tokens": "tokens", "tags": "ner_tags"})
    spans = [{"text": f"to rome {n}", "entities": [s(3, 7)]} for n in range(6)]
    assert RULE.propose(profile_rows(spans)).columns == {"text": "text", "spans": "entities"}
    assert RULE.propose(profile_rows([{"text": "a", "label": "b"}])) is None


@pytest.mark.full
def test_snips_slots_ship_with_the_package() -> None:
    task = validate_task("snips-slots")
    found = load_splits(task, test=True)
    assert (len(found.train) + len(found.validation), len(found.test)) == (13_784, 700)
    assert len({label[2:] for label in found.labels} - {""}) == 39
