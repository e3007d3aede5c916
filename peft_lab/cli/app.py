"""Command line `peft-lab`: the groups of commands, and the exit after errors.

Names, keys, values and files are checked before torch is imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer

from peft_lab import __version__, registry
from peft_lab.cli import chat, compare, data, demo, doctor, incremental, info, lookup, predict, runs, share
from peft_lab.cli.options import Quiet, Verbose, chosen_level, with_level
from peft_lab.errors import PeftLabError, WriteError
from peft_lab.utils.atomic_files import write_errors
from peft_lab.utils.terminal import SafeConsole, shown
from peft_lab.utils.verbosity import VARIABLE, set_variables

#: What the exit status of every command tells.
STATUSES = {
    0: "done",
    1: "a part failed, such as a run of `compare` or a check of `doctor`; or an error that peft-lab did not foresee",
    2: "refused or given up, with one sentence that says what to change",
    130: "stopped by Ctrl-C (143 by SIGTERM), with a line that says how to go on",
}

app = typer.Typer(
    name="peft-lab",
    help="Parameter-efficient fine-tuning of text and vision models: train, compare and share adapters.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: " + "; ".join(f"{number} {meaning}" for number, meaning in STATUSES.items()) + ".",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-lab {__version__}")
        raise typer.Exit()


@app.callback()
def before_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Set the level for the command that follows."""
    chosen = chosen_level(quiet, verbose)
    if chosen is not None:
        context.with_resource(set_variables({VARIABLE: chosen}))


for group in (lookup, data, runs, predict, info, chat, demo, share, compare, incremental, doctor):
    group.register(app)
# the commands that methods bring along
for module in registry.command_modules():
    importlib.import_module(module).register(app)
for command in app.registered_commands:
    if command.callback is not None:
        command.callback = with_level(command.callback)


def main() -> None:
    """Run the command line.

    An error about the user's input ends in one sentence and exit status 2.
    """
    try:
        with write_errors("the output"):
            try:
                app(prog_name="peft-lab")
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
