"""TRL's trainers with our configs as `peft_config`: chat templates that add tokens, reference passes, generation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from support.cover import cover, each_place
from support.properties import METHODS, OWN, SEQUENCE, TRAINED, UNTRAINED, config
from support.tiny_runs import make_decoder
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import peft_lab
from peft_lab import registry
from peft_lab.errors import ConfigError

pytest.importorskip("trl")

from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    clone_chat_template,
)

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ADDED = ["<|user|>", "<|assistant|>"]
#: One method of each place, and peft's LoRA as the yardstick.
FEW = sorted({"lora", *(case.values[0] for case in cover(TRAINED, each_place) if not case.marks)})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_decoder(tmp_path_factory.mktemp("tied"))
    settings = AutoModelForCausalLM.from_pretrained(folder).config
    settings.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def template(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose chat template uses tokens that the base does not have."""
    folder = tmp_path_factory.mktemp("template")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def plain(folder: Path, **changes: Any) -> dict[str, Any]:
    values = {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    values |= {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.05, "save_strategy": "no"}
    return {**values, "logging_steps": 1, "gradient_checkpointing": False, **changes}


def chats() -> Dataset:
    words = [("the rain", "some snow"), ("a song", "a band now"), ("please soup", "rice"), ("sun", "cloud today")]
    messages = []
    for question, answer in words:
        messages.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return Dataset.from_dict({"messages": messages})


def preferences() -> Dataset:
    return Dataset.from_dict(
        {"prompt": ["the rain", "a song"], "chosen": [" some snow", " a band"], "rejected": [" rice", " cloud"]}
    )


def moved(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    """Names of the parameters that training has changed."""
    return [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def callbacks(method: str) -> list[Any]:
    return [peft_lab.ReadTrainingData()] if method in UNTRAINED else []


def sft(method: str, base: Path, template: Path, folder: Path) -> SFTTrainer:
    torch.manual_seed(0)
    return SFTTrainer(
        str(base),
        SFTConfig(**plain(folder, max_steps=2, chat_template_path=str(template), max_length=32)),
        train_dataset=chats(),
        peft_config=config(method, task_type="CAUSAL_LM"),
        callbacks=callbacks(method),
    )


def check_added_tokens(trainer: SFTTrainer, base: Path, template: Path, folder: Path) -> None:
    start = values(trainer.model)
    trainer.train()
    changed = moved(trainer.model, start)
    rows = [name for name in changed if "trainable_tokens_delta" in name]
    assert len(rows) == 1, changed
    delta = trainer.model.get_parameter(rows[0]) - start[rows[0]]
    # those of the template, and of the tokens that only fill the table up to a multiple of 64
    assert len(delta) >= len(ADDED)
    assert (delta[: len(ADDED)].abs().sum(1) > 0).all()
    assert not [n for n in changed if n.endswith("base_layer.weight") or "original_module" in n], changed
    trainer.save_model(str(folder / "adapter"))
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model, tokenizer, _ = clone_chat_template(model, tokenizer, str(template))
    again = PeftModel.from_pretrained(model, folder / "adapter").eval()
    inputs = tokenizer.apply_chat_template(chats()[0]["messages"], return_tensors="pt", return_dict=True)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits
        torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.integration(
    library="trl", use="`SFTTrainer` with a `chat_template_path` that adds tokens: steps, save, reload"
)
@pytest.mark.parametrize("method", METHODS)
def test_the_tokens_of_a_chat_template_are_trained(method: str, base: Path, template: Path, tmp_path: Path) -> None:
    check_added_tokens(sft(method, base, template, tmp_path), base, template, tmp_path)


@pytest.mark.integration(
    library="trl", use="`SFTTrainer` with a `chat_template_path` that adds tokens, on tied embeddings"
)
@pytest.mark.parametrize("method", [name for name in FEW if name in OWN])
def test_they_are_trained_with_tied_embeddings(method: str, tied: Path, template: Path, tmp_path: Path) -> None:
    check_added_tokens(sft(method, tied, template, tmp_path), tied, template, tmp_path)


@pytest.mark.integration(library="trl", use="`SFTTrainer` with `packing=True`")
@pytest.mark.parametrize("method", sorted({*FEW, *SEQUENCE} - {*UNTRAINED}))
def test_packed_sequences(method: str, base: Path, tmp_path: Path, refused: Callable[[str], None]) -> None:
    rows = Dataset.from_dict({"text": ["the rain", "a song now", "some soup", "please a band"]})
    trainer = SFTTrainer(
        str(base),
        SFTConfig(**plain(tmp_path, packing=True, max_length=16)),
        train_dataset=rows,
        peft_config=config(method, task_type="CAUSAL_LM"),
    )
    if method in SEQUENCE:
        with pytest.raises(ConfigError, match="Packed sequences have no place for prompts"):
            trainer.train()
        refused("packed sequences have no place for prompts")
    else:
        start = values(trainer.model)
        trainer.train()
        assert moved(trainer.model, start)


@pytest.mark.integration(library="trl", use="`DPOTrainer`: a step, whose reference is the base without the adapter")
@pytest.mark.parametrize("method", TRAINED)
def test_a_step_of_dpo(method: str, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = DPOTrainer(
        str(base),
        args=DPOConfig(**plain(tmp_path, max_length=32)),
        train_dataset=preferences(),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=config(method, task_type="CAUSAL_LM"),
    )
    start = values(trainer.model)
    trainer.train()
    assert moved(trainer.model, start)
    first = trainer.state.log_history[0]
    assert math.isfinite(first["loss"])
    # a policy that starts at the base has no reward before the first step, and any other has some
    rewards = abs(first["rewards/chosen"]) + abs(first["rewards/rejected"])
    starts_at_base = method not in OWN or registry.method(method).can("identity_start")
    assert (rewards < 1e-6) == starts_at_base, first


@pytest.mark.integration(library="trl", use="`GRPOTrainer`: a step with generation and a reference pass")
@pytest.mark.parametrize("method", FEW)
def test_a_step_of_grpo(method: str, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(index % 3) for index in range(len(completions))]

    settings = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "per_device_train_batch_size": 4}
    trainer = GRPOTrainer(
        str(base),
        reward_funcs=reward,
        args=GRPOConfig(**plain(tmp_path, **settings)),
        train_dataset=Dataset.from_dict({"prompt": ["the rain", "a song now"]}),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=config(method, task_type="CAUSAL_LM"),
    )
    start = values(trainer.model)
    trainer.train()
    assert moved(trainer.model, start)
    assert math.isfinite(trainer.state.log_history[0]["kl"])


@pytest.mark.integration(library="trl", use="`RewardTrainer`: a step, save, reload")
@pytest.mark.parametrize("method", FEW)
def test_a_step_of_a_reward_model(method: str, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    whole = copy.deepcopy(model)
    trainer = RewardTrainer(
        model,
        args=RewardConfig(**plain(tmp_path, max_length=32)),
        train_dataset=preferences(),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=config(method, task_type="SEQ_CLS"),
    )
    start = values(trainer.model)
    trainer.train()
    assert any("score" not in name for name in moved(trainer.model, start))
    trainer.save_model(str(tmp_path / "adapter"))
    ids = torch.tensor([[5, 9, 7, 11]])
    again = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(again(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
