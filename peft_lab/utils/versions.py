"""Versions of packages and name of the device, which decide a result."""

from __future__ import annotations

import importlib.metadata
import platform

import psutil
import torch

_PACKAGES = ("peft-lab", "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "numpy")


def versions() -> dict[str, str]:
    """Versions of the packages that decide a result."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def device_name() -> str:
    """Name of the GPU, or processor architecture and number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {psutil.cpu_count()} cores, {torch.get_num_threads()} threads"
