"""IAPT: counts, a reference of a few lines, what a prompt may look at, presets, and training the activation in turn."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from support.backbones import TINY, tiny_inputs
from support.properties import adapt, adapter_parameters, move, output
from torch.nn.functional import adaptive_avg_pool1d, adaptive_max_pool1d, gelu
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_lab.adapters.sequence.iapt.method import DENOMINATOR, NUMERATOR, IAPTConfig, rational
from peft_lab.errors import ConfigError
from peft_lab.registry import check_method_args
from peft_lab.training.callbacks.bilevel import AlternatingActivation, activation_parameters
from peft_lab.training.trainer import LabTrainer
from peft_lab.tuners.forward_context import ForwardContext
from peft_lab.tuners.registration import make_config
from peft_lab.tuners.sequence.prompt_state import PromptState

WIDTH, LAYERS = 16, 2


def _count(model) -> int:
    return sum(p.numel() for p in adapter_parameters(model).values())


@pytest.mark.parametrize("m", [3, 8])
@pytest.mark.parametrize("l", [1, 4])
def test_counts(l, m):  # noqa: E741 - the letters of the formula
    base, d = TINY["llama"](), WIDTH
    rest = LAYERS * (m * l + 12)
    expected = {"none": LAYERS * 2 * d * m, "both": 2 * d * m, "down": (1 + LAYERS) * d * m, "up": (1 + LAYERS) * d * m}
    for share, projections in expected.items():
        assert _count(adapt("iapt", base, num_prompts=l, bottleneck=m, share=share)) == projections + rest


def test_counts_of_late_prompt_tuning():
    base, d = TINY["llama"](), WIDTH
    pooled = adapt("iapt", base, **_plain(IAPTConfig.from_preset("lpt", layers_to_transform=1)))
    assert _count(pooled) == 2 * d * 128 + 128 + d
    naive = adapt("iapt", base, **_plain(IAPTConfig.from_preset("lpt", layers_to_transform=1, pool="first")))
    assert _count(naive) == d * 128 + 128 + 128 * 5 * d + 5 * d
    idpg = adapt("iapt", base, **_plain(IAPTConfig.from_preset("idpg", num_prompts=3)))
    assert _count(idpg) == d * 128 + 128 + 128 * 3 * d + 3 * d


def _plain(config: IAPTConfig) -> dict:
    names = ("num_prompts", "bottleneck", "pool", "activation", "share", "biases", "layers_to_transform")
    return {name: getattr(config, name) for name in names}


def test_rational_starts_at_gelu():
    x = torch.linspace(-3, 3, 1001)
    numerator, denominator = torch.tensor(NUMERATOR), torch.tensor(DENOMINATOR)
    assert (rational(x, numerator, denominator) - gelu(x)).abs().max() < 1.2e-4
    a, b = torch.randn(7), torch.randn(5)
    top = sum(a[j] * x**j for j in range(7))
    bottom = 1 + sum(b[j] * x ** (j + 1) for j in range(5)).abs()
    torch.testing.assert_close(rational(x, a, b), top / bottom, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("share", "normalize"), [("none", True), ("none", False), ("both", True)])
@torch.no_grad()
def test_equals_blocks_run_by_hand(share, normalize):
    """On a vision transformer, whose blocks need neither masks nor positions."""
    base = TINY["vit"]().eval()
    model = move(adapt("iapt", base, bottleneck=8, num_prompts=3, share=share, normalize=normalize))
    parameters = {n.split("layers.")[1]: p for n, p in adapter_parameters(model).items()}
    pixels = tiny_inputs(base)["pixel_values"]
    tokens = base.vit.embeddings(pixels)
    for depth, block in enumerate(base.vit.layers):
        source = 0 if share == "both" else depth
        down, up = parameters[f"{source}.iapt_down.default"], parameters[f"{source}.iapt_up.default"]
        x = tokens / tokens.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt() if normalize else tokens
        x = x @ down.T
        z = (x @ parameters[f"{depth}.iapt_queries.default"].T).softmax(1).transpose(1, 2) @ x
        a, b = parameters[f"{depth}.iapt_numerator.default"], parameters[f"{depth}.iapt_denominator.default"]
        z = sum(a[j] * z**j for j in range(7)) / (1 + sum(b[j] * z ** (j + 1) for j in range(5)).abs())
        tokens = block(torch.cat([z @ up.T, tokens], 1))[:, 3:]
    expected = base.classifier(base.vit.layernorm(tokens)[:, 0])
    assert (output(model, {"pixel_values": pixels}) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("pool", ["max", "average", "first", "last", "self_attention"])
@torch.no_grad()
def test_pools_are_those_of_each_row_alone(pool):
    """Over the valid tokens only, wherever the padding stands, in as many parts as torch's adaptive pooling makes."""
    model = adapt("iapt", TINY["llama"](), pool=pool, num_prompts=3, bottleneck=4)
    layer = next(m for m in model.modules() if type(m).__name__ == "IAPTLayer")
    x = torch.randn(4, 9, 4)
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[0, :4], mask[1, 6:], mask[2, 1:] = False, False, False
    pooled = layer._pooled("default", x, mask)
    for row in range(4):
        alone = x[row][mask[row]].T[None]
        expected = {
            "max": lambda x: adaptive_max_pool1d(x, 3).mT,
            "average": lambda x: adaptive_avg_pool1d(x, 3).mT,
            "first": lambda x: x[..., :1].mT,
            "last": lambda x: x[..., -1:].mT,
            "self_attention": lambda x: layer._pooled("default", x.mT, None),
        }[pool](alone)
        torch.testing.assert_close(pooled[row], expected[0], atol=1e-5, rtol=1e-5)


def test_presets():
    assert IAPTConfig().pool == "self_attention"
    lpt = make_config("iapt", {"preset": "lpt", "layers_to_transform": "12", "pool": "average"})
    assert (lpt.layers_to_transform, lpt.pool, lpt.activation, lpt.biases) == (12, "average", "relu", True)
    idpg = IAPTConfig.from_preset("idpg", num_prompts=3)
    assert (idpg.layers_to_transform, idpg.pool, idpg.num_prompts) == (0, "first", 3)
    with pytest.raises(ConfigError, match=r'Preset "lpt" of method "iapt" needs layers_to_transform'):
        IAPTConfig.from_preset("lpt")
    with pytest.raises(ConfigError, match=r'no preset "ltp"\. Did you mean "lpt"\? Presets: lpt, idpg'):
        check_method_args("iapt", {"preset": "ltp"})
    with pytest.raises(ConfigError, match=r'"svfit" has no preset "small"\. It has none'):
        check_method_args("svfit", {"preset": "small"})
    with pytest.raises(ConfigError, match="bottleneck=0 must be at least 1"):
        IAPTConfig(bottleneck=0)


@pytest.mark.parametrize(
    ("preset", "fields"),
    [("lpt", {"pool": "max"}), ("lpt", {"pool": "average"}), ("lpt", {"pool": "first"}), ("idpg", {})],
)
@torch.no_grad()
def test_presets_are_the_generators_of_their_papers(preset, fields):
    """Projection down, pooling, ReLU and projection up of raw hidden states, none of them zero at the start."""
    fields = {"layers_to_transform": 0, **fields}
    model = adapt("iapt", TINY["llama"](), preset=preset, **fields)
    parts = {n.split("iapt_")[1].removesuffix(".default"): p for n, p in adapter_parameters(model).items()}
    assert {"down", "down_bias", "up", "up_bias"} == set(parts)
    for name, p in parts.items():
        bound = 1 / (128 if name.startswith("up") else WIDTH) ** 0.5
        assert 0.9 * bound < p.abs().max() <= bound
    layer = next(m for m in model.modules() if type(m).__name__ == "IAPTLayer")
    tokens = 30 * torch.randn(2, 9, WIDTH)
    x = torch.nn.functional.linear(tokens, parts["down"], parts["down_bias"])
    if fields.get("pool", "first") == "first":
        pooled = x[:, :1]
    else:
        pooled = {"max": adaptive_max_pool1d, "average": adaptive_avg_pool1d}[fields["pool"]](x.mT, 5).mT
    made = torch.nn.functional.linear(pooled.relu(), parts["up"], parts["up_bias"]).reshape(2, 5, WIDTH)
    found = layer.prompts("default", tokens, PromptState(ForwardContext(model)))
    torch.testing.assert_close(found, made, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_starts_with_prompts_of_zero_and_sees_no_scale():
    """The start is the slots of a soft prompt of zeros, and hidden states a thousand times larger change nothing."""
    base, ids = TINY["llama"]().eval(), torch.tensor([[5, 6, 7, 8]])
    zeros = adapt("soft_prompt", base, deep=True, num_virtual_tokens=4)
    for parameter in adapter_parameters(zeros).values():
        parameter.zero_()
    model = adapt("iapt", base)
    assert torch.equal(model(ids).logits, zeros(ids).logits)
    layer = next(m for m in move(model).modules() if type(m).__name__ == "IAPTLayer")
    tokens, state = torch.randn(2, 5, WIDTH), PromptState(ForwardContext(base))
    prompts = layer.prompts("default", tokens, state)
    torch.testing.assert_close(layer.prompts("default", 1000 * tokens, state), prompts, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pool", ["self_attention", "max", "average", "first", "last"])
def test_a_row_of_padding_alone_spoils_nothing(pool):
    model = move(adapt("iapt", TINY["llama"](), pool=pool))
    ids, mask = torch.randint(5, 90, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    model(ids, attention_mask=mask).logits[0].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in adapter_parameters(model).values())


@torch.no_grad()
def test_activation_is_computed_in_float32_under_autocast():
    model = move(adapt("iapt", TINY["llama"]()))
    layer = next(m for m in model.modules() if type(m).__name__ == "IAPTLayer")
    tokens, state = torch.randn(2, 5, WIDTH), PromptState(ForwardContext(model))
    plain = layer.prompts("default", tokens, state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.prompts("default", tokens, state), plain)


# What a prompt may look at --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["self_attention", "max", "average", "first", "last"])
@torch.no_grad()
def test_answers_do_not_leak(pool):
    """Changing the answer's last token changes no earlier logits, unless nothing says that it is an answer."""
    model = move(adapt("iapt", TINY["llama"](), pool=pool))
    ids = torch.randint(5, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, -1] = 3
    labels, instruction = ids.clone(), torch.ones_like(ids)
    labels[:, :5], instruction[:, 5:] = -100, 0
    for said in ({"labels": labels}, {"instruction_mask": instruction}):
        one, two = (model(input_ids=x, **said).logits[:, :-1] for x in (ids, other))
        assert torch.equal(one, two)
    one, two = (model(input_ids=x).logits[:, :-1] for x in (ids, other))
    assert torch.equal(one, two) == (pool == "first")
    by_labels, by_mask = model(ids, labels=labels).logits, model(ids, instruction_mask=instruction).logits
    assert torch.equal(by_labels, by_mask)


def test_a_row_without_an_instruction_is_an_error():
    model, ids = adapt("iapt", TINY["llama"]()), torch.tensor([[5, 6, 7], [7, 6, 5]])
    labels = torch.tensor([[-100, 6, 7], [7, 6, 5]])
    with pytest.raises(ConfigError, match="from the instruction, and a row of the batch has none"):
        model(ids, labels=labels)
    with pytest.raises(ConfigError, match=r"instruction_mask has shape \[2, 2\], expected \[2, 3\]"):
        model(ids, instruction_mask=torch.ones(2, 2))
    adapt("soft_prompt", TINY["llama"]())(ids, labels=ids)  # prompts that look at nothing need no instruction


def test_training_on_whole_texts_is_warned_of(recwarn):
    model, ids = adapt("iapt", TINY["llama"]()).train(), torch.tensor([[5, 6, 7]])
    model(ids, labels=torch.tensor([[-100, 6, 7]]))
    model(ids, instruction_mask=torch.tensor([[1, 0, 0]]))
    model.eval()(ids)
    assert not [w for w in recwarn if "instruction_mask" in str(w.message)]
    with pytest.warns(UserWarning, match="prompts see the answers too"):
        model.train()(ids)


def test_labels_of_an_encoder_are_no_answer():
    """A token classifier's labels, and a decoder's that happen to be as long as the encoder's text."""
    base = TINY["t5"]()
    model, inputs = move(adapt("iapt", base)), tiny_inputs(base)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, :4] = 7
    plain = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    seen = model(**plain, labels=labels).encoder_last_hidden_state
    decoder = torch.zeros(2, 1, dtype=torch.long)
    assert torch.equal(seen, model(**plain, decoder_input_ids=decoder).encoder_last_hidden_state)


@torch.no_grad()
def test_prompts_are_made_once_and_kept_in_the_cache(monkeypatch):
    model = adapt("iapt", TINY["llama"]())
    layer = next(m for m in model.modules() if type(m).__name__ == "IAPTLayer")
    calls, original = [], type(layer).prompts
    monkeypatch.setattr(type(layer), "prompts", lambda *args: calls.append(1) or original(*args))
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert len(calls) == LAYERS


# Training the activation in turn --------------------------------------------------------------------------------------


def _rows(seed: int) -> Dataset:
    ids = torch.randint(5, 90, (8, 6), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :3] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


class _Watch(TrainerCallback):
    """The adapter's parameters after every step, and before what other callbacks do then."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self._keep(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._keep(model)

    def _keep(self, model):
        self.seen.append({n: p.detach().clone() for n, p in adapter_parameters(model).items()})


@pytest.mark.full
@pytest.mark.parametrize("trainer_class", [Trainer, LabTrainer])
def test_activation_trains_on_held_out_data_alone(trainer_class, tmp_path):
    model = adapt("iapt", TINY["llama"]())
    watch, start = _Watch(), {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, weight_decay=0.1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callbacks = [AlternatingActivation(_rows(1), every=2, learning_rate=1e-3), watch]
    trainer_class(model, arguments, train_dataset=_rows(0), callbacks=callbacks).train()
    steps = [start, *watch.seen]  # per step: after the optimizer, and after the callback
    assert len(steps) == 9
    for step in range(4):
        before, trained, after = steps[2 * step : 2 * step + 3]
        for name in start:
            of_activation = "numerator" in name or "denominator" in name
            assert torch.equal(before[name], trained[name]) == of_activation
            in_turn = of_activation and step % 2 == 1
            assert torch.equal(trained[name], after[name]) != in_turn


@pytest.mark.full
def test_gradients_of_the_activation_count_in_no_norm(tmp_path):
    """Clipping sees what the training itself moves, and behind it the activations have their gradients again."""
    model, seen = move(adapt("iapt", TINY["llama"]())), []

    class Norms(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen.append([p.grad.norm().item() for p in activation_parameters(self.model)])
            return loss

    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
    Norms(model, arguments, train_dataset=_rows(0), callbacks=[AlternatingActivation(_rows(1))]).train()
    assert all(norm == 0 for step in seen for norm in step)
    Norms(model, arguments, train_dataset=_rows(0)).train()
    assert all(norm > 0 for norm in seen[-1])


@pytest.mark.full
def test_a_training_broken_off_leaves_nothing_to_the_next(tmp_path):
    model = move(adapt("iapt", TINY["llama"]()))
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True)

    class Broken(Trainer):
        def training_step(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Broken(model, arguments, train_dataset=_rows(0), callbacks=[AlternatingActivation(_rows(1))]).train()
    start = [p.detach().clone() for p in activation_parameters(model)]
    again = AlternatingActivation(_rows(1), learning_rate=1e-2)
    Trainer(model, arguments, train_dataset=_rows(0), callbacks=[again]).train()
    assert all(not torch.equal(p, q) for p, q in zip(activation_parameters(model), start, strict=True))


def test_alternating_says_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="every=0 must be at least 1"):
        AlternatingActivation(_rows(1), every=0)
    model = adapt("iapt", TINY["llama"](), activation="gelu")
    assert activation_parameters(model) == []
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    with pytest.raises(ConfigError, match="no learned activation"):
        Trainer(model, arguments, train_dataset=_rows(0), callbacks=[AlternatingActivation(_rows(1))]).train()


def test_coefficients_get_no_weight_decay(tmp_path):
    model = adapt("iapt", TINY["llama"]())
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True)
    trainer = LabTrainer(copy.deepcopy(model), arguments, train_dataset=_rows(0))
    groups = trainer.create_optimizer().param_groups
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {id(p) for p in activation_parameters(trainer.model)} <= undecayed
