"""Command `attention-maps` of `peft-lab`.

It imports torch after its checks only.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_lab.cli.output import print_out
from peft_lab.errors import ConfigError
from peft_lab.utils.atomic_files import check_can_be_made
from peft_lab.utils.terminal import shown


def register(app: typer.Typer) -> None:
    """Add the command to the `peft-lab` command."""
    app.command("attention-maps")(attention_maps)


def attention_maps(
    adapter: Annotated[
        str, typer.Argument(help="Folder of an adapter with class prompts, or a Hub id.", show_default=False)
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The picture, a .png file.")] = Path("maps.png"),
    classes: Annotated[
        list[str] | None,
        typer.Option(
            help="Classes to show, as `a,b` or one at a time (a name may hold commas); by default the predicted one "
            "and two rivals."
        ),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Heads to keep for a class; 4, or half where there are fewer than 8.")
    ] = None,
    blur: Annotated[
        str,
        typer.Option(
            help="What a head that is taken away looks at evenly: all `keys` (the authors' code) or the `patches` (the "
            "paper)."
        ),
    ] = "keys",
    task: Annotated[
        str | None, typer.Option(help="The task whose labels apply, instead of the adapter's or the base's own.")
    ] = None,
    model_name_or_path: Annotated[
        str | None, typer.Option("--model_name_or_path", help="Load this base instead of the one the adapter names.")
    ] = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow_other_base", help="Warn instead of refusing if the base has other weights.")
    ] = False,
) -> None:
    """Draw attention maps of classes by head; needed heads are framed."""
    from peft_lab.data.task_registry import load_task
    from peft_lab.runs.run_folder import find_adapter

    # All that can be refused without torch comes first, because importing it takes seconds.
    for image in images:
        if not image.is_file():
            raise ConfigError(f'There is no image file "{image}".')
    if output.suffix.lower() != ".png" or not output.absolute().parent.is_dir() or output.is_dir():
        raise ConfigError(f'--output "{output}" must be a .png file in a folder that exists.')
    check_can_be_made(output)
    if blur not in ("keys", "patches"):
        raise ConfigError(f'--blur "{blur}" must be "keys" or "patches".')
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("Pictures need matplotlib: pip install 'peft-lab[plots]'.")
    if task is not None:
        load_task(task)
    folder = find_adapter(adapter)
    _check_method(folder)
    from peft_lab.adapters.sequence.prompt_cam.attention_maps import named_classes, write
    from peft_lab.utils.images import open_image

    opened = [open_image(image) for image in images]
    model, processor = _load(adapter, folder, task, model_name_or_path, allow_other_base)
    names = named_classes(model, classes) if classes else None
    write(model, processor, opened, output, _say, classes=names, keep=heads, blur=blur)
    _say(f"Picture written to {output}")


def _say(line: str) -> None:
    # The names of classes come from the adapter's folder.
    print_out(shown(line))


def _load(adapter: str, folder: Path, task: str | None, base: str | None, allow_other_base: bool) -> tuple[Any, Any]:
    """Load a model with the adapter, and its image processor."""
    from peft_lab.loading.load_run import load, load_image_classifier
    from peft_lab.runs.run_folder import TASK, read_origin

    # An adapter of no task and no run has the labels of its base alone.
    if task is None and "task" not in read_origin(folder) and not (folder / TASK).is_file():
        return load_image_classifier(adapter, base, allow_other_base=allow_other_base)
    loaded = load(adapter, task, base, allow_other_base=allow_other_base)
    return loaded.model, loaded.processor


def _check_method(folder: Path) -> None:
    """Refuse an adapter whose method has no class prompts."""
    from peft_lab.adapter_files import safe_files
    from peft_lab.adapter_files.names import ADAPTER_CONFIG

    path = folder / ADAPTER_CONFIG
    name = str(safe_files.read_json(path).get("peft_type", "")).lower() if path.is_file() else "a baseline"
    if name != "prompt_cam":
        raise ConfigError(f'"{folder}" holds {name}, which has no prompt for each class; prompt_cam has.')
