"""The commands that use a trained model: ``colora export``, ``predict`` and ``personalize``."""

# pyright: reportMissingImports=false
# (in a checkout the other packages lie beside this one, where a type checker does not look)

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .progress import progress

PARTS = ("shared", "personal")

GroupOption = Annotated[
    int | None,
    typer.Option(min=1, help="Group of sites, if the run has several: 1 is the largest. See the event `grouped`."),
]

RoundOption = Annotated[
    int | None,
    typer.Option(
        "--round",
        min=1,
        help="Use the model of this round; the last + 1 is the final one. Default: the newest. See train.keep_states.",
    ),
]


def export(
    state: Annotated[Path, typer.Argument(show_default=False)],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write a full model instead of an adapter.")] = False,
    only: Annotated[
        str | None, typer.Option(help="shared (what all sites have) or personal (what this site adds).")
    ] = None,
    group: GroupOption = None,
    round_number: RoundOption = None,
) -> None:
    """Export a personalized model as a stock PEFT adapter.

    STATE is a site's folder or one of its state files. With --only shared it can also be a run folder or a checkpoint.
    Transformers and PEFT load the export without colora.
    """
    from colora.client.artifacts.export import export as write
    from colora.common.errors import ConfigError
    from colora.common.models.saved import read_saved_model

    if only not in (None, *PARTS):
        raise ConfigError(
            "--only", "shared or personal", repr(only), message=f"--only must be shared or personal, not {only!r}."
        )
    saved = read_saved_model(state, group, round_number)
    with progress(f"writing {out}"):
        written = write(saved, out, only or "all", merge=merge)  # type: ignore[arg-type]
    typer.echo(written.about(out, merged=merge))


def predict(
    state: Annotated[Path, typer.Argument(show_default=False)],
    source: Annotated[Path, typer.Option("--input", help="Rows to read, in a file that a recipe can name.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write: .jsonl, .csv or .tsv. Default: the terminal.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="The column to read. Default: the one that the model was trained on.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's evaluation.batch_size.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, …")] = "auto",
    round_number: RoundOption = None,
) -> None:
    """Predict with a personalized model: labels with probabilities, or text.

    STATE is a site's folder or one of its state files.
    """
    from colora.client.artifacts.predict import predict_file, render, trained_columns, write_rows
    from colora.common.models.saved import read_saved_model
    from colora.common.tasks.columns import listed

    saved = read_saved_model(state, round_number=round_number)
    columns = trained_columns(saved)
    if column:
        columns = dataclasses.replace(columns, text=column, prompt=column, messages=None)
    render([], out.suffix if out else ".jsonl")  # refuse an unknown ending before the work
    with progress("predicting", "rows") as on_row:
        found = predict_file(saved, source, columns, device=device, batch_size=batch_size, on_row=on_row)
    count = len(found.rows)
    if out:
        write_rows(found.rows, out)
        typer.echo(f"{out}: {count - len(found.blank)} predictions")
    else:
        typer.echo(render(found.rows, ".jsonl"), nl=False)
    if found.truncated:
        typer.echo(f"{found.truncated} of {count} inputs were truncated to the model's max_length.", err=True)
    if found.blank:
        typer.echo(
            f"{len(found.blank)} of {count} rows are blank and have no prediction: {listed(found.blank)}.", err=True
        )
    for note in found.notes:
        typer.echo(f"{note}.", err=True)


def personalize(
    site: Annotated[Path, typer.Argument(show_default=False, metavar="SITE.toml")],
    source: Annotated[Path, typer.Option("--from", help="A finished run's folder or its last checkpoint.")],
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimizer steps. Default: train.final_steps or, where that is 0, all rounds' steps."),
    ] = None,
    group: GroupOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite a result of another adapter or of other settings.")
    ] = False,
) -> None:
    """Personalize a finished shared adapter for a new site.

    Trains the site's core, head and private adapter on its own data with A and B frozen. SITE.toml needs a name and a
    [data] table. Nothing is sent anywhere.
    """
    from rich.console import Console

    from colora.client.personalize import personalize as train
    from colora.client.personalize import print_result
    from colora.common.config.loader import load_site
    from colora.common.models.saved import read_saved_model

    settings, saved = load_site(site), read_saved_model(source, group)
    with progress("personalizing", "steps") as on_step:
        result = train(settings, saved, steps=steps, replace=replace, on_step=on_step)
    print_result(result, Console())
