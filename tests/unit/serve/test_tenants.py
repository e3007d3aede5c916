"""Many adapters on one base: every row answers as its adapter does alone, whatever is added and removed meanwhile."""

from __future__ import annotations

import copy
import itertools
import json
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.backbones import TINY, tiny_inputs
from support.operations import OPS, make
from support.properties import EVERY, adapt, assert_close, config, main_tensor, move, output, text_or_image
from torch import nn

from peft_lab import registry
from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.serve.adapter_file import row_layer_class
from peft_lab.serve.parameter_banks import ParameterBank, RowLayout
from peft_lab.serve.tenants import Tenants, load_many

MIXED = [name for name in EVERY if registry.method(name).can("mixed_batch")]


def _is_served(method: str) -> bool:
    try:
        return bool(row_layer_class(method))
    except ConfigError:
        return False


SERVED = [name for name in MIXED if _is_served(name)]


def save(model: nn.Module, folder: Path, seed: int) -> Path:
    """Move an adapter off its start, its head too, and save it."""
    move(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    model.save_pretrained(folder)
    return folder


def alone(base: nn.Module, folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What peft answers with this adapter only."""
    return output(PeftModel.from_pretrained(copy.deepcopy(base), folder), inputs)


@torch.no_grad()
def check_rows(base: nn.Module, tenants: Tenants, folders: dict[str, Path], names: list[str], tolerance=1e-5) -> None:
    inputs = tiny_inputs(base, batch=len(names))
    if next(base.parameters()).dtype == torch.bfloat16:
        inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = {name: alone(base, folder, inputs) for name, folder in folders.items() if name in names}
    expected["__base__"] = output(base, inputs)
    mixed = main_tensor(tenants(**inputs, adapter_names=names))
    for row, name in enumerate(names):
        assert_close(mixed[row], expected[name][row], tolerance)
        assert name == "__base__" or not torch.allclose(mixed[row], expected["__base__"][row], atol=1e-3)


CASES = [(m, op) for m in SERVED for op, (kind, *_) in OPS.items() if registry.method(m).can(kind)]
# peft's LoRA does not run on dilated convolutions, and rows cannot differ on grouped ones.
CASES = [(m, op) for m, op in CASES if m != "lora" or op not in ("grouped", "depthwise", "conv2d without bias")]


@pytest.mark.parametrize(("method", "op"), CASES)
@torch.no_grad()
def test_every_op_answers_as_alone(method, op, tmp_path):
    base, x = make(op)
    folders = {}
    for seed, name in enumerate(("one", "two")):
        model = get_peft_model(copy.deepcopy(base), config(method, target_modules=["op"]))
        folders[name] = save(model, tmp_path / name, seed)
    tenants = load_many(copy.deepcopy(base), folders)
    names = ["two", "__base__", "one", "two"]
    single = {name: PeftModel.from_pretrained(copy.deepcopy(base), path).eval()(x) for name, path in folders.items()}
    single["__base__"] = base(x)
    mixed = tenants(x, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], single[name][row], atol=2e-5, rtol=2e-5)
    assert not torch.allclose(mixed[0], single["one"][0], atol=1e-4)
    assert torch.equal(tenants.model(x), single["__base__"])


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "swin", "t5", "resnet"])
def test_methods_ranks_and_modules_side_by_side(family, tmp_path):
    base = TINY[family]()
    some = {"rank": 3, "layers_to_transform": [1]} if family != "resnet" else {"rank": 3}
    recipes = {"full": ("svfit", {}), "small": ("svfit", some), "relative": ("svfit", {"parametrization": "relative"})}
    recipes |= {"minor": ("svfit", {"rank": 4, "selection": "minor", "parametrization": "relative"})}
    recipes |= {"mixed": ("svfit", {"rank": 5, "selection": "mixed"})}
    recipes |= {"ssf": ("ssf", {}), "scales": ("ssf", {"shift": False}), "lora": ("lora", {"r": 4, "lora_alpha": 6})}
    recipes |= {"lora2": ("lora", {"r": 2, "use_rslora": True, "alpha_pattern": {".*": 3}})}
    if family == "resnet":
        recipes = {name: recipe for name, recipe in recipes.items() if recipe[0] != "lora"}
    folders = {n: save(adapt(m, base, **f), tmp_path / n, i) for i, (n, (m, f)) in enumerate(recipes.items())}
    tenants = load_many(copy.deepcopy(base), folders)
    assert tenants.names == list(folders)
    check_rows(base, tenants, folders, [*folders, "__base__", "full"])
    check_rows(base, tenants, folders, ["full", "full"])
    check_rows(base, tenants, folders, ["scales", "small", "scales"])


@pytest.mark.parametrize("method", SERVED)
def test_bfloat16_base(method, tmp_path):
    base = TINY["vit"]().bfloat16()
    folders = {n: save(adapt(method, base), tmp_path / n, i) for i, n in enumerate("ab")}
    check_rows(base, load_many(copy.deepcopy(base), folders), folders, ["b", "__base__", "a"], 5e-2)


def test_methods_that_mix_batches_are_served_or_say_so(tmp_path):
    for method in {*MIXED, "ia3", "vera"}:
        base = TINY[text_or_image(method)]()
        folder = save(adapt(method, base), tmp_path / method, 0)
        if method in SERVED:
            assert len(load_many(copy.deepcopy(base), {"a": folder})) == 1
        else:
            with pytest.raises(ConfigError, match=f'Method "{method}" cannot serve many adapters'):
                load_many(copy.deepcopy(base), {"a": folder})
    assert {"lora", "ssf", "svfit"} <= {*SERVED}


@pytest.mark.full
@pytest.mark.parametrize("method", SERVED)
@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(method, family, beams, tmp_path):
    base = TINY[family]()
    folders = {n: save(adapt(method, base), tmp_path / n, i) for i, n in enumerate("ab")}
    inputs = {k: v for k, v in tiny_inputs(base, batch=3).items() if not k.startswith("decoder")}
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    tenants = load_many(copy.deepcopy(base), folders)
    mixed = tenants.generate(**inputs, adapter_names=["b", "__base__", "a"], **settings)
    for row, name in ((0, "b"), (2, "a")):
        model = PeftModel.from_pretrained(copy.deepcopy(base), folders[name]).eval()
        single = model.generate(**inputs, **settings)
        width = min(single.shape[1], mixed.shape[1])
        assert torch.equal(mixed[row, :width], single[row, :width])
    with pytest.raises(ConfigError, match="2 names, but the batch has 3 rows"):
        tenants.generate(**inputs, adapter_names=["b", "a"], **settings)


def test_heads_of_different_sizes(tmp_path):
    """Each adapter is trained with its own number of classes; the base has another, and columns too many are -inf."""
    base = TINY["bert"]()
    folders, expected, inputs = {}, {}, tiny_inputs(base, batch=4)
    for seed, classes in enumerate((2, 5, 3)):
        own = copy.deepcopy(base)
        own.classifier, own.config.num_labels = nn.Linear(16, classes), classes
        folders[f"{classes}"] = save(adapt("svfit", own), tmp_path / f"{classes}", seed)
        expected[f"{classes}"] = alone(own, folders[f"{classes}"], inputs)
    expected["__base__"] = output(base, inputs)
    logits = load_many(copy.deepcopy(base), folders)(**inputs, adapter_names=["5", "2", "__base__", "3"]).logits
    for row, name in enumerate(["5", "2", "__base__", "3"]):
        own = expected[name][row]
        assert_close(logits[row, : len(own)], own)
        assert (logits[row, len(own) :] == -torch.inf).all()


def test_large_heads_and_norms_by_row(tmp_path, monkeypatch):
    base = TINY["vit"]()
    folders = {
        n: save(adapt("svfit", base, modules_to_save=["classifier", "layernorm"]), tmp_path / n, i)
        for i, n in enumerate("ab")
    }
    tenants = load_many(copy.deepcopy(base), folders)
    check_rows(base, tenants, folders, ["b", "a", "__base__", "b"])
    monkeypatch.setattr("peft_lab.serve.request._LARGE_HEAD", 0)
    check_rows(base, tenants, folders, ["b", "a", "__base__", "b"])


def test_errors_name_the_mend(tmp_path):
    base = TINY["bert"]()
    folder = save(adapt("ssf", base), tmp_path / "a", 0)
    tenants = load_many(copy.deepcopy(base), {"alice": folder})
    inputs = tiny_inputs(base, batch=2)
    with pytest.raises(ConfigError, match='already is an adapter "alice"'):
        tenants.add("alice", folder)
    with pytest.raises(ConfigError, match=r'Row 1 asks for adapter "alize".*Did you mean "alice"'):
        tenants(**inputs, adapter_names=["alice", "alize"])
    with pytest.raises(ConfigError, match="3 names, but the batch has 2 rows"):
        tenants(**inputs, adapter_names=["alice"] * 3)
    with pytest.raises(ConfigError, match="one adapter name per row"):
        tenants(**inputs, adapter_names="alice")
    for call in (tenants.remove, tenants.nbytes):
        with pytest.raises(ConfigError, match='no adapter "bob"'):
            call("bob")
    for name in ("__base__", ""):
        with pytest.raises(ConfigError, match="cannot be called"):
            tenants.add(name, folder)
    with pytest.raises(ConfigError, match="no adapter folder"):
        tenants.add("bob", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="already carries ServedModule"):
        load_many(tenants.model, {"alice": folder})
    with pytest.raises(ConfigError, match="already carries SSFLayer"):
        load_many(adapt("ssf", base), {"alice": folder})
    tenants.model.train()
    with pytest.raises(ConfigError, match=r"model\.eval"):
        tenants(**inputs, adapter_names=["alice"] * 2)


@pytest.mark.parametrize("method", SERVED)
def test_a_base_may_be_cast_after_loading_but_not_moved(method, tmp_path):
    base = TINY["bert"]()
    folder, inputs = save(adapt(method, base), tmp_path / "a", 0), tiny_inputs(base)
    tenants = load_many(copy.deepcopy(base), {"a": folder})
    tenants.model.double()
    answers = main_tensor(tenants(**inputs, adapter_names=["a", "a"]))
    assert_close(answers, alone(base, folder, inputs).double())
    tenants.model.to("meta")
    with pytest.raises(ConfigError, match="moved to meta after its adapters were loaded to cpu"):
        tenants(**inputs, adapter_names=["a", "a"])


def test_files_that_do_not_fit_are_refused(tmp_path):
    base = TINY["bert"]()
    for method in ("svfit", "ssf"):
        other = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        folder = save(adapt(method, base), tmp_path / method, 0)
        with pytest.raises(AdapterMismatchError, match="differs from the one"):
            load_many(other, {"a": folder})
        assert not [m for m in other.modules() if type(m).__name__ == "ServedModule"]
        _without_first_entry(folder)
        with pytest.raises(ConfigError, match="cut short"):
            load_many(copy.deepcopy(base), {"a": folder})
    with pytest.raises(ConfigError, match="save_bases"):
        load_many(copy.deepcopy(base), {"a": save(adapt("svfit", base, save_bases=True), tmp_path / "bases", 0)})
    with pytest.raises(ConfigError, match="use_dora"):
        load_many(copy.deepcopy(base), {"a": save(adapt("lora", base, use_dora=True), tmp_path / "dora", 0)})
    lora = save(adapt("lora", TINY["gpt2"]()), tmp_path / "gpt2", 0)
    with pytest.raises(AdapterMismatchError, match="no module"):
        load_many(copy.deepcopy(base), {"a": lora})


def _without_first_entry(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    del state[next(key for key in sorted(state) if "_delta" in key or "_scale" in key)]
    save_file(state, path)


@torch.no_grad()
def test_modules_under_other_names(tmp_path):
    """Adapters of the bare backbone, on the model with a head."""
    base = TINY["bert"]()
    folders = {m: save(adapt(m, base.bert), tmp_path / m, i) for i, m in enumerate(("svfit", "ssf"))}
    tenants, inputs = load_many(copy.deepcopy(base), folders), tiny_inputs(base, batch=3)
    mixed = tenants(**inputs, adapter_names=["ssf", "svfit", "__base__"], output_hidden_states=True).hidden_states[-1]
    for row, name in ((0, "ssf"), (1, "svfit")):
        assert_close(mixed[row], alone(base.bert, folders[name], inputs)[row])
    assert_close(mixed[2], output(base.bert, inputs)[2])


def test_memory_is_that_of_the_files_and_goes_when_adapters_go(tmp_path):
    base = TINY["bert"]()
    folder = save(adapt("ssf", base), tmp_path / "a", 0)
    tenants = load_many(copy.deepcopy(base))
    numbers = sum(value.nbytes for value in load_file(folder / "adapter_model.safetensors").values())
    for index in range(100):
        tenants.add(str(index), folder)
        assert tenants.nbytes() <= numbers * len(tenants) * (1 + 1 / 16)
    assert tenants.nbytes("7") == numbers
    for index in range(100):
        tenants.remove(str(index))
        assert tenants.nbytes() <= numbers * len(tenants) * (1 + 1 / 16)
    assert len(tenants) == tenants.nbytes() == 0
    inputs = tiny_inputs(base)
    assert torch.equal(output(tenants.model, inputs), output(base, inputs))
    assert tenants.unload().state_dict().keys() == base.state_dict().keys()


@torch.no_grad()
def test_a_request_keeps_what_it_began_with(tmp_path):
    base, inputs = TINY["bert"](), tiny_inputs(TINY["bert"]())
    folders = {n: save(adapt("ssf", base), tmp_path / n, i) for i, n in enumerate("ab")}
    tenants = load_many(copy.deepcopy(base), {"a": folders["a"]})
    memory = [weakref.ref(bank.rows) for bank in tenants._snapshot.banks.values()]
    with tenants.rows(["a", "__base__"]):
        tenants.remove("a")
        tenants.add("a", folders["b"])
        assert_close(tenants.model(**inputs).logits[0], alone(base, folders["a"], inputs)[0])
        assert all(rows() is not None for rows in memory)
    assert_close(tenants(**inputs, adapter_names=["a", "a"]).logits, alone(base, folders["b"], inputs))
    assert all(rows() is None for rows in memory)


@pytest.mark.parametrize("method", ["svfit", "lora"])
def test_inputs_that_all_rows_share(method, tmp_path):
    """Positions reach their embedding once for the whole batch."""
    base = TINY["bert"]()
    targets = ["word_embeddings", "position_embeddings"]
    folders = {n: save(adapt(method, base, target_modules=targets), tmp_path / n, i) for i, n in enumerate("ab")}
    check_rows(base, load_many(copy.deepcopy(base), folders), folders, ["b", "__base__", "a"])


def test_copies_of_embeddings_must_be_those_of_the_base(tmp_path):
    base = TINY["bert"]()
    adapt("lora", base).save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("word_embeddings" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert len(load_many(copy.deepcopy(base), {"a": tmp_path})) == 1
    with torch.no_grad():
        base.bert.embeddings.word_embeddings.weight.add_(1)
    with pytest.raises(ConfigError, match="all rows share the base"):
        load_many(base, {"a": tmp_path})


def test_bases_are_shared_and_computed_once(tmp_path, monkeypatch):
    base = TINY["bert"]()
    folders = {str(i): save(adapt("svfit", base), tmp_path / str(i), i) for i in range(3)}
    from peft_lab.tuners.spectral import svd

    calls, original = [], svd.bases
    monkeypatch.setattr(svd, "bases", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    load_many(copy.deepcopy(base), folders)
    assert len(calls) == len(json.loads((folders["0"] / "adapter_config.json").read_text())["fingerprints"])


def test_a_bank_keeps_what_its_holder_sees():
    values = {"layer": {"delta": torch.arange(3.0)}}
    layout = RowLayout.of("svfit", values)
    bank, held = ParameterBank.empty(layout, torch.device("cpu")), []
    for step in range(200):
        name = str(step)
        bank = bank.with_adapter(name, layout.row({"layer": {"delta": torch.full((3,), float(step))}}))
        if step % 3 == 0:
            bank = bank.without_adapter(str(step // 3))
        held.append(bank)
        assert bank.rows.shape[0] <= len(bank.row_of) * (1 + 1 / 16) + 1
    for bank in held:
        assert all(torch.equal(bank.rows[row], torch.full((3,), float(name))) for name, row in bank.row_of.items())


def test_threads_serve_while_adapters_come_and_go(tmp_path):
    """Every answer is that of one version of each row's adapter, whole; a name that is gone is an error."""
    base, inputs = TINY["bert"](), tiny_inputs(TINY["bert"](), batch=8)
    recipes = [("svfit", {}), ("ssf", {}), ("lora", {"r": 2}), ("svfit", {"rank": 3}), ("ssf", {"shift": False})]
    folders = {f"v{i}": save(adapt(*r[:1], base, **r[1]), tmp_path / f"v{i}", i) for i, r in enumerate(recipes)}
    right = {name: alone(base, folder, inputs) for name, folder in folders.items()}
    right["__base__"] = output(base, inputs)
    tenants = load_many(copy.deepcopy(base), {"v0": folders["v0"], "changing": folders["v0"]})
    stop, wrong, served, gone = threading.Event(), [], itertools.count(), itertools.count()

    def serve(seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        while not stop.is_set():
            choices = [*(n for n in right if n == "__base__" or n in tenants), "changing", "changing"]
            names = [choices[i] for i in torch.randint(len(choices), (8,), generator=draw).tolist()]
            try:
                logits = tenants(**inputs, adapter_names=names).logits
            except ConfigError as error:
                if 'asks for adapter "changing", which is not loaded' not in str(error):
                    wrong.append(error)
                next(gone)
                continue
            except Exception as error:  # reported by the main thread, which would not see it otherwise
                wrong.append(error)
                return
            versions = []
            for row, name in enumerate(names):
                near = {n for n in right if (logits[row] - right[n][row]).abs().max() < 1e-5}
                if name == "changing":
                    versions.append(near)
                elif name not in near:
                    wrong.append((name, near))
            if versions and not set.intersection(*versions):
                wrong.append(("changing", versions))
            next(served)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for name in folders.keys() - {"v0"}:  # puts methods on modules that serve already
        tenants.add(name, folders[name])
    end, changes = time.monotonic() + 2, 0
    while (time.monotonic() < end or changes <= 10) and not wrong:
        changes += 1
        tenants.remove("changing")
        tenants.add(f"more{changes}", folders[f"v{changes % 5}"])
        tenants.add("changing", folders[f"v{changes % 5}"])
        if changes % 4 == 0:
            for name in [name for name in tenants.names if name.startswith("more")]:
                tenants.remove(name)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert next(served) > 20
    assert next(gone) > 0
    assert changes > 10
