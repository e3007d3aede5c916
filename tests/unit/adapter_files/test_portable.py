"""Adapters on models with other module names: other versions, with and without a head, fused and separate projections.

The older naming is simulated by building the same weights under it; outputs must be equal, not merely load.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from support.backbones import MODELS, bare, tiny, tiny_inputs
from support.cover import cover, each_place
from support.properties import (
    DRAWS,
    EVERY,
    EVERY_OWN,
    FITTED,
    HEADS,
    IMAGE_LOGITS,
    IMAGES,
    METHODS,
    ON_BLOCKS,
    ON_FIXED,
    TEXTS,
    assert_close,
    config,
    move,
    output,
    text_or_image,
)
from torch import Tensor, nn

from peft_lab import registry
from peft_lab.adapter_files.base_fingerprint import read_record
from peft_lab.backbones.family import Family
from peft_lab.backbones.family_table import FAMILIES
from peft_lab.backbones.module_roles import head_modules, module_locations, modules_by_role, target_regex
from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.loading.adapter_folder import AdapterFolder
from peft_lab.loading.foreign_adapters import adapt_folder, write_record
from peft_lab.loading.load_adapter import load_adapter

#: Heads that stand in place of the base's, and adapters behind a last norm, belong to no module that is renamed, cut
#: or joined.
ALL = [*(method for method in EVERY if method not in (*HEADS, *TEXTS)), "ia3"]
ON_PROJECTIONS = [name for name in ALL if name not in ON_BLOCKS]


def _adapted(method: str, model: nn.Module, **fields: Any) -> Any:
    torch.manual_seed(0)
    if method in ON_FIXED:  # whatever others adapt
        fields.pop("target_modules", None)
    if method == "ia3":
        wanted: Any = IA3Config(**fields, feedforward_modules=[], modules_to_save=head_modules(model) or None)
    else:
        wanted = config(method, model, **fields)
    return move(get_peft_model(copy.deepcopy(model), wanted)).eval()


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    write_record(model, folder)
    return folder


def _in_old_names(folder: Path, old: Callable[[str], str]) -> None:
    """Rewrite a saved adapter as a version with other module names would have saved it."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({_old_key(k, old): v for k, v in load_file(path).items()}, path)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    if values.get("fingerprints"):
        values["fingerprints"] = {old(k): v for k, v in values["fingerprints"].items()}
    targets = values["target_modules"]
    if values["peft_type"].lower() not in ON_BLOCKS:
        values["target_modules"] = ["query", "value"]
    elif isinstance(targets, list):  # a regex has the names of both versions
        values["target_modules"] = [old(name) for name in targets]
    values["feedforward_modules"] = [] if "feedforward_modules" in values else None
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    path = folder / "base_fingerprint.json"
    if path.is_file():
        modules = json.loads(path.read_text())["modules"]
        path.write_text(json.dumps({"modules": {old(k): v for k, v in modules.items()}}))


def _old_key(key: str, old: Callable[[str], str]) -> str:
    return "base_model.model." + old(key.removeprefix("base_model.model."))


# Names of transformers 4 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("method", cover(ALL, each_place))
def test_adapter_of_an_old_vit_loads(method: str, recorded: bool, tmp_path: Path) -> None:
    base = tiny("vit")
    renames = FAMILIES["vit"].renames
    targets = modules_by_role(base, "attn.q") + modules_by_role(base, "attn.v")
    model = _adapted(method, base, target_modules=targets)
    folder = _save(model, tmp_path)
    _in_old_names(folder, renames.old)
    renamed = "vit.encoder.layer.0" if method in ON_BLOCKS else "vit.encoder.layer.0.attention.attention.query"
    assert renamed in _module_names(folder)
    if not recorded:
        (folder / "base_fingerprint.json").unlink(missing_ok=True)
        values = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(
            json.dumps({k: v for k, v in values.items() if k != "fingerprints"})
        )
    inputs, wanted = tiny_inputs(base), output(model, tiny_inputs(base))
    assert not torch.equal(output(base, inputs), wanted)
    assert torch.equal(output(load_adapter(copy.deepcopy(base), folder), inputs), wanted)
    if method in EVERY_OWN:
        assert torch.equal(output(PeftModel.from_pretrained(copy.deepcopy(base), folder), inputs), wanted)
    else:
        renamed = adapt_folder(AdapterFolder(folder), base, tmp_path / "here").path
        assert torch.equal(output(PeftModel.from_pretrained(copy.deepcopy(base), renamed), inputs), wanted)


def _module_names(folder: Path) -> str:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return " ".join(file.keys())


def test_names_that_no_table_knows_are_found_by_role_and_block(tmp_path: Path) -> None:
    for method in ALL:
        base = tiny(text_or_image(method))
        model = _adapted(method, base, target_modules=target_regex(base, ["attn.q", "attn.v"]))
        folder = _save(model, tmp_path / method)
        _in_old_names(
            folder,
            lambda name: re.sub(r"bert\.encoder\.layer|vit\.layers", "deepnet.stack", name).replace("self", "mine"),
        )
        inputs = tiny_inputs(base)
        assert torch.equal(output(load_adapter(copy.deepcopy(base), folder), inputs), output(model, inputs))


@pytest.mark.parametrize("name", ["vit", "bert", "t5", "clip", "swin", "resnet", "llama"])
def test_places_name_each_module_once(name: str) -> None:
    found = module_locations(tiny(name))
    assert len({tuple(place.values()) for place in found.values()}) == len(found)
    for role in ("attn.q", "mlp.up", "norm", "conv"):
        assert set(modules_by_role(tiny(name), role)) <= set(found)


# With a head and without ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name"),
    cover(
        (
            (m, n)
            for m in ALL
            if m not in IMAGE_LOGITS
            for n in ("bert", "vit")
            if m not in (*IMAGES, *DRAWS) or n == "vit"
        ),
        each_place,
    ),
)
def test_bare_to_head_and_back(method: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full, backbone = MODELS[name](), bare(MODELS[name]())
    inputs = tiny_inputs(full)
    for source, target in ((backbone, full), (full, backbone)):
        wanted = target_regex(source, ["attn.q", "mlp.up"])
        model = _adapted(method, source, target_modules=wanted)
        folder = _save(model, tmp_path / type(source).__name__)
        again = load_adapter(copy.deepcopy(target), folder)
        assert torch.equal(_hidden(again, inputs), _hidden(model, inputs))
        assert not torch.equal(_hidden(target, inputs), _hidden(model, inputs))
        if method in EVERY_OWN:
            again = PeftModel.from_pretrained(copy.deepcopy(target), folder)
            assert torch.equal(_hidden(again, inputs), _hidden(model, inputs))
    if method in EVERY_OWN:
        assert "is left out" in caplog.text
    else:
        assert "has no place" in caplog.text


@torch.no_grad()
def _hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    model = model.eval().get_base_model() if isinstance(model, PeftModel) else model
    return getattr(model, model.base_model_prefix, model)(**inputs).last_hidden_state


@pytest.mark.parametrize("method", cover(METHODS, each_place))
def test_adapter_with_a_task_type_loads_on_the_bare_model(method: str, tmp_path: Path) -> None:
    full = MODELS["bert"]()
    model = _adapted(method, full, target_modules=target_regex(full, ["attn.q"]), task_type="SEQ_CLS")
    folder = _save(model, tmp_path)
    inputs = tiny_inputs(full)
    assert torch.equal(output(load_adapter(MODELS["bert"](), folder), inputs), output(model, inputs))
    again = load_adapter(bare(MODELS["bert"]()), folder)
    assert torch.equal(_hidden(again, inputs), _hidden(model, inputs))


# Fused projections ----------------------------------------------------------------------------------------------------


class _Attention(nn.Module):
    """Self-attention with query, key and value in one layer or in three."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.names = ("qkv",) if fused else ("q", "k", "v")
        for name in self.names:
            setattr(self, name, nn.Linear(8, 24 if fused else 8))
        self.o = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.cat([getattr(self, name)(x) for name in self.names], -1).chunk(3, -1)
        return x + self.o(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


class _Config(SimpleNamespace):
    def to_dict(self) -> dict[str, Any]:
        return vars(self)


class _Net(nn.Module):
    base_model_prefix = "net"

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.config = _Config(model_type=kind)
        self.blocks = nn.ModuleList(_Attention(kind == "fusednet") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def nets(monkeypatch: pytest.MonkeyPatch) -> dict[str, nn.Module]:
    """The same weights in both forms, and a third with other ones."""
    roles = {"attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.qkv": "qkv", "attn.out": "o"}
    paths = {role: (f"{{block}}.{name}",) for role, name in roles.items()}
    apart = {role: path for role, path in paths.items() if role != "attn.qkv"}
    fused = {role: paths[role] for role in ("attn.qkv", "attn.out")}
    for kind, table in (("apartnet", apart), ("fusednet", fused)):
        monkeypatch.setitem(FAMILIES, kind, Family(name=kind, blocks=("blocks.*",), roles=table))
    torch.manual_seed(3)
    first, second, other = _Net("apartnet").eval(), _Net("fusednet").eval(), _Net("fusednet").eval()
    state = dict(first.state_dict())
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{i}.{name}.{kind}") for name in "qkv"]
            state[f"blocks.{i}.qkv.{kind}"] = torch.cat(parts)
    second.load_state_dict(state)
    return {"apart": first, "fused": second, "other": other}


def _fields(method: str, model: nn.Module, roles: list[str]) -> dict[str, Any]:
    return {"target_modules": sorted({n for r in roles for n in modules_by_role(model, r)})}


@pytest.mark.parametrize("roles", [["attn.q", "attn.k", "attn.v"], ["attn.q", "attn.v"], ["attn.k", "attn.out"]])
@pytest.mark.parametrize("method", ON_PROJECTIONS)
def test_separate_to_fused(method: str, roles: list[str], nets: dict[str, nn.Module], tmp_path: Path) -> None:
    x = torch.randn(2, 5, 8)
    model = _adapted(method, nets["apart"], **_fields(method, nets["apart"], roles))
    folder = _save(model, tmp_path)
    _check_moved(method, model, copy.deepcopy(nets["fused"]), folder, x)
    with pytest.raises(AdapterMismatchError, match="rows"):
        load_adapter(copy.deepcopy(nets["other"]), folder)


@pytest.mark.parametrize("method", ON_PROJECTIONS)
def test_fused_to_separate(method: str, nets: dict[str, nn.Module], tmp_path: Path) -> None:
    model = _adapted(method, nets["fused"], **_fields(method, nets["fused"], ["attn.qkv", "attn.out"]))
    _check_moved(method, model, copy.deepcopy(nets["apart"]), _save(model, tmp_path), torch.randn(2, 5, 8))


def _check_moved(method: str, model: Any, target: nn.Module, folder: Path, x: Tensor) -> None:
    """The adapter gives the same outputs in the other form, or says why it cannot be moved."""
    if not _can_move(method):
        with pytest.raises(AdapterMismatchError, match="as a whole"):
            load_adapter(target, folder)
        return
    with torch.no_grad():
        wanted = model(x)
        assert_close(load_adapter(target, folder)(x), wanted)


def _can_move(method: str) -> bool:
    if method in ("lora", "ia3"):
        return True
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    layer = PEFT_TYPE_TO_TUNER_MAPPING[method.upper()].tuner_layer_cls
    return set(layer.adapter_layer_names) <= set(layer.per_channel)


def test_svfit_cannot_move_and_ssf_can() -> None:
    assert {name: _can_move(name) for name in ("svfit", "ssf")} == {"svfit": False, "ssf": True}


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_of_several_ranks_and_scales(rslora: bool, nets: dict[str, nn.Module], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rank_pattern": {"q": 2, "1.v": 3}, "alpha_pattern": {"v": 5, "o": 7}, "r": 4}
    wanted = LoraConfig(target_modules=["q", "v", "o"], use_rslora=rslora, lora_alpha=6, **settings)
    model = move(get_peft_model(copy.deepcopy(nets["apart"]), wanted)).eval()
    _check_moved("lora", model, copy.deepcopy(nets["fused"]), _save(model, tmp_path / "a"), torch.randn(2, 5, 8))
    wanted = LoraConfig(
        target_modules=["qkv", "o"], use_rslora=rslora, rank_pattern={"1.qkv": 3}, alpha_pattern={"o": 3}
    )
    model = move(get_peft_model(copy.deepcopy(nets["fused"]), wanted)).eval()
    _check_moved("lora", model, copy.deepcopy(nets["apart"]), _save(model, tmp_path / "b"), torch.randn(2, 5, 8))


def test_dora_cannot_be_joined(nets: dict[str, nn.Module], tmp_path: Path) -> None:
    wanted = LoraConfig(target_modules=["q", "v"], use_dora=True)
    folder = _save(get_peft_model(copy.deepcopy(nets["apart"]), wanted), tmp_path)
    with pytest.raises(AdapterMismatchError, match="as a whole"):
        load_adapter(copy.deepcopy(nets["fused"]), folder)


def test_without_a_record_nothing_is_guessed(nets: dict[str, nn.Module], tmp_path: Path) -> None:
    model = _adapted("lora", nets["apart"], target_modules=["q", "v"])
    model.save_pretrained(tmp_path)
    with pytest.raises((AdapterMismatchError, ConfigError)):
        load_adapter(copy.deepcopy(nets["fused"]), tmp_path)


# Another base ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", cover(ALL, each_place))
def test_other_base_is_refused_unless_allowed(method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny(text_or_image(method))
    folder = _save(_adapted(method, base, target_modules=target_regex(base, ["attn.q"])), tmp_path)
    other, adapted = copy.deepcopy(base), modules_by_role(base, "embed.patch" if method in DRAWS else "attn.q")[0]
    with torch.no_grad():
        other.get_submodule(adapted).weight.mul_(1.5)
    with pytest.raises(AdapterMismatchError, match="allow_other_base"):
        load_adapter(copy.deepcopy(other), folder)
    with caplog.at_level(logging.WARNING):
        model = load_adapter(copy.deepcopy(other), folder, allow_other_base=True)
    recorded = json.loads((folder / "adapter_config.json").read_text()).get("fingerprints") or {}
    assert f"in 1 of {len(recorded) or 2} adapted modules" in caplog.text
    assert output(model, tiny_inputs(base)).isfinite().all()
    with pytest.raises(AdapterMismatchError):  # the word of one call does not hold for the next
        load_adapter(copy.deepcopy(other), folder)
    wider = MODELS[text_or_image(method)]()
    wider.get_submodule(adapted).weight = nn.Parameter(torch.randn(24, *wider.get_submodule(adapted).weight.shape[1:]))
    with pytest.raises(AdapterMismatchError, match="shape"):
        load_adapter(wider, folder, allow_other_base=True)


def test_bases_of_svfit_are_rebuilt_from_the_other_weights(tmp_path: Path) -> None:
    base = tiny("bert")
    query = modules_by_role(base, "attn.q")[0]
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.get_submodule(query).weight.mul_(2)
    for save_bases in (False, True):
        folder = _save(
            _adapted("svfit", base, target_modules=[query], save_bases=save_bases), tmp_path / str(save_bases)
        )
        layer = load_adapter(copy.deepcopy(other), folder, allow_other_base=True).get_base_model().get_submodule(query)
        kept = torch.linalg.svdvals(base.get_submodule(query).weight)
        assert_close(layer.bases("default").s, kept if save_bases else 2 * kept)


@pytest.mark.parametrize("command", ["evaluate", "predict", "merge"])
def test_command_line_passes_the_word_on(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from peft_lab.cli.app import app

    asked: list[Any] = []
    functions = {"evaluate": "training.evaluate.evaluate", "predict": "training.evaluate.predict_rows"}
    called, found = functions.get(command, "export.merge.merge"), [{}] if command == "predict" else {}
    monkeypatch.setattr(
        f"peft_lab.{called}", lambda *args, **options: asked.append(options["allow_other_base"]) or found
    )
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path / "a")
    rest = {"evaluate": [], "predict": ["text", "--task", "snips"], "merge": [str(tmp_path / "b")]}[command]
    for flag, wanted in (([], False), (["--allow_other_base"], True)):
        result = CliRunner().invoke(app, [command, str(tmp_path / "a"), *rest, *flag], catch_exceptions=False)
        assert (result.exit_code, asked.pop()) == (0, wanted)


# One call for every method --------------------------------------------------------------------------------------------


@pytest.mark.full
def test_second_adapter_and_training_on(tmp_path: Path) -> None:
    for method in EVERY:
        base = tiny(text_or_image(method))
        folder = _save(_adapted(method, base, target_modules=target_regex(base, ["attn.q"])), tmp_path / method)
        model = load_adapter(copy.deepcopy(base), folder, "first", is_trainable=True)
        assert any(p.requires_grad for p in model.parameters()) == (method not in FITTED)
        model = load_adapter(model, folder, "second")
        model.set_adapter("second")
        inputs = tiny_inputs(base)
        second = output(model, inputs)
        model.set_adapter("first")
        assert torch.equal(output(model, inputs), second)


def test_untouched_folders_are_not_rewritten(tmp_path: Path) -> None:
    base = tiny("bert")
    folder = _save(_adapted("lora", base), tmp_path / "a")
    assert adapt_folder(AdapterFolder(folder), base, tmp_path / "b").path == folder
    assert not (tmp_path / "b").exists()


def test_every_saved_adapter_says_where_its_modules_stand(tmp_path: Path) -> None:
    for method in EVERY:
        base = tiny(text_or_image(method))
        folder = _save(_adapted(method, base), tmp_path / method)
        values = json.loads((folder / "adapter_config.json").read_text())
        own = registry.method(method).module.startswith("peft_lab.")
        recorded = values["fingerprints"] if own else read_record(folder)
        assert recorded
        assert all(re.fullmatch(r"[a-z.]+", e["role"]) and e["nth"] >= 0 for e in recorded.values())


def test_ia3_feedforward_modules_are_renamed(tmp_path: Path) -> None:
    base = tiny("vit")
    wanted = IA3Config(target_modules=["v_proj", "fc2"], feedforward_modules=["fc2"])
    model = move(get_peft_model(copy.deepcopy(base), wanted)).eval()
    folder = _save(model, tmp_path / "new")
    _in_old_names(folder, FAMILIES["vit"].renames.old)
    path = folder / "adapter_config.json"
    names = {"target_modules": ["value", "output.dense"], "feedforward_modules": ["output.dense"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    again = load_adapter(copy.deepcopy(base), folder)
    assert torch.equal(output(again, tiny_inputs(base)), output(model, tiny_inputs(base)))
