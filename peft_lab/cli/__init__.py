"""Command line, one file a group of commands."""

from __future__ import annotations

from peft_lab.utils.interruption import stopped_in_one_line


def main() -> None:
    """Run the command line; signals are handled while it is imported too."""
    with stopped_in_one_line():
        from peft_lab.cli.app import main as run

        run()


__all__ = ["main"]
