"""``colora transfer``."""

# pyright: reportMissingImports=false
# (in a checkout the other packages lie beside this one, where a type checker does not look)

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .exit_codes import STOPPED


def transfer(
    state: Annotated[Path, typer.Argument(show_default=False)],
    to: Annotated[str, typer.Option(help="The new base model: a hub id, a local folder, or asset:NAME.")],
    out: Annotated[Path, typer.Option(help="Folder to write. Run the same command again to continue.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Set a recipe key, for example transfer.samples=100. Repeatable.")
    ] = None,
) -> None:
    """Transfer a personalized model to a new base model without its data.

    STATE is the folder of a site that prepared the transfer: transfer.prepare = true in the recipe of a finished run.
    """
    from rich.console import Console

    from colora.client.artifacts.transfer import transfer as run_transfer
    from colora.client.artifacts.transfer import transfer_plan
    from colora.client.artifacts.transfer_progress import TransferProgress
    from colora.common.models.saved import read_saved_model

    saved = read_saved_model(state)
    plan = transfer_plan(saved, to, tuple(set_ or []))
    try:
        with TransferProgress(Console()) as progress:
            result = run_transfer(saved, plan, out, on_progress=progress.on_progress, on_step=progress.on_step)
    except KeyboardInterrupt:
        typer.echo("Stopped. Run the same command to continue with the texts written so far.", err=True)
        raise typer.Exit(STOPPED) from None
    typer.echo(f"{result.state}: trained on {result.examples} generated examples in {result.seconds:.0f} s")
    if result.examples < result.requested:
        calls = plan.transfer.generator.max_calls
        typer.echo(
            f"  {result.requested} examples were requested. The generator used all {calls} calls "
            "(transfer.generator.max_calls), or answers were empty."
        )
    if result.agreement is not None:
        typer.echo(f"  The new model agrees with the old one on {result.agreement:.0%} of them.")
    typer.echo(f"  Use {out} with colora export, colora predict and colora transfer.")
