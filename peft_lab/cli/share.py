"""Commands `push`, `to-lora` and `export`.

The functions behind them are imported once the arguments are checked, because they import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_lab.cli.options import Adapter, Base, OtherBase
from peft_lab.cli.output import Json, print_json
from peft_lab.errors import ConfigError
from peft_lab.utils.text import visible


def register(app: typer.Typer) -> None:
    """Add the commands to the `peft-lab` command."""
    app.command()(push)
    app.command("to-lora")(to_lora)
    app.command()(export)


def push(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Folder that `peft-lab train` wrote.", show_default=False)
    ],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; private by default.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; main by default.")] = None,
    token: Annotated[str | None, typer.Option(help="Token; by default the one of `hf auth login`.")] = None,
    commit_message: Annotated[str | None, typer.Option("--commit_message", help="Title of the commit.")] = None,
    base_model: Annotated[
        str | None, typer.Option("--base_model", help="Hub id of the base, if the adapter names a local folder.")
    ] = None,
    comparison: Annotated[
        Path | None, typer.Option(help="Folder of the comparison that the run is of, if it lies elsewhere.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Push an adapter to the Hub with a filled card.

    It is private by default, without checkpoints and without local paths.
    """
    if comparison is not None:
        from peft_lab.comparison.report.run_standing import write_standing_in

        # before the push, because the card reads the standing from the run's folder
        write_standing_in(adapter, comparison)
    from peft_lab import push as run_push

    done = run_push(
        adapter,
        repo_id,
        not public,
        revision=revision,
        token=token,
        commit_message=commit_message,
        base_model=base_model,
    )
    if as_json:
        print_json({"repo_id": repo_id, "commit_url": str(done.commit_url)})
    else:
        typer.echo(visible(f"Pushed to {done.commit_url}"))


def to_lora(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter, or a Hub id.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder for the LoRA adapter.", show_default=False)],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Truncate to this rank; by default what an exact conversion needs.")
    ] = None,
    model_name_or_path: Base = None,
    as_json: Json = False,
) -> None:
    """Convert an adapter into a LoRA adapter that loads with peft alone."""
    from peft_lab.runs.run_folder import find_adapter, refuse_filled

    folder = find_adapter(adapter)
    refuse_filled(out)
    from peft_lab import to_lora as run_conversion

    done = run_conversion(folder, out, rank=rank, model_name_or_path=model_name_or_path)
    # the worst module tells how far a conversion at a smaller rank is from the original
    worst = max(done.errors, key=lambda name: done.errors[name])
    if as_json:
        print_json({"output_dir": str(out), "ranks": done.ranks, "relative_errors": done.errors})
        return
    text = (
        f"LoRA adapter written to {out}: {len(done.ranks)} modules, rank up to {max(done.ranks.values())}, "
        f"largest relative error {done.errors[worst]:.1e} ({worst})"
    )
    typer.echo(visible(text))
    # served models write text; a classifier's head is trained in full in any case
    if done.config.task_type == "CAUSAL_LM":
        typer.echo(visible(done.vllm))


def export(
    adapter: Adapter,
    out: Annotated[Path, typer.Argument(help="Folder for the graph.", show_default=False)],
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx.")] = False,
    torch_export: Annotated[bool, typer.Option("--torch-export", help="Write model.pt2, by torch.export.")] = False,
    model_name_or_path: Base = None,
    allow_other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Export a model, its adapter merged where the method merges, as a graph whose outputs are compared."""
    if onnx == torch_export:
        raise ConfigError("export writes one format: pass --onnx or --torch-export.")
    from peft_lab.runs.run_folder import find_adapter, refuse_filled

    folder = find_adapter(adapter)
    refuse_filled(out)
    from peft_lab.export.graph import TOLERANCE, to_onnx, to_torch_export

    run_export = to_onnx if onnx else to_torch_export
    done = run_export(folder, out, model_name_or_path, allow_other_base=allow_other_base)
    if as_json:
        found = {"file": str(done.file), "merged": done.merged, "inputs": done.inputs, "difference": done.difference}
        print_json({**found, "tolerance": TOLERANCE})
        return
    axes = ", ".join(f"{name} ({', '.join(map(str, sizes))})" for name, sizes in done.inputs.items())
    typer.echo(
        visible(
            f"Graph written to {done.file}, {'merged' if done.merged else 'with the adapter beside the weights'}: "
            f"{axes} -> logits; largest difference from the model {done.difference:.1e} (tolerance {TOLERANCE:.0e})"
        )
    )
