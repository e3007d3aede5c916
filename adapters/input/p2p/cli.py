"""Command `point-pictures` of `peft-lab`.

It imports torch after its checks only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_lab.cli.output import print_out
from peft_lab.errors import ConfigError
from peft_lab.utils.atomic_files import check_can_be_made
from peft_lab.utils.terminal import shown


def register(app: typer.Typer) -> None:
    """Add the command to the `peft-lab` command."""
    app.command("point-pictures")(point_pictures)


def point_pictures(
    adapter: Annotated[
        str, typer.Argument(help="Folder of an adapter that draws point clouds, or a Hub id.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="Folder of the pictures, a .png file for each row and view.")] = Path(
        "pictures"
    ),
    split: Annotated[str, typer.Option(help="Split of the task: train, validation or test.")] = "validation",
    rows: Annotated[int, typer.Option(min=1, max=1000, help="Rows to draw, the first ones.")] = 8,
    task: Annotated[str | None, typer.Option(help="The task whose rows are drawn, instead of the run's own.")] = None,
    model_name_or_path: Annotated[
        str | None, typer.Option("--model_name_or_path", help="Load this base instead of the one the adapter names.")
    ] = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow_other_base", help="Warn instead of refusing if the base has other weights.")
    ] = False,
) -> None:
    """Draw point clouds as a trained adapter shows them to its backbone."""
    from peft_lab.data.task_registry import check_split
    from peft_lab.runs.run_folder import find_adapter

    # All that can be refused without torch comes first, because importing it takes seconds.
    check_split(split)
    if output.exists() and not output.is_dir():
        raise ConfigError(f'--output "{output}" is a file; name a folder.')
    check_can_be_made(output / "row.png")
    _check_method(find_adapter(adapter))
    from peft_lab.loading.load_run import load

    loaded = load(adapter, task, model_name_or_path, allow_other_base=allow_other_base)
    names = write(loaded, output, split, rows)
    print_out(shown(f"{len(names)} pictures written to {output}"))


def write(loaded: Any, output: Path, split: str, count: int) -> list[Path]:
    """Write the pictures of the first `count` rows of a split of a run's task, and return their files.

    A file is named by the number of the row, its label and the number of the view.
    """
    import torch
    from PIL import Image

    from peft_lab.adapters.input.p2p.method import P2PLayer
    from peft_lab.data.splits import load_splits

    splits = load_splits(loaded.task, test=split == "test")
    raw = getattr(splits, split)
    raw = raw.select(range(min(count, len(raw))))
    ready = loaded.kind.preprocess(raw, loaded.processor, loaded.task, loaded.model)
    ready = loaded.kind.evaluation_rows(ready, loaded.processor, loaded.task)
    layer = next(module for module in loaded.model.modules() if isinstance(module, P2PLayer) and module.is_encoder)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for number in range(len(ready)):
        row = ready[number]
        with torch.no_grad():
            colours, _ = layer.colours(loaded.model.active_adapter, torch.tensor(row["point_clouds"])[None])
        label = re.sub(r"\W+", "-", loaded.labels[row["labels"]])
        for view, image in enumerate((255 * colours).round().byte().permute(0, 2, 3, 1).cpu().numpy(), start=1):
            written.append(output / f"{number + 1:03d}-{label}-{view}.png")
            Image.fromarray(image).save(written[-1])
    return written


def _check_method(folder: Path) -> None:
    """Refuse an adapter whose method draws no point clouds."""
    from peft_lab.adapter_files import safe_files
    from peft_lab.adapter_files.names import ADAPTER_CONFIG

    path = folder / ADAPTER_CONFIG
    name = str(safe_files.read_json(path).get("peft_type", "")).lower() if path.is_file() else "a baseline"
    if name != "p2p":
        raise ConfigError(f'"{folder}" holds {name}, which draws no point clouds; p2p does.')
