"""The role table against real models of every family: what a role finds, what it never finds, and old names."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from support.backbones import MODELS, TINY, Custom, bare, found, tiny, tiny_inputs, unknown
from support.properties import CONV_NETS
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_lab.backbones.family_table import FAMILIES
from peft_lab.backbones.heads import backbone_weights, head_paths
from peft_lab.backbones.module_roles import ROLES, family, head_modules, layer_index, modules_by_role, target_regex
from peft_lab.errors import ConfigError

ALL_OPS = ["op", "linear", "norm", "norm.final", "norm.embed", "norm.stem", "downsample", "embed.token", "embed.patch"]
#: Names of modules that belong to no role, whatever the family.
OUTSIDE = {
    *("classifier", "score", "lm_head", "proj_out", "head", "pooler", "classification_head", "squeeze_excite"),
    *("cls_classifier", "distillation_classifier", "pre_classifier", "projector"),
    *("visual_projection", "text_projection"),
}

#: Parts of composites that the Auto classes do not know.
NO_AUTO_CLASS = {
    "siglip_text_model": hf.SiglipTextModel,
    "siglip2_text_model": hf.Siglip2TextModel,
    "blip_text_model": hf.BlipTextModel,
    "blip_vision_model": hf.BlipVisionModel,
}


def config_of(model_type: str, **settings: object) -> PretrainedConfig:
    if model_type in NO_AUTO_CLASS:
        return NO_AUTO_CLASS[model_type].config_class(**settings)
    return AutoConfig.for_model(model_type, **settings)


def on_meta(model_type: str, **settings: object) -> PreTrainedModel:
    config = config_of(model_type, **settings)
    with torch.device("meta"):
        if model_type in NO_AUTO_CLASS:
            return NO_AUTO_CLASS[model_type](config)
        return AutoModel.from_config(config)


def families_in(model: nn.Module) -> set[str]:
    types = {m.config.model_type for m in model.modules() if isinstance(m, PreTrainedModel)}
    return types & FAMILIES.keys()


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def is_weight(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | nn.Conv2d | nn.Conv1d)


@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_are_small_and_run(name: str) -> None:
    model = tiny(name)
    assert sum(p.numel() for p in model.parameters()) < 200_000
    with torch.no_grad():
        outputs = model(**tiny_inputs(model, batch=3, labels=True))
    tensors = [value for value in outputs.to_tuple() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all(bool(value.isfinite().all()) for value in tensors)


# What the roles find ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_role_finds_modules_of_its_kind(name: str) -> None:
    model = tiny(name)
    kinds = {
        "norm": is_norm,
        "embed.token": lambda m: isinstance(m, nn.Embedding),
        "block": lambda m: any(m.children()),
    }
    for role in ROLES.keys() - {"head", "op"}:
        is_right = kinds.get(role) or kinds.get(role.split(".")[0]) or is_weight
        wrong = [path for path in modules_by_role(model, role) if not is_right(model.get_submodule(path))]
        assert not wrong, (role, wrong)


def test_no_entry_of_the_table_is_dead() -> None:
    """Each path of each family is a module of some model that shares this table."""
    seen: dict[int, set[tuple[str, str]]] = {}
    named: dict[int, str] = {}
    for name in MODELS:
        model = tiny(name)
        for model_type in families_in(model):
            table = FAMILIES[model_type]
            named[id(table.roles)] = model_type
            for role in table.roles:
                for block, tail in table.paths(role):
                    path = re.escape(f"{block}.{tail}".strip(".")).replace(r"\*", r"\d+")
                    names = (table.renames.new(n) for n, _ in model.named_modules())
                    if any(re.fullmatch(rf"(.*\.)?{path}", n) for n in names):
                        # An encoder-decoder lists each path for both stacks; cross-attention is in one only.
                        seen.setdefault(id(table.roles), set()).update((b, tail) for b in table.blocks)
                        seen[id(table.roles)].add((block, tail))
    for key, model_type in named.items():
        table = FAMILIES[model_type]
        dead = {p for role in table.roles for p in table.paths(role)} - seen[key]
        # Only some versions of transformers hold the gate and up of DINOv2's SwiGLU in one matrix, or apart.
        if model_type.startswith("dinov2"):
            dead = {p for p in dead if p[1] not in ("mlp.weights_in", "mlp.gate_proj", "mlp.up_proj")}
        assert not dead, (model_type, dead)


@pytest.mark.parametrize("model_type", sorted(name for name, known in FAMILIES.items() if not known.library))
def test_all_linear_layers_of_the_blocks_are_found(model_type: str) -> None:
    """Also for the families that only share another one's table: built at their default width, with few layers."""
    few = {"num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "encoder_layers": 2, "decoder_layers": 2}
    known = config_of(model_type)
    settings = {key: value for key, value in few.items() if hasattr(known, key)}
    if model_type == "ministral":
        settings["head_dim"] = 8
    model = on_meta(model_type, **settings)
    blocks = modules_by_role(model, "block")
    weights = (nn.Linear, Conv1D)
    inside = {
        n for n, m in model.named_modules() if isinstance(m, weights) and any(n.startswith(f"{b}.") for b in blocks)
    }
    # Position projections of DeBERTa read the position table, not the features; a gate weighs experts.
    # The projections of WavLM's attention are read without a call.
    inside = {n for n in inside if not (model_type == "wavlm" and ".attention." in n)}
    inside = {n for n in inside if not re.search(r"\.(pos_(q_)?proj|shared_expert_gate)$", n)}
    linear = found(model, target_regex(model, ["linear"]))
    assert inside <= set(linear)
    assert all(any(n.startswith(f"{b}.") for b in blocks) for n in linear)
    assert linear


@pytest.mark.parametrize("name", MODELS)
def test_one_attention_projection_per_layer(name: str) -> None:
    model = tiny(name)
    blocks, expected = len(modules_by_role(model, "block")), 0
    if families_in(model) & {*CONV_NETS, "convnextv2"}:
        assert not modules_by_role(model, "attn.q")
        return
    # The backbone of a segmenter may be a family of its own.
    config = getattr(model.config, "backbone_config", None) or model.config
    towers = [getattr(config, t) for t in ("text_config", "vision_config") if hasattr(config, t)] or [config]
    if len(towers) == 2 and not (hasattr(model, "text_model") or hasattr(model, "text_encoder")):
        towers = towers[1:]
    for part in towers:
        if part.is_encoder_decoder:
            layers = getattr(part, "encoder_layers", None) or part.num_layers
            expected += layers if name == "whisper_classifier" else 3 * layers
        elif hasattr(part, "depths"):
            expected += sum(part.depths)
        elif part.model_type == "blip_text_model":
            expected += 2 * part.num_hidden_layers  # attention to the text, and to the image
        else:
            expected += 1 if name == "albert" else part.num_hidden_layers
    queries = found(model, target_regex(model, ["attn.q"]))
    assert len(queries) == expected
    assert len(queries) == blocks + len(modules_by_role(model, "cross.q"))
    apart = expected - len(modules_by_role(model, "attn.qkv"))
    for role in ("attn.q", "attn.k", "attn.v", "attn.out"):
        alone = modules_by_role(model, role)
        assert len(alone) in ((expected,) if role == "attn.out" else (0, apart))


def test_projections_that_are_read_without_a_call_have_no_role() -> None:
    """WavLM hands the weights of its projections to a function, under which an adapter around them would do nothing."""
    model = on_meta("wavlm", num_hidden_layers=2)
    assert {path.rpartition(".")[2] for path in found(model, target_regex(model, ["linear"]))} == {
        *("intermediate_dense", "output_dense")
    }
    with pytest.raises(ConfigError, match=r'"wavlm" plays the role attn.q; it has: mlp.up, mlp.down'):
        target_regex(model, ["attn.q"])


def test_roles_of_bert_are_told_apart() -> None:
    model = tiny("bert")
    layer = "bert.encoder.layer.1."
    assert modules_by_role(model, "attn.out")[1] == layer + "attention.output.dense"
    assert modules_by_role(model, "mlp.up")[1] == layer + "intermediate.dense"
    assert modules_by_role(model, "mlp.down")[1] == layer + "output.dense"
    assert all(len(modules_by_role(model, role)) == 2 for role in ("attn.out", "mlp.up", "mlp.down"))


@pytest.mark.parametrize("name", ["t5", "t5_gated", "whisper"])
def test_attention_of_encoder_decoders(name: str) -> None:
    model = tiny(name)
    for part in ("q", "k", "v", "out"):
        both, cross = modules_by_role(model, f"attn.{part}"), modules_by_role(model, f"cross.{part}")
        assert len(both) == 6
        assert len(cross) == 2
        assert set(cross) < set(both)
        assert all("decoder" in path for path in cross)
        assert sum("encoder." in path for path in both) == 2


@pytest.mark.parametrize(
    ("model_type", "count", "settings"),
    [
        ("vit", 205_824, {}),
        ("dinov2", 205_824, {}),
        ("clip_vision_model", 207_360, {"hidden_size": 768, "intermediate_size": 3072, "patch_size": 16}),
        ("swin", 267_264, {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}),
        ("convnext", 253_184, {"hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3]}),
        ("resnet", 106_240, {}),
    ],
)
def test_published_parameter_counts_of_ssf(model_type: str, count: int, settings: dict) -> None:
    """A scale and a shift per channel of every op: the counts of the paper's base models."""
    model = on_meta(model_type, **settings)
    ops = [model.get_submodule(path) for path in modules_by_role(model, "op")]
    channels = [
        m.weight.shape[0] if is_norm(m) else getattr(m, "out_features", None) or getattr(m, "out_channels", None)
        for m in ops
    ]
    assert 2 * sum(channels) == count


def test_ssf_leaves_text_embeddings_alone() -> None:
    for name in ("bert", "llama", "gpt2", "t5", "modernbert"):
        model = tiny(name)
        blocks = modules_by_role(model, "block")
        assert all(any(path.startswith(f"{b}.") for b in blocks) for path in modules_by_role(model, "op"))


# What no role ever finds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_poolers_are_never_found(name: str) -> None:
    model = tiny(name)
    paths = {path for role in ROLES.keys() - {"head"} for path in modules_by_role(model, role)}
    paths |= set(found(model, target_regex(model, ALL_OPS)))
    assert paths
    assert not [path for path in paths if OUTSIDE & set(path.split("."))]
    output = model.get_output_embeddings()
    assert not [path for path in paths if model.get_submodule(path) is output and output is not None]
    heads = head_modules(model)
    assert not [p for p in paths if any(p == h or h.startswith(f"{p}.") or p.startswith(f"{h}.") for h in heads)]


@pytest.mark.parametrize("name", MODELS)
def test_modules_without_parameters_are_never_found(name: str) -> None:
    """ModernBERT's first attention norm and BEiT's final norm are identities."""
    model = tiny(name)
    paths = found(model, target_regex(model, ALL_OPS))
    assert all(any(True for _ in model.get_submodule(path).parameters()) for path in paths)


# The regex ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [("attn.q", "attn.v"), ("op",)])
@pytest.mark.parametrize("name", MODELS)
def test_regex_fits_bare_model_and_model_with_head(name: str, roles: tuple[str, ...]) -> None:
    model = tiny(name)
    pattern = target_regex(model, roles)
    paths = found(model, pattern)
    assert all(re.fullmatch(pattern, f"base_model.model.{path}") for path in paths)
    if model.base_model_prefix not in dict(model.named_children()) or name.startswith("dinov3"):
        return
    prefix = f"{model.base_model_prefix}."
    below = [path.removeprefix(prefix) for path in paths]
    assert found(bare(model), pattern) == below
    assert found(bare(model), target_regex(bare(model), roles)) == below
    assert found(model, target_regex(bare(model), roles)) == paths


@pytest.mark.parametrize("name", TINY)
def test_peft_adapts_exactly_these_modules(name: str) -> None:
    model = TINY[name]()
    pattern = target_regex(model, ["attn.q", "attn.v", "mlp.up"])
    paths, heads = found(model, pattern), head_modules(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=pattern, modules_to_save=heads or None))
    assert sorted(adapted.base_model.targeted_module_names) == sorted(paths)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    allowed = [f"base_model.model.{p}.lora_" for p in paths]
    allowed += [f"base_model.model.{h}.modules_to_save." for h in heads]
    assert all(n.startswith(tuple(allowed)) for n in trained)
    assert all(any(n.startswith(a) for n in trained) for a in allowed)
    assert found(adapted.get_base_model(), target_regex(adapted, ["attn.q", "attn.v", "mlp.up"])) == paths


@pytest.mark.parametrize(
    ("name", "asked", "leaf"),
    [
        ("gpt2", "attn.q", {"c_attn"}),
        ("gpt2", "attn.out", {"c_proj"}),
        ("modernbert", "attn.v", {"Wqkv"}),
        ("modernbert", "mlp.up", {"Wi"}),
        ("phi3", "mlp.gate", {"gate_up_proj"}),
        ("llama", "attn.qkv", {"q_proj", "k_proj", "v_proj"}),
        ("llama", "mlp.fused", {"gate_proj", "up_proj"}),
        ("resnet", "attn.q", {"convolution"}),
        ("convnext", "attn.q", {"pwconv1", "pwconv2"}),
        ("convnext", "mlp.up", {"pwconv1"}),
        ("efficientnet", "attn.v", {"expand_conv", "project_conv"}),
        ("vit", "conv.stem", {"projection"}),
        ("convnext", "embed.patch", {"patch_embeddings"}),
    ],
)
def test_absent_roles_have_stand_ins(name: str, asked: str, leaf: set[str]) -> None:
    paths = found(tiny(name), target_regex(tiny(name), [asked]))
    assert {path.rpartition(".")[2] for path in paths} == leaf


def test_stand_in_convolutions_are_ungrouped_and_inside_the_blocks() -> None:
    for name in ("resnet", "efficientnet", "mobilenet_v2"):
        model = tiny(name)
        blocks = modules_by_role(model, "block")
        for path in found(model, target_regex(model, ["attn.q", "mlp.down"])):
            assert model.get_submodule(path).groups == 1
            assert any(path.startswith(f"{b}.") for b in blocks)


def test_wrong_roles_are_errors() -> None:
    with pytest.raises(ConfigError, match=r'Unknown role "attn_q".* Did you mean "attn.q"'):
        target_regex(tiny("bert"), ["attn_q"])
    with pytest.raises(ConfigError, match="modules_to_save"):
        target_regex(tiny("bert"), ["head"])
    with pytest.raises(ConfigError, match=r'"bert" plays the role conv.depthwise; it has: attn.q'):
        target_regex(tiny("bert"), ["conv.depthwise"])
    with pytest.raises(ConfigError, match="target_modules"):
        target_regex(tiny("bert"), [])


# Blocks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_layer_index_counts_the_blocks(name: str) -> None:
    model = tiny(name)
    blocks = modules_by_role(model, "block")
    stacks: dict[str, list[int]] = {}
    for block in blocks:
        stack = re.sub(r"\d+", "*", block)
        stacks.setdefault(stack, []).append(layer_index(model, block))
    assert all(indices == list(range(len(indices))) for indices in stacks.values())
    for path in modules_by_role(model, "linear"):
        (block,) = (b for b in blocks if path.startswith(f"{b}."))
        assert layer_index(model, path) == layer_index(model, block)
    for path in [*head_modules(model), *modules_by_role(model, "norm.final"), *modules_by_role(model, "embed.token")]:
        assert layer_index(model, path) is None


@pytest.mark.parametrize("name", MODELS)
def test_layers_restrict_the_targets(name: str) -> None:
    model = tiny(name)
    paths = found(model, target_regex(model, ["op"]))
    first = found(model, target_regex(model, ["op"], layers=[0]))
    assert first == [path for path in paths if layer_index(model, path) == 0]
    assert first
    last = max(index for path in paths if (index := layer_index(model, path)) is not None)
    everything = found(model, target_regex(model, ["op"], layers=range(last + 1)))
    assert everything == [path for path in paths if layer_index(model, path) is not None]
    with pytest.raises(ConfigError, match=f"index {last + 1} does not exist: .* 0 to {last}"):
        target_regex(model, ["op"], layers=last + 1)


def test_layer_index_of_a_family() -> None:
    assert layer_index("vit", "vit.layers.7.attention.q_proj") == 7
    assert layer_index("vit", "vit.encoder.layer.7.attention.attention.query") == 7
    assert layer_index(family("t5"), "decoder.block.3.layer.1.EncDecAttention.q") == 3
    assert layer_index("vit", "vit.layernorm") is None
    assert layer_index("swin", "encoder.layers.0.blocks.1.attention.q_proj") is None
    assert layer_index("no such family", "layers.1.x") is None


# Composites ---------------------------------------------------------------------------------------------------------


def test_both_towers_of_clip_and_siglip() -> None:
    for name in ("clip", "siglip"):
        paths = found(tiny(name), target_regex(tiny(name), ["attn.q"]))
        assert [path.partition(".")[0] for path in paths] == ["text_model"] * 2 + ["vision_model"] * 2
    assert family("clip") is None


def test_towers_of_a_vision_language_model() -> None:
    config = hf.LlavaConfig(
        vision_config=tiny("clip_vision").config, text_config=tiny("llama").config, image_token_index=98
    )
    model = hf.LlavaForConditionalGeneration(config)
    paths = found(model, target_regex(model, ["attn.q", "mlp.gate"]))
    assert len([p for p in paths if p.startswith("model.vision_tower.")]) == 2
    assert len([p for p in paths if p.startswith("model.language_model.")]) == 4
    assert head_modules(model) == []
    assert layer_index(model, paths[-1]) == 1


# Unknown families ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("layoutlm", 12), ("falcon", 8), ("pegasus", 32)])
def test_unknown_families_fall_back_with_one_warning(name: str, count: int, caplog: pytest.LogCaptureFixture) -> None:
    model = unknown(name)
    pattern = target_regex(model, ["attn.q", "attn.v"])
    warnings = [r for r in caplog.records if r.name == "peft_lab" and r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f'"{name}"' in warnings[0].getMessage()
    assert "target_modules" in warnings[0].getMessage()
    paths = found(model, pattern)
    assert len(paths) == count
    assert all(isinstance(model.get_submodule(path), nn.Linear) for path in paths)
    assert not [path for path in paths if OUTSIDE & set(path.split("."))]
    assert found(bare(model), pattern) == [path.removeprefix(f"{model.base_model_prefix}.") for path in paths]
    assert found(bare(model), target_regex(bare(model), ["attn.q"])) == found(bare(model), pattern)
    assert {layer_index(model, path) for path in paths} == {0, 1}
    norms = found(model, target_regex(model, ["norm"]))
    assert norms
    assert all(is_norm(model.get_submodule(path)) for path in norms)


def test_a_known_type_built_otherwise_is_read_as_unknown(caplog: pytest.LogCaptureFixture) -> None:
    class Other(hf.BertPreTrainedModel):
        def __init__(self, config: hf.BertConfig) -> None:
            super().__init__(config)
            self.stack = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3))

    model = Other(tiny("bert").config)
    assert found(model, target_regex(model, ["attn.q"])) == ["stack.0.0", "stack.1.0", "stack.2.0"]
    assert '"bert"' in caplog.text


def test_a_stack_in_the_head_is_no_backbone() -> None:
    towers = nn.ModuleList(nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 3)) for _ in range(4))
    model = Custom(body=bare(unknown("layoutlm")), experts=towers)
    paths = found(model, target_regex(model, ["attn.q"]))
    assert len(paths) == 12
    assert all(path.startswith("body.") for path in paths)
    assert len(head_modules(model)) == 8


def test_convolutions_stand_in_where_unknown_blocks_have_no_linear_layer() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    model = Custom(stem=nn.Conv2d(3, 4, 3), blocks=nn.ModuleList([block(), block()]))
    assert found(model, target_regex(model, ["attn.q"])) == ["blocks.0.1", "blocks.1.1"]


def test_attention_that_reads_weights_directly_is_left_out() -> None:
    layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
    paths = found(model := Custom(layers=layers), target_regex(model, ["attn.q"]))
    assert paths == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]


def test_nothing_to_adapt_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r'"Custom" has no known family .* pass target_modules'):
        target_regex(Custom(only=nn.Linear(2, 2)), ["attn.q"])


def test_importing_the_roles_does_not_import_torch() -> None:
    code = (
        "import sys, peft_lab.backbones.module_roles; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_backbone_may_hold_its_head_and_name_it() -> None:
    """As models of timm do, below the prefix of the backbone."""
    model, part = nn.Module(), nn.Module()
    part.body, part.head = nn.Linear(4, 4), nn.Linear(4, 2)
    part.get_classifier = lambda: part.head
    model.base_model_prefix, model.net = "net", part
    assert head_paths(model) == ["net.head"]
    assert backbone_weights(model, ["net.head.weight", "net.body.weight", "other"]) == ["net.body.weight"]
    part.head = nn.Identity()
    assert head_paths(model) == []


@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize(
    "model_type",
    ["bert", "roberta", "xlm-roberta", "electra", "deberta-v2", "albert", "distilbert", "modernbert", "xlnet", "llama"],
)
def test_heads_over_tokens_are_found_and_trained(model_type: str, task_type: str) -> None:
    """All parameters in front of the backbone are trained in a copy of their own."""
    auto = {"TOKEN_CLS": hf.AutoModelForTokenClassification, "QUESTION_ANS": hf.AutoModelForQuestionAnswering}
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {
        "modernbert": dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id"), 0),
        "xlnet": {"d_head": 8, "d_inner": 32},
    }.get(model_type, {"intermediate_size": 32})
    config = AutoConfig.for_model(model_type, **{**sizes, **special}, num_labels=2)
    with torch.device("meta"):
        model = auto[task_type].from_config(config)
    outside = {name for name, _ in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")}
    heads = head_modules(model)
    assert outside == {name for name in outside if name.startswith(tuple(f"{head}." for head in heads))} != set()
    adapted = get_peft_model(model, LoraConfig(task_type=task_type, target_modules="all-linear", modules_to_save=heads))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad and "lora" not in name]
    marks = (".modules_to_save.default", "base_model.model.")
    assert {name.replace(marks[0], "").replace(marks[1], "") for name in trained} == outside
