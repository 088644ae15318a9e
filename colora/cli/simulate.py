"""``colora simulate``."""

# pyright: reportMissingImports=false
# (in a checkout the other packages lie beside this one, where a type checker does not look)

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .exit_codes import STOPPED
from .recipes import find_recipe

if TYPE_CHECKING:
    from rich.console import Console

    from colora.common.config.schema import Recipe
    from colora.common.dataset import SiteDataset
    from colora.server.reporting.console import LiveDisplay
    from colora.server.reporting.summary import RunSummary
    from colora.server.rounds.run_options import Replay

MAX_SITES = 20  # more are counted, not listed


def simulate(
    recipe: Annotated[str | None, typer.Argument(show_default=False)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set a recipe key, for example train.lr=1e-3 or site.NAME.train=16. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the run folder.")] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Number of rounds. With --resume, a run can get more rounds.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="local (one process, the default), batched (several sites in one batch) or ray.")
    ] = None,
    baseline: Annotated[
        bool | None,
        typer.Option("--baseline/--no-baseline", help="Also train every site alone. Default: as the recipe says."),
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Train only the sites that this events.jsonl lists as admitted in each round.")
    ] = None,
    transfer_from: Annotated[
        Path | None, typer.Option(help="A finished run whose sites prepared a transfer. Needs --transfer-to.")
    ] = None,
    transfer_to: Annotated[
        str | None, typer.Option(help="The new base model for the sites of --transfer-from.")
    ] = None,
) -> None:
    """Simulate all sites of a federation on this machine.

    RECIPE is a .toml file, or demo (the default), mixed, newsgroups, r8, dissimilar, regression or chatterbot. With
    --resume and --out it can be left out: the run folder has its recipe. The final table shows what each site gains.
    """
    import json

    from rich.console import Console

    from colora.common.config.loader import load_recipe
    from colora.server.reporting.report import print_report
    from colora.server.rounds.run_options import read_replay

    changes = {"rounds": rounds, "simulation.engine": engine, "simulation.baseline": baseline}
    overrides = [*(set_ or []), *(f"{key}={json.dumps(value)}" for key, value in changes.items() if value is not None)]
    if transfer_from or transfer_to:
        settings = _transfer_recipe(transfer_from, transfer_to, recipe, overrides)
    else:
        settings = load_recipe(_recipe_path(recipe, out if resume else None), tuple(overrides))
    folder = out or Path("runs") / settings.name
    continues = resume and (folder / "recipe.toml").exists()  # with the rows in its folder
    if not continues:
        _check_start(settings, folder, resumes_nothing=resume and not (recipe or transfer_from))
    console = Console()
    replayed = read_replay(replay) if replay else None
    if resume and not continues:
        console.print(f"{folder} holds no run yet. Starting one.", highlight=False)
    summary = _run(settings, folder, console, replayed, resume=resume)
    print_report(summary, folder, console)  # with the sites' own words, which events.jsonl does not have
    _print_next_step(settings, folder, console)


def _check_start(settings: Recipe, folder: Path, *, resumes_nothing: bool) -> None:
    """Check what can be checked at once before a new run. Raises StateError or DataError."""
    from colora.common.errors import StateError
    from colora.server.reporting.run_folder import RunFolder

    if resumes_nothing:
        message = f"There is no run to resume in {folder}."
        raise StateError("--resume", "a run folder", folder, message=message, hint="Name its folder with --out.")
    RunFolder(folder).check_new()
    if settings.transfer.source_federation is None:
        _check_sources(settings)


def _run(settings: Recipe, folder: Path, console: Console, replay: Replay | None, *, resume: bool) -> RunSummary:
    """Run the simulation with a live display, and return what the display has gathered."""
    from colora.server.reporting.console import LiveDisplay
    from colora.server.reporting.run_folder import RunFolder

    try:
        with LiveDisplay(console) as display:
            from colora.simulation.run import LocalObserver  # imports torch, which takes seconds
            from colora.simulation.run import simulate as run_simulation

            for event in RunFolder(folder).events() if resume else ():
                display.summary.update(event)
            run_simulation(
                settings,
                folder,
                resume=resume,
                listener=display,
                replay=replay,
                terminal=LocalObserver(lambda sites: _show_rows(sites, display), display.progress.step, display.say),
            )
    except KeyboardInterrupt:
        typer.echo("Stopped. Run the same command with --resume to continue from the last completed round.", err=True)
        raise typer.Exit(STOPPED) from None
    return display.summary


def _recipe_path(recipe: str | None, resumed: Path | None) -> Path:
    """Return the path of the recipe: as named, that of the run to resume, or the demo's."""
    if recipe is None and resumed and (resumed / "recipe.toml").is_file():
        return resumed / "recipe.toml"
    return find_recipe(recipe or "demo")


def _check_sources(recipe: Recipe) -> None:
    """Check the files of all sites that can be checked at once. Raises DataError."""
    from colora.client.data.early_check import check_sources

    if recipe.partition is not None and not recipe.data.source.startswith("synthetic:"):
        check_sources(recipe.data, None)
    for site in recipe.site:
        check_sources(site.data, site.name)


def _show_rows(sites: Sequence[SiteDataset], display: LiveDisplay) -> None:
    """Print the rows of every site by label. They are shown on this terminal only."""
    from colora.client.data.label_counts import describe_rows

    for rows in sites[:MAX_SITES]:
        display.say(f"{rows.site}: {describe_rows(rows)}")
    if len(sites) > MAX_SITES:
        display.say(f"… and {len(sites) - MAX_SITES} more sites")


def _print_next_step(settings: Recipe, folder: Path, console: Console) -> None:
    """Print the commands that transfer the sites, if they have prepared it."""
    if settings.transfer.prepare:
        console.print(
            f"The sites can be transferred to another base model: colora transfer {folder}/sites/NAME --to MODEL "
            f"--out FOLDER for one site, colora simulate --transfer-from {folder} --transfer-to MODEL for all.",
            highlight=False,
            soft_wrap=True,
        )


def _transfer_recipe(old: Path | None, model: str | None, recipe: str | None, overrides: list[str]) -> Recipe:
    """The recipe of the run ``old`` with the base model that its sites are transferred to. Raises ConfigError."""
    import json

    from colora.common.config.loader import load_recipe, with_base_model
    from colora.common.errors import ConfigError

    if old is None:
        raise ConfigError(
            "--transfer-from", "a run folder", "nothing", message="--transfer-to needs --transfer-from, a run folder."
        )
    if model is None:
        raise ConfigError(
            "--transfer-to", "a base model", "nothing", message="--transfer-from needs --transfer-to, a base model."
        )
    if recipe:
        raise ConfigError(
            "RECIPE",
            f"none, as --transfer-from uses the recipe of {old}",
            recipe,
            message=f"RECIPE ({recipe}) cannot be combined with --transfer-from: the recipe is that of {old}.",
            hint="Change its keys with --set.",
        )
    if not (old / "recipe.toml").is_file():
        raise ConfigError(
            "--transfer-from",
            "the run folder of a simulation",
            old,
            message=f"--transfer-from {old} is not a run folder.",
        )
    source = f"simulation.source_run={json.dumps(str(old.resolve()))}"
    return with_base_model(load_recipe(old / "recipe.toml", (*overrides, source)), model)
