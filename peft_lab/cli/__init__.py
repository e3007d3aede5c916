"""Command line, one file a group of commands."""

from peft_lab.cli.app import main

__all__ = ["main"]
