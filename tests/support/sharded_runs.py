"""Runs of two processes whose weights are sharded, on the CPU by gloo."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from pathlib import Path
from typing import Any

import torch

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
#: Way of training -> environment that `accelerate launch` sets for it.
WAYS: dict[str, dict[str, str]] = {
    "one": {},
    "ddp": {},
    "fsdp2": FSDP2,
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}
#: Plain SGD without clipping: Adam would hide a gradient that is too large by a factor.
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.05}


#: Name -> method and fields of its config, tried beside each method's defaults: gradients on the training data that are
#: read before the first step, and parameters that several blocks share.
FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "atlas with blocks": ("atlas", {"blocks": 3}),
    "vpt with projection": ("vpt", {"projection": 4}),
}


def shard_on_the_cpu() -> None:
    """Let accelerate shard on the CPU, which torch can: accelerate itself takes FSDP on a CPU for plain DDP."""
    from accelerate import state

    original = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None and self.distributed_type == state.DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, kwargs["fsdp_plugin"]
            state.PartialState._shared_state["distributed_type"] = state.DistributedType.FSDP

    state.AcceleratorState.__init__ = init  # type: ignore[method-assign]


def as_rank(way: str, rank: int, port: int) -> dict[str, Any]:
    """Become one of two processes; returns the flags of `TrainingArguments` that go with the way of sharding."""
    if way != "one":
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ.update(where, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **WAYS.get(way, {}))
    if way == "fsdp2":
        shard_on_the_cpu()
    # accelerate initialises DeepSpeed only where it is not told to stay on the CPU
    return {"use_cpu": False, "ddp_backend": "gloo"} if way.startswith("zero") else {"use_cpu": way != "alone"}


def two(server: Any, function: Any, *args: Any, seconds: float = 300) -> list[int | None]:
    """Run `function(*args, rank, port)` in two processes; their exit codes, None for one that did not end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [server.Process(target=function, args=(*args, rank, port)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return codes


def server(*preload: str) -> Any:
    """Fork server that has imported what the runs need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.sharded_runs", "support.properties", "peft_lab.training.run", *preload])
    return context


def train_run(values: dict[str, Any], way: str, environment: dict[str, str], rank: int = 0, port: int = 0) -> None:
    """Train a run as one of two processes; write the sentence of a refusal beside its folder."""
    flags = as_rank(way, rank, port)
    os.environ.update(environment)
    from peft_lab.errors import PeftLabError
    from peft_lab.training.run import train

    try:
        train({**values, **flags})
    except PeftLabError as error:
        Path(f"{values['output_dir']}.error-{rank}").write_text(str(error))
        # the other process would wait for this one for ever
        os._exit(2)


def train_methods(cases: list[str], way: str, out: Path, dtype: str, rank: int = 0, port: int = 0) -> None:
    """Train each method, or case of `FIELDS`, for a few steps; write its losses and saved adapter below `out`."""
    flags = as_rank(way, rank, port)
    for case in cases:
        folder = out / way / case
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = _train_method(case, way, folder, getattr(torch, dtype), flags)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))


def tensor_parallel(folder: Path, out: Path, way: str, rank: int = 0, port: int = 0) -> None:
    """Adapt a Llama that two processes share by tensor parallelism; write outputs, losses, parameters and file."""
    as_rank(way, rank, port)
    for case, (method, fields) in TENSOR_PARALLEL.items():
        place = out / way / case
        place.mkdir(parents=True, exist_ok=True)
        try:
            found = _split_method(method, fields, folder, place, way, rank)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
        torch.save(found, place / f"found-{rank}.pt")


#: Name -> method and fields of its config that are tried with tensor parallelism.
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TENSOR_PARALLEL: dict[str, tuple[str, dict[str, Any]]] = {
    "svfit": ("svfit", {}),
    "svfit on all": ("svfit", {"target_modules": LINEARS}),
    "ssf": ("ssf", {}),
    "vpt": ("vpt", {}),
    "soft_prompt": ("soft_prompt", {}),
    "soft_prompt with key_values": ("soft_prompt", {"key_values": True}),
    "metadata_prompt": ("metadata_prompt", {}),
    "iapt": ("iapt", {}),
}


def _split_method(
    method: str, fields: dict[str, Any], folder: Path, place: Path, way: str, rank: int
) -> dict[str, Any]:
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from peft_lab.errors import ConfigError
    from support.properties import config, move

    plan = {"tp_plan": "auto"} if way != "one" else {}
    base = AutoModelForCausalLM.from_pretrained(folder, **plan)
    torch.manual_seed(0)
    model = move(get_peft_model(base, config(method, base, **fields)), scale=0.1)
    ids = torch.arange(5, 19).reshape(2, 7)
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["labels"][:, :3] = -100
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    model.save_pretrained(str(place / "adapter"), is_main_process=rank == 0)
    if way != "one":
        torch.distributed.barrier()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, **plan), str(place / "adapter"))
    with torch.no_grad():
        reloaded = again.eval()(**batch).logits
    try:
        model.merge_adapter()
        merged = ""
    except (ConfigError, NotImplementedError) as error:
        merged = str(error)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    recorded = model.peft_config["default"].recorded_fingerprints
    return {
        "losses": losses,
        "logits": logits,
        "reloaded": reloaded,
        "trained": trained,
        "recorded": recorded,
        "merged": merged,
    }


def _train_method(case: str, way: str, folder: Path, dtype: torch.dtype, flags: dict[str, Any]) -> dict[str, Any]:
    from peft import get_peft_model
    from transformers import TrainingArguments, set_seed

    from peft_lab.training.trainer import LabTrainer
    from support.backbones import TINY, tiny_inputs
    from support.properties import KEEPS_HEAD, as_read, config, text_or_image

    method, fields = FIELDS.get(case, (case, {}))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4 if way == "one" else 2,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **SGD,
        **flags,
    )
    base = TINY["vit" if method in KEEPS_HEAD else text_or_image(method)]().to(dtype)
    inputs = tiny_inputs(base, batch=12, labels=True)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    set_seed(0)
    model = get_peft_model(base, config(method, base, **fields))
    inputs = as_read(model, inputs)
    rows = [{name: values[index] for name, values in inputs.items()} for index in range(12)]
    trainer = LabTrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(folder / "adapter"), _internal_call=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "model": type(trainer.model_wrapped).__name__}
