"""Serving speed of many adapters.

Measured are the loading of an adapter, and a batch with an adapter for each row against a batch with one.

    python benchmarks/serving.py --output benchmarks/results/serving.md
    python benchmarks/serving.py --sections tenants --tenants 256 --methods "SSF"     # a part of it

BERT-base size, random weights, fp32, inference. "mixed" is peft's own ``adapter_names``, "tenants" is ``load_many``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import report  # first: it sets the environment
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from peft_lab.backbones.module_roles import target_regex
from peft_lab.serve.tenants import Tenants
from peft_lab.tuners.registration import make_config

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA r=8 (peft)": ("lora", {"r": 8}),
    "SVFit r=8": ("svfit", {"rank": 8}),
    "SVFit r=64": ("svfit", {"rank": 64}),
    "SVFit full rank": ("svfit", {"rank": "full"}),
    "SSF": ("ssf", {}),
}
#: Layers of the model; `--layers` changes it.
LAYERS = 12


def build() -> nn.Module:
    """Build the base: BERT-base width with random weights."""
    torch.manual_seed(0)
    return BertModel(BertConfig(num_hidden_layers=LAYERS), add_pooling_layer=False).eval()


def config_of(model: nn.Module, method: str) -> PeftConfig:
    """Config of a method for the model."""
    name, arguments = METHODS[method]
    if name != "ssf":
        arguments = {**arguments, "target_modules": target_regex(model, ("attn.q", "attn.v"))}
    return make_config(name, arguments, model)


@contextmanager
def empty_cache() -> Iterator[None]:
    """Use an empty cache folder, so that a first load is one."""
    before = os.environ.get("PEFT_LAB_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PEFT_LAB_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("PEFT_LAB_CACHE")
            if before is not None:
                os.environ["PEFT_LAB_CACHE"] = before


def loading(methods: list[str], repeats: int) -> str:
    """Report the time of loading an adapter."""
    rows = []
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            model = build()
            get_peft_model(model, config_of(model, method)).save_pretrained(folder)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            first, second, more = [], [], []
            for _ in range(repeats):
                with empty_cache():
                    first.append(load(folder))
                    second.append(load(folder))
                    served = PeftModel.from_pretrained(build(), folder)
                    more.append(report.timed(lambda served=served: served.load_adapter(folder, adapter_name="second")))
        times = [f"{min(values):.2f}" for values in (first, second, more)]
        rows.append([method, f"{size / 1024:.0f}", *times])
    header = ["method", "adapter KiB", "first load s", "second load s", "another adapter on the same model s"]
    return f"## Loading an adapter\n\n{report.table(header, rows)}"


def load(folder: str) -> float:
    """Seconds of loading an adapter on a new base."""
    model = build()
    return report.timed(lambda: PeftModel.from_pretrained(model, folder))


def mixed(methods: list[str], rows_in_batch: int, length: int, repeats: int) -> str:
    """Report the speed of mixed batches by peft's own `adapter_names`."""
    input_ids = torch.randint(1000, 30000, (rows_in_batch, length))
    names = [f"adapter{index}" for index in range(rows_in_batch)]
    runs: dict[str, Callable[[], Any]] = {}
    base = build()
    runs["base model"] = lambda: base(input_ids=input_ids)
    for method in methods:
        model = many_adapters(method, names)
        runs[f"{method}, one"] = lambda model=model: model(input_ids=input_ids)
        runs[f"{method}, mixed"] = lambda model=model: model(input_ids=input_ids, adapter_names=names)
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for run in runs.values():
            run()
        for _ in range(repeats):
            for name, run in runs.items():
                times[name].append(report.timed(run))
    best = {name: min(values) for name, values in times.items()}
    lora = best.get("LoRA r=8 (peft), mixed", float("nan"))
    table = []
    for method in methods:
        one, many = best[f"{method}, one"], best[f"{method}, mixed"]
        row = [method, f"{1e3 * one:.0f}", f"{1e3 * many:.0f}", f"{many / one:.2f}", f"{many / lora:.2f}"]
        table.append(row)
    title = f"## peft's adapter_names: {rows_in_batch} rows x {length} tokens, one adapter against {rows_in_batch}"
    header = ["method", "one adapter ms", "an adapter per row ms", "/ one", "/ peft's LoRA"]
    about = f"Base model alone: {1e3 * best['base model']:.0f} ms."
    return f"{title}\n\n{report.table(header, table)}\n\n{about}"


def many_adapters(method: str, names: list[str]) -> nn.Module:
    """Put an adapter on the base for each name, off its start."""
    model = build()
    config = config_of(model, method)
    served = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        served.add_adapter(name, config_of(model, method))
    with torch.no_grad():
        for name, parameter in served.named_parameters():
            if any(name.endswith(f".{adapter}") or f".{adapter}." in name for adapter in names):
                parameter.add_(0.01 * torch.randn_like(parameter))  # nothing may be saved by all being the same
    return served.eval()


def tenants(methods: list[str], rows_in_batch: int, length: int, repeats: int) -> str:
    """Report memory, loading and speed of `load_many`."""
    header = ["method", "file KiB", "banks / files", "RSS growth KiB each", "loading each ms"]
    header += ["one adapter ms", "an adapter per row ms", "/ one", "FLOPs / one"]
    rows = []
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            rows.append([method, *tenants_of(method, Path(folder), rows_in_batch, length, repeats)])
    title = f"## load_many: {rows_in_batch} rows x {length} tokens, one adapter against {rows_in_batch}"
    return f"{title}\n\n{report.table(header, rows)}"


def tenants_of(method: str, folder: Path, count: int, length: int, repeats: int) -> list[str]:
    """Measure `count` adapters of one method: memory, loading, speed."""
    folders = write_adapters(method, folder, count)
    input_ids = torch.randint(1000, 30000, (count, length))
    names, size = list(folders), (folders["0"] / "adapter_model.safetensors").stat().st_size
    alone = PeftModel.from_pretrained(build(), str(folders["0"])).eval()
    served = Tenants(build())
    served.add(names[0], folders[names[0]])
    before = resident()
    seconds = report.timed(lambda: [served.add(name, folders[name]) for name in names[1:]])
    grown = (resident() - before) / 1024 / (count - 1)
    runs = {"one": lambda: alone(input_ids=input_ids), "many": lambda: served(input_ids=input_ids, adapter_names=names)}
    flops, times = {}, dict.fromkeys(runs, float("inf"))
    with torch.inference_mode():
        for name, run in runs.items():
            with FlopCounterMode(display=False) as counter:
                run()
            flops[name] = counter.get_total_flops()
        for _ in range(repeats):
            times = {name: min(times[name], report.timed(run)) for name, run in runs.items()}
    numbers = [f"{size / 1024:.0f}", f"{served.nbytes() / size / count:.2f}", f"{grown:.0f}"]
    numbers += [f"{1e3 * value:.0f}" for value in (seconds / (count - 1), times["one"], times["many"])]
    return [*numbers, f"{times['many'] / times['one']:.2f}", f"{flops['many'] / flops['one']:.2f}"]


def write_adapters(method: str, folder: Path, count: int) -> dict[str, Path]:
    """Write different adapters of one method; return their folders by name."""
    model = build()
    get_peft_model(model, config_of(model, method)).save_pretrained(str(folder / "first"))
    state = load_file(folder / "first" / "adapter_model.safetensors")
    folders = {str(index): folder / str(index) for index in range(count)}
    for path in folders.values():
        path.mkdir()
        shutil.copy(folder / "first" / "adapter_config.json", path)
        moved = {name: value + 0.01 * torch.randn_like(value) for name, value in state.items()}
        save_file(moved, path / "adapter_model.safetensors")
    return folders


def resident() -> int:
    """Resident bytes of this process after free memory was given back (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measure the sections that are asked for, and publish the report."""
    global LAYERS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", default=["loading", "mixed", "tenants"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tenants", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer for a quick look: the cost of each is alike")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    LAYERS, methods, repeats = arguments.layers, arguments.methods, arguments.repeats
    parts = ["# Serving adapters", report.environment("cpu")]
    about = f"the best of {repeats} runs, the methods in turns, CPU time of one thread."
    parts.append(f"BERT-base width, {LAYERS} layers, random weights, fp32; {about}")
    if "loading" in arguments.sections:
        parts.append(loading(methods, max(1, repeats // 2)))
    if "mixed" in arguments.sections:
        parts.append(mixed(methods, arguments.rows, arguments.length, repeats))
    if "tenants" in arguments.sections:
        parts += [tenants(methods, count, arguments.length, repeats) for count in arguments.tenants]
    report.publish("\n\n".join(parts), arguments.output)


if __name__ == "__main__":
    main()
