"""Loss in chunks: the value and gradients of whole logits, which are never there at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from support.properties import IMAGES, TRAINED, adapt, move
from support.tiny_runs import make_decoder, make_task, make_writing_task, options, same_weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_lab.errors import ConfigError
from peft_lab.runs.run_config import RunConfig
from peft_lab.training.chunked_loss import chunked_loss
from peft_lab.training.run import train

FULL = pytest.mark.full
VOCABULARY, CHUNK = 600, 8
FAMILIES = {
    "Llama": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {},
}


def decoder(family: str = "Llama", **changes: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    values = {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    config = getattr(transformers, f"{family}Config")(**sizes, **ids, **values, **FAMILIES.get(family, {}), **changes)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 20), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Sizes(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes; of a view, those behind it."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else [found]:
            self.most = max(self.most, value.untyped_storage().nbytes() if isinstance(value, Tensor) else 0)
        return found


def step(model: nn.Module, **options: Any) -> tuple[Tensor, dict[str, Tensor], int, int]:
    """Loss, gradients, largest tensor, and bytes kept for the backward pass beside parameters."""
    model.zero_grad()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if value.data_ptr() not in own:
            kept[value.data_ptr()] = value.numel() * value.element_size()
        return value

    with Sizes() as sizes, torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = model(**batch(), **options)["loss"]
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sizes.most, sum(kept.values())


def assert_same(model: nn.Module, **options: Any) -> None:
    loss, gradients, most, kept = step(model, **options)
    with chunked_loss(model, CHUNK):
        step(model)  # the first call is checked against whole logits
        found = step(model, **options)
    assert torch.allclose(found[0], loss, atol=1e-6)
    assert found[1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(found[1][name], gradient, atol=1e-6), name
    logits = 4 * 3 * 20 * VOCABULARY
    assert most >= logits
    assert found[2] <= 4 * 16 * VOCABULARY  # the weight of the head is the largest tensor left
    assert kept - found[3] > 0.9 * logits
    again = step(model, **options)
    assert torch.equal(again[0], loss)
    assert again[2] == most  # the model is as it was


@pytest.mark.parametrize(
    "family", ["Gemma2", *(pytest.param(name, marks=FULL) for name in ("Llama", "Granite", "Cohere"))]
)
def test_losses_and_gradients_are_those_of_whole_logits(family: str) -> None:
    assert_same(decoder(family).train())
    assert_same(decoder(family).train(), num_items_in_batch=torch.tensor(57))


@pytest.mark.parametrize("method", [m for m in TRAINED if m not in IMAGES])
@FULL
def test_every_method_of_decoders(method: str) -> None:
    model = move(adapt(method, decoder())).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert_same(model)


@FULL
def test_adapted_and_trained_heads_and_virtual_tokens() -> None:
    for config in (
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"], init_lora_weights=False),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        assert_same(get_peft_model(decoder(), config).train())


def test_evaluation_gives_tokens_and_their_log_probabilities() -> None:
    model, given = decoder().eval(), batch()
    with torch.no_grad(), chunked_loss(model, CHUNK):
        found = model(**given)
    with torch.no_grad():
        logits = model(**given).logits[:, :-1]
    kept = given["labels"][:, 1:] != -100
    wanted = given["labels"][:, 1:].clamp(min=0)[..., None]
    assert torch.equal(found.predicted[kept], logits.argmax(-1)[kept])
    expected = logits.log_softmax(-1).gather(-1, wanted)[..., 0]
    assert torch.allclose(found.log_probabilities[kept], expected[kept], atol=1e-6)
    assert not found.log_probabilities[~kept].any()


def test_generation_is_the_model_s_own() -> None:
    model = decoder().eval()
    given = {"input_ids": batch()["input_ids"][:1, :6], "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**given)
    with chunked_loss(model, CHUNK):
        assert torch.equal(model.generate(**given), expected)


def test_models_whose_loss_is_more_are_refused() -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=16, **sizes))
    with (
        chunked_loss(opt, CHUNK),
        pytest.raises(ConfigError, match="hidden states of OPTForCausalLM are not to be had"),
    ):
        opt(**batch())
    mixture = decoder("Mixtral", num_local_experts=2, output_router_logits=True)
    with chunked_loss(mixture, CHUNK), pytest.raises(ConfigError, match="has a part for its router"):
        mixture(**batch())
    doubled = decoder()
    plain = doubled.loss_function
    doubled.loss_function = lambda *args, **kwargs: 2 * plain(*args, **kwargs)
    with chunked_loss(doubled, CHUNK), pytest.raises(ConfigError, match="is not the cross-entropy of its logits alone"):
        doubled(**batch())
    assert not isinstance(doubled, PeftModel)
    assert "forward" not in vars(doubled)


@pytest.mark.parametrize(("option", "value"), [("label_smoothing_factor", 0.1), ("torch_compile", True)])
def test_options_without_a_place_in_chunks_are_refused(option: str, value: Any) -> None:
    needed = {"task": "dolly", "model_name_or_path": "m", "method": "lora", "output_dir": "o", "loss_chunk_size": 8}
    with pytest.raises(ConfigError, match=f"loss_chunk_size has no place for {option}"):
        RunConfig.from_mapping(needed | {option: value}).check()
    with pytest.raises(ConfigError, match="loss_chunk_size must be at least 1"):
        RunConfig.from_mapping(needed | {"loss_chunk_size": 0}).check()


@FULL
def test_a_run_has_the_weights_and_scores_of_one_without_chunks(tmp_path: Path) -> None:
    task, base = make_writing_task(tmp_path / "texts"), make_decoder(tmp_path / "llama")
    plain = train(options(task, base, tmp_path / "plain", learning_rate=1e-3))
    chunked = train(options(task, base, tmp_path / "chunked", learning_rate=1e-3, loss_chunk_size=5))
    assert same_weights(tmp_path / "plain", tmp_path / "chunked", tolerance=1e-5)
    for split, scores in plain.metrics["metrics"].items():
        assert chunked.metrics["metrics"][split] == pytest.approx(scores, rel=1e-4)
    assert "forward" not in vars(chunked.model.get_base_model())
    classifier = options(make_task(tmp_path / "texts"), base, tmp_path / "other", loss_chunk_size=5)
    with pytest.raises(ConfigError, match="loss_chunk_size is for decoders that write"):
        train(classifier)
