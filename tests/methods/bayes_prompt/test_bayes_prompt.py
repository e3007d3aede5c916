"""BayesPrompt: what is drawn in training and what stands in evaluation, and where the particles live."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from support.backbones import TINY, tiny_inputs
from support.properties import adapt, adapter_parameters, config, output
from support.tiny_runs import make_backbone, make_decoder, make_task, make_writing_task, options
from torch.utils.checkpoint import checkpoint

from peft_lab import domain_prompts
from peft_lab.errors import ConfigError
from peft_lab.training.evaluate import evaluate
from peft_lab.training.run import train
from peft_lab.tuners.sequence.layer import SequenceLayer
from peft_lab.tuners.sequence.particles import particles, svgd


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Particles after a few steps: which ones they are is of no account here."""
    monkeypatch.setattr("peft_lab.tuners.sequence.particles.svgd", partial(svgd, steps=20))


def _written(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a forward writes before the first block (rows, prompts, width)."""
    layer = next(m for m in model.modules() if isinstance(m, SequenceLayer))
    seen: list[torch.Tensor] = []
    original = layer.prompts
    layer.prompts = lambda *args: seen.append(original(*args)) or seen[-1]
    try:
        model(**inputs)
    finally:
        del layer.prompts
    return seen[0].detach()


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_trained_is_the_head_alone_and_saved_are_the_particles(family, tmp_path):
    base = TINY[family]()
    model = get_peft_model(base, config("bayes_prompt", base, num_prompts=3, domain_particles=9))
    domain_prompts(model, [tiny_inputs(base, batch=6)])
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("modules_to_save" in name for name in trainable)
    assert bool(trainable) == (family != "llama")
    model.save_pretrained(tmp_path)
    saved = [v for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "bayes_prompt_" in k]
    assert [tuple(v.shape) for v in saved] == [(3, 9, 16)]
    again = PeftModel.from_pretrained(TINY[family](), tmp_path)
    assert torch.equal(output(again, tiny_inputs(base)), output(model, tiny_inputs(base)))
    model.set_adapter("default")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable


def test_particles_are_those_of_the_data(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "peft_lab.tuners.sequence.init_from_data.particles",
        lambda rows, *args: seen.append(rows) or particles(rows, *args),
    )
    base = TINY["bert"]()
    model = adapt("bayes_prompt", base, num_prompts=2, domain_particles=8, domain_components=3)
    domain_prompts(model, [tiny_inputs(base, batch=20)], seed=5)
    (values,) = adapter_parameters(model).values()
    assert np.allclose(values.reshape(16, -1), particles(seen[0], 16, 3, seed=5), atol=1e-5)


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_training_draws_for_each_row_and_evaluation_takes_the_mean(draws):
    base = TINY["bert"]()
    model = adapt("bayes_prompt", base, num_prompts=3, domain_particles=4, domain_draws=draws)
    inputs = tiny_inputs(base, batch=40)
    (values,) = adapter_parameters(model).values()
    torch.testing.assert_close(_written(model.eval(), inputs), values.mean(1).expand(40, -1, -1))
    torch.manual_seed(0)
    written = _written(model.train(), inputs)
    means = [values[:, list(chosen)].mean(1) for chosen in itertools.combinations(range(4), draws)]
    distances = torch.stack([(written - mean).abs().amax(-1) for mean in means])  # (choices, rows, prompts)
    assert distances.amin(0).max() < 1e-5, "every prompt is the mean of its own particles, each taken once"
    counts = torch.stack([(distances.argmin(0) == i).sum(0) for i in range(len(means))])
    assert (counts > 0).all(), "every choice is drawn, by every prompt"
    if len(means) > 1:
        assert len({tuple(row) for row in distances.argmin(0).tolist()}) > 10, "rows and prompts draw for themselves"


def test_the_same_seed_draws_the_same():
    base = TINY["vit"]()
    model = adapt("bayes_prompt", base).train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(**tiny_inputs(base)).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.parametrize("how", ["blocks", "blocks, reentrant", "the whole model"])
def test_a_forward_that_is_repeated_draws_the_same(family, how):
    """Under gradient checkpointing, where gradients of the first block tell what was drawn."""
    base = TINY[family]()
    grads = []
    for checkpointed in (False, True):
        model = adapt("bayes_prompt", base).train()
        first = next(m for m in model.modules() if isinstance(m, SequenceLayer))
        first.base_layer.requires_grad_(True)
        if checkpointed and how.startswith("blocks"):
            model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in how})
            model.enable_input_require_grads() if family == "bert" else None
        torch.manual_seed(3)
        inputs = tiny_inputs(base)
        if checkpointed and how == "the whole model":
            logits = checkpoint(lambda m, x: m(**x).logits, model, inputs, use_reentrant=False)
        else:
            logits = model(**inputs).logits
        logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    if family == "vit" and "reentrant" in how:
        return  # the first block's input needs no gradient there, so peft's users get none either
    assert len(grads[0]) > 10
    for plain, repeated in zip(*grads, strict=True):
        torch.testing.assert_close(repeated, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_without_data_there_is_nothing_to_write(training, tmp_path):
    base = TINY["bert"]()
    model = get_peft_model(TINY["bert"](), config("bayes_prompt", base)).train(training)
    with pytest.raises(ConfigError, match=r"read no training data.*ReadTrainingData.*domain_prompts") as error:
        model(**tiny_inputs(base))
    assert len(str(error.value).splitlines()) == 1
    with model.disable_adapter():
        model(**tiny_inputs(base))
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="read no training data"):
        PeftModel.from_pretrained(TINY["bert"](), tmp_path)(**tiny_inputs(base))


def test_a_decoder_writes_with_them():
    """Nothing is trained there: the particles are all there is."""
    base = TINY["llama"]()
    model = adapt("bayes_prompt", base)
    domain_prompts(model, [tiny_inputs(base, batch=12)])
    inputs = tiny_inputs(base)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, use_cache=False, **settings), cached)
    assert not torch.equal(base.generate(**inputs, **settings), cached)


def test_a_run_reads_its_own_rows(tmp_path):
    backbone, task = make_backbone(tmp_path / "bert"), make_task(tmp_path / "data")
    arguments = {"num_prompts": 2, "domain_particles": 4, "domain_draws": 2}
    run = train(options(task, backbone, tmp_path / "out", method="bayes_prompt", method_args=arguments))
    assert run.metrics["parameters"]["adapter"] == 0
    assert run.metrics["parameters"]["trainable"] == 32 * 3 + 3
    assert evaluate(run.output_dir)["accuracy"] == run.metrics["metrics"]["test"]["accuracy"]


def test_a_run_with_nothing_to_train_is_refused(tmp_path):
    backbone, task = make_decoder(tmp_path / "llama"), make_writing_task(tmp_path / "data")
    with pytest.raises(ConfigError, match="leaves nothing to train in LlamaForCausalLM; name what to train"):
        train(options(task, backbone, tmp_path / "out", method="bayes_prompt"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_prompts": 0}, "num_prompts=0 must be at least 1"),
        ({"domain_particles": 0}, "domain_particles=0 must be at least 1"),
        ({"domain_draws": 0}, "domain_draws=0 must be at least 1"),
        ({"domain_draws": 17}, "domain_draws=17 must be at most domain_particles=16"),
        ({"domain_draws": 5, "domain_particles": 4}, "domain_draws=5 must be at most domain_particles=4"),
        ({"domain_draws": None}, "needs domain_components and domain_draws"),
        ({"domain_components": None, "domain_draws": None}, "needs domain_components and domain_draws"),
        ({"domain_components": 0}, "domain_components=0 must be at least 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ConfigError, match=message):
        config("bayes_prompt", **fields)
