"""Measures of a run besides its metrics, named as in `MEASURES`.

Of every run: trainable_parameters; adapter_parameters, the same without the task head; adapter_bytes, the file of the
adapter or the whole model of full fine-tuning; step_seconds, the median time of a training step of this process without
its first two, data loading included, evaluations left out; train_seconds, the whole training; peak_memory_bytes, the
allocator's peak on CUDA, else the largest resident set of the run's process while it trained.

Of a final run, all outside the timed part:

- step_flops, saved_bytes: FLOPs of forward and backward on one training batch, and the activations that autograd keeps
  in between (`peft_lab.training.step_cost`), once for each arm on a cell, and with the pass through the backbone where
  a run computes its features once; not for runs that `accelerate launch` starts;
- ece: expected calibration error of a classifier on the test rows: rows are put into 15 bins of equal width by the
  probability of the predicted class; the sum over bins of share of rows x |accuracy - mean probability|;
- shifted_score, shifted_drop: the main metric on the test rows of the task named as `shifted`, and by how much it is
  worse than on the task's own;
- control_before, control_after, forgetting: on the task named as `control`, of the base model and of the adapted one.
  Of kinds that predict tokens the loss for each token of its test rows (or, if it has none, its validation rows). For
  classifiers the accuracy of a nearest-centroid classifier on the features that enter the task head: centroids from
  train rows, scored on test (or validation) rows; features of several positions are averaged over the positions that
  are not padding, or are those of each token that has a class. At most `CONTROL_ROWS` rows each. forgetting is positive
  where training made it worse.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_lab import registry
from peft_lab.comparison.records.run import Run
from peft_lab.comparison.run.out_of_distribution import ood_measures
from peft_lab.metrics import greater_is_better
from peft_lab.metrics.calibration import BINS, expected_calibration_error
from peft_lab.metrics.predictions import PREDICTIONS, Predictions, read_predictions
from peft_lab.runs import run_folder
from peft_lab.runs.optimization import ALTERNATING, UNSUPERVISED

if TYPE_CHECKING:
    from datasets import Dataset

    from peft_lab.data.task_registry import Task
    from peft_lab.loading.load_run import Loaded

CONTROL_ROWS = 1000
#: Batches of rows that are prepared to draw from them the one whose cost is counted.
COST_BATCHES = 4


def measure(run: Run, place: Path, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Measure all that can be measured of a finished run.

    Args:
        run: the run.
        place: its folder.
        metrics: content of its metrics.json.
    """
    found = _of_training(metrics)
    if run.stage != "final":
        return found
    batch_size = int(run.options.get("per_device_eval_batch_size", 32))
    if (place / PREDICTIONS).is_file():
        found |= _calibration(read_predictions(place / PREDICTIONS))
    if run.shifted:
        found |= _shifted(place, run.shifted, metrics, batch_size)
    if run.control:
        found |= _control(place, run.control, batch_size)
    if run.ood:
        found |= ood_measures(run, place, batch_size)
    # a head that is fitted has no training step
    if run.cost and not run.launcher and registry.method(str(run.options["method"])).takes_steps:
        found |= cost_of_step(run.options)
    return found


def curves(place: Path) -> dict[str, list[list[float]]]:
    """Read loss and evaluations over the steps of training from Trainer's log."""
    path = place / run_folder.HISTORY
    if not path.is_file():
        return {}
    found: dict[str, list[list[float]]] = {}
    for entry in json.loads(path.read_text(encoding="utf-8"))["log_history"]:
        for name, value in entry.items():
            # timings have names that begin with eval_ as well, but are no curves
            left_out = name.endswith(("_runtime", "_per_second", "_model_preparation_time"))
            # null stands for a value that is not finite, which no curve can show
            left_out |= value is None
            if (name in ("loss", "grad_norm", "learning_rate") or name.startswith("eval_")) and not left_out:
                found.setdefault(name, []).append([entry["step"], float(value)])
    return found


def _of_training(metrics: Mapping[str, Any]) -> dict[str, float]:
    found = {
        "trainable_parameters": metrics["parameters"]["trainable"],
        "adapter_parameters": metrics["parameters"].get("adapter"),
        "adapter_bytes": metrics["adapter_bytes"],
        "step_seconds": metrics["step_seconds"],
        "train_seconds": metrics["train_seconds"],
        "peak_memory_bytes": metrics["peak_memory_bytes"],
    }
    return {name: value for name, value in found.items() if value is not None}


def _calibration(items: Predictions) -> dict[str, float]:
    return {"ece": calibration_error(items)} if items.output_type == "classification" and len(items) else {}


def calibration_error(items: Predictions, bins: int = BINS) -> float:
    """Expected calibration error of a classifier's predictions, from bins of equal width."""
    confidence, correct = items.columns["confidence"], items.correct
    assert correct is not None, "classification items are right or wrong"
    return expected_calibration_error(confidence, correct, bins)


def _shifted(place: Path, task: str, metrics: Mapping[str, Any], batch_size: int) -> dict[str, float]:
    from peft_lab.training.evaluate import evaluate

    main = metrics["main_metric"]
    scores = metrics["metrics"]["test"]
    found = evaluate(place, task, "test", batch_size=batch_size)
    # the other task may have other metrics, and a metric may be undefined, but the loss is always there
    name = main if main in found and scores.get(main) is not None else "loss"
    own, shifted = float(scores[name]), float(found[name])
    drop = own - shifted if greater_is_better(name) else shifted - own
    return {"shifted_score": shifted, "shifted_drop": drop}


def _control(place: Path, control: str, batch_size: int) -> dict[str, float]:
    from peft_lab.data.splits import load_splits, subset
    from peft_lab.data.task_registry import load_task
    from peft_lab.loading.load_run import load

    loaded, task = load(place), load_task(control)
    splits = load_splits(task, test=task.has_test)
    # bounded, because both the base and the adapted model see these rows
    train, scored = subset(splits.train, CONTROL_ROWS), subset(splits.test or splits.validation, CONTROL_ROWS)
    by_loss = loaded.kind.predicts_tokens

    def score(model: Any) -> float:
        if by_loss:
            return _loss_per_token(loaded, model, task, scored, batch_size)
        return _centroid_accuracy(loaded, model, task, train, scored, batch_size)

    after = score(loaded.model)
    with _base_of(loaded) as base:
        before = score(base)
    return {
        "control_before": before,
        "control_after": after,
        # a loss gets worse when it rises, an accuracy when it falls
        "forgetting": after - before if by_loss else before - after,
    }


@contextmanager
def _base_of(loaded: Loaded) -> Iterator[Any]:
    """Base model of a run.

    Its adapter is switched off; of full fine-tuning, the base is loaded again, and pruned if it was so before.
    """
    from peft import PeftModel

    from peft_lab.loading.load_run import load_base
    from peft_lab.loading.pruned_base import prune_for, read_pruning

    if isinstance(loaded.model, PeftModel):
        with loaded.model.disable_adapter():
            yield loaded.model
        return
    run = run_folder.read_origin(loaded.folder)
    _, model = load_base(
        loaded.kind, loaded.task, loaded.labels, run["model_name_or_path"], run.get("model_revision"), run.get("dtype")
    )
    prune_for(model, read_pruning(loaded.folder), str(loaded.folder))
    yield model.eval()


def _loss_per_token(loaded: Loaded, model: Any, task: Task, rows: Dataset, size: int) -> float:
    import torch

    from peft_lab.training.head_outputs import batches

    reduce: Any = loaded.kind.preprocess_logits_for_metrics
    total = tokens = 0.0
    with torch.no_grad():
        for batch in batches(loaded, model, task, rows, size):
            labels = batch.pop("labels")
            _, log_probabilities = reduce(model(**batch).logits, labels)
            # a decoder predicts each token from those before it, so the first one has no prediction
            kept = labels[:, -log_probabilities.shape[1] :] != -100
            total -= float((log_probabilities * kept).sum())
            tokens += float(kept.sum())
    return total / max(tokens, 1.0)


def _centroid_accuracy(loaded: Loaded, model: Any, task: Task, train: Dataset, scored: Dataset, size: int) -> float:
    import torch

    from peft_lab.training.head_outputs import head_outputs

    # not the task head, which knows the classes of its own task only
    known = head_outputs(loaded, model, task, train, size)
    features, labels = torch.from_numpy(known.features), torch.from_numpy(known.labels)
    classes = labels.unique()
    centroids = torch.stack([features[labels == c].mean(0) for c in classes])
    found = head_outputs(loaded, model, task, scored, size)
    nearest = classes[torch.cdist(torch.from_numpy(found.features), centroids).argmin(-1)]
    return float((nearest == torch.from_numpy(found.labels)).float().mean())


def cost_of_step(options: Mapping[str, Any]) -> dict[str, float]:
    """FLOPs and kept activations, in bytes, of a training step."""
    from peft_lab.backbones.frozen_norms import set_frozen_norms
    from peft_lab.data.task_registry import load_task
    from peft_lab.training.chunked_loss import chunked_loss
    from peft_lab.training.pruning import quick_prune
    from peft_lab.training.run import prepare
    from peft_lab.training.step_cost import count_flops, kept_activations, training_step

    # no rows to hold out of so few, and weights change no size
    left_out = (*ALTERNATING, *UNSUPERVISED, "row_weight_column", "reference_model", "reference_share")
    few = {name: value for name, value in options.items() if name not in left_out}
    few |= {"max_eval_samples": 1, "do_predict": False, "prune": quick_prune(options.get("prune") or {})}
    streaming = load_task(options["task"]).streaming
    if options.get("examples_per_class") is None and not streaming:  # nothing but the one batch is looked at
        rows = COST_BATCHES * int(options.get("per_device_train_batch_size", 8))
        few["max_train_samples"] = min(rows, options.get("max_train_samples") or rows)
    chunk = options.get("loss_chunk_size")
    with prepare(few) as trainer, chunked_loss(trainer.model, chunk):
        model = trainer.model.train()
        # train() also switches the norms that stay in evaluation mode while a run trains
        set_frozen_norms(model)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        autocast = getattr(trainer, "compute_loss_context_manager", nullcontext)
        # mixed precision changes the size of the kept activations
        with autocast():
            if chunk is not None:
                loss = model(**inputs).loss  # the first call with chunks is checked, which is no part of a step
            # SAM passes each batch twice
            flops = count_flops(training_step(model, inputs)) * (1 if options.get("sam_rho") is None else 2)
            with kept_activations(model, inputs) as kept:
                # the activations are kept only as long as the loss is alive
                loss = model(**inputs).loss
                saved = kept.bytes()
        del loss
    return {"step_flops": flops, "saved_bytes": saved}
