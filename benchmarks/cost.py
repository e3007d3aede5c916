"""Cost of a training step by method: FLOPs, kept activations, memory, time.

The last section has the aims for SVFit.

    python benchmarks/cost.py --output benchmarks/results/cost.md
    python benchmarks/cost.py --sections counted --workloads weights-vit-b    # a part of it

The step is forward, loss, backward and AdamW, in training mode, fp32. Methods are timed in turns, so that a machine
that slows down slows all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import report  # first: it sets the environment
import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from peft_lab import domain_prompts
from peft_lab.backbones.module_roles import target_regex
from peft_lab.backbones.pypi_weights import resolve_model
from peft_lab.registry import method as card_of
from peft_lab.training.step_cost import Cost, count_flops, frozen_floor, kept_activations, measure_step, training_step
from peft_lab.tuners.registration import has_trait, make_config

QUERY_VALUE = ("attn.q", "attn.v")
MIB = 2**20
#: Points of a cloud.
CLOUD = 1024


@dataclass(frozen=True)
class Workload:
    """Model and batch; ``build`` makes the same model each time."""

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, torch.Tensor]]


def vit(batch: int, image: int = 224, patch: int = 16, **config: Any) -> Workload:
    """Image classifier of the ViT family with random weights."""
    config = {"image_size": image, "patch_size": patch, "num_labels": 10, **config}
    shape = f"{config.get('num_hidden_layers', 12)} layers of width {config.get('hidden_size', 768)}"
    tokens = batch * ((image // patch) ** 2 + 1)
    return Workload(
        f"ViT, {shape}, random weights; {batch} images, {tokens:,} tokens",
        lambda: ViTForImageClassification(ViTConfig(**config)),
        lambda: images(batch, image),
    )


def bert(batch: int, length: int, **config: Any) -> Workload:
    """Text classifier of BERT-base size with random weights."""
    changed = "".join(f", {name}={value}" for name, value in config.items())
    return Workload(
        f"BERT-base size, random weights{changed}; {batch} x {length} tokens",
        lambda: BertForSequenceClassification(BertConfig(num_labels=2, **config)),
        lambda: tokens(batch, length),
    )


def llama(batch: int, length: int, **config: Any) -> Workload:
    """Decoder of the Llama family with random weights."""
    shape = f"{config['num_hidden_layers']} layers of width {config['hidden_size']}"
    return Workload(
        f"Llama, {shape}, random weights; {batch} x {length} tokens, the first half the instruction",
        lambda: LlamaForCausalLM(LlamaConfig(**config)),
        lambda: written(batch, length),
    )


def images(batch: int, size: int) -> dict[str, torch.Tensor]:
    """Random images (batch, 3, size, size) with labels."""
    return {"pixel_values": torch.randn(batch, 3, size, size), "labels": torch.randint(0, 10, (batch,))}


def tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens (batch, length) with labels."""
    return {"input_ids": torch.randint(1000, 30000, (batch, length)), "labels": torch.randint(0, 2, (batch,))}


def written(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens (batch, length); the second half is the answer."""
    ids = torch.randint(100, 30000, (batch, length))
    return {"input_ids": ids, "labels": ids.where(torch.arange(length) >= length // 2, -100)}


SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}

WORKLOADS: dict[str, Workload] = {
    "vit-b": vit(4),
    "bert-base": bert(8, 128),
    "bert-base-fused-attention": bert(8, 128, attention_probs_dropout_prob=0.0),
    "minilm": Workload(
        "MiniLM-L6, pretrained; 32 x 32 tokens",
        lambda: AutoModelForSequenceClassification.from_pretrained(resolve_model("minilm"), num_labels=2),
        lambda: tokens(32, 32),
    ),
    "efficientnet-lite0": Workload(
        "EfficientNet-Lite0, pretrained; 16 images of 128 x 128",
        lambda: AutoModelForImageClassification.from_pretrained(resolve_model("efficientnet-lite0")),
        lambda: images(16, 128),
    ),
}

METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "full fine-tuning": None,
    "frozen floor": None,
    "LoRA r=8 (peft)": ("lora", {"r": 8}),
    "SVFit r=8": ("svfit", {"rank": 8}),
    "SVFit r=64": ("svfit", {"rank": 64}),
    "SVFit full rank": ("svfit", {"rank": "full"}),
    "SSF": ("ssf", {}),
}

Methods = dict[str, tuple[str, dict[str, Any]]]

#: Methods that are put on query and value here, as LoRA is; others choose their modules themselves.
SAME_MODULES = (
    "lora",
    "svfit",
    "svft",
    "lora_xs",
    "petalface",
    "atlas",
    "intrinsic",
    "sparse_support",
    "gated_spectra",
)
WEIGHTS: Methods = {
    "SVFT plain": ("svft", {}),
    "SVFT banded 2": ("svft", {"pattern": "banded", "off_diagonals": 2}),
    "LoRA-XS r=16": ("lora_xs", {}),
    "SVDiff, all weights": ("svdiff", {}),
    "aTLAS, 4 vectors of rank 4": ("atlas", {}),
    "intrinsic dimension, d = 1,000": ("intrinsic", {}),
    "gated spectra (experimental)": ("gated_spectra", {}),
    "sparse support": ("sparse_support", {}),
    "bottleneck, houlsby": ("bottleneck", {"placement": "houlsby"}),
    "bottleneck, pfeiffer": ("bottleneck", {"placement": "pfeiffer"}),
    "bottleneck, parallel": ("bottleneck", {"placement": "parallel"}),
}
HEADS: Methods = {
    "NMTune": ("nmtune", {}),
    "moment probing": ("moment_probing", {}),
    "moment probing, MP+": ("mp_plus", {}),
}

#: Workloads of the methods that are counted and not timed, and those methods, by name of the section.
COUNTED: dict[str, tuple[str, Workload, Methods]] = {
    "weights-vit-b": ("Weights, features and heads", vit(4), {**WEIGHTS, "PETALface r=8": ("petalface", {}), **HEADS}),
    "weights-bert-base": ("Weights, features and heads", bert(8, 128), {**WEIGHTS, "WiCLP": ("wiclp", {}), **HEADS}),
    "points-vit-b": ("Point clouds as images", vit(4), {"P2P, one view": ("p2p", {})}),
    "prompts-vit-b": (
        "Prompts",
        vit(4),
        {
            "VPT shallow, 10 prompts": ("vpt", {"num_prompts": 10, "deep": False}),
            "VPT deep, 10 prompts": ("vpt", {"num_prompts": 10, "deep": True}),
            "DVPT, 50 prompts": ("dvpt", {}),
            "Prompt-CAM, 10 classes": ("prompt_cam", {}),
            "BayesPrompt, 4 prompts, head trained": ("bayes_prompt", {}),
            "pixel prompts, a frame of 48 pixels": ("pixel_prompt", {}),
        },
    ),
    "prompts-smollm2-135m-size": (
        "Prompts",
        llama(4, 128, **SMOLLM2),
        {
            "IAPT, 4 prompts, bottleneck 13": ("iapt", {"num_prompts": 4, "bottleneck": 13}),
            "soft prompts, 20 at the input": ("soft_prompt", {"num_virtual_tokens": 20}),
            "soft prompts, 26 per block": ("soft_prompt", {"num_virtual_tokens": 26, "deep": True}),
            "prompts by metadata, 1 in each of 2 modes": ("metadata_prompt", {}),
        },
    ),
}
FLOOR, LORA = "frozen floor", "LoRA r=8 (peft)"


def adapted(model: nn.Module, name: str, arguments: dict[str, Any]) -> nn.Module:
    """Put a method on a model.

    Methods on single weights get the same modules; a head is trained only where nothing else is.
    """
    if name in SAME_MODULES:
        arguments = {**arguments, "target_modules": target_regex(model, QUERY_VALUE)}
    config: PeftConfig = make_config(name, arguments, model)
    if not has_trait(card_of(name), "values_from_data"):
        config.modules_to_save = None
    return get_peft_model(model, config)


def prepare(workload: Workload, method: tuple[str, dict[str, Any]] | None, device: str = "cpu") -> nn.Module:
    """Build a workload's model with a method on it, in training mode."""
    torch.manual_seed(0)
    model = workload.build().train()
    if method is not None:
        model = adapted(model, *method)
        if has_trait(card_of(method[0]), "values_from_data"):
            domain_prompts(model, [workload.batch()])
        else:
            for parameter_name, parameter in model.named_parameters():
                if ".modules_to_save." in parameter_name:
                    parameter.requires_grad_(False)
    return model.to(device).train()


@dataclass
class Entry:
    """Measurements of one method on one workload."""

    cost: Cost
    trainable: int
    resident: int
    times: list[float]
    step: Callable[[], None]


def measure(workload: Workload, method: str, device: str) -> Entry:
    """Measure a step of a method; its times are added later."""
    model = prepare(workload, METHODS[method], device)
    batch = {key: value.to(device) for key, value in workload.batch().items()}
    if method == FLOOR:
        context = frozen_floor(model)
        context.__enter__()  # for as long as this process measures it
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None
    cost = measure_step(model, batch, optimizer=optimizer, repeats=1)
    states = []
    if optimizer is not None:
        for state in optimizer.state.values():
            states += state.values()
    held = [*model.parameters(), *model.buffers(), *states]
    tensors = {id(tensor): tensor for tensor in held if torch.is_tensor(tensor)}  # tied weights count once
    resident = sum(tensor.nbytes for tensor in tensors.values())
    trainable = sum(parameter.numel() for parameter in trained)
    return Entry(cost, trainable, resident, [], training_step(model, batch, optimizer=optimizer))


def compare(name: str, repeats: int, device: str) -> str:
    """Report the cost of all methods on a workload."""
    workload = WORKLOADS[name]
    entries = {method: measure(workload, method, device) for method in METHODS}
    for _ in range(repeats):
        for entry in entries.values():
            entry.step()  # untimed, so that no method pays for the memory that the one before it gave back
            entry.times.append(report.timed(entry.step, device))
    full, floor, lora = (entries[name] for name in ("full fine-tuning", FLOOR, LORA))
    header = ["method", "trainable", "GFLOPs", "/ full", "/ floor", "/ LoRA"]
    header += ["kept MiB", "/ full", "/ floor", "/ LoRA", "peak MiB", "/ full", "/ LoRA", "ms", "/ full", "/ LoRA"]
    rows = []
    for method, entry in entries.items():
        flops = [entry.cost.flops / other.cost.flops for other in (full, floor, lora)]
        kept = [entry.cost.saved_bytes / other.cost.saved_bytes for other in (full, floor, lora)]
        peak = peak_of(entry)
        peaks = [peak / peak_of(other) for other in (full, lora)]
        times = [seconds(entry) / seconds(other) for other in (full, lora)]
        row = [method, f"{entry.trainable:,}", f"{entry.cost.flops / 1e9:.2f}", *(f"{value:.3f}" for value in flops)]
        row += [f"{entry.cost.saved_bytes / MIB:.1f}", *(f"{value:.3f}" for value in kept)]
        row += [f"{peak / MIB:.0f}", *(f"{value:.2f}" for value in peaks)]
        rows.append([*row, f"{1e3 * seconds(entry):.0f}", *(f"{value:.2f}" for value in times)])
    return f"## {workload.title}\n\n{report.table(header, rows)}"


def peak_of(entry: Entry) -> int:
    """Peak bytes of a step: weights, buffers, optimiser state and tensors."""
    return entry.resident + entry.cost.peak_bytes


def seconds(entry: Entry) -> float:
    """Best seconds of a step."""
    return min(entry.times)


def counted_table(name: str) -> str:
    """Report FLOPs and kept activations of methods that are not timed.

    They stand against the frozen floor and LoRA.
    """
    title, workload, methods = COUNTED[name]
    found = {method: counts(workload, how) for method, how in {FLOOR: None, LORA: METHODS[LORA], **methods}.items()}
    rows = []
    for method, (trainable, flops, saved) in found.items():
        row = [method, f"{trainable:,}", f"{flops / 1e9:.2f}"]
        row += [f"{flops / found[other][1]:.3f}" for other in (FLOOR, LORA)]
        rows.append([*row, f"{saved / MIB:.1f}", *(f"{saved / found[other][2]:.3f}" for other in (FLOOR, LORA))])
    header = ["method", "trainable", "GFLOPs", "/ floor", "/ LoRA", "kept MiB", "/ floor", "/ LoRA"]
    return f"## {title}: {workload.title}\n\nCounted only.\n\n{report.table(header, rows)}"


def counts(workload: Workload, method: tuple[str, dict[str, Any]] | None) -> tuple[int, int, int]:
    """Count trainable parameters, FLOPs and kept bytes of a step.

    Without a method they are those of the frozen floor.
    """
    model, batch = prepare(workload, method), workload.batch()
    source = getattr(getattr(model, "active_peft_config", None), "image_source", "")
    if source:
        batch[source] = torch.randn(len(batch.pop("pixel_values")), CLOUD, 3)
    with frozen_floor(model) if method is None else nullcontext():
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        flops = count_flops(training_step(model, batch))
        with kept_activations(model, batch) as kept:
            loss = model(**batch).loss
            saved = kept.bytes()
    del loss
    return trainable, flops, saved


SMALL = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
AIMS = [(vit(41), 1.10), (bert(64, 128), 1.10), (vit(8, 32, 4, **SMALL), 1.22)]


def counted(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Count the FLOPs of a step from shapes alone, without values."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return count_flops(training_step(model, {key: mode.from_tensor(value) for key, value in batch.items()}))


def aims() -> str:
    """Report the FLOPs of SVFit against its aims."""
    rows = []
    for workload, aim in AIMS:
        torch.manual_seed(0)
        model, batch = workload.build().train(), workload.batch()
        with frozen_floor(model):
            floor = counted(model, batch)
        flops = counted(adapted(model, "svfit", {"rank": "full"}), batch)
        row = [workload.title, f"{floor / 1e9:,.1f}", f"{flops / 1e9:,.1f}", f"{flops / floor:.4f}", f"{aim:.2f}"]
        rows.append(row)
    header = ["model", "floor GFLOPs", "SVFit GFLOPs", "/ floor", "aim"]
    return f"## SVFit at full rank on query and value\n\n{report.table(header, rows)}"


ABOUT = """\
One step: forward, loss, backward, AdamW; fp32, training mode with the dropout of each model's configuration. *Frozen
floor*: nothing is trained, and gradient flows through all layers down to the first embedding, as it must for an adapter
on that; adapters that start later can be below it. Methods on single weights adapt query and value (in EfficientNet the
pointwise convolutions), SSF every op; heads are frozen, except in full fine-tuning, with BayesPrompt, which trains
nothing else and sends no gradient through the backbone, and with the methods that replace the head. Heads that are
fitted without steps have no row. *FLOPs* are those of products, convolutions and attention. *Kept* is
what autograd holds between forward and backward, each storage once, without parameters, buffers, frozen bases and the
batch. With dropout inside the attention torch has no fused attention on CPUs: it then keeps probabilities and copies of
query, key and value. *Peak* is weights, buffers, optimiser state and the most that tensors held at one time during the
step. *ms* is the best of {repeats} steps, the methods in turns: CPU time of one thread, or wall time on a GPU."""


SECTIONS = ("steps", "counted", "aims")


def main() -> None:
    """Measure the sections that are asked for, and publish the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = list(dict.fromkeys([*WORKLOADS, *COUNTED]))
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--workloads", nargs="+", default=known, choices=known)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    parts = ["# Cost of a training step", report.environment(arguments.device)]
    parts.append(ABOUT.format(repeats=arguments.repeats))
    # a process for each, which gives back what it held
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        found = []
        if "steps" in arguments.sections:
            names = [name for name in arguments.workloads if name in WORKLOADS]
            found += [pool.submit(compare, name, arguments.repeats, arguments.device) for name in names]
        if "counted" in arguments.sections:
            found += [pool.submit(counted_table, name) for name in arguments.workloads if name in COUNTED]
        if "aims" in arguments.sections:
            found.append(pool.submit(aims))
        parts += [future.result() for future in found]
    report.publish("\n\n".join(parts), arguments.output)


if __name__ == "__main__":
    main()
