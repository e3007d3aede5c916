"""Serving many adapters: time to load one, and a batch whose 64 rows have 64 adapters against a batch with one.

    python benchmarks/serving.py --output benchmarks/results/serving.md

BERT-base size, random weights, fp32, inference. Adapters of peft (LoRA) are served by peft's own ``adapter_names``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import report  # first: it sets the environment
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from peft_lab.registry import make_config
from peft_lab.roles import target_regex

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA r=8 (peft)": ("lora", {"r": 8}),
    "SVFit r=8": ("svfit", {"rank": 8}),
    "SVFit r=64": ("svfit", {"rank": 64}),
    "SVFit full rank": ("svfit", {"rank": "full"}),
    "SSF": ("ssf", {}),
}


def build() -> nn.Module:
    torch.manual_seed(0)
    return BertModel(BertConfig(), add_pooling_layer=False).eval()


def config_of(model: nn.Module, method: str) -> PeftConfig:
    name, arguments = METHODS[method]
    if name != "ssf":
        arguments = {**arguments, "target_modules": target_regex(model, ("attn.q", "attn.v"))}
    return make_config(name, arguments, model)


@contextmanager
def empty_cache() -> Iterator[None]:
    """A cache folder of one's own, so that the first load is a first load."""
    before = os.environ.get("PEFT_LAB_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PEFT_LAB_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("PEFT_LAB_CACHE")
            if before is not None:
                os.environ["PEFT_LAB_CACHE"] = before


def loading(repeats: int) -> str:
    rows = []
    for method in METHODS:
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
    model = build()
    return report.timed(lambda: PeftModel.from_pretrained(model, folder))


def mixed(rows_in_batch: int, length: int, repeats: int) -> str:
    input_ids = torch.randint(1000, 30000, (rows_in_batch, length))
    names = [f"adapter{index}" for index in range(rows_in_batch)]
    runs: dict[str, Callable[[], Any]] = {}
    base = build()
    runs["base model"] = lambda: base(input_ids=input_ids)
    for method in METHODS:
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
    lora = best["LoRA r=8 (peft), mixed"]
    table = [
        [
            method,
            *(f"{1e3 * each:.0f}" for each in (one, many)),
            *(f"{ratio:.2f}" for ratio in (many / one, many / lora)),
        ]
        for method in METHODS
        for one, many in [(best[f"{method}, one"], best[f"{method}, mixed"])]
    ]
    title = f"## {rows_in_batch} rows x {length} tokens, one adapter against {rows_in_batch}"
    header = ["method", "one adapter ms", "an adapter per row ms", "/ one", "/ peft's LoRA"]
    about = f"Base model alone: {1e3 * best['base model']:.0f} ms."
    return f"{title}\n\n{report.table(header, table)}\n\n{about}"


def many_adapters(method: str, names: list[str]) -> nn.Module:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    parts = ["# Serving adapters", report.environment("cpu")]
    about = f"the best of {arguments.repeats} runs, the methods in turns, CPU time of one thread."
    parts.append(f"BERT-base size, random weights, fp32; {about}")
    parts += [loading(max(1, arguments.repeats // 2)), mixed(arguments.rows, arguments.length, arguments.repeats)]
    report.publish("\n\n".join(parts), arguments.output)


if __name__ == "__main__":
    main()
