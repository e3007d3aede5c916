"""Names that a shell completes: tasks, methods, short names of backbones, and the flags of `train`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from typer.core import TyperCommand

from peft_lab import registry

Names = list[tuple[str, str]]


def complete_task(incomplete: str) -> Names:
    """Built-in tasks with their kinds; of a file the shell completes the path."""
    from peft_lab.data.task_registry import list_tasks

    return _beginning(incomplete, ((task.name, task.kind) for task in list_tasks().values()))


def complete_method(incomplete: str) -> Names:
    """Methods with their titles."""
    return _beginning(incomplete, ((info.name, info.title) for info in registry.list_methods().values()))


def complete_backbone(incomplete: str) -> Names:
    """Short names of backbones with their titles; of a folder the shell completes the path."""
    from peft_lab.backbones.pypi_weights import BACKBONES

    return _beginning(incomplete, ((backbone.name, backbone.title) for backbone in BACKBONES.values()))


def complete_flag(incomplete: str) -> Names:
    """Flags of `train`, those of Trainer included."""
    from peft_lab.runs.command_line import argument_parser

    found = []
    for action in argument_parser()._actions:
        meaning = (action.help or "").split(". ")[0]
        found += [(option, meaning) for option in action.option_strings]
    return _beginning(incomplete, found)


#: Options of `train` whose values have names.
OF_TRAIN: dict[str, Callable[[str], Names]] = {
    "--task": complete_task,
    "--method": complete_method,
    "--model_name_or_path": complete_backbone,
}


class TrainCommand(TyperCommand):
    """Command whose flags another parser reads, so that typer knows none of them."""

    def flags(self, incomplete: str) -> Names:
        """Flags that begin so."""
        return complete_flag(incomplete)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete a flag, or the value of the flag before it."""
        if incomplete.startswith("-"):
            return _items(self.flags(incomplete))
        complete = OF_TRAIN.get(ctx.args[-1].replace("-", "_").replace("__", "--", 1) if ctx.args else "")
        return _items(complete(incomplete)) if complete else []


class IncrementalCommand(TrainCommand):
    """Command `incremental`, with the flags of `train` and its own."""

    def flags(self, incomplete: str) -> Names:
        """Flags that begin so."""
        from peft_lab.protocols.incremental_options import HELP

        own = _beginning(incomplete, ((f"--{name}", text) for name, text in HELP.items()))
        return own + [pair for pair in super().flags(incomplete) if pair[0].removeprefix("--") not in HELP]


def _beginning(incomplete: str, names: Iterable[tuple[str, str]]) -> Names:
    return [(name, meaning) for name, meaning in names if name.startswith(incomplete)]


def _items(names: Iterable[tuple[str, str]]) -> list[Any]:
    """Names in the form that the shell's script is given, of the click that typer uses."""
    try:
        click: Any = import_module("typer._click.shell_completion")
    except ImportError:  # newer versions of typer have a click of their own
        click = import_module("click.shell_completion")
    return [click.CompletionItem(name, help=meaning) for name, meaning in names]
