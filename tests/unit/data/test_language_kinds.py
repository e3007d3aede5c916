"""Kinds that predict tokens: chats, pairs and texts of decoders, encoder-decoders, and masked language models."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.tiny_runs import make_backbone, make_decoder, make_encoder_decoder, make_masked_lm, options
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from peft_lab.data import chat
from peft_lab.data.masking import MaskingCollator, mask
from peft_lab.data.profile import profile_rows
from peft_lab.data.row_preparation import faulty
from peft_lab.data.task_registry import kind, parse_task
from peft_lab.errors import ConfigError, TaskError
from peft_lab.loading.load_run import load_base
from peft_lab.metrics.per_row import jackknife_values, written_metrics
from peft_lab.metrics.predictions import Predictions
from peft_lab.training.evaluate import evaluate
from peft_lab.training.run import train

IGNORED = -100
#: Marks of a template, each of which is one token.
MARKS = ("<u>", "<a>", "<s>", "<end>")


def task_of(name: str, columns: dict[str, str] | None = None, **keys: Any) -> Any:
    data = {"builder": "json", "files": {"train": "x.jsonl"}}
    return parse_task({"name": "t", "kind": name, "data": data, **({"columns": columns} if columns else {}), **keys})


def word_tokenizer(**changes: Any) -> Any:
    """A tokenizer of words between spaces and of the marks, which puts `<bos>` first by itself."""
    words = ["<pad>", "<unk>", "<bos>", "<eos>", *MARKS, "one", "two", "three", "four", "five", "six", "seven", "eight"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
    fast.add_special_tokens({"extra_special_tokens": list(MARKS)})
    fast.chat_template = changes.get("chat_template")
    return fast


BEGIN = "<bos>{% for m in messages %}"
MARK = "{{ {'user': '<u> ', 'assistant': '<a> ', 'system': '<s> '}[m['role']] }}"
ASK = "{% endfor %}{% if add_generation_prompt %}<a> {% endif %}"
MARKED = (
    BEGIN + MARK + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} <end> {% endgeneration %}"
    "{% else %}{{ m['content'] }} <end> {% endif %}" + ASK
)
UNMARKED = BEGIN + MARK + "{{ m['content'] }} <end> " + ASK
#: Only the last turn of the assistant keeps its second word, as templates drop earlier thoughts.
FORGETFUL = (
    BEGIN + MARK + "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split()[0] }}{% endif %} <end> " + ASK
)


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    found = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + found


def shown(tokenizer: Any, row: dict[str, Any]) -> list[tuple[str, bool]]:
    """Tokens of a row, and True where they have a loss."""
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    kept = [label != IGNORED for label in row["labels"]]
    assert all(label in (IGNORED, found) for label, found in zip(row["labels"], row["input_ids"], strict=True))
    return list(zip(tokens, kept, strict=True))


def as_pairs(text: str) -> list[tuple[str, bool]]:
    """Words by hand; a star before one says that it has a loss."""
    return [(word.removeprefix("*"), word.startswith("*")) for word in text.split()]


# Chats ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_the_loss_is_on_the_turns_of_the_assistant(template: str) -> None:
    rule, task = kind("causal_lm"), task_of("causal_lm", {"messages": "messages"})
    tokenizer = word_tokenizer(chat_template=template)
    chats = [turns("one", "two three", "four", "five", system="six"), turns("seven", "eight")]
    rows = Dataset.from_list([{"messages": chat_} for chat_ in chats])
    ready = rule.preprocess(rows, tokenizer, task, None)
    first = "<bos> <s> six <end> <u> one <end> <a> *two *three *<end> <u> four <end> <a> *five *<end>"
    assert shown(tokenizer, ready[0]) == as_pairs(first)
    assert shown(tokenizer, ready[1]) == as_pairs("<bos> <u> seven <end> <a> *eight *<end>")
    as_text = Dataset.from_list([{"messages": json.dumps(chat_)} for chat_ in chats])
    assert rule.preprocess(as_text, tokenizer, task, None)[:] == ready[:]
    # a limit leaves the end of the conversation
    short = rule.preprocess(rows, tokenizer, task.model_copy(update={"max_length": 6}), None)
    assert shown(tokenizer, short[0]) == as_pairs("<bos> four <end> <a> *five *<end>")
    prompt = tokenizer.decode(chat.prompt_ids(tokenizer, chats[0][:-1]), skip_special_tokens=False)
    assert first.replace("*", "").startswith(prompt)


def test_a_template_that_rewrites_earlier_turns_is_refused_by_row() -> None:
    rule, task = kind("causal_lm"), task_of("causal_lm", {"messages": "messages"})
    tokenizer = word_tokenizer(chat_template=FORGETFUL)
    chats = [turns("one", "two"), turns("one", "two three"), turns("one", "two three", "four", "five")]
    ready = rule.preprocess(Dataset.from_dict({"messages": chats[:2]}), tokenizer, task, None)
    assert shown(tokenizer, ready[1]) == as_pairs("<bos> <u> one <end> <a> *two *three *<end>")
    with pytest.raises(TaskError, match=r"row 3: the chat template writes the first 2 turns otherwise"):
        rule.preprocess(Dataset.from_dict({"messages": chats}), tokenizer, task, None)


@pytest.mark.parametrize("name", sorted(chat.TEMPLATES))
def test_a_tokenizer_without_a_template_gets_a_named_one(name: str, tmp_path: Path, caplog: Any) -> None:
    """Each answer ends with the end token, the beginning stays, and the saved tokenizer has the template."""
    rule = kind("causal_lm")
    word_tokenizer().save_pretrained(tmp_path)
    given = {} if name == chat.DEFAULT_TEMPLATE else {"chat_template": name}
    tokenizer = rule.load_processor(str(tmp_path), task_of("causal_lm", {"messages": "messages"}, **given))
    assert (f'it gets "{name}"' in caplog.text) == (not given)
    ids, answers = chat.encode(tokenizer, turns("one", "two three", "four", "five"))
    learnt = [token for token, answer in zip(tokenizer.convert_ids_to_tokens(ids), answers, strict=True) if answer]
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<bos>"
    assert "five" in learnt
    assert learnt[-1] == "<eos>"
    assert "one" not in learnt
    assert chat.end_tokens(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.save_pretrained(tmp_path / "run")
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "run")
    assert chat.render(saved, turns("one")) == chat.render(tokenizer, turns("one"))
    with pytest.raises(TaskError, match=r'must be one of chatml, plain, not "chatlm"\. Did you mean "chatml"'):
        task_of("causal_lm", {"messages": "messages"}, chat_template="chatlm")


def test_an_answer_can_end_where_the_template_has_no_end_of_a_turn() -> None:
    rule, task = kind("causal_lm"), task_of("causal_lm", {"messages": "messages"})
    tokenizer = word_tokenizer(chat_template=UNMARKED.replace(" <end>", ""))
    ready = rule.preprocess(Dataset.from_list([{"messages": turns("one", "two")}]), tokenizer, task, None)
    assert shown(tokenizer, ready[0]) == as_pairs("<bos> <u> one <a> *two *<eos>")
    assert chat.end_tokens(tokenizer) == []
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[9, 3]))
    assert chat.stop_tokens(model, tokenizer) == [9, tokenizer.eos_token_id]
    # the token that ends a turn stops the writing, whatever the model's config names
    ending = word_tokenizer(chat_template=UNMARKED)
    assert chat.stop_tokens(model, ending) == [9, ending.eos_token_id, ending.convert_tokens_to_ids("<end>")]


WRONG_CHATS = [
    (turns("one"), "have no turn of the assistant"),
    ([{"role": "bot", "content": "x"}], 'have a turn of the role "bot", which is none of system'),
    ([{"role": "assistant", "content": "x"}, *turns("one", "two")], "do not begin with a turn of the user"),
    (turns("one", " "), "have a turn without a text"),
    ([{"from": "human", "value": "x"}], 'turn 1 has no text in "role", but from, value'),
    ("not json", "hold no conversation"),
    ([], "hold no conversation"),
    (None, 'have no value in column "messages"'),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG_CHATS, ids=[said for _, said in WRONG_CHATS])
def test_conversations_that_teach_nothing_are_refused_by_number(wrong: Any, said: str) -> None:
    task = task_of("causal_lm", {"messages": "messages"})
    value = wrong if wrong is None or isinstance(wrong, str) else json.dumps(wrong)
    good = json.dumps(turns("one", "two"))
    rows = Dataset.from_dict({"messages": [good, value, good, value]})
    with pytest.raises(TaskError, match=r"2 train rows .*\(rows 2, 4 of 4\)") as raised:
        faulty(task, "train", rows)
    assert said in str(raised.value)
    assert faulty(task.model_copy(update={"empty_rows": "drop"}), "train", rows) == {1, 3}


def test_tools_and_missing_keys_reach_the_template() -> None:
    """Tables fill the keys that a turn lacks; a template must not see them."""
    messages = [
        {"role": "user", "content": "x", "tool_calls": None},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1, "b": None}}], "content": None},
        {"role": "tool", "content": "y"},
        {"role": "assistant", "content": "z"},
    ]
    found = chat.conversation(messages)
    assert found[0] == {"role": "user", "content": "x"}
    assert found[1] == {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
    assert chat.fault(found) is None
    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    assert '"tool_calls"' in chat.render(word_tokenizer(chat_template=template), found, add_generation_prompt=False)
    refusing = word_tokenizer(chat_template="{{ raise_exception('no tools here') }}")
    with pytest.raises(TaskError, match="the chat template refuses the conversation: no tools here"):
        chat.render(refusing, found)


def test_a_conversation_is_answered_up_to_its_last_answer(tmp_path: Path) -> None:
    keys = {"metrics": ["perplexity", "exact_match"], "max_new_tokens": 3, "chat_template": "plain"}
    rule, task = kind("causal_lm"), task_of("causal_lm", {"messages": "messages"}, **keys)
    tokenizer, model = load_base(rule, task, None, str(make_decoder(tmp_path)))
    asked = turns("the rain", "a song", "more")
    (answer,) = rule.predict(model, tokenizer, [asked], task)
    assert rule.predict(model, tokenizer, [[*asked, {"role": "assistant", "content": "soup"}]], task) == [answer]
    assert rule.predict(model, tokenizer, ["the rain", turns("the rain")], task)[0] != answer
    rows = Dataset.from_list(
        [{"messages": [*asked, {"role": "assistant", "content": text}]} for text in (answer, "nothing of it")]
    )
    assert rule.generation_scores(model, tokenizer, rows, task) == {"exact_match": [1.0, 0.0]}
    with pytest.raises(TaskError, match=r'the role "bot".* \(input 2\)'):
        rule.predict(model, tokenizer, ["a", [{"role": "bot", "content": "x"}]], task)


# Prompt and completion, text ------------------------------------------------------------------------------------------


def test_pairs_are_texts_or_turns() -> None:
    rule, task = kind("causal_lm"), task_of("causal_lm", {"prompt": "prompt", "completion": "completion"})
    tokenizer = word_tokenizer(chat_template=MARKED)
    texts = Dataset.from_list([{"prompt": "one two", "completion": "three"}])
    assert shown(tokenizer, rule.preprocess(texts, tokenizer, task, None)[0]) == as_pairs("<bos> one two *three *<eos>")
    before = turns("one", "two", "three")
    pair = {"prompt": before, "completion": [{"role": "assistant", "content": "four"}]}
    for template in (MARKED, UNMARKED):
        tokenizer.chat_template = template
        ready = rule.preprocess(Dataset.from_list([pair]), tokenizer, task, None)
        wanted = "<bos> <u> one <end> <a> two <end> <u> three <end> <a> *four *<end>"
        assert shown(tokenizer, ready[0]) == as_pairs(wanted), "an answer of the prompt is not learnt"
    mixed = Dataset.from_list([{"prompt": "one", "completion": pair["completion"]}])
    with pytest.raises(TaskError, match="texts on one side and lists of turns on the other"):
        rule.cast(mixed, task)


def test_all_of_a_text_is_learnt() -> None:
    rule, task = kind("causal_lm"), task_of("causal_lm", {"text": "text"}, max_length=4)
    tokenizer = word_tokenizer()
    ready = rule.preprocess(Dataset.from_dict({"text": ["one two", "one two three four"]}), tokenizer, task, None)
    assert shown(tokenizer, ready[0]) == as_pairs("*<bos> *one *two *<eos>")
    assert shown(tokenizer, ready[1]) == as_pairs("*<bos> *one *two *three"), "a text that is cut has no end"
    assert tokenizer.chat_template is None


FORMS = [
    ({}, 'names the columns of "messages"'),
    ({"columns": {"prompt": "p"}}, "not prompt"),
    ({"columns": {"messages": "m", "text": "t"}}, "not messages, text"),
    ({"columns": {"messages": "m"}, "template": {"prompt": "{a}", "answer": "{b}"}}, "not both"),
    ({"columns": {"text": "t"}, "metrics": ["perplexity", "exact_match"]}, '"exact_match" does not fit'),
    ({"columns": {"text": "t"}, "chat_template": "plain"}, "no effect on rows that are no chats"),
]


@pytest.mark.parametrize(("keys", "said"), FORMS, ids=[said for _, said in FORMS])
def test_a_task_has_one_form(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError) as raised:
        task_of("causal_lm", **keys)
    assert said.replace("names", "name") in str(raised.value)


# Encoder and decoder --------------------------------------------------------------------------------------------------


def test_the_decoder_reads_the_target_one_place_later(tmp_path: Path) -> None:
    """The loss is the cross-entropy of each target token after the start token and those before it."""
    rule, task = kind("seq2seq_lm"), task_of("seq2seq_lm", {"source": "a", "target": "b"}, source_prefix="please ")
    tokenizer, model = load_base(rule, task, None, str(make_encoder_decoder(tmp_path)))
    rows = Dataset.from_list([{"source": "rain", "target": "the song"}, {"source": "sun", "target": "rice"}])
    ready = rule.preprocess(rows, tokenizer, task, model)
    words = [tokenizer.convert_ids_to_tokens(ready[0][name]) for name in ("input_ids", "labels")]
    assert words == [["[CLS]", "please", "rain", "[SEP]"], ["[CLS]", "the", "song", "[SEP]"]]
    batch = rule.data_collator(tokenizer, task, model)([ready[0], ready[1]])
    start, pad = model.config.decoder_start_token_id, tokenizer.pad_token_id
    assert batch["labels"][1, -1] == IGNORED
    assert batch["decoder_input_ids"].tolist() == [
        [start, *ready[0]["labels"][:-1]],
        [start, *ready[1]["labels"][: batch["labels"].shape[1] - 1]],
    ]
    with torch.no_grad():
        output = model(**batch)
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"],
        ).logits
    losses = functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none", ignore_index=IGNORED)
    kept = batch["labels"] != IGNORED
    assert float(output.loss) == pytest.approx(float(losses[kept].mean()), rel=1e-5)
    predicted, log_probabilities = rule.preprocess_logits_for_metrics((logits, None), batch["labels"])
    torch.testing.assert_close(-log_probabilities, losses)
    assert torch.equal(predicted, logits.argmax(-1))
    assert pad == model.config.pad_token_id


def test_a_text_is_written_after_its_source(tmp_path: Path) -> None:
    keys = {"metrics": ["perplexity", "exact_match"], "max_new_tokens": 4}
    rule, task = kind("seq2seq_lm"), task_of("seq2seq_lm", {"source": "a", "target": "b"}, **keys)
    tokenizer, model = load_base(rule, task, None, str(make_encoder_decoder(tmp_path)))
    sources = ["rain", "the sun with some more", "song"]
    whole = rule.predict(model, tokenizer, sources, task)
    assert whole == rule.predict(model, tokenizer, sources, task, batch_size=1)
    ids = tokenizer("the sun with some more", return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert whole[1] == tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    rows = Dataset.from_dict({"source": sources, "target": [whole[0], "wrong", whole[2]]})
    assert rule.generation_metrics(model, tokenizer, rows, task) == {"exact_match": pytest.approx(2 / 3)}


def test_languages_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    path = make_encoder_decoder(tmp_path)
    keys = {"source_lang": "en_XX", "target_lang": "de_DE"}
    with pytest.raises(TaskError, match=r"knows no languages; remove"):
        kind("seq2seq_lm").load_processor(str(path), task_of("seq2seq_lm", {"source": "a", "target": "b"}, **keys))
    with pytest.raises(TaskError, match="go together"):
        task_of("seq2seq_lm", {"source": "a", "target": "b"}, source_lang="en_XX")


def test_bleu_is_that_of_the_corpus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    from peft_lab.metrics import bleu, load_metric

    draw = np.random.default_rng(0)
    words = np.array(["the", "cat", "sat", "on", "a", "mat", ",", "there"])
    references = [" ".join(draw.choice(words, 9)) for _ in range(12)]
    texts = [" ".join(np.where(draw.random(9) < 0.2, "dog", reference.split())) for reference in references]
    wanted = sacrebleu.corpus_bleu(texts, [references]).score
    assert load_metric("bleu").compute(predictions=texts, references=references)["bleu"] == pytest.approx(wanted)
    columns = dict(zip(bleu.COLUMNS, bleu.counts(texts, references).T, strict=True))
    assert written_metrics({"exact_match": np.array([0.0, 1.0]), **columns}) == {
        "exact_match": 0.5,
        "bleu": pytest.approx(wanted),
    }
    found = jackknife_values("bleu", Predictions("seq2seq_lm", columns))
    assert found is not None
    assert found[0] == pytest.approx(wanted)
    without_first = sacrebleu.corpus_bleu(texts[1:], [references[1:]]).score
    assert found[1][0] == pytest.approx(12 * wanted - 11 * without_first)


def test_a_missing_package_is_named_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "sacrebleu" else find(name, *a))
    task = task_of("seq2seq_lm", {"source": "a", "target": "b"}, metrics=["perplexity", "bleu"])
    with pytest.raises(TaskError, match=r"needs the package sacrebleu: pip install 'peft-lab\[text\]'"):
        kind("seq2seq_lm").compute_metrics(task, None)


# Masks ----------------------------------------------------------------------------------------------------------------


def masked_task(**keys: Any) -> Any:
    return task_of("masked_lm", {"text": "text"}, **keys)


def test_blocks_lose_no_token(tmp_path: Path) -> None:
    rule, task = kind("masked_lm"), masked_task(max_length=8)
    tokenizer, model = load_base(rule, task, None, str(make_masked_lm(tmp_path)))
    texts = ["the rain", "a song with some soup", "now", "please more rice today"]
    rows = rule.preprocess(Dataset.from_dict({"text": texts}), tokenizer, task, model)
    joined = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert [token for ids in rows["input_ids"] for token in ids] == joined
    assert [len(ids) for ids in rows["input_ids"]] == [8] * (len(joined) // 8) + [len(joined) % 8]
    lines = masked_task(max_length=8, line_by_line=True)
    rows = rule.preprocess(Dataset.from_dict({"text": texts}), tokenizer, lines, model)
    assert rows["input_ids"][:] == [tokenizer(text)["input_ids"] for text in texts]
    # the end mark of the last text would be a block of its own
    whole = Dataset.from_dict({"text": ["the rain now", "a song with"]})
    assert [len(ids) for ids in rule.preprocess(whole, tokenizer, masked_task(max_length=9), model)["input_ids"]] == [9]


def test_tokens_are_masked_as_bert_does(tmp_path: Path) -> None:
    tokenizer = kind("masked_lm").load_processor(str(make_masked_lm(tmp_path)), masked_task())
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, len(tokenizer) - 1, (400, 25), generator=draw)
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    found, labels = mask(ids, tokenizer, 0.15, 1)
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(found[~chosen], ids[~chosen])
    assert not chosen[:, [0, -1]].any()
    assert chosen.any(1).all(), "each row has a loss"
    share = lambda where: float(where[chosen].float().mean())  # noqa: E731
    assert float(chosen[:, 1:-1].float().mean()) == pytest.approx(0.15, abs=0.02)
    assert share(found == tokenizer.mask_token_id) == pytest.approx(0.8, abs=0.04)
    assert share(found == ids) == pytest.approx(0.1, abs=0.04)


def test_training_masks_anew_and_an_evaluation_does_not(tmp_path: Path) -> None:
    rule, task = kind("masked_lm"), masked_task(line_by_line=True)
    tokenizer = rule.load_processor(str(make_masked_lm(tmp_path)), task)
    rows = rule.preprocess(Dataset.from_dict({"text": ["the rain now and more", "a song"]}), tokenizer, task, None)
    one, other = (MaskingCollator(tokenizer, 0.5, seed) for seed in (0, 1))
    batch = [rows[0], rows[1]]

    def masks(collator: Any, chosen: Any) -> list[list[int]]:
        return collator(chosen)["labels"].tolist()

    first = masks(one, batch)
    assert first == masks(one, batch), "the masks follow from the rows, so that a resumed run has them too"
    assert first != masks(other, batch)
    one.set_epoch(1)
    assert first != masks(one, batch)
    scored = rule.evaluation_rows(rows, tokenizer, task)
    assert scored[:] == rule.evaluation_rows(rows.select([1, 0]), tokenizer, task).select([1, 0])[:]
    fixed = masks(one, [scored[0], scored[1]])
    other.set_epoch(3)
    assert fixed == masks(other, [scored[0], scored[1]])
    assert fixed[1] == [*scored[1]["labels"], *[IGNORED] * (len(fixed[0]) - len(scored[1]["labels"]))]


def test_masks_are_filled_with_likely_tokens(tmp_path: Path) -> None:
    rule, task = kind("masked_lm"), masked_task()
    tokenizer, model = load_base(rule, task, None, str(make_masked_lm(tmp_path)))
    (found, other) = rule.predict(model, tokenizer, ["the [MASK] and [MASK] now", "a [MASK]"], task)
    with torch.no_grad():
        batch = tokenizer("the [MASK] and [MASK] now", return_tensors="pt")
        scores = model.eval()(**batch).logits[0].softmax(-1)
    for place, entries in zip((2, 4), found["masks"], strict=True):
        top = scores[place].topk(5)
        assert [tokenizer.convert_tokens_to_ids(entry["token"]) for entry in entries] == top.indices.tolist()
        assert [entry["score"] for entry in entries] == pytest.approx(top.values.tolist(), rel=1e-4)
    first, second = (entries[0]["token"] for entries in found["masks"])
    special = set(tokenizer.all_special_tokens)
    filled = ["the", first, "and", second, "now"]
    assert found["sequence"].split() == [word for word in filled if word not in special]
    assert len(other["masks"]) == 1
    with pytest.raises(TaskError, match=r"1 inputs have no \[MASK\] for which.*\(row 2\)"):
        rule.predict(model, tokenizer, ["a [MASK]", "no mask"], task)
    with pytest.raises(TaskError, match=r"have their \[MASK\] behind the limit of 32 tokens"):
        rule.predict(model, tokenizer, ["the " * 40 + "[MASK]"], task)


def test_an_encoder_without_the_pretrained_head_is_refused(tmp_path: Path) -> None:
    path = make_backbone(tmp_path)
    rule, task = kind("masked_lm"), masked_task()
    with pytest.raises(TaskError, match="has no mask token"):
        load_base(rule, task, None, str(path))
    with pytest.raises(ConfigError, match=r"does not bring the head of a masked language model \(cls\."):
        rule.load_model(str(path), task, None)
    with pytest.raises(TaskError, match='set "line_by_line: true"'):
        task_of("masked_lm", {"text": "a", "prompt_ids": "b"})
    with pytest.raises(TaskError, match='"mlm_probability" must be between 0 and 1'):
        masked_task(mlm_probability=1.5)


@pytest.mark.full
def test_a_resumed_run_of_masks_ends_as_one_that_was_not_broken_off(tmp_path: Path) -> None:
    backbone = make_masked_lm(tmp_path / "base")
    (tmp_path / "x.txt").write_text("\n".join(f"the rain and {word} now" for word in ("song", "sun", "soup") * 8))
    data = {"builder": "text", "files": {"train": str(tmp_path / "x.txt")}}
    path = tmp_path / "t.yaml"
    keys = {"columns": {"text": "text"}, "line_by_line": True}
    path.write_text(json.dumps({"name": "t", "kind": "masked_lm", "data": data, "test_fraction": 0.2, **keys}))
    plan = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    whole = train(options(path, backbone, tmp_path / "whole", **plan))
    again = {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-3")}
    resumed = train(options(path, backbone, tmp_path / "resumed", **plan, **again))
    assert resumed.metrics["metrics"] == whole.metrics["metrics"]
    assert math.isfinite(whole.metrics["metrics"]["test"]["perplexity"])
    found = evaluate(tmp_path / "whole", batch_size=3)
    assert found["perplexity"] == pytest.approx(whole.metrics["metrics"]["test"]["perplexity"], rel=1e-5)


# Proposals ------------------------------------------------------------------------------------------------------------


def test_kinds_propose_their_forms() -> None:
    def best(rows: list[dict[str, Any]]) -> Any:
        profile = profile_rows(rows)
        found = [kind(name).propose(profile) for name in ("causal_lm", "seq2seq_lm", "masked_lm")]
        return max((each for each in found if each), key=lambda each: each.confidence)

    texts = [f"a text of number {number} " * 5 for number in range(24)]
    found = best([{"messages": turns(text, "x")} for text in texts])
    assert (found.kind, dict(found.columns)) == ("causal_lm", {"messages": "messages"})
    found = best([{"prompt": text, "completion": text[::-1]} for text in texts])
    assert (found.kind, dict(found.columns)) == ("causal_lm", {"prompt": "prompt", "completion": "completion"})
    found = best([{"document": text, "summary": text[:30]} for text in texts])
    assert (found.kind, dict(found.columns)) == ("seq2seq_lm", {"source": "document", "target": "summary"})
