"""Command line `peft-lab`: the groups of commands, and the exit after errors.

Names, keys, values and files are checked before torch is imported.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings

import typer

from peft_lab import registry
from peft_lab.cli import compare, demo, doctor, lookup, runs, share
from peft_lab.errors import PeftLabError, WriteError
from peft_lab.utils.atomic_files import write_errors
from peft_lab.utils.terminal import SafeConsole, shown

app = typer.Typer(
    name="peft-lab",
    help="Parameter-efficient fine-tuning of text and vision models: train, compare and share adapters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (lookup, runs, demo, share, compare, doctor):
    group.register(app)
# the commands that methods bring along
for module in registry.command_modules():
    importlib.import_module(module).register(app)


def main() -> None:
    """Run the command line.

    An error about the user's input ends in one sentence and exit status 2.
    """
    # peft asks transformers for a property by its old name, which nobody who types a command can change
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        with write_errors("the output"):
            try:
                app()
            finally:
                # otherwise a full disk behind a pipe or file would be noticed after the exit status is decided
                sys.stdout.flush()
    except PeftLabError as error:
        if isinstance(error, WriteError):
            _leave_output()
        SafeConsole(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]Error:[/] {shown(error)}")
        sys.exit(2)


def _leave_output() -> None:
    """Send what is still buffered nowhere, if standard output cannot take it.

    Python would try again at its end, and print a traceback.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
