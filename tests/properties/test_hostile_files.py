"""Broken and hostile adapter folders: each ends in one of our own errors, and the model stays as it was."""

from __future__ import annotations

import copy
import fnmatch
import json
import re
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from support.backbones import TINY
from support.cover import cover, each_place
from support.properties import EVERY, EVERY_OWN, ON_FIXED, config, equal_weights, home, move
from torch import nn

from peft_lab.errors import PeftLabError
from peft_lab.loading.foreign_adapters import write_record
from peft_lab.loading.load_adapter import load_adapter


def _model(method: str = "") -> nn.Module:
    """The base of a method: two linear layers, or a transformer for a method that finds its place in one."""
    if method in ON_FIXED:
        return TINY[home(method)]()
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def _adapted(method: str) -> nn.Module:
    fields = {} if method in ON_FIXED else {"target_modules": ["0", "2"]}
    torch.manual_seed(0)
    return move(get_peft_model(_model(method), config(method, **fields)))


#: The method of each folder made here, which may no longer say so itself.
_METHOD_OF: dict[Path, str] = {}


@pytest.fixture(params=cover(EVERY_OWN, each_place))
def folder(request, tmp_path):
    _adapted(request.param).save_pretrained(tmp_path)
    _METHOD_OF[tmp_path] = request.param
    return tmp_path


def _load(folder):
    base = _model(_METHOD_OF[folder])
    before = copy.deepcopy(base)
    try:
        return PeftModel.from_pretrained(base, folder)
    finally:
        assert equal_weights(_base(base, before), before)


def _base(model: nn.Module, like: nn.Module) -> nn.Module:
    """What a model holds of its base, which an adapter may have been put on."""
    plain = copy.deepcopy(like)
    state = {re.sub(r"base_layer\.|original_module\.", "", k): v for k, v in model.state_dict().items()}
    plain.load_state_dict({k: state[k] for k in plain.state_dict()})
    return plain


def _edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


def _edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def _first(state) -> str:
    """An entry of the adapter itself, not of a head."""
    return next(key for key in sorted(state) if re.search(r"\.\d+\.", key) or not key.endswith((".weight", ".bias")))


def test_untouched_folder_loads(folder):
    assert _load(folder).peft_config["default"].inference_mode


@pytest.mark.parametrize(
    "changes",
    [
        {"trust_remote_code": True},
        {"modules_to_svae": ["x"]},
        {"target_modules": 7},
        {"target_modules": [1, 2]},
        {"exclude_modules": {"a": 1}},
        {"layers_to_transform": "all"},
        {"modules_to_save": "0"},
        {"fingerprints": [1]},
        {"fingerprints": {"0": {"shape": [1], "dtype": "float32", "sha256": "0", "probe": []}}},
        {"fingerprints": {"0": {}}},
        {"fingerprints": {"__class__": {"shape": []}}},
    ],
)
def test_bad_config_is_refused(folder, changes):
    _edit_config(folder, **changes)
    with pytest.raises(PeftLabError):
        _load(folder)


def test_missing_entry_is_refused(folder):
    _edit_weights(folder, lambda state: state.pop(_first(state)))
    with pytest.raises(PeftLabError, match="lacks"):
        _load(folder)


def test_unknown_entry_is_refused(folder):
    def change(state):
        key = _first(state)
        state[".7.".join(key.rsplit(".", 1))] = state[key].clone()

    _edit_weights(folder, change)
    with pytest.raises(PeftLabError, match="unknown entr"):
        _load(folder)


def test_base_weight_in_the_file_is_refused(folder):
    _edit_weights(folder, lambda state: state.update({"base_model.model.0.base_layer.weight": torch.zeros(8, 6)}))
    with pytest.raises(PeftLabError, match="unknown entr"):
        _load(folder)


def test_wrong_shape_is_refused(folder):
    def change(state):
        key = _first(state)
        state[key] = torch.zeros(state[key].shape[0] + 1)

    _edit_weights(folder, change)
    with pytest.raises(PeftLabError, match="shape"):
        _load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(folder, value):
    def change(state):
        # positions in a weight are whole numbers
        numbers = {key: entry for key, entry in state.items() if entry.is_floating_point()}
        numbers[_first(numbers)].fill_(value)

    _edit_weights(folder, change)
    with pytest.raises(PeftLabError, match="finite"):
        _load(folder)


@pytest.mark.parametrize("keep", [0, 4, 60])
def test_truncated_file_is_an_error(folder, keep):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Exception, match=r"(?i)header|deserializ|truncat|buffer|safetensors|invalid|small"):
        _load(folder)


def test_adapter_name_inside_the_prefix_is_refused(folder):
    prefix = json.loads((folder / "adapter_config.json").read_text())["peft_type"].lower()
    base = _model(prefix)
    with pytest.raises(PeftLabError, match="cannot be used"):
        PeftModel.from_pretrained(base, folder, adapter_name=prefix[:2])
    assert base.state_dict().keys() == _model(prefix).state_dict().keys()


# Through peft_lab's own loader, for every method ----------------------------------------------------------------------


@pytest.fixture(params=cover(EVERY, each_place))
def any_folder(request, tmp_path):
    model = _adapted(request.param)
    model.save_pretrained(tmp_path)
    write_record(model, tmp_path)
    _METHOD_OF[tmp_path] = request.param
    return tmp_path


def assert_refused(folder, match):
    method = _METHOD_OF[folder]
    base = _model(method)
    with pytest.raises(PeftLabError, match=match):
        load_adapter(base, folder)
    assert equal_weights(_base(base, base), _model(method))


def test_pickles_are_never_read(any_folder):
    (any_folder / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, any_folder / "adapter_model.bin")
    assert_refused(any_folder, "safetensors")


@pytest.mark.parametrize("method", cover(EVERY_OWN, each_place))
def test_peft_does_not_read_pickles_of_our_methods(method, tmp_path):
    _adapted(method).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    with pytest.raises(PeftLabError, match="safetensors"):
        PeftModel.from_pretrained(_model(method), tmp_path)


def test_link_out_of_the_folder_is_refused(any_folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "file"
    path = any_folder / "adapter_model.safetensors"
    path.rename(outside)
    path.symlink_to(outside)
    assert_refused(any_folder, "link that leads out")


def test_links_of_the_cache_of_the_hub_are_followed(any_folder):
    home = any_folder / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(p for p in any_folder.iterdir() if p.is_file()):
        path.rename(home / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert load_adapter(_model(_METHOD_OF[any_folder]), snapshot).training is False


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a{1,60000}){2}", "("])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_regex_of_a_file_is_not_run(any_folder, field, pattern):
    """The modules are those of the weights, so the adapter loads as it was."""
    expected = load_adapter(_model(_METHOD_OF[any_folder]), any_folder)
    _edit_config(any_folder, **{field: pattern})
    model = load_adapter(_model(_METHOD_OF[any_folder]), any_folder)
    read = model.peft_config["default"]
    assert pattern not in (read.target_modules, read.exclude_modules)
    assert equal_weights(model, expected)


@pytest.mark.parametrize("size", [10**6, 10**9, 2**62])
def test_absurd_sizes_allocate_nothing(any_folder, size):
    values = json.loads((any_folder / "adapter_config.json").read_text())
    sizes = ("r", "rank", "num_prompts", "num_virtual_tokens")
    name = next((name for name in sizes if name in values), None)
    if name is None:
        pytest.skip("the method has no size to choose")
    field = PEFT_TYPE_TO_CONFIG_MAPPING[values["peft_type"]].__dataclass_fields__[name]
    _edit_config(any_folder, **{name: size}, **field.metadata.get("with", {}))
    tracemalloc.start()
    assert_refused(any_folder, "larger than anything|does not fit")
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()


def test_absurd_header_is_refused(any_folder):
    path = any_folder / "adapter_model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    assert_refused(any_folder, "no safetensors file")


def test_file_much_larger_than_the_base_is_refused(any_folder):
    with (any_folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(2**30)  # takes no space on the disk
    assert_refused(any_folder, "more than the")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"peft_type": "X", "peft_type": "LORA"}', "given twice"),
        ("{}", "peft_type"),
        ('{"peft_type": ["LORA"]}', "peft_type"),
        ('{"peft_type": "LORRA"}', 'Did you mean "LORA"'),
    ],
)
def test_config_without_a_method_is_refused(tmp_path, text, match):
    _adapted("svfit").save_pretrained(tmp_path)
    _METHOD_OF[tmp_path] = "svfit"
    (tmp_path / "adapter_config.json").write_text(text)
    assert_refused(tmp_path, match)


@pytest.mark.parametrize(
    "changes",
    [
        *({"trust_remote_code": True}, {"modules_to_svae": ["x"]}, {"target_modules": 7}, {"modules_to_save": "0"}),
        *({"revision": 7}, {"auto_mapping": []}, {"auto_mapping": {"parent_library": ["os"]}}, {"task_type": "X"}),
        *({"inference_mode": "yes"}, {"base_model_name_or_path": "x" * 10**6}, {"modules_to_save": ["(a+)+$"]}),
        *({"target_modules": ["0"] * 10**5}, {"megatron_config": {"a": 1}}, {"runtime_config": {"a": 1}}),
    ],
)
def test_config_is_a_closed_schema_for_every_method(any_folder, changes):
    _edit_config(any_folder, **changes)
    assert_refused(any_folder, ".")


def test_nothing_is_imported_by_name(any_folder):
    mapping = {"base_model_class": "Flying", "parent_library": "antigravity"}
    _edit_config(any_folder, auto_mapping=mapping)
    load_adapter(_model(_METHOD_OF[any_folder]), any_folder)
    with pytest.raises((ValueError, PeftLabError)):
        AutoPeftModel.from_pretrained(any_folder)
    assert "antigravity" not in sys.modules
    if json.loads((any_folder / "adapter_config.json").read_text())["peft_type"] == "LORA":
        _edit_config(any_folder, megatron_core="antigravity")
        assert_refused(any_folder, "module to import")


def test_revision_is_pinned(monkeypatch, any_folder):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(any_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load_adapter(_model(_METHOD_OF[any_folder]), "someone/adapter", revision="abc")
    assert (asked["name"], asked["revision"]) == ("someone/adapter", "abc")
    assert not any(fnmatch.fnmatch("x.bin", p) or fnmatch.fnmatch("x.py", p) for p in asked["allow_patterns"])
