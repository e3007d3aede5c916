"""The registry: what is found, what it costs to look, what a name that is not there answers."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_lab import registry
from peft_lab.errors import AdapterMismatchError, ConfigError, check_keys, did_you_mean
from peft_lab.tuners.registration import config_class, make_config
from peft_lab.utils import peft_source, source_reader

OWN = [n for n, m in registry.list_methods().items() if m.module.startswith("peft_lab.") and m.config]


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    import os

    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **env})


def test_every_tuner_of_peft_is_reachable_by_name():
    known = registry.list_methods()
    for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if not config.__module__.startswith(("peft.", "peft_lab.")):
            continue  # registered by a test of this process
        name = str(peft_type.value).lower()
        assert name in known
        assert config_class(name) is config


@pytest.mark.parametrize("name", sorted(n for n, m in registry.list_methods().items() if m.config))
def test_fields_read_from_source_equal_those_of_the_class(name):
    shown, real = registry.config_fields(name), config_class(name).__dataclass_fields__
    assert set(shown) <= set(real)
    init = {n for n, f in real.items() if f.init and "ClassVar" not in str(f.type)}
    assert init - set(shown) <= registry._MACHINE_FIELDS


@pytest.mark.parametrize("name", OWN)
def test_own_methods_are_native_peft_types(name):
    member = getattr(peft.PeftType, name.upper())
    assert isinstance(member, peft.PeftType)
    assert peft.PeftType(name.upper()) is member
    assert member in list(peft.PeftType)
    assert config_class(name)().peft_type is member


def test_defaults_that_are_made_for_each_instance_are_read_from_source_too():
    assert registry.config_fields("p2p")["elevation"].default == config_class("p2p")().elevation


@pytest.mark.parametrize("name", OWN)
def test_every_field_has_a_help_text(name):
    for key, entry in registry.config_fields(name).items():
        assert entry.help or key == "task_type", f"{name}.{key}"


def test_importing_and_listing_do_not_import_torch():
    result = python("""
        import sys, peft_lab
        names = peft_lab.list_methods()
        assert "svfit" in names and "ia3" in names
        peft_lab.registry.check_method_args("svfit", {"rank": 4})
        assert not {"torch", "peft", "transformers"} & set(sys.modules), sorted(sys.modules)
    """)
    assert result.returncode == 0, result.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    "order",
    ["import peft, peft_lab", "import peft_lab, peft", "from peft import PeftModel; import peft_lab",
     "from peft_lab.adapters import SVFitConfig; import peft", "import peft_lab.tuners.layer",
     "import peft_lab.tuners.sequence.stored_prompts"],
)  # fmt: skip
def test_methods_are_registered_whatever_is_imported_first(order):
    result = python(f"""
        {order}
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
        assert "SVFIT" in known and "SSF" in known, list(known)
    """)
    assert result.returncode == 0, result.stderr


def test_without_peft_lab_an_adapter_names_what_is_missing(tmp_path):
    import torch

    from peft_lab.adapters import SVFitConfig

    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), SVFitConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    assert '"requires": "peft-lab"' in (tmp_path / "adapter_config.json").read_text()


def test_unknown_method_answers_with_the_nearest():
    with pytest.raises(ConfigError, match='Did you mean "svfit"'):
        registry.method("svfitt")


def test_a_preset_in_place_of_a_method_answers_with_its_method():
    presets = [(preset, name) for name, info in registry.list_methods().items() for preset in info.presets]
    assert presets
    for preset, name in presets:
        with pytest.raises(ConfigError, match=f'"{preset}".* preset of "{name}".* preset={preset}'):
            registry.method(preset)


def test_unknown_argument_answers_with_the_nearest():
    with pytest.raises(ConfigError, match='Did you mean "rank"'):
        registry.check_method_args("svfit", {"rnak": 4})
    with pytest.raises(ConfigError, match='Did you mean "lora_alpha"'):
        registry.check_method_args("lora", {"lora_alfa": 4})


@pytest.mark.parametrize(
    ("name", "args", "field", "value"),
    [
        ("svfit", {"rank": "full"}, "rank", "full"),
        ("svfit", {"rank": "8"}, "rank", 8),
        ("svfit", {"save_bases": "true"}, "save_bases", True),
        ("lora", {"r": "4", "target_modules": "[q_proj, v_proj]"}, "r", 4),
        ("ssf", {"init_std": "0.1"}, "init_std", 0.1),
        ("ssf", {"init_std": "1e-3"}, "init_std", 1e-3),
    ],
)
def test_text_values_become_typed_fields(name, args, field, value):
    assert getattr(make_config(name, args), field) == value


@pytest.mark.parametrize(
    ("name", "args"), [("svfit", {"rank": "-3"}), ("svfit", {"rank": "[1]"}), ("ssf", {"shift": "3"})]
)
def test_refused_values_are_named(name, args):
    with pytest.raises(ConfigError, match=next(iter(args))):
        make_config(name, args)


def _plugin(folder, body: str) -> None:
    (folder / "my_plugin.py").write_text(body)
    info = folder / "my_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[peft_lab.methods]\nmine = my_plugin:METHOD\n")


@pytest.mark.full
def test_broken_plugin_is_left_out_with_a_warning(tmp_path):
    _plugin(
        tmp_path,
        'METHOD = MethodInfo(name="mine", title="M", paper="", place="weight", config="C")\nraise OSError(7)\n',
    )
    result = python("import peft_lab, peft; assert 'mine' in peft_lab.list_methods()", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "cannot be loaded" in result.stderr


def test_plugin_may_not_take_a_known_name(tmp_path):
    _plugin(tmp_path, 'METHOD = MethodInfo(name="ssf", title="M", paper="", place="weight", config="C")\n')
    result = python("import peft_lab; peft_lab.list_methods()", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "defined by both" in result.stderr


@pytest.mark.parametrize("name", ["Bad", "bad_", "_bad", "b d", ""])
def test_bad_method_names_are_refused(name):
    with pytest.raises(ConfigError, match="must be lower case"):
        registry.MethodInfo(name=name, title="", paper="", place="weight")


def test_undeclarable_capability_is_refused():
    with pytest.raises(ConfigError, match='Did you mean "merge"'):
        registry.MethodInfo(name="fine", title="", paper="", place="weight", capabilities=("merg",))


def test_source_reads_what_python_would():
    import dataclasses

    from peft import LoraConfig

    path = registry.method("lora").path
    shown = source_reader.dataclass_fields(path, "LoraConfig", peft_source.config_files())
    real = {f.name: f for f in dataclasses.fields(LoraConfig)}
    assert set(shown) == set(real)
    assert shown["r"].default == real["r"].default
    assert shown["r"].help == real["r"].metadata["help"]


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """An empty cache folder, and tuners that are read anew at every call."""
    monkeypatch.setenv("PEFT_LAB_CACHE", str(tmp_path))
    peft_source.tuners.cache_clear()
    yield tmp_path
    peft_source.tuners.cache_clear()


def test_tuners_of_peft_are_read_from_source_once(fresh_cache, monkeypatch):
    found = peft_source.tuners()
    assert {tuner.name for tuner in found.values()} >= {"lora", "ia3", "prefix_tuning"}
    monkeypatch.setattr(peft_source, "_tuners_of", lambda file: pytest.fail("the cache is there"))
    peft_source.tuners.cache_clear()
    assert peft_source.tuners() == found


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}', '{"key": KEY, "tuners": [["lora"]]}', "\x00"])
def test_a_broken_cache_is_written_anew(fresh_cache, content):
    found = peft_source.tuners()
    (file,) = fresh_cache.iterdir()
    whole = json.loads(file.read_text())
    file.write_text(content.replace("KEY", json.dumps(whole["key"])))
    peft_source.tuners.cache_clear()
    assert peft_source.tuners() == found
    assert json.loads(file.read_text()) == whole


def test_another_peft_is_read_anew(fresh_cache, monkeypatch):
    found = peft_source.tuners()
    (file,) = fresh_cache.iterdir()
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({"key": ["0.1", *whole["key"][1:]], "tuners": [["old", "old", "OldConfig"]]}))
    peft_source.tuners.cache_clear()
    assert peft_source.tuners() == found


def test_a_cache_that_cannot_be_written_costs_nothing_else(fresh_cache, monkeypatch):
    found = peft_source.tuners()
    (fresh_cache / "file").write_text("")
    monkeypatch.setenv("PEFT_LAB_CACHE", str(fresh_cache / "file" / "below"))
    peft_source.tuners.cache_clear()
    assert peft_source.tuners() == found


def test_error_helpers():
    assert did_you_mean("lroa", ["lora", "ssf"]) == ' Did you mean "lora"?'
    assert did_you_mean("xyz", ["lora", "ssf"]) == ""
    with pytest.raises(ConfigError, match='Unknown key "b" for it'):
        check_keys(["a", "b"], ["a"], "it")
    assert issubclass(AdapterMismatchError, ValueError)
