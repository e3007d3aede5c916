"""Task heads as peft must be told of them, and module names that transformers changed, against real models."""

from __future__ import annotations

import re

import pytest
import transformers as hf
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from support.backbones import MODELS, Custom, bare, found, tiny
from torch import nn

from peft_lab.backbones.family_table import FAMILIES
from peft_lab.backbones.module_roles import (
    family,
    head_modules,
    modules_by_role,
    rename_old,
    rename_targets,
    target_regex,
)
from peft_lab.errors import ConfigError

# Heads --------------------------------------------------------------------------------------------------------------

HEADS = {
    **{
        n: ["classifier.dense", "classifier.out_proj"]
        for n in ("roberta", "xlm-roberta", "camembert", "electra", "mpnet")
    },
    **{n: ["classification_head.dense", "classification_head.out_proj"] for n in ("t5_classifier", "bart", "mbart")},
    **{n: ["pooler.dense", "classifier"] for n in ("deberta", "deberta-v2")},
    **{n: ["classifier.1"] for n in ("resnet", "resnet_basic")},
    **{n: ["score"] for n in ("gpt2_classifier", "llama_classifier")},
    "distilbert": ["pre_classifier", "classifier"],
    "modernbert": ["head.dense", "head.norm", "classifier"],
    "deit_teacher": ["cls_classifier", "distillation_classifier"],
    **{n: ["projector", "classifier"] for n in ("whisper_classifier", "wav2vec2", "hubert_stable")},
    "audio-spectrogram-transformer": ["classifier.layernorm", "classifier.dense"],
    "blip": ["vision_proj", "text_proj", "itm_head"],
}
GENERATIVE = {"gpt2", "opt", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3"} | {
    *("t5", "t5_gated", "whisper", "phi_qk_norm")
}
BARE = {"clip", "siglip", "dinov3_vit", "dinov3_gated", "vit_mae", "clip_vision", "clip_text", "siglip_vision"} | {
    "clip_vision_projected"
}


#: Segmenters, by all that stands in front of their backbone.
SEGMENTERS = {
    "segformer": {"decode_head"},
    "dpt": {"neck", "head", "auxiliary_head"},
    "beit_segmenter": {"fpn", "decode_head", "auxiliary_head"},
    "upernet_swin": {"decode_head", "auxiliary_head"},
    "upernet_convnext": {"decode_head"},
}


@pytest.mark.parametrize("name", SEGMENTERS)
def test_head_of_a_segmenter_is_all_in_front_of_its_backbone(name: str) -> None:
    model, parts = tiny(name), SEGMENTERS[name]
    own = [path for path, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]
    assert head_modules(model) == [path for path in own if path.partition(".")[0] in parts]
    assert {path.partition(".")[0] for path in head_modules(model)} == parts


@pytest.mark.parametrize("name", [name for name in MODELS if name not in SEGMENTERS])
def test_head_modules(name: str) -> None:
    expected = [] if name in GENERATIVE | BARE else HEADS.get(name, ["classifier"])
    assert head_modules(tiny(name)) == expected
    assert modules_by_role(tiny(name), "head") == expected
    if expected and hasattr(tiny(name), tiny(name).base_model_prefix):
        assert head_modules(bare(tiny(name))) == []


def test_masked_language_models_have_no_head() -> None:
    assert head_modules(hf.BertForMaskedLM(tiny("bert").config)) == []
    assert head_modules(hf.BertModel(tiny("bert").config)) == []
    assert head_modules(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("name", [n for n in MODELS if n not in GENERATIVE | BARE])
def test_peft_trains_the_head_and_nothing_else_in_full(name: str) -> None:
    """Peft finds modules_to_save by the ends of names, and all its tuners must be able to merge them away."""
    model = MODELS[name]()
    heads = head_modules(model)
    plain = {n for n, _ in model.named_parameters() if any(n.startswith(f"{h}.") for h in heads)}
    pattern = target_regex(model, ["mlp.up"])
    adapted = get_peft_model(model, IA3Config(target_modules=pattern, feedforward_modules=[], modules_to_save=heads))
    saved = {n for n, p in adapted.named_parameters() if p.requires_grad and "modules_to_save" in n}
    assert {n.replace("modules_to_save.default.", "").removeprefix("base_model.model.") for n in saved} == plain
    merged = adapted.merge_and_unload()
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in MODELS[name]().named_parameters()}


@pytest.mark.parametrize(
    ("name", "heads"),
    [("bert", []), ("roberta", []), ("distilbert", []), ("llama_classifier", []), ("deberta-v2", ["pooler.dense"])],
)
def test_head_that_peft_saves_itself_is_not_named_twice(name: str, heads: list[str], tmp_path) -> None:
    model = MODELS[name]()
    assert head_modules(model, "SEQ_CLS") == heads
    config = LoraConfig(
        task_type="SEQ_CLS", target_modules=target_regex(model, ["attn.q"]), modules_to_save=heads or None
    )
    get_peft_model(model, config).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MODELS[name](), tmp_path)
    trained = head_modules(tiny(name))
    wrapped = [n for n, m in again.named_modules() if type(m).__name__ == "ModulesToSaveWrapper"]
    assert all(any(f"base_model.model.{h}.".startswith(f"{w}.") for w in wrapped) for h in trained)


def test_head_of_a_custom_model() -> None:
    model = Custom(body=hf.ViTModel(tiny("vit").config), to_labels=nn.Sequential(nn.Dropout(), nn.Linear(16, 3)))
    assert head_modules(model) == ["to_labels.1"]
    assert all(path.startswith("body.") for path in found(model, target_regex(model, ["op"])))
    assert len(found(model, target_regex(model, ["attn.q"]))) == 2


def test_a_missing_head_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    class NoBackbone(hf.BertPreTrainedModel):
        def __init__(self, config: hf.BertConfig) -> None:
            super().__init__(config)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    assert head_modules(NoBackbone(tiny("bert").config)) == []
    assert "No task head found in NoBackbone: pass modules_to_save" in caplog.text


def test_head_that_peft_would_confuse(caplog: pytest.LogCaptureFixture) -> None:
    body = hf.BertModel(tiny("bert").config)
    with pytest.raises(ConfigError, match=r'head "dense" cannot be told from "body.encoder'):
        head_modules(Custom(body=body, dense=nn.Linear(16, 3)))
    model = Custom(body=body, LayerNorm=nn.LayerNorm(16), classifier=nn.Linear(16, 3))
    assert head_modules(model) == ["classifier"]
    assert '"LayerNorm" stays frozen' in caplog.text


# Names of transformers 4 ----------------------------------------------------------------------------------------------

RENAMED = ["vit", "deit", "beit", "swin", "dinov2", "dinov2_with_registers", "vit_msn", "dinov2_swiglu"]
OLD = {
    "vit": "vit.encoder.layer.1.attention.attention.query",
    "deit": "deit.encoder.layer.1.attention.attention.query",
    "beit": "beit.encoder.layer.1.attention.attention.query",
    "vit_msn": "vit.encoder.layer.1.attention.attention.query",
    "swin": "swin.encoder.layers.1.blocks.0.attention.self.query",
    "dinov2": "dinov2.encoder.layer.1.attention.attention.query",
    "dinov2_with_registers": "dinov2_with_registers.encoder.layer.1.attention.attention.query",
    "dinov2_swiglu": "dinov2.encoder.layer.1.attention.attention.query",
}


@pytest.mark.parametrize("name", RENAMED)
def test_old_paths_find_their_module(name: str) -> None:
    model, old = tiny(name), OLD[name]
    new = modules_by_role(model, "attn.q")[1]
    assert rename_old(model, old) == new
    assert rename_old(model, new) == new
    assert rename_old(model, f"base_model.model.{old}.lora_A.weight") == f"base_model.model.{new}.lora_A.weight"
    assert rename_old(model, "classifier.weight") == "classifier.weight"
    assert rename_old(model, rename_old(model, "value")) == modules_by_role(model, "attn.v")[0].rpartition(".")[2]


@pytest.mark.parametrize("name", RENAMED)
def test_all_aliases_go_both_ways(name: str) -> None:
    table = FAMILIES[tiny(name).config.model_type]
    changed = 0
    for path, _ in tiny(name).named_modules():
        other = table.renames.old(table.renames.new(path))
        assert table.renames.new(other) == rename_old(table, path)
        changed += other != table.renames.new(path)
    assert changed >= 8


@pytest.mark.parametrize("name", [*RENAMED, "dinov3_vit", "vit_mae", "clip_vision"])
def test_names_agree_with_the_checkpoints_of_transformers(name: str, tmp_path) -> None:
    """Transformers still writes its old names into files: an answer that does not come from our table."""
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = {rename_old(model, key) for key in file.keys()}  # noqa: SIM118
    wanted = {f"{path}.weight" for path in [*modules_by_role(model, "op"), *head_modules(model)]}
    if name == "dinov2_swiglu":
        # One matrix of the file becomes gate and up: no name of one module.
        wanted = {key for key in wanted if not re.search(r"\.(gate|up)_proj\.", key)}
    assert wanted <= written


def test_regex_finds_modules_under_either_version_of_their_names() -> None:
    for name in RENAMED:
        assert re.fullmatch(target_regex(tiny(name), ["attn.q"]), OLD[name])
        assert not re.fullmatch(target_regex(tiny(name), ["attn.v"]), OLD[name])
    old = target_regex(tiny("vit"), ["attn.out", "mlp.up", "mlp.down"])
    names = ("attention.output.dense", "intermediate.dense", "output.dense")
    assert all(re.fullmatch(old, f"encoder.layer.11.{tail}") for tail in names)
    assert not re.fullmatch(old, "pooler.dense")


def test_target_lists_of_old_adapters() -> None:
    model = tiny("vit")
    ends = [modules_by_role(model, role)[0].rpartition(".")[2] for role in ("attn.q", "attn.v")]
    assert rename_targets(model, ["query", "value"]) == ends
    assert rename_targets(model, ends) == ends
    dense = sorted(p for role in ("attn.out", "mlp.up", "mlp.down") for p in modules_by_role(model, role))
    other_generation = ends != ["q_proj", "v_proj"]
    assert rename_targets(model, ["dense"]) == (["dense"] if other_generation else dense)
    assert found(model, rename_targets(model, r".*\.layer\.0\..*query")) == modules_by_role(model, "attn.q")[:1]
    assert rename_targets(tiny("bert"), ["query", "dense"]) == ["query", "dense"]
    assert rename_old(tiny("bert"), "query") == "query"


def test_renaming_by_family_alone() -> None:
    assert rename_old("vit", "encoder.layer.0.attention.attention.query") == "layers.0.attention.q_proj"
    assert rename_old("vit", "encoder.layer.0.attention.output.dense") == "layers.0.attention.o_proj"
    assert rename_old("vit", "encoder.layer.0.output.dense") == "layers.0.mlp.fc2"
    assert (
        rename_old("swin", "encoder.layers.0.blocks.1.attention.self.key")
        == "encoder.layers.0.blocks.1.attention.k_proj"
    )
    assert rename_old(family("dinov3_vit"), "layer.3.norm1") == "model.layer.3.norm1"
    assert rename_old(family("dinov3_vit"), "model.layer.3.norm1") == "model.layer.3.norm1"
    assert rename_old("vit", "value") == "v_proj"
    assert rename_old("vit", "dense") == "dense"
    assert rename_old("bert", "query") == "query"
    assert rename_old("no such family", "query") == "query"


def test_clip_vision_model_lost_a_prefix() -> None:
    model = tiny("clip_vision")
    path = modules_by_role(model, "attn.q")[0]
    assert rename_old(model, "vision_model.encoder.layers.0.self_attn.q_proj") == path
    assert rename_old(model, "encoder.layers.0.self_attn.q_proj") == path


def test_names_of_one_tower_do_not_leak_into_another() -> None:
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(tiny("vit").config, tiny("bert").config)
    model = hf.VisionTextDualEncoderModel(config)
    assert rename_old(model, "vision_model.encoder.layer.0.output.dense") == new_name(model, "mlp.fc2")
    assert rename_old(model, "text_model.encoder.layer.0.output.dense") == "text_model.encoder.layer.0.output.dense"
    assert rename_old(model, "query") == "query"
    queries = rename_targets(model, ["query"])
    assert {n for n, _ in model.named_modules() if any(n == q or n.endswith(f".{q}") for q in queries)} == set(
        modules_by_role(model, "attn.q")
    )


def new_name(model: nn.Module, tail: str) -> str:
    """Path of a module of the first vision block, in whichever names are installed."""
    role = {"mlp.fc2": "mlp.down"}[tail]
    return next(path for path in modules_by_role(model, role) if path.startswith("vision_model."))
