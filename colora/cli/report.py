"""``colora report``."""

# pyright: reportMissingImports=false
# (in a checkout the other packages lie beside this one, where a type checker does not look)

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(show_default=False, metavar="RUN...")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write. Default: report.html in the run folder; of several runs, in this folder."),
    ] = None,
) -> None:
    """Write a page with charts and tables of a run, or of several runs beside each other.

    RUN is a run folder or its events.jsonl. The run may be unfinished. The page is one HTML file that needs no network.
    """
    from colora.common.errors import StateError
    from colora.server.reporting.page.build import write_page

    for run in runs:
        log = run if run.is_file() else run / "events.jsonl"
        if not log.is_file():
            raise StateError(
                "RUN",
                "a run folder with events.jsonl",
                run,
                message=f"{run} has no events.jsonl.",
                hint="Give a run folder, for example runs/demo, or its events.jsonl.",
            )
    folder = runs[0] if len(runs) == 1 else Path()
    target = out or (folder.parent if folder.is_file() else folder) / "report.html"
    for sentence in write_page(runs, target):
        typer.echo(sentence, err=True)
    typer.echo(f"Report: {target}")
