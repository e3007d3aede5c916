"""Conversion to LoRA: exact for every method that declares it, loaded by peft alone, refused for all others."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from support.backbones import TINY, tiny_inputs
from support.properties import METHODS, OWN, adapt, config, move, output
from support.tiny_runs import environment, make_backbone, make_task, options
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_lab import registry, to_lora
from peft_lab.errors import AdapterMismatchError, ConfigError
from peft_lab.export.to_lora import Converted, convert
from peft_lab.loading.load_run import load
from peft_lab.training.evaluate import evaluate
from peft_lab.training.run import train
from peft_lab.tuners.registration import config_class, has_trait

X = {"input_ids": torch.tensor([[2, 4, 14, 3], [2, 17, 5, 3]]), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
EXPORTING = [name for name in OWN if has_trait(registry.method(name), "exports_lora")]
OTHERS = [name for name in METHODS if name not in EXPORTING]


class Ops(nn.Module):
    """One op of a kind, so that its name is the same for all of them."""

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def ops() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    image = torch.randn(2, 6, 9, 9)
    return {
        "linear": (nn.Linear(12, 7), torch.randn(2, 5, 12)),
        "conv1d": (Conv1D(7, 12), torch.randn(2, 5, 12)),
        "conv2d": (nn.Conv2d(6, 8, 3, stride=2, padding=1), image),
        "pointwise": (nn.Conv2d(6, 8, 1), image),
        "grouped": (nn.Conv2d(6, 9, 3, padding=1, groups=3), image),
        "depthwise": (nn.Conv2d(6, 6, 3, groups=6), image),
        "embedding": (nn.Embedding(20, 6, padding_idx=0), torch.randint(20, (2, 5))),
    }


def as_lora(model: nn.Module, done, tmp_path) -> PeftModel:
    """The converted adapter, written and read by peft."""
    done.config.save_pretrained(tmp_path)
    save_file(done.state, tmp_path / "adapter_model.safetensors")
    return PeftModel.from_pretrained(model, tmp_path).eval()


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", list(ops()))
@pytest.mark.parametrize("method", EXPORTING)
@torch.no_grad()
def test_conversion_is_exact_on_every_kind_of_op(method, kind, tmp_path):
    op, x = ops()[kind]
    declared = {"pointwise": "conv2d", "grouped": "conv2d", "depthwise": "conv2d"}.get(kind, kind)
    if not registry.method(method).can(declared):
        pytest.skip(f"{method} does not adapt it")
    base = Ops(op).eval()
    plain = base(x)
    model = move(adapt(method, base, target_modules=["op"]), scale=1.0)
    expected = model(x)
    done = convert(model)
    found = as_lora(copy.deepcopy(base), done, tmp_path)(x)
    assert relative(found, expected) < 1e-6
    assert relative(plain, expected) > 1e-2  # there was something to convert
    assert max(done.errors.values()) < 1e-6
    assert done.config.fan_in_fan_out == (kind == "conv1d")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", EXPORTING)
def test_a_whole_model_answers_the_same(method, family, tmp_path):
    base = TINY[family]()
    inputs = tiny_inputs(base)
    model = move(adapt(method, base))
    expected, plain = output(model, inputs), output(base, inputs)
    done = convert(model)
    assert done.config.lora_alpha == done.config.r
    found = as_lora(copy.deepcopy(base), done, tmp_path)
    assert set(found.targeted_module_names) == set(model.targeted_module_names)
    assert relative(output(found, inputs), expected) < 5e-6  # rounding adds up over the blocks
    assert relative(plain, expected) > 1e-3
    assert set(found.peft_config["default"].modules_to_save or ()) == set(
        model.peft_config["default"].modules_to_save or ()
    )


@pytest.mark.parametrize("method", OTHERS)
def test_what_does_not_declare_it_is_refused_with_a_reason(method):
    model = adapt(method, TINY["bert"]())
    with pytest.raises(ConfigError) as error:
        convert(model)
    said = str(error.value)
    info = registry.method(method)
    assert "already" in said if method == "lora" else f'"{method}"' in said
    assert ("peft-lab merge" in said) == (info.can("merge") and method != "lora")


@pytest.mark.parametrize("method", ["loha", "lokr", "vera", "fourierft", "randlora", "miss", "delora"])
def test_tuners_of_peft_convert_by_their_own_delta(method, tmp_path):
    base = Ops(nn.Linear(16, 16)).eval()
    x = torch.randn(3, 16)
    arguments = {"fourierft": {"n_frequency": 20}, "miss": {"r": 4}}.get(method, {})
    model = move(_plain(method, base, arguments))
    with torch.no_grad():
        expected = model(x)
        done = convert(model)
        found = as_lora(copy.deepcopy(base), done, tmp_path)(x)
    assert relative(found, expected) < 2e-6


def _plain(method: str, base: nn.Module, arguments: dict) -> PeftModel:
    torch.manual_seed(0)
    cls = config_class(method)
    return get_peft_model(copy.deepcopy(base), cls(target_modules=["op"], **arguments)).eval()


@pytest.mark.parametrize("method", ["ia3", "oft"])
def test_tuners_of_peft_without_a_delta_say_so(method):
    base = Ops(nn.Linear(16, 16))
    extra = {"feedforward_modules": []} if method == "ia3" else {}
    model = _plain(method, base, extra)
    with pytest.raises(ConfigError, match="no weight delta"):
        convert(model)


def test_a_method_without_layers_says_so():
    base = TINY["llama"]()
    model = get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ConfigError, match='"prompt_tuning" adds no delta'):
        convert(model)


def test_dora_is_lora_already():
    model = get_peft_model(Ops(nn.Linear(8, 8)), LoraConfig(target_modules=["op"], use_dora=True))
    with pytest.raises(ConfigError, match="LoRA adapter already"):
        convert(model)


@pytest.mark.parametrize("changes", [{"dilation": 2}, {"padding_mode": "reflect", "padding": 1}])
def test_a_convolution_that_lora_cannot_express_is_refused(changes):
    model = adapt("svfit", Ops(nn.Conv2d(4, 4, 3, **changes)), target_modules=["op"])
    with pytest.raises(ConfigError, match='"op" cannot be converted'):
        convert(model)


@torch.no_grad()
def test_a_smaller_rank_is_the_best_one_and_states_its_error(tmp_path):
    base = Ops(nn.Linear(12, 7)).eval()
    model = move(adapt("svfit", base, target_modules=["op"]), scale=1.0)
    delta = model.base_model.model.op.delta_weight("default").double()
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    best = (s[3:].norm() / s.norm()).item()
    done = convert(model, rank=3)
    assert done.ranks == {"op": 3}
    assert done.errors["op"] == pytest.approx(best, rel=1e-4)
    lora = as_lora(copy.deepcopy(base), done, tmp_path).base_model.model.op.get_delta_weight("default")
    assert torch.allclose(lora.double(), (u[:, :3] * s[:3]) @ vh[:3], atol=1e-6)
    with pytest.raises(ConfigError, match="rank 8 is above 7, the largest rank of the adapter"):
        convert(model, rank=8)
    with pytest.raises(ConfigError, match="at least 1"):
        convert(model, rank=0)


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (1, "--max-lora-rank 1, one of its choices"),
        (2, "--max-lora-rank 8, the next of its choices above 2"),
        (65, "--max-lora-rank 128, the next"),
        (320, "--max-lora-rank 320, one"),
        (512, "--max-lora-rank 512, one"),
        (513, "no rank above 512, so it cannot serve rank 513"),
    ],
)
def test_ranks_of_vllm(rank, said):
    info = registry.method("svfit")
    assert said in Converted(LoraConfig(), {}, {"a": 1, "b": rank}, {}, info).vllm
    if rank <= 512:
        headed = Converted(LoraConfig(modules_to_save=["score"]), {}, {"a": rank}, {}, info)
        assert "modules trained in full, and this adapter has some (score)" in headed.vllm


@torch.no_grad()
def test_ranks_that_differ_stay_with_their_modules(tmp_path):
    base = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))).eval()
    model = move(adapt("svfit", base, target_modules=["0", "1.0", "1.1"]))
    model.base_model.model[1][0].svfit_delta["default"][3:] = 0.0
    x = torch.randn(3, 8)
    expected, done = model(x), convert(model)
    assert done.ranks == {"0": 8, "1.0": 3, "1.1": 4}
    # vLLM reads r and lora_alpha alone: they must give the scaling 1 of every module
    assert (done.config.lora_alpha, done.config.alpha_pattern) == (done.config.r, done.config.rank_pattern)
    assert convert(model, rank=4).ranks == {"0": 4, "1.0": 3, "1.1": 4}
    found = as_lora(copy.deepcopy(base), done, tmp_path)
    assert {
        n: m.r["default"] for n, m in found.base_model.model.named_modules() if hasattr(m, "lora_A") and m.r
    } == done.ranks
    assert relative(found(x), expected) < 1e-6


def test_an_adapter_at_its_start_becomes_one_that_does_nothing(tmp_path):
    base = Ops(nn.Linear(6, 5)).eval()
    done = convert(adapt("svfit", base, target_modules=["op"]))
    assert done.ranks == {"op": 1}
    assert done.errors == {"op": 0.0}
    x = torch.randn(2, 6)
    assert torch.equal(as_lora(copy.deepcopy(base), done, tmp_path)(x), base(x))


def test_names_that_others_end_with_are_not_adapted_by_mistake():
    base = nn.ModuleDict({"fc": nn.Linear(4, 4), "block": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    done = convert(adapt("svfit", base, target_modules="fc"))
    assert done.config.target_modules == "fc"  # a regex of the whole path, as a list would name block.fc too


# Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return {"task": make_task(folder / "data"), "backbone": make_backbone(folder / "bert"), "folder": folder}


@pytest.fixture(scope="module")
def run(place):
    values = options(place["task"], place["backbone"], place["folder"] / "svfit", method="svfit", learning_rate=5e-2)
    return train(values | {"max_steps": 20})


@pytest.fixture(scope="module")
def converted(run, place):
    return to_lora(run.output_dir, place["folder"] / "as-lora"), place["folder"] / "as-lora"


@pytest.mark.full
def test_peft_alone_loads_what_was_written(run, converted, tmp_path):
    """In a process where peft_lab cannot be imported."""
    done, folder = converted
    code = """
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "peft_lab":
                    raise ImportError(name)
        sys.meta_path.insert(0, Blocked())
        import torch
        from peft import AutoPeftModelForSequenceClassification, PeftConfig
        assert PeftConfig.from_pretrained(sys.argv[1]).peft_type == "LORA"
        model = AutoPeftModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=3).eval()
        inputs = {"input_ids": torch.tensor([[2, 4, 14, 3], [2, 17, 5, 3]])}
        torch.save(model(**inputs, attention_mask=torch.ones(2, 4, dtype=torch.long)).logits, sys.argv[2])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder), str(tmp_path / "logits.pt")]
    done_ = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done_.returncode == 0, done_.stderr
    with torch.no_grad():
        expected = run.model.eval()(**X).logits
    assert relative(torch.load(tmp_path / "logits.pt"), expected) < 1e-6
    assert max(done.errors.values()) < 1e-6


def test_a_converted_run_is_a_run(run, converted):
    _, folder = converted
    assert evaluate(folder)["accuracy"] == run.metrics["metrics"]["test"]["accuracy"]
    assert load(folder).labels == ["food", "music", "weather"]
    text = (folder / "README.md").read_text()
    assert "converted from SVFit" in text
    assert "import peft_lab" not in text
    assert "measured before the conversion" in text
    assert json.loads((folder / "metrics.json").read_text())["lora_export"]["method"] == "svfit"


def test_a_converted_run_still_knows_its_base(converted, place, tmp_path):
    with pytest.raises(AdapterMismatchError):
        load(converted[1], model_name_or_path=str(make_backbone(tmp_path / "other", seed=1)))


def test_the_command_prints_rank_and_error(run, place, converted, capsys, monkeypatch, tmp_path):
    from peft_lab.cli import main

    arguments = ["peft-lab", "to-lora", str(run.output_dir), str(tmp_path / "out"), "--rank", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as leaving:
        main()
    assert not leaving.value.code
    assert "4 modules, rank up to 2, largest relative error" in capsys.readouterr().out
    config_file = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config_file["r"], config_file["lora_alpha"]) == (2, 2)


def test_folders_that_cannot_be_converted_are_named(run, place, converted, tmp_path):
    with pytest.raises(ConfigError, match="not empty"):
        to_lora(run.output_dir, converted[1])
    with pytest.raises(ConfigError, match="already"):
        to_lora(converted[1], tmp_path / "again")
    with pytest.raises(ConfigError, match="no adapter folder"):
        to_lora(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "again").exists()


def test_a_folder_of_peft_alone_is_converted(place, tmp_path):
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(place["backbone"], num_labels=5)
    model = move(get_peft_model(base, config("svfit", task_type="SEQ_CLS"))).eval()
    model.save_pretrained(tmp_path / "plain")
    to_lora(tmp_path / "plain", tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(place["backbone"], num_labels=5)
    found = PeftModel.from_pretrained(again, tmp_path / "out").eval()
    with torch.no_grad():
        assert relative(found(**X).logits, model(**X).logits) < 1e-6
    assert peft.PeftConfig.from_pretrained(tmp_path / "out").base_model_name_or_path == str(place["backbone"])
