"""Conversion of weight-delta adapters into LoRA adapters, which load with peft alone.

A method that declares `lora_export` converts exactly: by its own factors where its layer has them, else by the singular
value decomposition of its delta at the delta's numerical rank. Tuners of peft convert where peft says that they can.
"""

from __future__ import annotations

import copy
import inspect
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_lab import registry
from peft_lab.adapter_files import safe_files
from peft_lab.adapter_files.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_RECORD,
    PRUNING,
    PRUNING_MASKS,
    write_json,
)
from peft_lab.backbones.from_pretrained import load_checkpoint
from peft_lab.backbones.names import PEFT_PREFIX
from peft_lab.backbones.pypi_weights import resolve_model
from peft_lab.errors import ConfigError
from peft_lab.hub.model_card import card_text
from peft_lab.hub.public_copy import PROCESSOR_FILES
from peft_lab.hub.usage import head_outputs
from peft_lab.loading.adapter_folder import AdapterFolder
from peft_lab.loading.load_adapter import load_folder
from peft_lab.loading.load_run import load
from peft_lab.loading.pruned_base import read_pruning, tell_peft
from peft_lab.registry import MethodInfo
from peft_lab.runs import run_folder
from peft_lab.runs.metrics_schema import check_complete
from peft_lab.runs.trained_task import trained_task
from peft_lab.tuners.operations import ExpertWeight, Operation, operation
from peft_lab.tuners.registration import has_trait
from peft_lab.utils.atomic_files import new_folder, write_text

#: Relative error (Frobenius norm) that counts as exact: what float32 rounding leaves of a low-rank product.
_EXACT = 5e-7
#: Values that vLLM takes as its `max_lora_rank`.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Converted:
    """LoRA adapter made from another one.

    Attributes:
        config: its config, with `lora_alpha` equal to the rank: the scaling is 1 everywhere.
        state: the content of its file, task head included.
        ranks: module -> rank.
        errors: module -> relative error of the delta (Frobenius norm).
        origin: the method it was converted from.
    """

    config: LoraConfig
    state: dict[str, Tensor]
    ranks: dict[str, int]
    errors: dict[str, float]
    origin: MethodInfo

    @property
    def vllm(self) -> str:
        """Sentence on serving the adapter with vLLM."""
        rank = max(self.ranks.values())
        choice = next((choice for choice in VLLM_RANKS if choice >= rank), None)
        if choice is None:
            return (
                f"vLLM takes no rank above {VLLM_RANKS[-1]}, so it cannot serve rank {rank}: convert with --rank "
                f"{VLLM_RANKS[-1]} or less, or use `peft-lab merge`."
            )
        if self.config.modules_to_save:
            names = ", ".join(sorted(self.config.modules_to_save))
            return f"vLLM takes no modules trained in full, and this adapter has some ({names}); use `peft-lab merge`."
        own = "one of its choices" if choice == rank else f"the next of its choices above {rank}"
        return f"vLLM serves it with --max-lora-rank {choice}, {own}."


def to_lora(
    adapter: str | Path, out: str | Path, *, rank: int | None = None, model_name_or_path: str | None = None
) -> Converted:
    """Convert a saved adapter into a LoRA adapter in a new folder.

    Processor, labels and card are written too.

    Args:
        adapter: folder of a run, any folder of a peft adapter, or a Hub id.
        out: a folder that is not there yet or empty.
        rank: largest rank, at most what an exact conversion needs; by default that, which for SVFit at full rank is the
            full rank.
        model_name_or_path: the base to load instead of the one that the adapter names.

    Raises:
        ConfigError: the method's effect is no weight delta, peft's LoRA cannot express it, or `out` holds something.
        WriteError: `out` cannot be written; then nothing of it is left.
    """
    out = Path(out).expanduser()
    run_folder.refuse_filled(out)
    folder = run_folder.find_adapter(adapter)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(f'"{adapter}" is a whole model: there is no adapter to convert.')
    config = safe_files.read_json(folder / ADAPTER_CONFIG)
    _check_method(registry.method(str(config.get("peft_type", "")).lower()))
    done = convert(_load(folder, model_name_or_path), rank=rank)
    with new_folder(out) as place:
        _write(done, folder, place, out.name)
        if config.get("fingerprints"):  # of our own methods; those of peft have the file beside their config
            write_json(place / BASE_RECORD, {"modules": config["fingerprints"]})
    return done


def convert(model: Any, adapter_name: str = "default", rank: int | None = None) -> Converted:
    """Convert an adapter of a model in memory, which is not changed.

    Args:
        model: a `PeftModel`.
        adapter_name: the adapter to convert.
        rank: largest rank, at most what an exact conversion needs; by default that.

    Raises:
        ConfigError: as `to_lora`.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}.")
    config = model.peft_config[adapter_name]
    info = registry.method(str(getattr(config.peft_type, "value", config.peft_type)).lower())
    _check_method(info)
    if (getattr(config, "bias", None) or "none") != "none":
        raise ConfigError(f'The adapter trains biases (bias="{config.bias}"), which LoRA alone cannot hold.')
    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    exact = 0
    layers = _adapted_layers(model)
    for path, layer in layers.items():
        name = path.removeprefix(PEFT_PREFIX)
        base: Any = layer.get_base_layer()
        op = operation(base, name)
        _check_layer(info, layer, base, op, name, adapter_name)
        with torch.no_grad():
            up, down, errors[name], needed = _factors(layer, base, op, adapter_name, rank)
        exact = max(exact, needed)
        ranks[name] = down.shape[0] // (op.experts or 1)
        place = _stacked_place(layers, name) if op.experts else name
        for key, value in _entries(op, base, up, down).items():
            state[f"{PEFT_PREFIX}{place}.{key}"] = value
    if not ranks:
        raise ConfigError(f'Method "{info.name}" adds no delta to a weight here, so LoRA has nothing to take over.')
    if rank is not None and rank > exact:
        raise ConfigError(f"rank {rank} is above {exact}, the largest rank of the adapter; leave it out for all of it.")
    return Converted(_config(config, model, layers, ranks), state | _heads(model, adapter_name), ranks, errors, info)


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Layers with a delta by path; trained token rows are the same in LoRA, and taken over with the heads."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer):
            found[path] = module
    return found


def _check_method(info: MethodInfo) -> None:
    """Refuse a method that LoRA cannot express."""
    if info.name == "lora":
        raise ConfigError("The adapter is a LoRA adapter already: there is nothing to convert.")
    if info.place == "peft" or has_trait(info, "exports_lora"):
        return
    mend = "; `peft-lab merge` folds it into the base weights" if info.can("merge") else ""
    raise ConfigError(
        f'Method "{info.name}" acts on more than a low-rank delta of weights and does not declare that it '
        f"{'converts exactly to LoRA'}{mend}."
    )


def _check_layer(info: MethodInfo, layer: Any, base: Any, op: Operation, name: str, adapter: str) -> None:
    """Refuse a layer whose delta peft's LoRA cannot express."""
    if info.place == "peft" and not layer.supports_lora_conversion(adapter):
        raise ConfigError(
            f'peft has no weight delta for "{name}" with method "{info.name}" that LoRA could take over; '
            "`peft-lab merge` may fold it into the base weights."
        )
    if op.op_type == "conv2d" and (base.padding_mode != "zeros" or set(base.dilation) != {1}):
        raise ConfigError(f'peft\'s LoRA has no dilation and pads with zeros only, so "{name}" cannot be converted.')


def _factors(layer: Any, base: Any, op: Operation, adapter: str, rank: int | None) -> tuple[Tensor, Tensor, float, int]:
    """LoRA factors B (out, r), A (r, in) in float32, their error, and the rank of exact ones.

    The error is relative to the delta (Frobenius norm). For a convolution with groups A has the rows of all groups, and
    B those of a row's own group: (out, r / groups). Experts are groups of rank r each.
    """
    own = layer.lora_factors(adapter) if hasattr(layer, "lora_factors") else None
    # in float64, so that the error below is that of the float32 factors alone
    delta = own[0].double() @ own[1].double() if own else op.matrix(_delta(layer, base, adapter)).double()
    groups = base.groups if op.op_type == "conv2d" else op.experts or 1
    delta = delta.flatten(0, 1) if op.experts else delta
    if own is not None and groups == 1:  # the method's own factors, without the directions that are still zero
        used = (own[0] != 0).any(0)
        used[0] = True  # peft has no rank 0
        up, down = own[0][:, used], own[1][used]
        exact = up.shape[1]
    if own is None or groups > 1 or (rank is not None and rank < up.shape[1]):
        # each group of a convolution has rows of its own in A, so the groups share the rank
        shared = groups if op.op_type == "conv2d" else 1
        up, down, exact = _decomposed(delta, groups, None if rank is None else max(1, rank // shared))
    up, down = up.float().contiguous(), down.float().contiguous()
    blocks = zip(up.double().chunk(groups), down.double().chunk(groups), strict=True)
    difference = torch.cat([b @ a for b, a in blocks]) - delta
    # a delta that is still zero has no norm to divide by
    error = (difference.norm() / delta.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
    return up, down, error, exact


def _delta(layer: Any, base: Any, adapter: str) -> Tensor:
    """Delta in the layout of the weight.

    Tuners that give none by name (MiSS) merge a copy, and the delta is the change of its weight.
    """
    parameters = inspect.signature(layer.get_delta_weight).parameters.values()
    if sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) == 1:
        delta: Tensor = layer.get_delta_weight(adapter)
        return delta
    merged = copy.deepcopy(layer).double()  # in float64, so that the difference is not rounded away
    merged.merge(adapter_names=[adapter])
    return merged.get_base_layer().weight - base.weight


def _decomposed(delta: Tensor, groups: int, rank: int | None) -> tuple[Tensor, Tensor, int]:
    """Best factors at a rank, for each group's rows, and the smallest rank that is exact, the default."""
    u, s, vh = torch.linalg.svd(delta.reshape(groups, -1, delta.shape[1]), full_matrices=False)
    left = s.square().flip(-1).cumsum(-1).flip(-1).sqrt()  # error of stopping before each singular value
    needed = int((left > _EXACT * left[:, :1]).sum(-1).max())
    kept = max(1, needed if rank is None else min(rank, needed))
    up, down = (u * s[:, None])[..., :kept].reshape(-1, kept), vh[:, :kept].reshape(-1, delta.shape[1])
    return up, down, max(1, needed) * groups


def _entries(op: Operation, base: Any, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Entries of peft's LoRA file for one module."""
    if op.op_type == "embedding":  # the matrix is (tokens, dim)
        return {"lora_embedding_A": up.T.contiguous(), "lora_embedding_B": down.T.contiguous()}
    if op.op_type == "conv2d":
        weight, groups = base.weight, base.groups
        shape = (down.shape[0], base.in_channels, *weight.shape[2:])
        spread = down.new_zeros(groups, down.shape[0] // groups, groups, *weight.shape[1:])
        for group, rows in enumerate(down.chunk(groups)):  # peft's A reads all channels, also those of other groups
            spread[group, :, group] = rows.reshape(-1, *weight.shape[1:])
        return {"lora_A.weight": spread.reshape(shape), "lora_B.weight": up[:, :, None, None]}
    if op.experts:  # peft's A is (experts * r, in), and its B (out, r * experts)
        columns = up.reshape(op.experts, -1, up.shape[1]).permute(1, 2, 0)
        return {"lora_A.weight": down, "lora_B.weight": columns.flatten(1).contiguous()}
    return {"lora_A.weight": down, "lora_B.weight": up}


def _stacked_place(layers: dict[str, Any], name: str) -> str:
    """Path of peft's LoRA layer on a stacked weight.

    Its layers of several weights of one module lie inside of each other, the last one outermost.
    """
    around, _, parameter = name.rpartition(".")
    experts = layers[PEFT_PREFIX + name].get_base_layer().experts
    adapted = [other for other in experts._parameters if f"{PEFT_PREFIX}{around}.{other}" in layers]
    return around + ".base_layer" * (len(adapted) - 1 - adapted.index(parameter))


def _config(config: Any, model: Any, layers: dict[str, Any], ranks: dict[str, int]) -> LoraConfig:
    """LoRA config of the converted adapter.

    The most common rank is its `r`; modules of another rank are named in its patterns.
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    # anchored: a bare name would also match a longer one that ends with it
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items()} if len({*ranks.values()}) > 1 else {}
    stacked = [name for name in ranks if isinstance(layers[PEFT_PREFIX + name].get_base_layer(), ExpertWeight)]
    modules = {name: rank for name, rank in ranks.items() if name not in stacked}
    # Conv1D keeps its weight as (in, out), which peft's LoRA has to be told
    conv1d = any(isinstance(layer.get_base_layer(), transformers.pytorch_utils.Conv1D) for layer in layers.values())
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_targets(model, modules) if modules else [],
        target_parameters=stacked or None,
        modules_to_save=getattr(config, "modules_to_save", None),
        trainable_token_indices=getattr(config, "trainable_token_indices", None),
        fan_in_fan_out=conv1d,
    )


def _targets(model: nn.Module, ranks: dict[str, int]) -> list[str] | str:
    """Value of `target_modules` that matches the adapted modules alone.

    It is a list of last names or of paths where that is enough, else a regex of the paths.
    """
    paths = {name.removeprefix(PEFT_PREFIX) for name, _ in model.named_modules()}
    # inner modules of the present tuner are not there when the LoRA adapter is loaded
    others = {path for path in paths if path not in ranks and not path.endswith(".base_layer")}
    for names in ({name.rpartition(".")[2] for name in ranks}, set(ranks)):
        endings = tuple(f".{name}" for name in names)
        if not any(f".{other}".endswith(endings) for other in others):
            return sorted(names)
    # peft matches a text against the whole path, so the names need no anchors
    return "|".join(re.escape(name) for name in ranks)


def _heads(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Entries of the modules that were trained in full, and of trained token rows."""
    heads = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    # safetensors refuses tensors that share memory, such as tied embeddings
    return {key: value.detach().clone().contiguous() for key, value in saved.items() if key.startswith(heads)}


def _load(folder: Path, base: str | None) -> PeftModel:
    """Load the adapter on its base, by its run or by adapter_config.json."""
    if run_folder.read_metrics(folder).get("run"):
        model: Any = load(folder, None, base).model
        return model
    found = AdapterFolder(folder)
    path = resolve_model(base or found.base_name())
    # the values are checked by now, but the name of a class may still be that of anything in transformers
    mapping, task_type = found.config.auto_mapping or {}, found.config.task_type
    cls: Any = getattr(transformers, str(mapping.get("base_model_class")), None)
    if task_type:
        auto = peft.auto.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task_type].__name__.replace("PeftModelFor", "AutoModelFor")
        cls = getattr(transformers, auto, transformers.AutoModel)
    elif not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ConfigError(f'"{folder}" does not say which class its base is; convert it in Python by convert(model).')
    outputs = head_outputs(folder)
    labels: dict[str, Any] = {"num_labels": outputs, "ignore_mismatched_sizes": True} if outputs else {}
    try:
        model = load_checkpoint(cls, path, **labels)[0]
    except OSError as error:
        raise ConfigError(f'The base "{path}" cannot be loaded: {str(error).strip().splitlines()[0]}') from error
    return load_folder(model, found).eval()


def _write(done: Converted, folder: Path, out: Path, title: str) -> None:
    """Write the converted adapter; metrics and card tell of the conversion."""
    done.config.save_pretrained(str(out))
    save_file(done.state, out / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    for pattern in (*PROCESSOR_FILES, run_folder.LABELS, run_folder.TASK, BASE_RECORD, PRUNING, PRUNING_MASKS):
        for path in folder.glob(pattern):
            shutil.copyfile(path, out / path.name)
    pruning = read_pruning(out)
    if pruning is not None:
        tell_peft(out, pruning.record)
    metrics = run_folder.read_metrics(folder)
    if not metrics.get("run"):
        return
    check_complete(metrics, f'"{folder / run_folder.METRICS}"')
    metrics["adapter_bytes"] = run_folder.weights_bytes(out)
    metrics["lora_export"] = {
        "method": done.origin.name,
        "title": done.origin.title,
        "rank": max(done.ranks.values()),
        "max_relative_error": max(done.errors.values()),
        "modules": {name: {"rank": rank, "relative_error": done.errors[name]} for name, rank in done.ranks.items()},
    }
    task = trained_task(folder, run_folder.read_origin(folder))
    write_text(out / run_folder.CARD, card_text(title, metrics, registry.method("lora"), task))
    write_json(out / run_folder.METRICS, metrics)
