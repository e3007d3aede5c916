"""Flags of `peft-lab train`, one for each option. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from peft_lab.errors import ConfigError, did_you_mean
from peft_lab.runs.data_flags import data_flags
from peft_lab.runs.optimization import NAMES
from peft_lab.runs.run_config import FALSE, REFUSED, TRUE, RunConfig, training_argument_fields

#: Flags that start several processes, which are no options of the run, with their help.
LAUNCH = {
    "accelerate_config": "Train in several processes: cpu, multi_gpu, fsdp2, zero2, zero3, or a config of accelerate.",
    "num_processes": "Number of these processes, if not that of the config or one per GPU.",
}

#: Flags of all commands for what they print, which the command line takes before this parser, with their help.
OUTPUT = {
    "json": "Print one JSON document to standard output and nothing else.",
    "quiet": "Print warnings, errors and the result alone.",
    "verbose": "Print what peft-lab and transformers do as well.",
}


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of printing its usage and leaving."""

    def error(self, message: str) -> Any:
        raise ConfigError(message[0].upper() + message[1:] + ".")


def argument_parser() -> argparse.ArgumentParser:
    """Flags of `peft-lab train`: our own, and those of TrainingArguments.

    All values stay text.
    """
    # options that are not given must be absent, else their defaults would win over the run file
    parser = _Parser(
        prog="peft-lab train",
        usage="peft-lab train [RUN.yaml] [--option value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train an adapter: flags, a YAML or JSON file, or both (flags win).\n\n"
        "  peft-lab train --task snips --model_name_or_path minilm --method svfit --method_args rank=full "
        "--output_dir out\n  peft-lab train run.yaml --learning_rate 1e-3",
    )
    parser.add_argument(
        "run_file", nargs="?", default=None, metavar="RUN.yaml", help="A file with any of these options."
    )
    own = parser.add_argument_group("the run")
    optimization = parser.add_argument_group("the optimization")
    for spec in fields(RunConfig):
        if spec.name != "training_arguments":
            several = str(spec.type).startswith(("dict", "list"))
            group = optimization if spec.name in NAMES else own
            _add(group, spec.name, str(spec.type), spec.metadata["help"], several)
    data = parser.add_argument_group("your own data, for which a task file is written")
    for name, text in data_flags().items():
        _add(data, name, "", text, several=False)
    start = parser.add_argument_group("several processes")
    for name, text in LAUNCH.items():
        _add(start, name, "", text, several=False)
    output = parser.add_argument_group("output")
    for name, text in OUTPUT.items():
        output.add_argument(f"--{name}", action="store_true", help=text)
    trainer = parser.add_argument_group("flags of transformers.TrainingArguments")
    for name, spec_ in training_argument_fields().items():
        if name != "output_dir" and name not in REFUSED:
            text = spec_.help + (" By default the method's own." if name == "learning_rate" else "")
            _add(trainer, name, spec_.annotation, text, several="list" in spec_.annotation)
    _add(trainer, "do_train", "bool", "Accepted for habit: this command always trains.", several=False)
    return parser


def _add(group: Any, name: str, annotation: str, text: str, several: bool) -> None:
    options: dict[str, Any] = {"help": text.replace("%", "%%").strip(), "metavar": name.rsplit("_", 1)[-1].upper()}
    if several:
        options |= {"nargs": "+", "action": "extend"}
    elif _is_flag(annotation):
        options |= {"nargs": "?", "const": "true"}
    group.add_argument(f"--{name}", **options)


def _is_flag(annotation: str) -> bool:
    return "bool" in {part.strip() for part in annotation.split("|")}


def pop_launch(values: dict[str, Any]) -> tuple[str, int | None] | None:
    """Take the flags that start several processes out of parsed ones.

    Returns:
        Name or path of the config and number of processes; None if the run is to be trained in this process.

    Raises:
        ConfigError: the number is none, or has no config.
    """
    name, count = (values.pop(flag, None) for flag in LAUNCH)
    if count is not None and (not count.isdecimal() or int(count) < 1):
        raise ConfigError(f"--num_processes must be a number from 1 on, not {count}.")
    if name is None and count is not None:
        raise ConfigError("--num_processes goes with --accelerate_config, which says how they train together.")
    return None if name is None else (name, None if count is None else int(count))


def parse_arguments(argv: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Split the command line of `train` into run file and options.

    Boolean flags work both ways (`--bf16`, `--bf16 true`), dashes count as underscores, and an unknown flag raises
    `ConfigError` with the nearest known one.
    """
    parser = argument_parser()
    # argparse has no public list of its options
    known = {option.lstrip("-"): action for action in parser._actions for option in action.option_strings}
    tidy: list[str] = []
    for index, token in enumerate(argv):
        if not token.startswith("--") or token == "--":
            tidy.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        if name.endswith("_column_name") and name.removesuffix("_name") in known:
            name = name.removesuffix("_name")  # as some of the example scripts call it
        # argparse itself would name no near option, and take `--learning-rate` for an unknown one
        if name not in known:
            near = did_you_mean(name, known).replace('"', "", 1).replace('"', "", 1)
            raise ConfigError(f"Unknown option --{name}.{near.replace('mean ', 'mean --')}")
        following = argv[index + 1] if index + 1 < len(argv) else ""
        if known[name].nargs == "?" and not equals and following.lower() not in (*TRUE, *FALSE, "none"):
            equals, value = "=", "true"  # else argparse would take a following run file for the flag's value
        tidy.append(f"--{name}{equals}{value}")
    values = vars(parser.parse_args(tidy))
    return values.pop("run_file"), values
