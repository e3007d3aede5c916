"""Padding: a row answers in a padded batch as it does alone, whatever the side, the positions and the adapter."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backbones import MODELS
from support.cover import cover
from support.properties import METHODS, SEQUENCE, TRAINED, adapt, adapter_parameters, assert_close, move
from support.sequences import DECODERS, ENCODERS, GENERATE, two_adapters
from support.tiny_runs import make_decoder, make_task, make_writing_task
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache

from peft_lab import registry
from peft_lab.data.task_registry import kind, load_task
from peft_lab.registry import list_kinds
from peft_lab.tasks.kinds import causal_lm
from peft_lab.tuners.sequence.text_positions import position_offset

#: Families that number tokens from the left edge of a batch and are not invariant to shifts. Without `position_ids`,
#: padding at the left moves them; methods that act within the text inherit that, prompts mend it.
ABSOLUTE = ("gpt2", "bert", "electra", "distilbert", "deberta-v2", "mpnet", "albert", "clip_text")
ENCODER_DECODERS = ("t5",)
#: Token ids of rows of different lengths.
ROWS = [[9, 8, 7], [11, 15, 12, 17, 13, 19], [20, 21, 29, 23, 28, 25, 27, 26, 24, 22]]


def _needs(case: tuple[Any, ...]) -> set[Hashable]:
    """Every family with a prompt method at the left, and every method on each side, with and without positions."""
    method, family, side, *rest = case
    prompts = registry.method(method).place == "sequence"
    return {(method, side), *map(str, rest), *({family} if prompts and side == "left" else ())}


def _cases(families: Iterable[str], *others: Iterable[Any], methods: Iterable[str] = METHODS) -> list[Any]:
    """Methods, families and sides, with and without positions where the backbone takes either."""
    found = []
    for method, family, side, given, *rest in itertools.product(
        methods, families, ("left", "right"), (False, True), *others
    ):
        moves = family in ABSOLUTE and side == "left" and not given and method not in SEQUENCE
        if not moves and not (given and family in ENCODER_DECODERS):
            found.append((method, family, side, given, *rest))
    return cover(found, _needs)


def _batch(model: Any, side: str, given: bool, rows: list[list[int]] = ROWS) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if given:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0) + position_offset(model)
    return inputs


def _alone(row: list[int]) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}


@cache
def _base(family: str) -> Any:
    """A model of large random weights, where a shift shows."""
    base = MODELS[family]()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.5)
    return base


def _model(method: str, family: str, **fields: Any) -> Any:
    """Adapted model that is moved off its start, in double precision, because large weights enlarge rounding."""
    model = move(adapt(method, _base(family), **fields), scale=0.5)
    # Gemma 2 takes its softmax in single precision, where the lowest number of a double mask is infinite
    return model if family == "gemma2" else model.double()


@pytest.mark.parametrize(
    ("method", "family", "side", "given"),
    _cases([*DECODERS, *ENCODERS, *ENCODER_DECODERS, "clip_text", "llama_classifier"]),
)
@torch.no_grad()
def test_hidden_states_of_a_row(method, family, side, given):
    model = _model(method, family)
    base = model.get_base_model()
    stack = base.get_encoder() if base.config.is_encoder_decoder else base.base_model
    inputs = _batch(stack, side, given)
    together = stack(**inputs).last_hidden_state
    for number, row in enumerate(ROWS):
        own = inputs["attention_mask"][number].bool()
        # some norms compute in single precision, whatever they are given; a shifted position moves far more
        assert_close(together[number, own], stack(**_alone(row)).last_hidden_state[0], 2e-4)
    if "Classification" in type(base).__name__ and family not in ENCODERS:
        alone = torch.cat([model(**_alone(row)).logits for row in ROWS])
        assert_close(model(**inputs).logits, alone, 2e-5)


@pytest.mark.parametrize(
    ("method", "family", "side", "given"),
    _cases(["llama", "gpt2", "phi"], methods=[m for m in METHODS if m in {*TRAINED, "lora"}]),
)
def test_loss_and_gradient_of_a_batch(method, family, side, given):
    """A batch trains as its rows do, each weighted by its number of answered tokens."""
    model = _model(method, family).train()
    inputs, found = _batch(model, side, given), []
    for batches in ([inputs], [_alone(row) for row in ROWS]):
        model.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            # The first two tokens of a row are its prompt.
            answer = (batch["attention_mask"].cumsum(1) > 2) & batch["attention_mask"].bool()
            loss = model(**batch, labels=batch["input_ids"].masked_fill(~answer, -100)).loss
            total = total + loss * answer.sum()
        total.backward()
        gradients = {n: p.grad for n, p in adapter_parameters(model).items() if p.grad is not None}
        found.append({"loss": total.detach(), **gradients})
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        assert_close(found[0][name], value, 1e-4)


@pytest.mark.parametrize(
    ("method", "family", "cached"),
    cover(itertools.product(METHODS, [*DECODERS, *ENCODER_DECODERS], (True, False)), lambda case: set(map(str, case))),
)
def test_greedy_generation_of_a_row(method, family, cached):
    model = _model(method, family)
    written = model.generate(**_batch(model, "left", False), use_cache=cached, **GENERATE)[:, -4:]
    for number, row in enumerate(ROWS):
        assert torch.equal(model.generate(**_alone(row), use_cache=cached, **GENERATE)[0, -4:], written[number])


@pytest.mark.parametrize(
    ("method", "family", "side"), cover(itertools.product(SEQUENCE, ["llama", "gpt2", "bert", "t5"], ["left", "right"]))
)
@torch.no_grad()
def test_rows_with_adapters_of_their_own(method, family, side):
    """Adapters with different numbers of prompts, at the input and before every block."""
    model, names = two_adapters(method, family).double(), ["default", "other", "__base__"]
    base = model.get_base_model()
    target = {"decoder_input_ids": torch.tensor([[0, 7, 8]])} if base.config.is_encoder_decoder else {}
    inputs = _batch(base, side, False)
    states = {"output_hidden_states": True, "return_dict": True}
    many = {name: value.expand(3, -1) for name, value in target.items()}
    together = _last(model(**inputs, **many, **states, adapter_names=names))
    for number, (row, name) in enumerate(zip(ROWS, names, strict=True)):
        own = inputs["attention_mask"][number].bool()
        alone = _last(model(**_alone(row), **target, **states, adapter_names=[name]))
        assert_close(together[number, own], alone[0], 2e-5)


def _last(output: Any) -> Tensor:
    found = getattr(output, "encoder_hidden_states", None) or output.hidden_states
    return found[-1]


@pytest.mark.parametrize(
    ("method", "family", "given"), cover(itertools.product(SEQUENCE, ["llama", "gpt2", "opt"], [False, True]))
)
@torch.no_grad()
def test_a_cache_that_goes_on_without_positions(method, family, given):
    """A batch that is padded at the left, one token by one and several at once, as one row alone."""
    model, rows = _model(method, family), [ROWS[2][:4], ROWS[2]]
    start = _batch(model, "left", given, [row[: len(row) - 3] for row in rows])
    cache, mask = DynamicCache(config=model.config), _batch(model, "left", False, rows)["attention_mask"]
    model(**start, past_key_values=cache)
    last, found = torch.tensor([row[-3:] for row in rows]), []
    for begin, end in ((0, 1), (1, 3)):
        seen = mask[:, : mask.shape[1] - 3 + end]
        found.append(model(last[:, begin:end], attention_mask=seen, past_key_values=cache).logits)
    alone, cache = rows[0], DynamicCache(config=model.config)
    model(**_alone(alone[:1]), past_key_values=cache)
    expected = [model(torch.tensor([[token]]), past_key_values=cache).logits for token in alone[1:]]
    assert_close(torch.cat(found, 1)[:1], torch.cat(expected, 1), 2e-5)


# The kinds of task, whose batches are made by us ----------------------------------------------------------------------

#: Kind of task -> a task of it, and backbones: positions that are absolute, rotary or not given, a first token read.
TEXT_KINDS = {
    "text_classification": (make_task, ("bert", "gpt2_classifier", "llama_classifier", "bart")),
    "causal_lm": (make_writing_task, ("gpt2", "llama")),
}


def test_every_kind_that_pads_is_tried():
    # kinds that share the inputs of text_classification are tried in test_kinds
    assert set(TEXT_KINDS) <= set(list_kinds())


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padding")
    make_decoder(folder / "decoder")
    for name, (make, _) in TEXT_KINDS.items():
        make(folder / name)
    return folder


def _kind(name: str, folder: Path) -> tuple[Any, Any]:
    task = load_task(next((folder / name).glob("writing.yaml" if name == "causal_lm" else "*.yaml")))
    return kind(name), task


@pytest.mark.parametrize(
    ("method", "name", "family", "side"),
    cover(
        (method, name, family, side)
        for name, (_, families) in TEXT_KINDS.items()
        for method, family, side in itertools.product(METHODS, families, ["left", "right"])
    ),
)
@torch.no_grad()
def test_batches_of_a_kind(method, name, family, side, text_folder, monkeypatch):
    """Rows that are collated, and predictions, are those of each row alone, whatever side the tokenizer pads at."""
    from datasets import Dataset

    used, task = _kind(name, text_folder)
    monkeypatch.setattr(causal_lm, "MAX_NEW_TOKENS", 3)
    tokenizer = AutoTokenizer.from_pretrained(text_folder / "decoder", padding_side=side)
    model = _model(method, family)
    rows = [{"text": "rain", "label": 0}, {"text": "a song with the band now", "label": 1}]
    if name == "causal_lm":
        rows = [{"topic": "rain", "sentence": "a"}, {"topic": "a song now", "sentence": "the band and more"}]
    encoded = list(used.preprocess(Dataset.from_list(rows), tokenizer, task, model))
    collate = used.data_collator(tokenizer, task, model)
    together = model(**collate(encoded))
    alone = [model(**collate([row])) for row in encoded]
    if name == "causal_lm":
        counts = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in encoded])
        losses = torch.stack([output.loss for output in alone])
        assert_close(together.loss, (losses * counts).sum() / counts.sum(), 2e-5)
    else:
        assert_close(together.logits, torch.cat([output.logits for output in alone]), 2e-5)
    inputs = [row["topic" if name == "causal_lm" else "text"] for row in rows]
    many, one = (used.predict(model, tokenizer, inputs, task, size) for size in (2, 1))
    if name == "causal_lm":
        assert many == one
    else:
        assert [record["label"] for record in many] == [record["label"] for record in one]
        assert many[0]["score"] == pytest.approx(one[0]["score"], abs=1e-5)
    assert tokenizer.padding_side == side


@pytest.mark.parametrize("method", ["soft_prompt", "lora", "metadata_prompt"])
def test_generation_in_batches_of_one_length(method, text_folder, monkeypatch):
    """Where a backbone cannot leave padding at the left out of its count, its rows are not padded there."""
    import transformers as hf
    from support.backbones import _SEQ2SEQ, _build

    used, task = _kind("causal_lm", text_folder)
    monkeypatch.setattr(causal_lm, "MAX_NEW_TOKENS", 3)
    tokenizer = AutoTokenizer.from_pretrained(text_folder / "decoder")
    base = _build(hf.BartForCausalLM, max_position_embeddings=64, **_SEQ2SEQ)
    model = move(adapt(method, base), scale=0.5)
    inputs = ["rain", "a song now", "sun", "the band and more"]
    ids = [0, 1, 1, 0] if method == "metadata_prompt" else None
    many, one = (used.predict_with_prompts(model, tokenizer, inputs, task, size, ids) for size in (4, 1))
    assert many == one


def test_a_head_that_reads_the_last_place(text_folder):
    """XLNet's head reads the last place, so that its rows are padded at the left by any tokenizer."""
    import transformers as hf
    from support.backbones import _build

    used, task = _kind("text_classification", text_folder)
    sizes = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 99, "pad_token_id": 0}
    model = _build(hf.XLNetForSequenceClassification, **sizes)
    collate = used.data_collator(AutoTokenizer.from_pretrained(text_folder / "decoder"), task, model)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row), "labels": 0} for row in ROWS]
    with torch.no_grad():
        alone = torch.cat([model(**collate([row])).logits for row in rows])
        assert_close(model(**collate(rows)).logits, alone, 2e-5)
