"""Command `incremental`: methods on classes or domains that come session after session."""

from __future__ import annotations

import argparse
from typing import Any

import typer

from peft_lab.cli.completion import IncrementalCommand
from peft_lab.cli.output import Json, new_table, print_json, print_out
from peft_lab.errors import ConfigError
from peft_lab.utils.terminal import shown


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    # the flags of `train` hold for adapters, so its parser reads all but the protocol's own
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(cls=IncrementalCommand, context_settings=settings, add_help_option=False)(incremental)


def incremental(context: typer.Context, as_json: Json = False) -> None:
    """Compare methods on classes that come session by session; `peft-lab incremental --help` lists the flags."""
    if not context.args or {"-h", "--help"} & set(context.args):
        own_parser().print_help()
        raise typer.Exit()
    values = read_arguments(context.args)
    from peft_lab.protocols.incremental_options import IncrementalOptions

    IncrementalOptions.from_mapping(values, "the command line")  # before torch is imported
    from peft_lab.protocols.incremental import incremental as run
    from peft_lab.protocols.incremental_metrics import SUMMARIES
    from peft_lab.protocols.incremental_report import interval

    result = run(values)
    if as_json:
        print_json({"output_dir": str(result.output_dir), "summary": result.table, "records": result.records})
        return
    table = new_table("method", *SUMMARIES.values(), "orders")
    for row in result.table:
        table.add_row(row["method"], *[interval(row[name]) for name in SUMMARIES], str(row["orders"]))
    print_out(table)
    print_out(f"Report: {shown(result.output_dir / 'report.md')}")


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage and leaving."""

    def error(self, message: str) -> Any:
        raise ConfigError(message[0].upper() + message[1:] + ".")


def own_parser() -> argparse.ArgumentParser:
    """Flags that are the protocol's own; all values stay text."""
    from peft_lab.protocols.incremental_options import HELP, SEVERAL

    parser = _Parser(
        prog="peft-lab incremental",
        usage="peft-lab incremental [FILE.yaml] [--option value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compare methods on classes that come session by session. Flags of `peft-lab train` hold for the "
        "adapters.\n\n  peft-lab incremental --task banking77 --model_name_or_path minilm --method nearest_mean lora "
        "--steps 7 --max_steps 60 --output_dir out",
    )
    for name, text in HELP.items():
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "metavar": name.rsplit("_", 1)[-1].upper()}
        if name in SEVERAL:
            options |= {"nargs": "+", "action": "extend"}
        elif name == "overwrite_output_dir":
            options |= {"nargs": "?", "const": "true"}
        parser.add_argument(f"--{name}", **options)
    return parser


def read_arguments(argv: list[str]) -> dict[str, Any]:
    """Options of a command line, and of a file that it names.

    Raises:
        ConfigError: an unknown flag, or a file that cannot be read.
    """
    from peft_lab.protocols.incremental_options import HELP
    from peft_lab.runs.command_line import parse_arguments
    from peft_lab.runs.run_config import read_run_file

    tidy = [_with_underscores(token) for token in argv]
    own, rest = own_parser().parse_known_args(tidy)
    file, training = parse_arguments(rest)
    values = read_run_file(file) if file is not None else {}
    return {**values, **training, **{name: value for name, value in vars(own).items() if name in HELP}}


def _with_underscores(token: str) -> str:
    """Flag with underscores in place of dashes; other texts as they are."""
    name, equals, value = token.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if token.startswith("--") else token
