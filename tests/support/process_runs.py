"""Runs of many methods in the processes of one `accelerate launch`, and the values that each process ends with."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

#: Plain SGD without clipping: Adam would hide a gradient that is too large by a factor.
SGD = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.2, "max_steps": 3}


def main(folder: Path) -> None:
    """Train each run of `runs.json`; each process keeps its values in `<name>-<rank>.pt`, rank 0 of one process.

    A refusal is kept as its sentence. Any other error ends the process, for which the launcher ends the others.
    """
    import torch

    from peft_lab.errors import PeftLabError
    from peft_lab.training.trainer import LabTrainer

    rank = os.environ.get("RANK", "0")
    LabTrainer.train = _keeping_start(LabTrainer.train)  # type: ignore[method-assign]
    for name, values in json.loads((folder / "runs.json").read_text()).items():
        try:
            found = _train(values)
        except PeftLabError as error:
            found = {"refused": str(error)}
        except Exception:
            traceback.print_exc()
            print(f"in the run of {name}", file=sys.stderr, flush=True)
            # the other process waits for this one
            os._exit(1)
        torch.save(found, folder / f"{name}-{rank}.pt")


def _train(values: dict[str, Any]) -> dict[str, Any]:
    from peft_lab.training.run import train

    result = train(values)
    tensors = {**dict(result.model.named_parameters()), **dict(result.model.named_buffers())}
    start = getattr(result.trainer, "start_values", {})
    moved = {name: float((tensors[name].detach() - value).abs().max()) for name, value in start.items()}
    return {
        "values": {name: tensor.detach() for name, tensor in tensors.items()},
        "moved": moved,
        "metrics": result.metrics["metrics"],
        "processes": result.metrics["processes"],
    }


def _keeping_start(train: Any) -> Any:
    """`LabTrainer.train` that keeps the trained parameters from before the first step."""

    def keeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = self.model.named_parameters()
        self.start_values = {name: value.detach().clone() for name, value in named if value.requires_grad}
        return train(self, *args, **kwargs)

    return keeping


if __name__ == "__main__":
    main(Path(sys.argv[1]))
