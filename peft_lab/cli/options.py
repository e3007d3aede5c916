"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Adapter = Annotated[str, typer.Argument(help="Folder that `peft-lab train` wrote, or a Hub id.", show_default=False)]
Base = Annotated[
    str | None, typer.Option("--model_name_or_path", help="Load this base instead of the one the adapter names.")
]
OtherBase = Annotated[
    bool, typer.Option("--allow_other_base", help="Warn instead of refusing if the base has other weights.")
]
BatchSize = Annotated[int, typer.Option("--per_device_eval_batch_size", help="Rows in one batch.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output and nothing else.")]
