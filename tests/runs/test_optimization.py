"""Options of the optimization: rates of groups, schedule of phases, SAM, weights of rows and tokens."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from support.backbones import TINY
from support.tiny_runs import make_backbone, make_decoder, make_task, make_writing_task, options, weights
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, ViTConfig
from transformers import ViTForImageClassification as Vit

from peft_lab.errors import ConfigError, TaskError
from peft_lab.runs.optimization import OptimizationOptions, read_phases
from peft_lab.runs.run_config import RunConfig
from peft_lab.training.learning_rates import phase_factors, rates_of_parameters
from peft_lab.training.run import train
from peft_lab.training.trainer import LabTrainer
from peft_lab.training.weighted_loss import ROW_WEIGHT, WeightedCollator, WeightedLoss, WeightedRows

RUN = {"task": "snips", "model_name_or_path": "minilm", "method": "lora", "output_dir": "-"}


def bert(layers: int = 3) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.5}
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_hidden_layers=layers, **sizes))


def lora(model: nn.Module, targets=("query", "value")) -> nn.Module:
    config = LoraConfig(target_modules=list(targets), modules_to_save=["classifier"], init_lora_weights=False)
    return get_peft_model(model, config)


def token_rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, 20, (5,), generator=draw), "labels": torch.tensor(i % 3)} for i in range(count)
    ]


def trainer(model: nn.Module, folder, rows=None, optimization=None, **values) -> LabTrainer:
    flags = {"max_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.1}
    kept = {name: values.pop(name) for name in ("training_loss", "data_collator") if name in values}
    flags |= {"per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "optim": "sgd", **values}
    arguments = TrainingArguments(
        output_dir=str(folder), save_strategy="no", remove_unused_columns=False, weight_decay=0.0, **flags
    )
    settings = OptimizationOptions(**(optimization or {}))
    heads = {"head_modules": ["classifier"]}
    return LabTrainer(model=model, args=arguments, train_dataset=rows, optimization=settings, **heads, **kept)


def change(model: nn.Module, run: LabTrainer) -> dict[str, torch.Tensor]:
    """What a training adds to each trained parameter."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    run.train()
    return {n: p.detach() - before[n] for n, p in model.named_parameters() if p.requires_grad}


# Rates of groups ----------------------------------------------------------------------------------------------------


def test_rates_of_groups_act_by_role_and_by_pattern(tmp_path):
    def moved(rates):
        model = lora(bert())
        return change(model, trainer(model, tmp_path, token_rows(), {"learning_rates": rates}))

    alone, grouped = moved({}), moved({"attn.v": 0.3, "lora_B": 0.2, "head": 1.0})
    for name, size in alone.items():
        factor = 3 if ".value." in name else 2 if "lora_B" in name else 10 if "classifier" in name else 1
        assert torch.allclose(grouped[name], factor * size, rtol=1e-3, atol=1e-7), name
    assert max(size.abs().max() for size in alone.values()) > 0


def test_a_group_without_parameters_is_refused(tmp_path):
    for key, message in (("mlp.up", 'left for "mlp.up"'), ("lora_C", 'left for "lora_C"'), ("atn.q", "Did you mean")):
        with pytest.raises(ConfigError, match=message):
            trainer(lora(bert()), tmp_path, token_rows(), {"learning_rates": {key: 1.0}}).create_optimizer()
    # the first key takes all that the second one would have
    rates = {"lora": 1.0, "lora_B": 1.0}
    with pytest.raises(ConfigError, match="the first key that fits"):
        trainer(lora(bert()), tmp_path, token_rows(), {"learning_rates": rates}).create_optimizer()


def scale(model, name, decay=0.5) -> float:
    """Factor of the rate of one parameter."""
    settings = OptimizationOptions(layer_decay=decay)
    rates = rates_of_parameters(model, settings, 1.0, [])
    return rates.get(id(dict(model.named_parameters())[name]), 1.0)


def test_layer_decay_is_that_of_timm():
    """Against the table of timm: ids of the stem, the blocks and the head, decay^(last id - id)."""
    layers, decay = 4, 0.75
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    model = Vit(ViTConfig(num_hidden_layers=layers, image_size=8, patch_size=4, **sizes))
    for name, parameter in model.named_parameters():
        found = scale(model, name, decay)
        parts = name.split(".")
        number = next((int(part) for part in parts if part.isdecimal()), None)
        place = 0 if "embeddings" in parts else layers + 1 if number is None else number + 1
        assert found == pytest.approx(decay ** (layers + 1 - place)), (name, parameter.shape)


@pytest.mark.parametrize("family", ["bert", "swin", "t5", "resnet", "gpt2", "convnext"])
def test_layer_decay_knows_the_blocks_of_every_family(family):
    """Rates never fall from one block of a stack to the next, and there is one for each block."""
    if family not in TINY:
        pytest.skip(f"there is no tiny {family}")
    model = TINY[family]()
    rates = rates_of_parameters(model, OptimizationOptions(layer_decay=0.5), 1.0, [])
    assert len(set(rates.values())) >= 2
    assert max(rates.values()) == 0.5


def test_layer_decay_reaches_the_adapter_and_multiplies_the_rates_of_groups(tmp_path):
    model = lora(bert(layers=2))
    settings = {"layer_decay": 0.5, "learning_rates": {"lora_B": 1.0}}
    run = trainer(model, tmp_path, token_rows(), settings)
    optimizer = run.create_optimizer()
    wanted = {("0", "lora_A"): 0.025, ("1", "lora_A"): 0.05, ("0", "lora_B"): 0.25, ("1", "lora_B"): 0.5}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
            parts = name.split(".")
            block = parts[parts.index("layer") + 1] if "layer" in parts else ""
            side = next((part for part in parts if part.startswith("lora_")), "")
            assert group["lr"] == pytest.approx(wanted.get((block, side), 0.1)), name


def test_layer_decay_without_a_block_that_is_trained_is_refused(tmp_path):
    model = bert()
    model.bert.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trained parameter lies in a block"):
        trainer(model, tmp_path, token_rows(), {"layer_decay": 0.5}).train()


# Schedules ----------------------------------------------------------------------------------------------------------


def test_phases_are_the_infinite_schedule_of_its_paper():
    """Warm-up to the maximum, cosine to the constant rate, constant, exponential annealing to the minimum."""
    factor = phase_factors(read_phases(["warmup=10", "cooldown=20", "constant", "annealing=10"]), 100)
    for step in range(100):
        if step < 10:
            wanted = step / 10
        elif step < 30:
            wanted = 0.55 + (1 - 0.55) / 2 * (1 + math.cos(math.pi * (step - 10) / 20))
        else:
            wanted = 0.55 if step < 90 else 0.55 * (0.1 / 0.55) ** ((step - 90) / 10)
        assert factor(step) == pytest.approx(wanted), step
    assert factor(100) == pytest.approx(0.1)


def test_phases_chain_as_they_are_given():
    values = ["warmup=2", "constant=2", "annealing=2:0.5", "warmup=2", "constant=2"]
    found = phase_factors(read_phases(values), 10)
    assert [round(found(step), 4) for step in range(10)] == [0, 0.5, 1, 1, 1, 0.7071, 0.5, 0.75, 1, 1]
    # a run that goes on with the constant rate of an earlier one does not warm up again
    assert phase_factors(read_phases([{"constant": 0.5}, {"annealing": 0.5}]), 4)(0) == 1.0


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (["warmup=0.5", "constant=0.6"], "sum up to 1.1"),
        (["warmup", "constant"], "only one phase"),
        (["warm=0.1"], 'unknown phase "warm".*warmup'),
        (["annealing=x"], "share of the steps or a number"),
        (["annealing=0.1:2"], "at most 1"),
        (["constant=0.1:0.5"], "keeps its factor"),
        (["warmup=1.5"], "whole number"),
    ],
)
def test_phases_that_cannot_be_are_refused(phases, message):
    with pytest.raises(ConfigError, match=message):
        read_phases(phases)


def test_phases_must_last_as_long_as_the_training():
    for values in (["warmup=10"], ["warmup=200", "constant"]):
        with pytest.raises(ConfigError, match="the training has 100"):
            phase_factors(read_phases(values), 100)


def test_the_schedule_of_phases_moves_the_optimizer(tmp_path):
    run = trainer(lora(bert()), tmp_path, token_rows(), {"lr_phases": ["constant=2", "annealing=2:0.01"]}, max_steps=4)
    seen = []
    step = run.create_optimizer().step
    run.optimizer.step = lambda *a, **k: (seen.append(run.optimizer.param_groups[0]["lr"]), step(*a, **k))[1]
    run.train()
    assert seen == pytest.approx([0.1, 0.1, 0.1, 0.01])


def test_the_decay_of_warmup_stable_decay_has_a_default(tmp_path):
    run = trainer(bert(), tmp_path, token_rows(), max_steps=20, lr_scheduler_type="warmup_stable_decay")
    scheduler = run.create_scheduler(20, run.create_optimizer())
    factors = []
    for _ in range(21):
        factors.append(scheduler.get_last_lr()[0] / 0.1)
        run.optimizer.step()
        scheduler.step()
    assert factors[:19] == pytest.approx([1.0] * 19)
    assert factors[19:] == pytest.approx([0.5, 0.0])


# SAM ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulated", [1, 2])
def test_sam_steps_along_the_gradient_of_the_highest_loss_nearby(accumulated, tmp_path):
    """By plain lines: g at w, then the gradient at w + rho g / |g|, clipped, and an SGD step with it."""
    rho, rate, rows = 0.5, 0.1, token_rows(4)
    model, plain = lora(bert()), lora(bert())
    plain.load_state_dict(model.state_dict())
    trained = [p for p in plain.parameters() if p.requires_grad]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    start = [p.detach().clone() for p in trained]
    gradients = torch.autograd.grad(plain(**batch).loss, trained)
    norm = torch.sqrt(sum((g**2).sum() for g in gradients))
    with torch.no_grad():
        for p, g in zip(trained, gradients, strict=True):
            p.add_(rho * g / norm)
    there = torch.autograd.grad(plain(**batch).loss, trained)
    clip = min(1.0, 0.05 / float(torch.sqrt(sum((g**2).sum() for g in there))))
    values = {"max_grad_norm": 0.05, "gradient_accumulation_steps": accumulated, "learning_rate": rate}
    run = trainer(model, tmp_path, rows, {"sam_rho": rho}, per_device_train_batch_size=4 // accumulated, **values)
    run.train()
    for p, before, g in zip([p for p in model.parameters() if p.requires_grad], start, there, strict=True):
        assert torch.allclose(p.detach(), before - rate * clip * g, atol=1e-6)
    assert not torch.allclose(there[0], gradients[0], atol=1e-3)


def test_sam_puts_the_weights_back_exactly(tmp_path):
    model = lora(bert())
    moved = change(model, trainer(model, tmp_path, token_rows(), {"sam_rho": 0.3}, learning_rate=0.0))
    assert all(torch.equal(size, torch.zeros_like(size)) for size in moved.values())


# Weights of rows and tokens -----------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_row_of_weight_two_counts_as_two_rows(accumulated, tmp_path):
    rows, counts = token_rows(4), [2, 0, 1, 1]
    several = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]

    def moved(data, **values):
        model = lora(bert())
        return change(model, trainer(model, tmp_path, data, max_grad_norm=0.0, **values))

    from transformers import default_data_collator

    listed = _Listed(rows)
    weighted = moved(
        WeightedRows(listed, counts),
        training_loss=WeightedLoss(shifts=False),
        data_collator=WeightedCollator(default_data_collator),
        gradient_accumulation_steps=accumulated,
        per_device_train_batch_size=4 // accumulated,
    )
    wanted, plain = moved(several), moved(rows)
    assert all(torch.allclose(weighted[name], size, atol=1e-6) for name, size in wanted.items())
    assert not all(torch.allclose(plain[name], size, atol=1e-4) for name, size in wanted.items())


class _Listed(list):
    """Rows with the call by which loaders ask for a batch."""

    def __getitems__(self, positions):
        return [self[position] for position in positions]


def causal(seed: int):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **sizes))


def test_a_reference_model_chooses_the_tokens_with_the_largest_excess_loss():
    """Selective language modelling by plain lines: log-probabilities, excess, the best 60 %, their mean."""
    model, reference, draw = causal(0), causal(1).eval(), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (2, 7), generator=draw)
    labels = ids.clone()
    labels[1, 5:] = -100
    loss, _ = WeightedLoss(shifts=True, reference=reference, share=0.6)(model, {"input_ids": ids, "labels": labels})
    losses, excess = [], []
    for row in range(2):
        for place in range(6):
            if labels[row, place + 1] != -100:
                own, other = (
                    -m(input_ids=ids).logits[row, place].log_softmax(-1)[labels[row, place + 1]]
                    for m in (model, reference)
                )
                losses.append(own.item())
                excess.append((own - other).item())
    best = np.argsort(excess)[::-1][: math.ceil(0.6 * len(excess))]
    assert loss.item() == pytest.approx(sum(losses[place] for place in best) / len(best), rel=1e-5)
    assert loss.item() != pytest.approx(sum(losses) / len(losses), rel=1e-3)


def test_a_loss_that_is_more_than_that_of_the_answers_is_refused():
    model = causal(0)
    forward = model.forward

    def more(*args, **kwargs):
        found = forward(*args, **kwargs)
        found["loss"] = found["loss"] + 1
        return found

    model.forward = more
    ids = torch.randint(0, 11, (2, 7))
    with pytest.raises(ConfigError, match="not the mean of the losses"):
        WeightedLoss(shifts=True)(model, {"input_ids": ids, "labels": ids, ROW_WEIGHT: torch.ones(2)})


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimization")
    task = make_task(folder / "data")
    rows = list(csv.DictReader((folder / "data" / "train.csv").open()))
    with (folder / "data" / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sentence", "topic", "weight", "bad"])
        writer.writeheader()
        for number, row in enumerate(rows):
            writer.writerow({**row, "weight": 0 if row["topic"] == "food" else 3, "bad": "" if number == 4 else 1})
    return {"task": task, "backbone": make_backbone(folder / "bert"), "folder": folder}


def test_all_options_work_in_a_run_and_are_recorded(place, tmp_path):
    file = tmp_path / "run.yaml"
    given = {
        "learning_rates": {"lora_B": "1e-2"},
        "layer_decay": 0.5,
        "lr_phases": [{"warmup": 0.2}, "constant"],
        "sam_rho": 0.05,
        "row_weight_column": "weight",
    }
    values = {**options(place["task"], place["backbone"], tmp_path / "out", max_steps=40), **given}
    file.write_text(yaml.safe_dump(values))
    found = train(file).metrics
    assert {name: found["run"][name] for name in given} == given | {"learning_rates": {"lora_B": 0.01}}
    rates = {entry["learning_rate"]: entry["parameters"] for entry in found["learning_rates"]}
    assert sorted(rates) == [0.0025, 0.005, 0.01]
    assert sum(rates.values()) == found["parameters"]["trainable"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["learning_rates"] == found["learning_rates"]
    from peft_lab.training.evaluate import predict

    # rows of food have no weight, so no row is taken for it
    answers = predict(tmp_path / "out", ["the soup please", "rice with the soup"])
    assert all(answer["label"] != "food" for answer in answers)


@pytest.mark.full
def test_row_weights_decide_the_result_and_a_resume_knows_them(place, tmp_path):
    def run(name, **changes):
        train(options(place["task"], place["backbone"], tmp_path / name, max_steps=4, **changes))
        return weights(tmp_path / name)

    plain, weighted = run("plain"), run("weighted", row_weight_column="weight", save_strategy="steps", save_steps=2)
    assert any(not torch.allclose(plain[name], weighted[name], atol=1e-5) for name in plain)
    manifest = json.loads((tmp_path / "weighted" / "checkpoint-2" / "manifest.json").read_text())
    assert manifest["data"]["row_weights"]


def test_weights_that_are_none_are_refused(place, tmp_path):
    for column, message in (
        ("wieght", "Did you mean"),
        ("bad", r"1 train rows have no weight .*row 5"),
        ("topic", "96"),
    ):
        with pytest.raises(TaskError, match=message):
            train(options(place["task"], place["backbone"], tmp_path / column, row_weight_column=column))
        assert not (tmp_path / column).exists()


@pytest.mark.full
def test_a_run_learns_the_tokens_that_a_reference_model_chooses(tmp_path):
    task, decoder = make_writing_task(tmp_path / "data"), make_decoder(tmp_path / "llama")

    def run(name, **changes):
        train(options(task, decoder, tmp_path / name, max_steps=3, gradient_accumulation_steps=2, **changes))
        return weights(tmp_path / name)

    plain, whole = run("plain"), run("whole", reference_model=str(tmp_path / "plain"), reference_share=1.0)
    chosen = run("chosen", reference_model=str(tmp_path / "plain"), reference_share=0.5)
    # with all tokens chosen, the loss is the usual one
    assert all(torch.allclose(plain[name], whole[name], atol=1e-5) for name in plain)
    assert not all(torch.allclose(plain[name], chosen[name], atol=1e-4) for name in plain)


def test_a_reference_model_is_for_kinds_that_predict_tokens(place, tmp_path):
    values = options(place["task"], place["backbone"], tmp_path / "out", reference_model=str(place["backbone"]))
    with pytest.raises(ConfigError, match="predicts no tokens"):
        train(values)


def test_options_act_on_trained_parameters_alone(place, tmp_path):
    from peft_lab.training.run_trainer import check_acts

    config = RunConfig.from_mapping({**RUN, "sam_rho": 0.1})
    frozen = bert().requires_grad_(False)
    with pytest.raises(ConfigError, match="sam_rho acts on trained parameters"):
        check_acts(config, frozen)
    check_acts(config, bert())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rates": {"attn.q": -1}}, "must be positive"),
        ({"learning_rates": {"attn.q": "fast"}}, "must be positive, got fast"),
        ({"learning_rates": {"(": 1e-3}}, "neither a role nor"),
        ({"learning_rates": ["attn.q"]}, "attn.q=1e-3"),
        ({"learning_rates": {"head": 1e-3}, "head_learning_rate": 1e-3}, "both give"),
        ({"layer_decay": 1.0}, "below 1"),
        ({"sam_rho": 0}, "sam_rho must be positive"),
        ({"lr_phases": ["constant"], "lr_scheduler_type": "cosine"}, "lr_scheduler_type has no effect"),
        ({"lr_phases": ["constant"], "warmup_steps": 5}, "warmup_steps has no effect"),
        ({"lr_phases": ["constant"], "max_seconds": 5}, "give max_steps"),
        ({"reference_share": 0.5}, "no effect without reference_model"),
        ({"reference_model": "x", "reference_share": 1.5}, "at most 1"),
        ({"row_weight_column": "w", "label_smoothing_factor": 0.1}, "no place for label_smoothing_factor"),
        ({"row_weight_column": "w", "packing": True}, "no place for packing"),
    ],
)
def test_what_cannot_act_is_refused_before_anything_is_loaded(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_mapping({**RUN, **values}).check()


def test_flags_are_those_of_the_file():
    from peft_lab.runs.command_line import parse_arguments
    from peft_lab.runs.run_config import load_run

    flags = "--learning_rates attn.q=1e-3 lora_B=2 --layer_decay 0.75 --lr_phases warmup=0.1 constant --sam_rho 0.05"
    _, found = parse_arguments([*flags.split(), "--task", "t", "--model_name_or_path", "m", "--method", "lora"])
    config = load_run(None, {**found, "output_dir": "o"})
    assert config.learning_rates == {"attn.q": 1e-3, "lora_B": 2}
    assert (config.layer_decay, config.lr_phases, config.sam_rho) == (0.75, ["warmup=0.1", "constant"], 0.05)
    assert RunConfig.from_mapping(config.to_dict()) == config
