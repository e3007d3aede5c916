"""The linear probe: what it trains, that its file holds the head alone, and that peft loads it by itself."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from support.backbones import MODELS, bare, tiny, tiny_inputs
from support.cover import MAIN, cover
from support.properties import assert_close, output
from support.tiny_runs import make_backbone, make_task, options
from torch import nn

from peft_lab import registry, to_lora
from peft_lab.backbones.family_table import FAMILIES
from peft_lab.backbones.module_roles import head_modules
from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.export.merge import merge
from peft_lab.loading.foreign_adapters import write_record
from peft_lab.loading.load_adapter import load_adapter
from peft_lab.loading.load_run import adapt, load
from peft_lab.training.run import train

#: Those whose output is that of the head; models of retrieval give hidden states beside it.
WITH_HEAD = [name for name in MODELS if head_modules(tiny(name)) and "Retrieval" not in type(tiny(name)).__name__]


def probe(base: nn.Module, task_type: str | None = None) -> PeftModel:
    """A linear probe whose head is off its start."""
    model = adapt(copy.deepcopy(base), registry.method("head"), {}, task_type)
    assert isinstance(model, PeftModel)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


def save(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    write_record(model, folder)
    return folder


@pytest.mark.parametrize("name", cover(WITH_HEAD, lambda case: {case[0] if case[0] in MAIN else "other"}))
def test_only_the_head_is_trained_and_saved(name: str, tmp_path: Path) -> None:
    base = tiny(name).eval()
    heads = head_modules(base)
    inputs = tiny_inputs(base)
    start = adapt(copy.deepcopy(base), registry.method("head"), {}).eval()
    assert torch.equal(output(start, inputs), output(base, inputs))
    model = probe(base)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for head in heads for p in base.get_submodule(head).parameters())
    expected = output(model, inputs)
    assert not torch.equal(expected, output(base, inputs))
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), output(base, inputs))
    save(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    # the running statistics of a head's norms belong to what it has learned
    statistics = sum(b.numel() for head in heads for b in base.get_submodule(head).buffers())
    assert sum(value.numel() for value in keys.values()) == trained + statistics
    for loaded in (
        PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)),
        load_adapter(copy.deepcopy(base), tmp_path),
    ):
        assert torch.equal(output(loaded.eval(), inputs), expected)
    assert_close(output(model.merge_and_unload().eval(), inputs), expected)


@pytest.mark.parametrize("name", [name for name in WITH_HEAD if "SequenceClassification" in type(tiny(name)).__name__])
def test_a_task_type_names_the_same_head(name: str, tmp_path: Path) -> None:
    """Peft adds the head of a task type by itself, in full; it must be neither named twice nor forgotten."""
    base, inputs = tiny(name).eval(), tiny_inputs(tiny(name))
    model, plain = probe(base, "SEQ_CLS"), probe(base)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for p in plain.parameters() if p.requires_grad
    )
    save(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(loaded.eval(), inputs), output(model, inputs))


def test_other_features_are_refused_unless_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny("vit")
    save(probe(base), tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.vit.layers[1].mlp.fc2.weight.mul_(1.5)
    with pytest.raises(AdapterMismatchError, match=r"mlp\.fc2.*allow_other_base"):
        load_adapter(copy.deepcopy(other), tmp_path)
    with caplog.at_level(logging.WARNING):
        load_adapter(other, tmp_path, allow_other_base=True)
    assert "in 1 of" in caplog.text


def test_names_of_an_older_version_are_found(tmp_path: Path) -> None:
    base = tiny("vit")
    expected = output(probe(base), tiny_inputs(base))
    save(probe(base), tmp_path)
    file = tmp_path / "base_fingerprint.json"
    modules = json.loads(file.read_text())["modules"]
    older = {FAMILIES["vit"].renames.old(name): entry for name, entry in modules.items()}
    assert older.keys() != modules.keys()
    file.write_text(json.dumps({"modules": older}))
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(loaded.eval(), tiny_inputs(base)), expected)
    assert not any(isinstance(module, BaseTunerLayer) for module in loaded.modules())


def test_without_its_head_the_bare_model_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny("bert")
    save(probe(base), tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = load_adapter(bare(base), tmp_path).eval()
    assert "has no place in BertModel" in caplog.text
    assert torch.equal(output(loaded, tiny_inputs(base)), output(bare(base), tiny_inputs(base)))


def test_lora_beside_a_head_on_one_model(tmp_path: Path) -> None:
    base, inputs = tiny("bert").eval(), tiny_inputs(tiny("bert"))
    save(probe(base), tmp_path)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    load_adapter(model, tmp_path, "probe")
    model.set_adapter("probe")
    assert torch.equal(output(model.eval(), inputs), output(probe(base), inputs))


@pytest.mark.full
def test_a_trained_head_is_loaded_by_peft_alone(tmp_path: Path) -> None:
    backbone, task = make_backbone(tmp_path / "bert"), make_task(tmp_path / "task")
    result = train(options(task, backbone, tmp_path / "out", method="head"))
    assert result.metrics["method_config"]["peft_type"] == "LORA"
    assert result.metrics["parameters"]["trainable"] == 3 * 32 + 3
    assert result.metrics["adapter_bytes"] < 2_000
    lines = [
        "import sys, torch",
        "from peft import AutoPeftModelForSequenceClassification as Auto",
        f"model = Auto.from_pretrained({str(tmp_path / 'out')!r}, num_labels=3).eval()",
        "print(model(torch.arange(1, 6)[None]).logits.tolist())",
        "assert 'peft_lab' not in sys.modules",
    ]
    # as where peft-lab is not installed: `import torch` loads it otherwise
    alone = os.environ | {"PEFT_LAB_AUTOLOAD": "0"}
    script = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, env=alone)
    assert done.returncode == 0, done.stderr
    expected = load(tmp_path / "out").model(torch.arange(1, 6)[None]).logits
    assert_close(torch.tensor(json.loads(done.stdout)), expected)
    merged = merge(tmp_path / "out", tmp_path / "merged")
    assert_close(load(merged, task=str(task)).model(torch.arange(1, 6)[None]).logits, expected)
    with pytest.raises(ConfigError, match="LoRA adapter already"):
        to_lora(tmp_path / "out", tmp_path / "lora")


def test_a_model_that_writes_has_no_head_of_its_own() -> None:
    with pytest.raises(ConfigError, match="no task head in LlamaForCausalLM"):
        adapt(tiny("llama"), registry.method("head"), {})
