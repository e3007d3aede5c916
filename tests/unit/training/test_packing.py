"""Packed rows: loss and gradients of padded ones, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from support.properties import IMAGES, TRAINED, adapt, move
from support.tiny_runs import make_decoder, make_task, make_writing_task, options
from torch import Tensor, nn

from peft_lab import registry
from peft_lab.errors import ConfigError
from peft_lab.training.packing import PackedCollator, pack, packed_collator
from peft_lab.training.run import train

FULL = pytest.mark.full
LENGTHS = (5, 9, 3, 12, 7, 4)


def rows() -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for length in LENGTHS:
        ids = torch.randint(3, 90, (length,), generator=draw).tolist()
        # two rows have a label at their first token, which nothing predicts
        labels = ids if len(found) < 2 else [-100, -100, *ids[2:]]
        found.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return found


def decoder(family: str = "Llama", **changes: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = {"vocab_size": 90, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **values, pad_token_id=0, **changes)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def padded(found: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in found)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in found])
        for name, value in fill.items()
    }


def packed(length: int = 16) -> dict[str, Any]:
    joined = pack(Dataset.from_list(rows()), length)
    return PackedCollator(padded, 0)(list(joined))


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module) -> None:
    loss, gradients = step(model, padded(rows()))
    for length in (12, 16, 40):
        found = step(model, packed(length))
        assert torch.allclose(found[0], loss, atol=1e-6), length
        for name, gradient in gradients.items():
            assert torch.allclose(found[1][name], gradient, atol=2e-6), (length, name)


def test_rows_are_joined_whole_and_in_order() -> None:
    joined = pack(Dataset.from_list(rows()), 16)
    assert [len(row["input_ids"]) for row in joined] == [14, 15, 11]  # 5 + 9, 3 + 12, 7 + 4
    assert joined[0]["position_ids"] == [*range(5), *range(9)]
    first, second = rows()[:2]
    assert joined[0]["input_ids"] == first["input_ids"] + second["input_ids"]
    assert joined[0]["labels"] == [-100, *first["labels"][1:], -100, *second["labels"][1:]]
    tokens = sorted(token for row in rows() for token in row["input_ids"])
    assert sorted(token for row in joined for token in row["input_ids"]) == tokens


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=FULL)])
@pytest.mark.parametrize("family", ["Llama", *(pytest.param(f, marks=FULL) for f in ("Mistral", "Gemma2", "Qwen3"))])
def test_losses_and_gradients_are_those_of_padded_rows(family: str, attention: str) -> None:
    changes = {"sliding_window": 4} if family in ("Mistral", "Gemma2") else {}
    model = decoder(family, **changes)
    if family == "Gemma2" and attention == "sdpa":
        pytest.skip("transformers has no sdpa for it")
    model.set_attn_implementation(attention)
    assert_same(model)


@FULL
@pytest.mark.parametrize("method", [m for m in TRAINED if m not in IMAGES and registry.method(m).place != "sequence"])
def test_every_method_without_prompts(method: str) -> None:
    model = move(adapt(method, decoder()))
    assert_same(model.eval())


class Tokenizer:
    pad_token_id = 0


def test_a_model_that_mixes_packed_rows_is_refused() -> None:
    joined = pack(Dataset.from_list(rows()), 16)
    packed_collator(padded, Tokenizer, decoder(), joined)
    mixing = decoder()
    original = mixing.model.forward
    mixing.model.forward = lambda *args, position_ids=None, **kwargs: original(*args, **kwargs)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM does not keep packed rows apart \(their logits differ by"):
        packed_collator(padded, Tokenizer, mixing, joined)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    recurrent = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=90, pad_token_id=0, **sizes))
    with pytest.raises(ConfigError, match="MambaForCausalLM takes no positions"):
        packed_collator(padded, Tokenizer, recurrent, joined)


def test_columns_with_a_value_for_each_row_are_refused() -> None:
    with pytest.raises(ConfigError, match="has no place for prompt_ids"):
        pack(Dataset.from_list([row | {"prompt_ids": 1} for row in rows()]), 16)


@FULL
def test_a_run_on_packed_rows(tmp_path: Path) -> None:
    """One step on all rows, packed and not, gives the same weights; other methods and kinds are refused."""
    task, base = make_writing_task(tmp_path / "texts"), make_decoder(tmp_path / "llama")
    sgd = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "max_steps": 1, "warmup_steps": 0}
    plain = train(options(task, base, tmp_path / "plain", **sgd | {"per_device_train_batch_size": 96}))
    joined = train(options(task, base, tmp_path / "joined", **sgd | {"per_device_train_batch_size": 96}, packing=True))
    assert joined.metrics["data"]["rows"] == plain.metrics["data"]["rows"]
    assert len(joined.trainer.train_dataset) < 30
    for name, weight in plain.model.state_dict().items():
        assert torch.allclose(joined.model.state_dict()[name], weight, atol=1e-6), name
    train(options(task, base, tmp_path / "chunked", packing=True, loss_chunk_size=7))
    prompts = options(task, base, tmp_path / "prompts", packing=True, method="soft_prompt")
    with pytest.raises(ConfigError, match='the prompts of method "soft_prompt" have no place before each packed row'):
        train(prompts)
    topics = options(make_task(tmp_path / "texts"), base, tmp_path / "topics", packing=True)
    with pytest.raises(ConfigError, match='kind "text_classification" has none'):
        train(topics)
