"""Start of `peft-lab train` in several processes, by a config of accelerate."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.utils import plain_yaml
from peft_lab.utils.accelerate_launch import launch
from peft_lab.utils.interruption import Stopped

#: The configs that are shipped, by name.
CONFIGS = {file.stem: file for file in sorted((Path(__file__).parent / "accelerate_configs").glob("*.yaml"))}


def find_config(name: str) -> Path:
    """Find the config of accelerate of this name, or at this path.

    Raises:
        ConfigError: there is none.
    """
    path = Path(name).expanduser()
    if name in CONFIGS:
        return CONFIGS[name]
    if path.is_file():
        return path
    raise ConfigError(
        f'accelerate_config "{name}" is neither a file nor one of {", ".join(CONFIGS)}.{did_you_mean(name, CONFIGS)}'
    )


def launch_train(
    name: str, num_processes: int | None, file: str | None, options: Mapping[str, Any], flags: Sequence[str] = ()
) -> int:
    """Run `peft-lab train` in the processes of a config.

    Args:
        name: name or path of the config.
        num_processes: number of processes; None for that of the config, else one per GPU.
        file: the run file, if any.
        options: options of the run by name, as texts or lists of texts.
        flags: flags of the command that are no options of the run.

    Returns:
        The exit code.

    Raises:
        ConfigError: the config cannot be started on this machine, or from here.
    """
    if "LOCAL_RANK" in os.environ:
        raise ConfigError(
            "--accelerate_config starts processes, and this command is one of those of `accelerate launch` already; "
            "leave one of them out."
        )
    path = find_config(name)
    values = read_config(path)
    count = _check_devices(name, values, num_processes, options)
    launcher = {"config_file": path, **({} if count is None else {"num_processes": count})}
    try:
        return launch(launcher, [*train_command(file, {**options, **process_options(values)}), *flags])
    except Stopped as stop:
        # the first of the processes has said how to go on
        return int(str(stop.code))


def read_config(path: Path) -> dict[str, Any]:
    """Content of a config of accelerate.

    Raises:
        ConfigError: it is no YAML or JSON mapping.
    """
    values = plain_yaml.read_file(path)
    if not isinstance(values, dict) or "distributed_type" not in values:
        raise ConfigError(
            f'"{path}" is no config of accelerate, because it has no distributed_type; `accelerate config` makes one.'
        )
    return values


def process_options(config: Mapping[str, Any]) -> dict[str, str]:
    """Options of the run that each process needs, because accelerate tells its launcher alone."""
    return {"use_cpu": "true"} if config.get("use_cpu") else {}


def train_command(file: str | None, options: Mapping[str, Any]) -> list[str]:
    """Arguments of `peft-lab train`: a run file and options, texts or lists of them."""
    found = ["train", *([] if file is None else [file])]
    for name, value in options.items():
        found += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return found


def _check_devices(
    name: str, values: Mapping[str, Any], num_processes: int | None, options: Mapping[str, Any]
) -> int | None:
    """Number of processes to start; None for that of the config.

    Raises:
        ConfigError: the config needs GPUs or a library that are not there.
    """
    deepspeed = values["distributed_type"] == "DEEPSPEED"
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f'accelerate_config "{name}" needs DeepSpeed; `pip install deepspeed`.')
    if values.get("use_cpu") or (deepspeed and options.get("ddp_backend") == "gloo"):
        return num_processes
    import torch

    if not torch.accelerator.is_available():
        other = ", or for DeepSpeed --ddp_backend gloo" if deepspeed else ""
        raise ConfigError(
            f'accelerate_config "{name}" needs GPUs, and this machine has none; use --accelerate_config cpu{other}.'
        )
    devices = torch.accelerator.device_count()
    if num_processes is not None and num_processes > devices and values.get("num_machines", 1) == 1:
        raise ConfigError(f"--num_processes {num_processes} is more than the {devices} GPUs of this machine.")
    return num_processes if num_processes is not None or "num_processes" in values else devices
