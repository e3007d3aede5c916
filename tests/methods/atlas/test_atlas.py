"""aTLAS against W + sum of lambda_ij tau_ij written out, and what is its own: vectors, partitions, blocks, loss."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.backbones import TINY, tiny_inputs
from support.properties import assert_close, move, output
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

import peft_lab
from peft_lab.adapters import ATLASConfig
from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.export.to_lora import convert
from peft_lab.loading.foreign_adapters import write_record
from peft_lab.loading.load_adapter import load_adapter
from peft_lab.training.trainer import LabTrainer

#: Settings of the LoRA vectors: other ranks, scalings and modules.
SETTINGS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 6, "target_modules": ["query", "value"]},
    {"r": 3, "use_rslora": True, "target_modules": ["query", "dense"], "alpha_pattern": {"dense": 5}},
    {"r": 1, "rank_pattern": {"layer.1.attention.self.key": 4}, "target_modules": ["key"]},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of three LoRA adapters on the tiny BERT, each with the record of its base, and one of a checkpoint."""
    folder = tmp_path_factory.mktemp("vectors")
    for number, settings in enumerate(SETTINGS):
        torch.manual_seed(number)
        model = move(
            get_peft_model(TINY["bert"](), LoraConfig(**settings, modules_to_save=["classifier"])), seed=number
        )
        model.save_pretrained(folder / str(number))
        write_record(model, folder / str(number))
    tuned = TINY["bert"]()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    tuned.save_pretrained(folder / "checkpoint")
    return folder


def _vectors(place: Path) -> list[str]:
    return [str(place / str(number)) for number in range(len(SETTINGS))]


def _taus(folder: str) -> dict[str, Tensor]:
    """Differences of the weights by module, as peft itself merges the adapter or transformers loads the checkpoint."""
    base = TINY["bert"]()
    if folder.endswith("checkpoint"):
        tuned: Any = type(base).from_pretrained(folder)
    else:
        tuned = PeftModel.from_pretrained(copy.deepcopy(base), folder).double().merge_and_unload()
    found = {}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and name != "classifier":
            delta = tuned.get_submodule(name).weight.double() - module.weight.double()
            if delta.any():
                found[name] = delta.detach()
    return found


def _explicit(model: Any, folders: list[str]) -> nn.Module:
    """The base in float64 with W_j + sum of lambda_ij tau_ij, row by row of each partition."""
    base, taus = TINY["bert"]().double(), [_taus(folder) for folder in folders]
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "atlas_lambda"):
            continue
        coefficients, weight = layer.atlas_lambda["default"].detach().double(), base.get_submodule(name).weight.data
        count, rows = coefficients.shape[1], len(weight)
        for row in range(rows):
            for vector, tau in enumerate(taus):
                if name in tau:
                    weight[row] += coefficients[vector, row * count // rows] * tau[name][row]
    base.classifier.load_state_dict(model.base_model.model.classifier.modules_to_save["default"].state_dict())
    return base


def _model(folders: list[str], **fields: Any) -> Any:
    return get_peft_model(TINY["bert"](), ATLASConfig(vectors=folders, **fields)).eval()


@pytest.mark.parametrize("partitions", [1, 5])
@pytest.mark.parametrize("kinds", ["lora", "checkpoint", "both"])
def test_equals_the_sum_of_scaled_vectors(place, kinds, partitions):
    folders = [] if kinds == "checkpoint" else _vectors(place)
    folders += [] if kinds == "lora" else [str(place / "checkpoint")]
    model = _model(folders, partitions=partitions)
    inputs, base = tiny_inputs(TINY["bert"]()), TINY["bert"]()
    assert torch.equal(output(model, inputs), output(base, inputs)), "starts bit-exactly at the base"
    modules = set().union(*map(_taus, folders))
    layers = {n for n, m in model.base_model.model.named_modules() if hasattr(m, "atlas_lambda")}
    assert layers == modules
    count = sum(p.numel() for n, p in model.named_parameters() if "atlas" in n and p.requires_grad)
    assert count == len(folders) * len(modules) * partitions
    expected = output(_explicit(move(model), folders), inputs)
    assert_close(output(model, inputs), expected.float(), 1e-5)
    assert (expected - output(base, inputs)).abs().max() > 1e-2
    assert_close(output(model.merge_and_unload(), inputs), expected.float(), 1e-5)


def test_low_rank_vectors_stay_in_factors(place, monkeypatch):
    model = move(_model(_vectors(place), partitions=2))
    layer = model.get_submodule("base_model.model.bert.encoder.layer.1.attention.self.query")
    assert [tuple(layer.atlas_B["default"].shape), tuple(layer.atlas_A["default"].shape)] == [(16, 9), (9, 16)]
    assert not len(layer.atlas_dense)
    monkeypatch.setattr(type(layer), "delta_weight", None)
    output(model, tiny_inputs(TINY["bert"]()))


@pytest.mark.parametrize("partitions", [1, 3])
def test_exports_one_ordinary_lora_adapter(place, partitions, tmp_path):
    model = move(_model(_vectors(place), partitions=partitions))
    inputs, done = tiny_inputs(TINY["bert"]()), convert(model)
    assert max(done.errors.values()) < 1e-6
    # at most the ranks of the vectors that change the module
    assert done.ranks["bert.encoder.layer.0.attention.self.query"] == 2 + 3
    done.config.save_pretrained(tmp_path)
    save_file(done.state, tmp_path / "adapter_model.safetensors")
    assert_close(output(PeftModel.from_pretrained(TINY["bert"](), tmp_path), inputs), output(model, inputs))


def test_an_adapter_loads_without_the_folders_of_its_vectors(place, tmp_path):
    copies = [str(shutil.copytree(folder, tmp_path / Path(folder).name)) for folder in _vectors(place)]
    copies.append(str(shutil.copytree(place / "checkpoint", tmp_path / "checkpoint")))
    model, inputs = move(_model(copies)), tiny_inputs(TINY["bert"]())
    model.save_pretrained(tmp_path / "saved")
    for folder in copies:
        shutil.rmtree(folder)
    values = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert values["vector_ranks"] == [2, 3, 4, 0]
    assert [len(entry) for entry in values["vector_hashes"]] == [64] * 4
    for load in (PeftModel.from_pretrained, load_adapter):
        assert torch.equal(output(load(TINY["bert"](), tmp_path / "saved"), inputs), output(model, inputs))
    # a new adapter of the same config reads them, and they are gone
    with pytest.raises(ConfigError, match="is no folder"):
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))


@pytest.mark.parametrize("field", ["vector_ranks", "fingerprints"])
def test_no_folder_that_a_file_names_is_opened(place, field, tmp_path):
    _model(_vectors(place)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: None}))
    with pytest.raises(ConfigError, match="names vectors without their ranks"):
        PeftModel.from_pretrained(TINY["bert"](), tmp_path)


@pytest.mark.parametrize("ranks", [[2, 3], [2, 3, -4], [0, 0, 10**9], [2, 3, 10**9]])
def test_ranks_of_a_file_allocate_nothing(place, ranks, tmp_path):
    _model(_vectors(place)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vector_ranks": ranks}))
    with pytest.raises(ConfigError, match=r"one rank for each|larger than anything"):
        PeftModel.from_pretrained(TINY["bert"](), tmp_path)


# Vectors that are refused -------------------------------------------------------------------------------------------


def test_a_vector_of_another_base_is_refused(place, tmp_path):
    base = TINY["bert"]()
    with torch.no_grad():
        base.bert.encoder.layer[0].attention.self.query.weight[0, 0] += 1
    with pytest.raises(AdapterMismatchError, match=r'task vector ".*/0" does not fit: Base weight ".*query" differs'):
        get_peft_model(base, ATLASConfig(vectors=_vectors(place)))
    # without its record a vector is known by the names and shapes of its modules alone
    folder = shutil.copytree(place / "0", tmp_path / "0")
    (folder / "base_fingerprint.json").unlink()
    get_peft_model(base, ATLASConfig(vectors=[str(folder)]))
    with pytest.raises(AdapterMismatchError, match="the model has no module"):
        get_peft_model(TINY["vit"](), ATLASConfig(vectors=[str(folder)]))


def _pickle(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def _change(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _spoil(folder: Path, value: float) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    state[min(key for key in state if "lora_A" in key)][:] = value
    save_file(state, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shutil.rmtree, "is no folder"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "neither adapter_config.json nor config.json"),
        (_pickle, "which can run code"),
        (lambda folder: _change(folder, peft_type="SVFIT"), "convert it with `peft-lab to-lora`"),
        (lambda folder: _change(folder, use_dora=True), "use_dora=True is more than a low-rank delta"),
        (lambda folder: _change(folder, bias="all"), "bias='all' is more than a low-rank delta"),
        (lambda folder: _change(folder, alpha_pattern={"(a+)+$": 3}), "take for ever"),
        (lambda folder: _change(folder, r=7), "the weight is 16 x 16"),
        (lambda folder: _spoil(folder, float("nan")), "are not finite"),
    ],
)
def test_a_folder_that_is_no_vector_is_refused_by_name(place, change, words, tmp_path):
    folder = shutil.copytree(place / "0", tmp_path / "vector")
    change(folder)
    base = TINY["bert"]()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(ConfigError if "weight is" not in words else AdapterMismatchError, match=words) as raised:
        get_peft_model(base, ATLASConfig(vectors=[str(folder)]))
    assert str(folder) in str(raised.value)
    assert base.state_dict().keys() == before.keys()


def test_a_regex_of_a_vector_is_not_run(place, tmp_path):
    folder = shutil.copytree(place / "0", tmp_path / "vector")
    _change(folder, target_modules="(a+)+$")
    assert _model([str(folder)]).targeted_module_names


def test_fields_that_make_no_sense_are_refused(place):
    wrong: list[dict[str, Any]] = [{"partitions": 0}, {"blocks": 0}, {"l1": -1.0}, {"vectors": []}, {"r": 0}]
    for fields in wrong:
        with pytest.raises(ConfigError, match=next(iter(fields))):
            ATLASConfig(**fields)
    with pytest.raises(ConfigError, match="no effect beside vectors"):
        ATLASConfig(vectors=_vectors(place), r=2)
    with pytest.raises(ConfigError, match="at most 4; take LoRA adapters"):
        _model([str(place / "checkpoint")] * 5)


# Objective ----------------------------------------------------------------------------------------------------------


def _batch(rows: int = 4) -> dict[str, Tensor]:
    return {**tiny_inputs(TINY["bert"](), batch=rows), "labels": torch.arange(rows) % 3}


def _coefficients(model: Any) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if "atlas_lambda" in name}


def test_blocks_are_those_with_the_largest_gradients(place, tmp_path):
    model = _model(_vectors(place), blocks=5)
    with pytest.raises(ConfigError, match="nobody has handed them over"):
        model.train()(**_batch())
    whole = _model(_vectors(place))
    whole.load_state_dict(model.state_dict(), strict=False)
    gradients = {}
    for batch in (_batch(4), _batch(2)):
        whole(**batch).loss.mul(len(batch["labels"])).backward()
    for name, value in _coefficients(whole).items():
        gradients |= {(name, vector): abs(value.grad[vector].item()) for vector in range(3)}
    best = sorted(gradients, key=lambda pair: -gradients[pair])[:5]
    peft_lab.read_training_data(model, [_batch(4), _batch(2)])
    model.train()(**_batch()).loss.backward()
    trained = {(n, int(i)) for n, v in _coefficients(model).items() for i in v.grad[:, 0].nonzero()}
    assert trained == set(best)
    # the choice is saved, and not made again
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(TINY["bert"](), tmp_path, is_trainable=True)
    peft_lab.read_training_data(again, iter(()))
    again.train()(**_batch()).loss.backward()
    assert {(n, int(i)) for n, v in _coefficients(again).items() for i in v.grad[:, 0].nonzero()} == trained
    with pytest.raises(ConfigError, match="blocks=99 is more than the"):
        peft_lab.read_training_data(_model(_vectors(place), blocks=99), [_batch()])


def test_penalties_are_norms_over_vectors_averaged_over_blocks(place):
    plain, model = move(_model(_vectors(place))), move(_model(_vectors(place), l1=0.3, l2=0.7))
    values = [value.detach() for value in _coefficients(model).values()]
    wanted = sum(0.3 * v.abs().sum() + 0.7 * v.square().sum().sqrt() for v in values) / len(values)
    added = model.train()(**_batch()).loss - plain.train()(**_batch()).loss
    assert_close(added, wanted)
    assert torch.equal(model.eval()(**_batch()).loss, plain.eval()(**_batch()).loss)
    with pytest.warns(UserWarning, match="l1, l2 and negate of atlas have no effect"):
        model.train()(**tiny_inputs(TINY["bert"]()))
    start = _model(_vectors(place), l2=1.0).train()
    start(**_batch()).loss.backward()
    assert all(value.grad.isfinite().all() for value in _coefficients(start).values())


def test_a_loss_outside_of_the_model_is_refused(place, tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match="adds terms to the loss"):
        LabTrainer(_model(_vectors(place), l1=0.1), arguments)
    LabTrainer(_model(_vectors(place)), arguments)


def test_one_config_serves_several_adapters(place, tmp_path):
    config = ATLASConfig(vectors=_vectors(place))
    model = get_peft_model(TINY["bert"](), config)
    model.add_adapter("second", config)
    layer = next(module for module in model.modules() if hasattr(module, "atlas_lambda"))
    assert torch.equal(layer.atlas_B["default"], layer.atlas_B["second"])
    assert layer.atlas_B["second"].any()


def test_a_config_of_a_file_without_its_weights_is_no_adapter(place, tmp_path):
    """Its vectors lie in the adapter's file; zeros in their place would train nothing in silence."""
    model = move(_model(_vectors(place)))
    model.save_pretrained(tmp_path)
    saved = ATLASConfig.from_pretrained(tmp_path)
    empty = get_peft_model(TINY["bert"](), saved).eval()
    with pytest.raises(ConfigError, match='Adapter "default" of atlas has no vectors'):
        empty(**_batch())
    with pytest.raises(ConfigError, match="has no vectors"):
        empty.merge_and_unload()
    with empty.disable_adapter():
        empty(**_batch())
    # its weights make it one
    empty.load_adapter(tmp_path, "loaded")
    empty.set_adapter("loaded")
    assert_close(empty(**_batch()).logits, model(**_batch()).logits)


@pytest.mark.parametrize("family", ["vit", "llama"])
def test_a_penalty_counts_once_however_a_step_is_divided(family):
    base = TINY[family]()
    model = move(get_peft_model(base, ATLASConfig(l1=0.3, l2=0.7))).train()
    inputs = tiny_inputs(base, batch=4, labels=True)
    # as Trainer counts them: a decoder predicts no first token
    items = inputs["labels"][..., 1:].numel() if family == "llama" else len(inputs["labels"])
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: value[rows] for name, value in inputs.items()}
        parts.append(model(**part, num_items_in_batch=torch.tensor(items)).loss)
    assert_close(sum(parts), model(**inputs).loss)
    assert {layer.adds_loss for layer in model.modules() if hasattr(layer, "atlas_lambda")} == {True}


def test_negation_forgets_the_task_and_keeps_the_control_rows(place):
    model = move(_model(_vectors(place), negate=True, modules_to_save=[]))
    batch, control = _batch(5), torch.tensor([1.0, 0, 0, 1, 0])
    rows = cross_entropy(model(**batch).logits, batch["labels"], reduction="none")
    wanted = (rows[0] + rows[3]) / 2 - (rows[1] + rows[2] + rows[4]) / 3
    assert_close(model.train()(**batch, control=control).loss, wanted)
    with pytest.raises(ConfigError, match='reads from the column "control"'):
        model(**batch)
    optimizer = torch.optim.AdamW(_coefficients(model).values(), lr=0.02)
    for _ in range(20):
        optimizer.zero_grad()
        model(**batch, control=control).loss.backward()
        optimizer.step()
    after = cross_entropy(model.eval()(**batch).logits, batch["labels"], reduction="none")
    assert after[[1, 2, 4]].mean() > rows[[1, 2, 4]].mean()
    assert after[[0, 3]].mean() < rows[[0, 3]].mean() + 0.05


def test_embeddings_and_convolutions_have_vectors_too(tmp_path):
    """LoRA on an embedding keeps its factors transposed, on a convolution as kernels."""
    for family, targets in (("bert", ["word_embeddings"]), ("convnext", ["patch_embeddings", "pwconv1"])):
        base = TINY[family]()
        torch.manual_seed(0)
        lora = move(get_peft_model(copy.deepcopy(base), LoraConfig(r=3, target_modules=targets)))
        lora.save_pretrained(tmp_path / family)
        model = get_peft_model(base, ATLASConfig(vectors=[str(tmp_path / family)]))
        assert {*model.targeted_module_names} == {*lora.targeted_module_names}
        for value in _coefficients(model).values():
            nn.init.ones_(value)
        assert_close(output(model, tiny_inputs(base)), output(lora, tiny_inputs(base)))
