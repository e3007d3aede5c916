"""Decoding speed of adapters: greedy, with a KV cache.

The rows of a batch have one adapter, or each its own.

    python benchmarks/decoding.py --output benchmarks/results/decoding.md
    python benchmarks/decoding.py --model tiny --repeats 1     # a quick check on a small random Llama

SmolLM2-135M, fp32. Adapters are not merged; rows have adapters of their own by peft's ``adapter_names``, LoRA's also by
``load_many``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report  # first: it sets the environment
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_lab.backbones.module_roles import target_regex
from peft_lab.backbones.pypi_weights import resolve_model
from peft_lab.serve.tenants import Tenants, load_many
from peft_lab.tuners.registration import make_config

#: The sizes that the arms of benchmarks/studies/generation.yaml have.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA r=8 (peft)": ("lora", {"r": 8}),
    "IAPT, 4 prompts": ("iapt", {"num_prompts": 4, "bottleneck": 13}),
    "soft prompts, 20 at the input": ("soft_prompt", {"num_virtual_tokens": 20}),
    "soft prompts, 26 per block": ("soft_prompt", {"num_virtual_tokens": 26, "deep": True}),
}
BASE = "base model"

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}


def build(name: str) -> nn.Module:
    """Load a decoder, or build the tiny one."""
    torch.manual_seed(0)
    if name == "tiny":
        return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=2, **TINY)).eval()
    return AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=torch.float32).eval()


def adapted(model: nn.Module, method: str, names: list[str]) -> nn.Module:
    """Put an adapter on the model for each name, off its start."""
    name, arguments = METHODS[method]
    if name == "lora":
        arguments = {**arguments, "target_modules": target_regex(model, ("attn.q", "attn.v"))}
    served = None
    for adapter in names:
        config = make_config(name, arguments, model, task_type="CAUSAL_LM")
        config.modules_to_save = None
        if served is None:
            served = get_peft_model(model, config, adapter_name=adapter)
        else:
            served.add_adapter(adapter, config)
    assert served is not None
    with torch.no_grad():
        for path, parameter in served.named_parameters():
            if any(f".{adapter}." in f"{path}." for adapter in names):
                parameter.add_(0.01 * torch.randn_like(parameter))  # nothing may be saved by all being the same
    return served.eval()


def writer(model: Any, prompt: torch.Tensor, **options: Any) -> Callable[[int], Any]:
    """Function that writes a number of tokens behind the prompt.

    No row ends before that number.
    """
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0, **options}
    return lambda new: model.generate(**inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new)


def writers(name: str, methods: list[str], rows: int, length: int) -> tuple[dict[str, Callable[[int], Any]], list[str]]:
    """Writers by name, and the trainable parameters of each."""
    base = build(name)
    prompt = torch.randint(10, base.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    found, sizes = {BASE: writer(base, prompt)}, ["0"]
    names = [f"tenant{index}" for index in range(rows)]
    each = {"adapter_names": names}
    for method in methods:
        model = adapted(build(name), method, names)
        count = f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}"
        found[f"{method}; one adapter"] = writer(model, prompt)
        found[f"{method}; {rows} adapters"] = writer(model, prompt, **each)
        sizes += [count, count]
        if METHODS[method][0] == "lora":
            found[f"{method}; {rows} adapters by load_many"] = writer(tenants(name, model, names), prompt, **each)
            sizes.append(count)
    return found, sizes


def tenants(name: str, served: Any, names: list[str]) -> Tenants:
    """Load the adapters of a model on a new base by `load_many`."""
    with tempfile.TemporaryDirectory() as folder:
        served.save_pretrained(folder)
        return load_many(build(name), {adapter: Path(folder) / adapter for adapter in names})


def measure(found: dict[str, Callable[[int], Any]], new: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of the prompt with one token, and of each further token.

    The writers run in turns, so that a machine that slows down slows all of them.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    with torch.inference_mode():
        for write in found.values():
            write(2)
        for _ in range(repeats):
            for name, write in found.items():
                first, whole = report.timed(lambda write=write: write(1)), report.timed(lambda write=write: write(new))
                times[name].append((first, (whole - first) / (new - 1)))
    medians = {}
    for name, pairs in times.items():
        firsts, each = zip(*pairs, strict=True)
        medians[name] = (statistics.median(firsts), statistics.median(each))
    return medians


def decoding(name: str, methods: list[str], rows: int, length: int, new: int, repeats: int) -> str:
    """Report the decoding speed of the methods on a model."""
    found, sizes = writers(name, methods, rows, length)
    times = measure(found, new, repeats)
    base_first, base_each = times[BASE]
    table = []
    for (method, (first, each)), size in zip(times.items(), sizes, strict=True):
        speed = rows * new / (first + (new - 1) * each)
        ratios = [f"{first / base_first:.2f}", f"{1e3 * each:.1f}", f"{each / base_each:.2f}", f"{speed:.0f}"]
        table.append([method, size, f"{1e3 * first:.0f}", *ratios])
    header = ["method", "parameters of an adapter", "prompt ms", "/ base", "ms per token", "/ base", "tokens / s"]
    title = f"## {name}: {rows} rows, prompts of {length} tokens, {new} new tokens"
    return f"{title}\n\n{report.table(header, table)}"


ABOUT = """\
fp32, adapters unmerged, greedy with a KV cache; medians of {repeats} runs, the methods in turns, CPU time of one
thread. *Prompt* is the call that reads the prompt and writes the first token, *ms per token* one further step for all
rows, and *tokens / s* counts the new tokens of all rows over the whole call. LoRA is on query and value; its rows with
adapters of their own are measured in peft, which goes through the adapters one by one, and in `load_many`, which does
not. The base model is what a merged LoRA costs. No adapter is faster than the base: a ratio below 1 shows how far noise
reaches, above 1 as well."""


def main() -> None:
    """Measure the methods that are asked for, and publish the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help='a short name, a path, or "tiny"')
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--rows", type=int, default=16, help="rows of the batch, and adapters where each has its own")
    parser.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to write, at least 2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.new < 2:
        parser.error("--new must be at least 2: the first token belongs to the prompt")
    parts = ["# Decoding speed", report.environment("cpu"), ABOUT.format(repeats=arguments.repeats)]
    numbers = (arguments.rows, arguments.length, arguments.new, arguments.repeats)
    parts.append(decoding(arguments.model, arguments.methods, *numbers))
    report.publish("\n\n".join(parts), arguments.output)


if __name__ == "__main__":
    main()
