"""Prompts that start at particles of the training data, for every method that stores prompts."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from support.backbones import TINY, VARIANTS, tiny_inputs
from support.properties import adapt, adapter_parameters, config, move, needs_add_adapter, output
from support.tiny_runs import make_backbone, make_task, options, same_weights
from transformers import Trainer, TrainingArguments

from peft_lab import ReadTrainingData, domain_prompts, read_training_data
from peft_lab.errors import ConfigError
from peft_lab.training.run import train
from peft_lab.tuners.sequence.particles import particles, svgd
from peft_lab.tuners.sequence.stored_prompts import StoredPrompts


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Particles after a few steps: which ones they are is of no account here."""
    monkeypatch.setattr("peft_lab.tuners.sequence.particles.svgd", partial(svgd, steps=20))


@pytest.fixture
def rows(monkeypatch) -> list[np.ndarray]:
    """What mixtures are fitted to."""
    seen: list[np.ndarray] = []

    def spy(points: np.ndarray, *args: Any) -> np.ndarray:
        seen.append(points)
        return particles(points, *args)

    monkeypatch.setattr("peft_lab.tuners.sequence.init_from_data.particles", spy)
    return seen


def _stack_input(base: Any, inputs: dict[str, Any], depth: int) -> torch.Tensor:
    stack = base.get_encoder() if base.config.is_encoder_decoder else base.base_model
    stack = getattr(stack, "vision_model", stack)
    with torch.no_grad():
        return stack(**inputs, output_hidden_states=True).hidden_states[depth]


def _padded(side: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 90, (6, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(9)[None] < torch.tensor([[9], [5], [2], [1], [9], [7]])
    mask = mask if side == "right" else mask.flip(1)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2", "gemma", "t5", "deberta-v2"])
def test_rows_of_text_are_means_over_what_is_not_padding(family, side, depth, rows):
    base, inputs = TINY[family]().eval(), _padded(side)
    model = adapt("soft_prompt", base, domain_components=2, layers_to_transform=[depth])
    domain_prompts(model, [inputs])
    wanted = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        alone = {"input_ids": ids[mask][None], "attention_mask": mask[mask][None].long()}
        wanted.append(_stack_input(base, alone, depth).mean(1))
    wanted = torch.cat(wanted)
    torch.testing.assert_close(torch.from_numpy(rows[0]).float(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "prefix"), [("vit", 1), ("deit", 2), ("dinov2_with_registers", 5), ("siglip", 0)])
def test_rows_of_images_are_means_over_patches(family, prefix, rows):
    base = (VARIANTS["siglip_vision"] if family == "siglip" else TINY[family])().eval()
    inputs = tiny_inputs(base, batch=5)
    domain_prompts(adapt("vpt", base, domain_components=2), [inputs])
    wanted = _stack_input(base, inputs, 0)[:, prefix:].mean(1)
    torch.testing.assert_close(torch.from_numpy(rows[0]).float(), wanted)


#: A method, its fields, the number of prompts that start and the particles of each.
STARTS = [
    ("soft_prompt", {"num_virtual_tokens": 3, "deep": True}, 3, 21),
    ("vpt", {"num_prompts": 2}, 2, 32),
    ("vpt", {"num_prompts": 80}, 80, 1),
    ("metadata_prompt", {"num_modes": 3, "num_prompts": 2, "deep": True}, 6, 10),
    ("prompt_cam", {}, 3, 21),
    ("dvpt", {"num_prompts": 4}, 4, 16),
]


@pytest.mark.parametrize(("method", "fields", "count", "each"), STARTS)
def test_the_first_block_starts_at_means_of_particles(method, fields, count, each, rows):
    base = TINY["vit"]().eval()
    fields = {**fields, "domain_components": 2, "domain_dimensions": 5}
    model = adapt(method, base, **fields)
    before = copy.deepcopy(adapter_parameters(model))
    inputs = tiny_inputs(base, batch=12)
    read_training_data(model, ({k: v[i : i + 4] for k, v in inputs.items()} for i in range(0, 12, 4)))
    changed = {n: p for n, p in adapter_parameters(model).items() if not torch.equal(p, before[n])}
    ((name, values),) = changed.items()
    assert ".0." in name, "the first block's alone"
    assert values.dtype == torch.float32
    assert values.requires_grad
    wanted = particles(rows[0], count * each, 2, 5).reshape(count, each, -1).mean(1)
    assert np.allclose(values.detach().reshape(count, -1), wanted, atol=1e-5)
    assert len(rows[0]) == 12
    assert len(np.unique(wanted, axis=0)) == count, "prompts that are the same would stay the same"


#: A method, its fields, the shape of the prompts that are drawn, and whether something else of it is trained.
DRAWN = [
    ("soft_prompt", {"num_virtual_tokens": 3}, (3,), False),
    ("soft_prompt", {"num_virtual_tokens": 3, "deep": True}, (3,), True),
    ("vpt", {"num_prompts": 2}, (2,), True),
    ("vpt", {"num_prompts": 2, "deep": False, "dropout": 0.0}, (2,), False),
    ("metadata_prompt", {"num_modes": 3, "num_prompts": 2}, (3, 2), False),
    ("metadata_prompt", {"num_modes": 2, "num_prompts": 2, "deep": True}, (2, 2), True),
    ("dvpt", {"num_prompts": 4}, (4,), True),
]


def _drawn(method: str, fields: dict[str, Any]) -> tuple[Any, Any, torch.Tensor]:
    """A model whose prompts are drawn, its first block with prompts, and its particles."""
    base = TINY["vit"]().eval()
    fields = {**fields, "domain_components": 2, "domain_particles": 4, "domain_draws": 2}
    model = adapt(method, base, **fields)
    domain_prompts(model, [tiny_inputs(base, batch=12)])
    layer = next(m for m in model.modules() if isinstance(m, StoredPrompts) and m.draws_particles("default"))
    return model, layer, layer.stored_values["default"]


@pytest.mark.parametrize(("method", "fields", "shape", "more"), DRAWN)
def test_prompts_are_drawn_for_each_row_in_training_and_are_the_mean_in_evaluation(method, fields, shape, more, rows):
    _, layer, values = _drawn(method, fields)
    assert values.shape == (*shape, 4, 16)
    wanted = particles(rows[0], values.shape[:-1].numel(), 2).reshape(values.shape)
    assert np.allclose(values, wanted, atol=1e-5)
    assert torch.equal(layer.eval().values("default", 30), values.mean(-2))
    assert torch.equal(layer.train().values("default"), values.mean(-2))
    found = layer.values("default", 30)
    assert found.shape == (30, *shape, 16)
    means = torch.stack([values[..., list(pair), :].mean(-2) for pair in itertools.combinations(range(4), 2)])
    distances = (found[:, None] - means).abs().amax(-1)  # (rows, choices, ...)
    assert distances.amin(1).max() < 1e-5, "every prompt is the mean of two of its own particles"
    assert len({tuple(row) for row in distances.argmin(1).flatten(1).tolist()}) > 3, "rows draw for themselves"


@pytest.mark.parametrize(("method", "fields", "shape", "more"), DRAWN)
def test_drawn_prompts_are_not_trained_and_reach_the_blocks(method, fields, shape, more):
    model, _, values = _drawn(method, fields)
    inputs = tiny_inputs(model, batch=2)
    own = {n: p for n, p in adapter_parameters(model).items() if p.requires_grad}
    assert not values.requires_grad
    assert bool(own) == more
    model.set_adapter("default")
    assert not values.requires_grad
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model.train()(**inputs).logits)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-6)
    evaluated = output(model, inputs)
    assert torch.equal(evaluated, output(model, inputs))
    with torch.no_grad():
        values.copy_(values.mean(-2, keepdim=True).expand_as(values))
    torch.testing.assert_close(output(model, inputs), evaluated)


@pytest.mark.parametrize(("method", "fields", "shape", "more"), DRAWN)
def test_drawn_prompts_are_saved_and_needed(method, fields, shape, more, tmp_path):
    model, _, values = _drawn(method, fields)
    model.save_pretrained(tmp_path / "read")
    again = PeftModel.from_pretrained(TINY["vit"](), tmp_path / "read")
    assert torch.equal(output(again, tiny_inputs(model)), output(model, tiny_inputs(model)))
    with torch.no_grad():
        values.zero_()
    for training in (True, False):
        with pytest.raises(ConfigError, match=f'Method "{method}" has read no training data to draw prompts from'):
            model.train(training)(**tiny_inputs(model))


def test_each_row_draws_of_its_own_mode():
    model, layer, values = _drawn("metadata_prompt", {"num_modes": 3, "num_prompts": 1})
    written: list[torch.Tensor] = []
    original = layer.prompts
    layer.prompts = lambda *args: written.append(original(*args)) or written[-1]
    modes = torch.tensor([2, 0, 1, 2])
    model.train()(**tiny_inputs(model, batch=4), prompt_ids=modes)
    means = torch.stack([values[:, 0, list(pair)].mean(1) for pair in itertools.combinations(range(4), 2)], 1)
    distances = (written[0][:, :, None] - means[None]).abs().amax(-1)  # (rows, modes, choices)
    assert distances.amin(-1).argmin(-1).tolist() == modes.tolist()


def test_bayes_prompt_is_soft_prompts_that_are_drawn():
    base, found = TINY["bert"]().eval(), []
    inputs = tiny_inputs(base, batch=8)
    drawn = {"domain_components": 8, "domain_draws": 8}
    for method, fields in (("bayes_prompt", {}), ("soft_prompt", {"num_virtual_tokens": 4, **drawn})):
        model = adapt(method, base, **fields)
        domain_prompts(model, [inputs])
        torch.manual_seed(5)
        found.append((output(model, inputs), model.train()(**inputs).logits))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_number_of_particles_can_be_given(rows):
    base = TINY["vit"]()
    model = adapt("vpt", base, num_prompts=2, domain_components=2, domain_particles=5)
    domain_prompts(model, [tiny_inputs(base, batch=12)])
    value = next(iter(adapter_parameters(model).values()))
    assert np.allclose(value.detach(), particles(rows[0], 10, 2).reshape(2, 5, -1).mean(1), atol=1e-5)


def test_the_backbone_runs_up_to_the_block_only_and_stays_in_its_mode():
    base = TINY["bert"]()
    model = adapt("soft_prompt", base, domain_components=2).train()
    base_blocks = [m.base_layer for m in model.modules() if isinstance(m, StoredPrompts)]
    for block in base_blocks:
        block.register_forward_pre_hook(lambda *_: pytest.fail("a block ran"))
    domain_prompts(model, [tiny_inputs(base, batch=4)])
    assert model.training
    assert not any(p.grad is not None for p in model.parameters())


def test_values_once_found_stay():
    """Not at a later epoch, not a second time, not over what was loaded; but a script may ask again."""
    base = TINY["bert"]()
    inputs = tiny_inputs(base, batch=6)
    model = adapt("soft_prompt", base, domain_components=2)
    (value,) = adapter_parameters(model).values()
    start = value.detach().clone()
    read_training_data(model, [inputs], epoch=1)
    assert torch.equal(value, start)
    read_training_data(model, [inputs])
    found = value.detach().clone()
    assert not torch.equal(found, start)
    move(model)
    moved = value.detach().clone()
    read_training_data(model, [inputs])
    assert torch.equal(value, moved)
    domain_prompts(model, [inputs])
    assert torch.equal(value, found)


@pytest.mark.parametrize("recorded", [True, False])
def test_an_adapter_that_is_trained_on_keeps_its_values(recorded, tmp_path):
    base = TINY["bert"]()
    adapt("soft_prompt", base, domain_components=2).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    if not recorded:  # as a file that does not say which base it belongs to
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "fingerprints"}))
    model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    before = copy.deepcopy(adapter_parameters(model))
    read_training_data(model, [tiny_inputs(base, batch=6)])
    assert all(torch.equal(p, before[n]) for n, p in adapter_parameters(model).items())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**tiny_inputs(base))


def test_a_config_of_a_file_without_its_values_reads_the_data(tmp_path):
    base = TINY["bert"]()
    adapt("soft_prompt", base, domain_components=2).save_pretrained(tmp_path)
    model = get_peft_model(TINY["bert"](), PeftConfig.from_pretrained(tmp_path))
    (value,) = adapter_parameters(model).values()
    start = value.detach().clone()
    read_training_data(model, [tiny_inputs(base, batch=6)])
    assert not torch.equal(value, start)


@pytest.mark.parametrize("method", ["soft_prompt", "metadata_prompt"])
def test_training_without_data_keeps_the_usual_start_and_warns_once(method):
    base = TINY["bert"]()
    inputs = {**tiny_inputs(base, batch=6), "prompt_ids": torch.zeros(6, dtype=torch.long)}
    plain, model = adapt(method, base), adapt(method, base, domain_components=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(output(model, inputs), output(plain, inputs))
    with pytest.warns(UserWarning, match=r"domain_components=2 .*ReadTrainingData, or call peft_lab.domain_prompts"):
        model.train()(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.train()(**inputs)
        read = adapt(method, base, domain_components=2)
        domain_prompts(read, [inputs])
        read.train()(**inputs)


def test_the_active_adapter_gets_the_values():
    base = TINY["vit"]()
    inputs = tiny_inputs(base, batch=6)
    model = adapt("vpt", base, domain_components=2)
    model.add_adapter("other", config("vpt", domain_components=2))
    model.add_adapter("third", config("vpt"))
    model.set_adapter("other")
    before = {name: copy.deepcopy(adapter_parameters(model, name)) for name in ("default", "other")}
    read_training_data(model, [inputs])
    changed = [
        name
        for name in ("default", "other")
        if any(not torch.equal(p, before[name][n]) for n, p in adapter_parameters(model, name).items())
    ]
    assert changed == ["other"]
    model.set_adapter("third")
    with pytest.raises(ConfigError, match="one active adapter with domain_components at a time; this model has 0"):
        domain_prompts(model, [inputs])


@needs_add_adapter
def test_without_peft_model_a_script_reads_by_itself():
    """`add_adapter` of transformers keeps no tuner that a Trainer could find."""
    base = TINY["vit"]()
    base.add_adapter(config("vpt", domain_components=2))
    before = copy.deepcopy(adapter_parameters(base))
    domain_prompts(base, [tiny_inputs(base, batch=6)])
    assert sum(not torch.equal(p, before[n]) for n, p in adapter_parameters(base).items()) == 1


def test_many_rows_are_drawn_evenly(monkeypatch, rows):
    monkeypatch.setattr("peft_lab.tuners.sequence.init_from_data.MAX_ROWS", 40)
    base = TINY["bert"]()
    model = adapt("soft_prompt", base, domain_components=2)
    ids = torch.arange(5, 95).repeat_interleave(2)[:, None]  # each row twice, in order
    batches = [{"input_ids": part} for part in ids.split(9)]
    domain_prompts(model, batches)
    domain_prompts(model, batches)
    domain_prompts(model, batches, seed=1)
    assert [len(found) for found in rows] == [40] * 3
    assert np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
    every = _stack_input(base, {"input_ids": ids}, 0)[:, 0].numpy()
    places = [int(np.abs(every - row).sum(1).argmin()) for row in rows[0]]
    assert 60 < np.mean(places) < 120
    assert max(places) > 150


def test_a_bfloat16_base():
    base = TINY["bert"]().to(torch.bfloat16)
    model = adapt("soft_prompt", base, domain_components=2)
    domain_prompts(model, [tiny_inputs(base, batch=6)])
    (value,) = adapter_parameters(model).values()
    assert value.dtype == torch.float32
    assert value.isfinite().all()


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("soft_prompt", {"domain_components": 0}, "domain_components=0 must be at least 1"),
        ("vpt", {"domain_components": 2, "domain_dimensions": 0}, "domain_dimensions=0 must be at least 1"),
        ("metadata_prompt", {"domain_dimensions": 4}, "domain_dimensions=4 goes with domain_components"),
        ("dvpt", {"domain_draws": 4}, "domain_draws=4 goes with domain_components"),
        ("vpt", {"domain_particles": 4}, "domain_particles=4 goes with domain_components"),
        ("vpt", {"domain_components": 2, "domain_draws": 17}, "domain_draws=17 must be at most domain_particles=16"),
        ("prompt_cam", {"domain_components": 2, "domain_draws": 4}, "domain_draws=4 leaves prompts untrained"),
        ("vpt", {"domain_components": 2, "projection": 4}, "projection=4 stores narrower ones"),
        ("soft_prompt", {"domain_components": 2, "prompt_tuning_init": "SAMPLE_VOCAB"}, "both say where prompts start"),
    ],
)
def test_bad_fields(method, fields, message):
    with pytest.raises(ConfigError, match=message):
        config(method, **fields)


def test_a_trainer_with_the_callback(tmp_path):
    base = TINY["bert"]()
    inputs = tiny_inputs(base, batch=8, labels=True)
    data = [{name: value[i] for name, value in inputs.items()} for i in range(8)]
    model = adapt("soft_prompt", base, domain_components=2)
    by_script = adapt("soft_prompt", base, domain_components=2)
    domain_prompts(by_script, [inputs])
    flags = {"max_steps": 2, "learning_rate": 0.0, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=3, save_strategy="no", **flags)
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.add_callback(ReadTrainingData())
    trainer.train()
    by_loop = adapt("soft_prompt", base, domain_components=2)
    read_training_data(by_loop, [inputs])
    for name, value in adapter_parameters(by_script).items():
        torch.testing.assert_close(adapter_parameters(model)[name], value, atol=1e-4, rtol=1e-4)
        assert torch.equal(adapter_parameters(by_loop)[name], value)


@pytest.mark.full
@pytest.mark.parametrize("method", ["soft_prompt", "bayes_prompt"])
def test_a_resumed_run_ends_with_the_same_weights(method, tmp_path):
    backbone, task = make_backbone(tmp_path / "bert", dropout=0.1), make_task(tmp_path / "data")
    values = {"method": method, "max_train_samples": 40, "save_steps": 2, "max_steps": 8}
    values["method_args"] = {"domain_components": 3}
    train(options(task, backbone, tmp_path / "one", **values))
    for step in (2, 6):  # within the first epoch of five steps and behind it
        checkpoint = str(tmp_path / "one" / f"checkpoint-{step}")
        train(options(task, backbone, tmp_path / f"from{step}", resume_from_checkpoint=checkpoint, **values))
        assert same_weights(tmp_path / "one", tmp_path / f"from{step}")
