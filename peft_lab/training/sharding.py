"""Sharded training by accelerate: FSDP2 and DeepSpeed, made ready for adapters or refused."""

from __future__ import annotations

import os
from typing import Any, cast

from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule

from peft_lab.backbones.sharded_weights import whole_shape
from peft_lab.errors import ConfigError
from peft_lab.tuners.layer import AdapterLayer

#: Key of DeepSpeed's config for the size below which a parameter is not partitioned, and its default.
_THRESHOLD, _DEFAULT_THRESHOLD = "stage3_param_persistence_threshold", 100_000


def check_processes(num_processes: int) -> None:
    """Check that the processes of `accelerate launch` train together.

    Args:
        num_processes: number of processes that accelerate has found.

    Raises:
        ConfigError: they do not know of each other, and would write into one folder.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and num_processes == 1:
        raise ConfigError(
            f"{started} processes were started, but they do not train together, because accelerate finds no GPU; pass "
            "--use_cpu, or for DeepSpeed --ddp_backend gloo."
        )


def prepare_sharding(trainer: Any) -> None:
    """Make a Trainer's plugin of FSDP or DeepSpeed ready for a model with an adapter.

    Raises:
        ConfigError: the processes would not train as the launch asks for, it asks for FSDP1 or efficient loading, or an
            adapter reads parameters where FSDP2 has not gathered them.
    """
    check_processes(trainer.args.world_size)
    if trainer.is_deepspeed_enabled:
        _keep_adapter_whole(trainer.accelerator.state.deepspeed_plugin.deepspeed_config, trainer.model)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and trainer.args.world_size > 1:
            raise ConfigError(
                "accelerate shards by FSDP on GPUs alone, and these processes run on the CPU; use the accelerate "
                'config "cpu", which keeps a whole model in each process.'
            )
        return
    if plugin.fsdp_version != 2:
        raise ConfigError(f"fsdp_version {plugin.fsdp_version} flattens the weights of adapters; set fsdp_version: 2.")
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but the first without weights, from which adapters "
            "are built; set it to false."
        )
    _check_layers(trainer.model)
    # an adapter is small, and its parts are no file that peft loads
    plugin.set_state_dict_type("FULL_STATE_DICT")
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = _units(trainer.model)


def _check_layers(model: nn.Module) -> None:
    """Raise `ConfigError` for adapters whose parameters are read before FSDP2 gathers them."""
    for layer in model.modules():
        if isinstance(layer, AdapterLayer) and layer.reads_before_forward:
            raise ConfigError(
                f'Method "{layer.info.name}" makes the model\'s inputs by parameters that FSDP2 gathers later; use '
                "DeepSpeed ZeRO-2 or plain data parallel processes."
            )


def _keep_adapter_whole(config: dict[str, Any], model: nn.Module) -> None:
    """Let ZeRO-3 keep the trained parameters of an adapter whole in each process, which costs little memory.

    It gathers a parameter for the forward of its own module, and those of an adapter are read by others too.
    """
    zero = config.get("zero_optimization", {})
    sizes = [whole_shape(parameter).numel() for parameter in model.parameters() if parameter.requires_grad]
    if zero.get("stage") != 3 or not hasattr(model, "peft_config") or not sizes:
        return
    given = zero.get(_THRESHOLD)
    # "auto" would be a fraction of the width, and DeepSpeed's own number may be smaller than a matrix of prompts
    zero[_THRESHOLD] = max(given if isinstance(given, int) else _DEFAULT_THRESHOLD, max(sizes) + 1)


def gather_adapter(model: nn.Module) -> None:
    """Gather the parameters that `prepare_sharding` lets ZeRO-3 keep whole, which it would do after its first step."""
    kept: list[Any] = [p for p in model.parameters() if p.requires_grad and getattr(p, "ds_persist", False)]
    if kept:
        kept[0].all_gather(kept)


def keep_shared_whole(model: nn.Module) -> None:
    """Keep the units of FSDP2 gathered from forward to backward whose adapter parameters other units read too.

    A unit that is sharded again behind its own forward would leave the others a part of them.
    """
    unit_of: dict[int, FSDPModule] = {}
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            # a nested unit comes behind the one around it, and takes its layers over
            unit_of |= {id(module): unit for module in cast(nn.Module, unit).modules()}
    for layer in model.modules():
        if not isinstance(layer, AdapterLayer):
            continue
        for adapter, config in layer.configs.items():
            for key in layer.shared_groups(adapter, config):
                owner = unit_of.get(id(layer.owners.get((adapter, key))))
                if owner is not None and owner is not unit_of.get(id(layer)):
                    owner.set_reshard_after_forward(False, recurse=False)


def _units(model: nn.Module) -> list[str]:
    """Names of the classes whose modules are sharded as units: blocks, and a head of another dtype than the adapter.

    accelerate shards the embeddings by themselves, so a class around them must not be a second unit.
    """
    names = {*(getattr(model, "_no_split_modules", None) or ())}
    blocks: dict[str, bool] = {}
    find = getattr(model, "get_input_embeddings", None)
    embeddings = _embeddings(find) if find else None
    for module in model.modules():
        name = type(module).__name__
        if name in names:
            blocks[name] = blocks.get(name, True) and all(part is not embeddings for part in module.modules())
    units = sorted(name for name, alone in blocks.items() if alone)
    # the trained parameters of a unit have one dtype, but the head has that of the base, and prompts are float32
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    heads = {type(module).__name__ for module in model.modules() if isinstance(module, ModulesToSaveWrapper)}
    return [*units, *sorted(heads)] if len(trained) > 1 else units


def _embeddings(find: Any) -> nn.Module | None:
    """Input embeddings of a model; None if it has none."""
    try:
        return find()
    except (AttributeError, NotImplementedError):  # transformers' answer of some models without them
        return None
