"""Question answering: windows, places of answers and what is found again, on examples written by hand."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support.letter_models import letter_tokenizer, write_letter_model
from transformers import EvalPrediction

from peft_lab.data.context_windows import Window, Windows, answer_places, best_answer
from peft_lab.data.profile import profile_rows
from peft_lab.data.splits import load_splits
from peft_lab.data.task_registry import kind, parse_task
from peft_lab.errors import TaskError

RULE = kind("question_answering")
SQUAD = {"question": "question", "context": "context", "answers": "answers"}


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_letter_model(tmp_path_factory.mktemp("letters"))


def make_task(folder: Path | None = None, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Any:
    if folder is not None and rows is not None:
        (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = {"builder": "json", "files": {"train": str((folder or Path("/nowhere")) / "train.jsonl")}}
    values = {"name": "t", "kind": "question_answering", "data": data, "columns": SQUAD, "validation_fraction": 0.5}
    return parse_task({**values, "metrics": ["f1", "exact_match"], **changes})


def row(context: str, *answers: str, question: str = "who?") -> dict[str, Any]:
    places = {"text": list(answers), "answer_start": [context.index(answer) for answer in answers]}
    return {"question": question, "context": context, "answers": places}


# Rows -----------------------------------------------------------------------------------------------------------------


def test_forms_of_answers_are_read_alike(tmp_path: Path) -> None:
    squad = [row("ann and bob", "bob"), row("cy", "cy")] * 2
    forms = {
        "squad": squad,
        "one mapping an answer": [
            {**r, "answers": [{"text": r["answers"]["text"][0], "answer_start": r["answers"]["answer_start"][0]}]}
            for r in squad
        ],
        "json": [{**r, "answers": json.dumps(r["answers"])} for r in squad],
    }
    found = {name: load_splits(make_task(tmp_path, rows)).fingerprints for name, rows in forms.items()}
    plain = [{**r, "answer": r["answers"]["text"][0], "start": str(r["answers"]["answer_start"][0])} for r in squad]
    columns = {"question": "question", "context": "context", "answer": "answer", "answer_start": "start"}
    found["plain"] = load_splits(make_task(tmp_path, plain, columns=columns)).fingerprints
    assert all(each == found["squad"] for each in found.values())


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (
            {**row("ann and bob"), "answers": {"text": ["bob"], "answer_start": [7]}},
            r"2 train rows have an answer that does not stand at its answer_start in the context \(rows 2, 3 of 4\)",
        ),
        ({**row("ann"), "answers": {"text": ["ann"], "answer_start": ["x"]}}, "does not stand at its answer_start"),
        (row("ann"), r"2 train rows have no answer \(rows 2, 3 of 4\).*empty_rows: keep"),
        ({**row("ann"), "answers": None}, 'have no value in column "answers"'),
        ({**row("ann", "ann"), "question": " "}, 'have an empty text in column "question"'),
        ({**row("ann"), "answers": "ann"}, r'2 rows have no answers in column "answers" \(rows 2, 3 of 4\)'),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_number(tmp_path: Path, bad: dict[str, Any], said: str) -> None:
    good = row("ann and bob", "bob")
    if isinstance(bad["answers"], str):
        good = {**good, "answers": json.dumps(good["answers"])}
    with pytest.raises(TaskError, match=said) as raised:
        load_splits(make_task(tmp_path, [good, bad, bad, good]))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"columns": {"question": "q", "context": "c", "answer": "a"}}, '"answer" and "answer_start"'),
        ({"columns": {"question": "q", "context": "c"}}, 'either "answers" or "answer"'),
        ({"doc_stride": -1}, '"doc_stride" must be at least 0'),
        ({"max_answer_length": 0}, '"max_answer_length" must be at least 1'),
        ({"metrics": ["squad"]}, 'metric "squad" does not fit'),
    ],
)
def test_a_task_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError, match=said):
        make_task(**changes)


# Windows --------------------------------------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    # [CLS] q [SEP] + six letters + [SEP], of which neighbours share two
    windows = Windows(letter_tokenizer(), limit=10, stride=2).of_row("q", "abcdefghijk").windows
    tokenizer = letter_tokenizer()
    assert [tokenizer.decode(window.inputs["input_ids"]) for window in windows] == [
        "[CLS] q [SEP] a b c d e f [SEP]",
        "[CLS] q [SEP] e f g h i j [SEP]",
        "[CLS] q [SEP] i j k [SEP]",
    ]
    assert [(window.first, window.starts[0], window.ends[-1], window.null) for window in windows] == [
        (3, 0, 6, 0),
        (3, 4, 10, 0),
        (3, 8, 11, 0),
    ]
    # "ef" stands whole in the first two
    assert [answer_places(window, 4, 6) for window in windows] == [(7, 8), (3, 4), None]
    # "dg" is cut by each
    assert [answer_places(window, 3, 7) for window in windows] == [None, None, None]


@settings(max_examples=60, deadline=None)
@given(
    context=st.text("ab ", min_size=1, max_size=60).filter(str.strip),
    question=st.text("q ", min_size=1, max_size=40).filter(str.strip),
    limit=st.integers(8, 40),
    stride=st.integers(0, 30),
)
def test_windows_cover_the_context_and_share_their_stride(context: str, question: str, limit: int, stride: int) -> None:
    made = Windows(letter_tokenizer(), limit, stride).of_row(question, context)
    assert all(len(window.inputs["input_ids"]) <= limit for window in made.windows)
    covered = set().union(*(window.starts for window in made.windows))
    assert covered == {place for place, character in enumerate(context) if character != " "}
    asked = len(question.replace(" ", ""))
    assert made.cuts_question == (asked > (limit - 3) // 2)
    wanted = min(stride, (limit - 3 - min(asked, (limit - 3) // 2)) // 2)
    for one, other in itertools.pairwise(made.windows):
        assert len(set(one.starts) & set(other.starts)) == wanted


def test_a_limit_without_room_is_refused(letters: Path) -> None:
    task = make_task(max_length=6)
    with pytest.raises(TaskError, match="6 tokens have no room for question and context beside the 3"):
        RULE.preprocess(Dataset.from_list([row("ab", "ab")]), RULE.load_processor(str(letters), task), task, None)


def test_a_row_gives_a_window_for_each_part(letters: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = make_task(max_length=10, doc_stride=2, max_answer_length=2)
    tokenizer = RULE.load_processor(str(letters), task)
    rows = Dataset.from_list(
        [
            {**row("abcdefghijk", "ef", question="q"), "prompt_ids": 7},
            {**row("abcdefg", "bcdefg", question="qqqqqqq"), "prompt_ids": 8},
            {**row("ab", question="q"), "prompt_ids": 9},
        ]
    )
    with caplog.at_level(logging.WARNING):
        found = RULE.preprocess(rows, tokenizer, task, None)
    assert set(found.column_names) == {
        *("input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions", "prompt_ids")
    }
    pairs = list(zip(found["start_positions"][:], found["end_positions"][:], strict=True))
    assert pairs[:3] == [(7, 8), (3, 4), (0, 0)], "a window without the answer has the first token in its place"
    assert pairs[-1] == (0, 0)
    assert found["prompt_ids"][:] == [7] * 3 + [8] * (len(found) - 4) + [9]
    assert "1 of 3 rows have a question that takes more than half of the 10 tokens" in caplog.text
    assert "1 of 3 rows have an answer that stands whole in no window, and is trained as none (row 2" in caplog.text


def test_an_answer_that_could_never_be_found_is_counted(letters: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = make_task(max_answer_length=2)
    rows = Dataset.from_list([row("abcdef", "ab"), row("abcdef", "abc")])
    RULE.preprocess(rows, RULE.load_processor(str(letters), task), task, None)
    assert "1 of 2 rows have an answer of more than 2 tokens, which is never found (row 2" in caplog.text


# Answers --------------------------------------------------------------------------------------------------------------


def searched(context: str, windows: list[Window], starts: Any, ends: Any, most: int) -> tuple[float, str]:
    """Best answer by trying every pair of tokens."""
    best = (-np.inf, "")
    for window, start, end in zip(windows, starts, ends, strict=True):
        for i in range(len(window.starts)):
            for j in range(i, min(i + most, len(window.starts))):
                score = start[window.first + i] + end[window.first + j]
                best = max(best, (score, context[window.starts[i] : window.ends[j]]))
    return best


@pytest.mark.parametrize("most", [1, 3, 50])
def test_the_best_answer_is_that_of_a_full_search(most: int) -> None:
    draw, context = np.random.default_rng(most), "abcdefghijklmnopq"
    windows = Windows(letter_tokenizer(), limit=12, stride=3).of_row("q", context).windows
    for _ in range(20):
        starts, ends = draw.normal(size=(2, len(windows), 12))
        score, text = searched(context, windows, starts, ends, most)
        found = best_answer(context, windows, starts, ends, most, may_be_none=False)
        assert found.text == text == context[found.start : found.end]
        null = min(starts[k][0] + ends[k][0] for k in range(len(windows)))
        or_none = best_answer(context, windows, starts, ends, most, may_be_none=True)
        assert or_none.text == (text if score > null else "")


def test_the_score_is_the_share_among_the_best() -> None:
    windows = Windows(letter_tokenizer(), limit=9, stride=0).of_row("q", "ab").windows
    starts, ends = np.zeros((1, 6)), np.zeros((1, 6))
    starts[0, 3] = 1.0
    found = best_answer("ab", windows, starts, ends, 30, may_be_none=False)
    # the answers "a", "ab" and "b"
    assert found.score == pytest.approx(np.e / (2 * np.e + 1))
    assert (found.text, found.start, found.end) == ("a", 0, 1)


def test_a_space_before_a_word_is_no_part_of_an_answer() -> None:
    window = Window({}, first=0, starts=[0, 2], ends=[2, 5], null=0)
    logits = np.array([0.0, 9.0])
    found = best_answer("it is", [window], [logits], [logits], 30, may_be_none=False)
    assert (found.text, found.start, found.end) == ("is", 3, 5)


def test_scores_are_those_of_rows_and_not_of_windows(letters: Path) -> None:
    task = make_task(max_length=10, doc_stride=2, empty_rows="keep")
    tokenizer, model = RULE.load_processor(str(letters), task), RULE.load_model(str(letters), task, None)
    raw = Dataset.from_list(
        [row("abcdefghijk", "ef", question="q"), row("ab cd", "cd", "ab cd", question="q"), row("ab", question="q")]
    )
    rows = RULE.rows_to_score(raw, tokenizer, task, model)
    ready = RULE.preprocess(raw, tokenizer, task, model)
    assert len(ready) == 5
    # the right places, and for the second row those of its last word alone
    logits = np.zeros((2, 5, 13))
    for side, name in enumerate(RULE.trainer_labels):
        logits[side, range(5), ready[name][:]] = 10.0
    labels = tuple(np.array(ready[name][:]) for name in RULE.trainer_labels)
    prediction = EvalPrediction((logits[0], logits[1]), labels)
    assert RULE.compute_metrics(task, None, rows)(prediction) == {"f1": 1.0, "exact_match": 1.0}
    logits[:, 3] = 0.0
    logits[0, 3, 3] = logits[1, 3, 4] = 10.0  # "ab" of the second row: half of "ab cd"
    items = RULE.row_predictions(prediction, task, rows)
    assert items.columns["exact_match"].tolist() == [1.0, 0.0, 1.0]
    assert items.columns["f1"].tolist() == pytest.approx([1.0, 2 / 3, 1.0])


def test_baselines_are_the_context_and_the_usual_answer() -> None:
    train = Dataset.from_list([row("ann", "ann"), row("bob", "bob"), row("ann", "ann")])
    rows = Dataset.from_list([row("cy ann", "ann"), row("dan eve", "dan")])
    found = RULE.baseline(make_task(), None, train, rows)
    assert found.predictor == "the whole context as the answer"
    assert found.scores == {"f1": pytest.approx(2 / 3), "exact_match": 0.0}
    found = RULE.baseline(make_task(metrics=["exact_match"]), None, train, rows)
    assert (found.predictor, found.scores) == ("the most frequent training answer", {"exact_match": 0.5})


@torch.no_grad()
def test_answers_of_inputs(letters: Path) -> None:
    task = make_task(max_length=10, doc_stride=2)
    tokenizer, model = RULE.load_processor(str(letters), task), RULE.load_model(str(letters), task, None)
    model.train()
    inputs = [{"context": "abcdefghijk", "question": "q"}, ("q", "ab")]
    answers = RULE.predict(model, tokenizer, inputs, task, batch_size=2)
    assert model.training, "the mode is put back"
    for answer, context in zip(answers, ("abcdefghijk", "ab"), strict=True):
        assert answer["answer"] == context[answer["start"] : answer["end"]] != ""
        assert 0 < answer["score"] <= 1
    with pytest.raises(TaskError, match="a mapping of question and context, not 'q' \\(input 1\\)"):
        RULE.predict(model, tokenizer, ["q"], task)
    with pytest.raises(TaskError, match="1 inputs have an empty question or context"):
        RULE.predict(model, tokenizer, [("q", " ")], task)


@torch.no_grad()
def test_all_windows_of_a_row_take_its_prompts(letters: Path) -> None:
    from peft import get_peft_model

    from peft_lab.tuners.registration import make_config

    task = make_task(max_length=10, doc_stride=2)
    tokenizer, base = RULE.load_processor(str(letters), task), RULE.load_model(str(letters), task, None)
    options = {"prompt_values": ["a", "b"], "num_prompts": 2}
    config = make_config("metadata_prompt", options, model=base, task_type="QUESTION_ANS")
    model = get_peft_model(base, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "metadata_prompt" in name:
            parameter.normal_(std=3.0)
    inputs, ids = [("q", "abcdefghijklmn"), ("q", "opqrstuvwxyz"), ("q", "abcdefghijklmn")], [0, 1, 1]
    together = RULE.predict_with_prompts(model, tokenizer, inputs, task, 2, ids)
    for value, number, answer in zip(inputs, ids, together, strict=True):
        (alone,) = RULE.predict_with_prompts(model, tokenizer, [value], task, 8, [number])
        assert alone == pytest.approx(answer)
    assert together[0] != together[2], "the prompts of the value count"


def test_it_proposes_itself_for_the_columns_of_squad() -> None:
    rows = [row(f"ann {n}", "ann", question=f"who {n}") for n in range(4)]
    found = RULE.propose(profile_rows(rows))
    assert (found.confidence, found.columns) == (0.9, SQUAD)
    plain = [{"question": "who", "context": "ann", "answer": "ann", "answer_start": "0"} for _ in range(4)]
    expected = {name: name for name in ("question", "context", "answer", "answer_start")}
    assert RULE.propose(profile_rows(plain)).columns == expected
    assert RULE.propose(profile_rows([{"question": "q", "answer": "a"}])) is None


# Tokens that an adapter puts in front -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["token_classification", "question_answering"])
def test_answers_stand_behind_the_virtual_tokens_of_peft(name: str, letters: Path) -> None:
    """Prompt tuning of peft makes inputs and logits longer."""
    from datasets import ClassLabel, Features, List, Value
    from peft import PromptTuningConfig, get_peft_model

    rule = kind(name)
    if name == "question_answering":
        task, labels, rows = make_task(), None, Dataset.from_list([row("abc de", "de"), row("ab", "b")])
    else:
        data = {"builder": "json", "files": {"train": "/nowhere.jsonl"}}
        columns = {"tokens": "tokens", "tags": "tags"}
        task = parse_task({"name": "t", "kind": name, "data": data, "columns": columns})
        labels = ("O", "x", "y")
        features = Features(tokens=List(Value("string")), tags=List(ClassLabel(names=list(labels))))
        rows = Dataset.from_dict({"tokens": [["ab", "c"], ["d"]], "tags": [[0, 1], [2]]}, features=features)
    tokenizer, base = rule.load_processor(str(letters), task), rule.load_model(str(letters), task, labels)
    sizes = {"token_dim": 16, "num_transformer_submodules": 1, "num_layers": 1, "num_attention_heads": 2}
    config = PromptTuningConfig(task_type=rule.info.task_type, num_virtual_tokens=3, **sizes)
    model = get_peft_model(base, config).eval()
    ready = rule.preprocess(rows, tokenizer, task, model)
    batch = rule.data_collator(tokenizer, task, model)(list(ready))
    out = model(**batch)
    assert batch["input_ids"].shape[1] + 3 == next(v for k, v in out.items() if "logits" in k).shape[1]
    if name == "token_classification":
        losses = [
            -out.logits[number, 3 + place].log_softmax(-1)[label]
            for number, row in enumerate(ready)
            for place, label in enumerate(row["labels"])
            if label >= 0
        ]
        assert len(losses) == 3
        assert float(out.loss) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
        return
    for number, row_ in enumerate(ready):
        own = out.start_logits[number, 3:]
        assert out.start_logits[number, batch["start_positions"][number]] == own[row_["start_positions"]]
    # the answer that an evaluation finds is that of a prediction
    scored = rule.rows_to_score(rows, tokenizer, task, model)
    prediction = EvalPrediction((out.start_logits.numpy(), out.end_logits.numpy()), (None, None))
    answers = [answer["answer"] for answer in rule.predict(model, tokenizer, list(rows), task)]
    references = [{"text": [text], "answer_start": [0]} for text in answers]
    scored = scored.remove_columns("answers").add_column("answers", references)
    assert rule.compute_metrics(task, None, scored)(prediction)["exact_match"] == 1.0
