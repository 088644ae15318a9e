"""The commands. Heavy imports wait until a command needs them."""

# pyright: reportMissingImports=false
# (in a checkout the rooms stand beside this package, which a type checker cannot know)

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from colora.common.config.schema import Recipe

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
UNHEALTHY, BAD_INPUT, STOPPED = 1, 2, 130

app = typer.Typer(
    help="Federated fine-tuning of foundation models in which every site keeps its own model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from colora import __version__

        typer.echo(f"colora {__version__}")
        raise typer.Exit()


@app.command()
def simulate(
    recipe: Annotated[str | None, typer.Argument(show_default=False)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change a key: train.lr=1e-3. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    engine: Annotated[str | None, typer.Option(help="local (default: one process) or ray (several).")] = None,
    baseline: Annotated[
        bool | None,
        typer.Option("--baseline/--no-baseline", help="Also train every site alone; default: as in the recipe."),
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="An events.jsonl: ask only the sites that it says were admitted.")
    ] = None,
    transfer_from: Annotated[
        Path | None, typer.Option(help="A run whose sites prepared: its recipe on the model of --transfer-to.")
    ] = None,
    transfer_to: Annotated[str | None, typer.Option(help="The new base model of --transfer-from.")] = None,
) -> None:
    """Play all sites of a federation on this machine.

    RECIPE is a .toml file, or demo (the default), newsgroups, dissimilar, regression or chatterbot. At the end a table
    shows what each site gains.
    """
    from rich.console import Console

    from colora.common.config.loader import load_recipe
    from colora.server.reporting.console import LiveDisplay, print_report
    from colora.server.reporting.summary import summarize
    from colora.server.rounds.run_options import read_replay
    from colora.simulation.run import simulate as run_simulation

    overrides = [*(set_ or [])]
    overrides += [f'simulation.engine="{engine}"'] if engine else []
    overrides += [f"simulation.baseline={str(baseline).lower()}"] if baseline is not None else []
    if transfer_from or transfer_to:
        settings = _moved_recipe(transfer_from, transfer_to, recipe, overrides)
    else:
        settings = load_recipe(find_recipe(recipe or "demo"), tuple(overrides))
    folder = out or Path("runs") / settings.name
    console = Console()
    log = read_replay(replay) if replay else None
    if resume and not (folder / "recipe.toml").exists():
        console.print(f"No run in {folder} yet: starting one.", highlight=False)
    try:
        with LiveDisplay(console) as screen:
            run = run_simulation(settings, folder, resume=resume, listener=screen, replay=log)
    except KeyboardInterrupt:
        typer.echo(
            "Stopped. The same command with --resume goes on from the last round and the texts that are written.",
            err=True,
        )
        raise typer.Exit(STOPPED) from None
    print_report(summarize(run.events()), run.path, console)
    if settings.transfer.prepare:
        one = f"colora transfer {run.path}/sites/NAME --to MODEL --out FOLDER"
        every = f"colora simulate --transfer-from {run.path} --transfer-to MODEL"
        console.print(f"Prepared for another base model: {one}, or {every}", highlight=False, soft_wrap=True)


def _moved_recipe(old: Path | None, model: str | None, recipe: str | None, overrides: list[str]) -> Recipe:
    """The recipe of the run ``old`` on the base model to which its sites move. Raises ConfigError."""
    import json

    from colora.common.config.loader import load_recipe, with_base_model
    from colora.common.errors import ConfigError

    if old is None:
        raise ConfigError("--transfer-from", "the run folder whose sites move to --transfer-to", "nothing")
    if model is None:
        raise ConfigError("--transfer-to", "the base model that the sites of --transfer-from move to", "nothing")
    if recipe:
        raise ConfigError("RECIPE", f"none: it is that of {old}, and --set changes its keys", recipe)
    if not (old / "recipe.toml").is_file():
        raise ConfigError("--transfer-from", "the run folder of a simulation", old)
    states = f"simulation.source_run={json.dumps(str(old.resolve()))}"
    return with_base_model(load_recipe(old / "recipe.toml", (*overrides, states)), model)


@app.command()
def server(
    recipe: Annotated[str, typer.Argument(show_default=False)],
    keys: Annotated[Path | None, typer.Option(help="The coordinator's folder that colora provision wrote.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 9443,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change a key: rounds=20. Repeatable.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Neither TLS nor keys: trials on one machine.")] = False,
    transfer_to: Annotated[
        str | None, typer.Option(help="A new base model: the sites of RECIPE, which prepared, move to it.")
    ] = None,
) -> None:
    """Lead a federation whose sites run elsewhere.

    RECIPE is as for simulate; its [[site]] tables name the sites (their data are the sites' own business). The same
    command goes on after any interruption.
    """
    from rich.console import Console

    from colora.common.config.loader import load_recipe, with_base_model
    from colora.common.errors import ConfigError
    from colora.server.deployment.supervisor import ServerJob, read_keys, run_server
    from colora.server.reporting.console import LiveDisplay, print_report
    from colora.server.reporting.run_folder import RunFolder

    if (keys is None) != insecure:
        raise ConfigError("--keys", "a folder of keys, or --insecure for none", "both" if keys else "neither")
    settings = load_recipe(find_recipe(recipe), tuple(set_ or []))
    settings = with_base_model(settings, transfer_to) if transfer_to else settings
    folder, console = out or Path("runs") / settings.name, Console()
    post = ServerJob(settings, folder, host, port, read_keys(keys) if keys else None)
    with LiveDisplay(console) as screen:
        for event in RunFolder(folder).events():
            screen.summary.update(event)
        ended = run_server(post, screen)
    if not ended:
        typer.echo("Stopped. The same command goes on from the last round.", err=True)
        raise typer.Exit(STOPPED)
    print_report(screen.summary, folder, console)


@app.command()
def client(
    site: Annotated[Path, typer.Argument(show_default=False)],
    check: Annotated[bool, typer.Option("--check", help="Look whether all is well, and do nothing.")] = False,
    model: Annotated[str | None, typer.Option(help="For --check: the base model to look at.")] = None,
    only: Annotated[str | None, typer.Option(help="trainer or node: one of the two processes, for containers.")] = None,
    personalize: Annotated[
        Path | None, typer.Option(help="A finished run's folder or checkpoint: fit this site's core to it, and end.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="For --join-core: optimiser steps.")] = None,
) -> None:
    """Take part in a federation as one site.

    SITE is the site.toml that colora provision wrote. Trainer and SuperNode are kept running until this is stopped.
    """
    from rich.console import Console

    from colora.common.errors import ConfigError

    console = Console()
    if only not in (None, "trainer", "node"):
        raise ConfigError("--only", "trainer or node", repr(only))
    if check:
        from colora.client.deployment.checks.preflight import preflight, print_checks

        raise typer.Exit(print_checks(preflight(site, model, only), console))  # type: ignore[arg-type]
    if personalize:
        from colora.client.personalize import personalize as join
        from colora.client.personalize import print_result
        from colora.common.config.loader import load_site
        from colora.common.models.saved import read_saved_model

        print_result(join(load_site(site), read_saved_model(personalize), steps=steps), console)
        return
    from colora.client.deployment.supervisor import run_site

    run_site(site, lambda text: console.print(text, highlight=False, soft_wrap=True), only)  # type: ignore[arg-type]


@app.command()
def export(
    state: Annotated[Path, typer.Argument(show_default=False)],
    out: Annotated[Path, typer.Option(help="New folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="Write a full model instead of an adapter.")] = False,
    only: Annotated[
        str | None, typer.Option(help="shared (what all sites have) or personal (what this one adds).")
    ] = None,
) -> None:
    """Write a personalised model as a PEFT adapter that transformers and PEFT load without colora.

    STATE is a site's folder or one of its state files; with --only shared also a run folder or checkpoint.
    """
    from colora.client.artifacts.export import export as write
    from colora.common.errors import ConfigError
    from colora.common.models.saved import read_saved_model

    if only not in (None, "shared", "personal"):
        raise ConfigError("--only", "shared or personal", repr(only))
    written = write(read_saved_model(state), out, only or "all", merge=merge)  # type: ignore[arg-type]
    typer.echo(written.about(out, merged=merge))


@app.command()
def predict(
    state: Annotated[Path, typer.Argument(show_default=False)],
    source: Annotated[Path, typer.Option("--input", help="Rows: .jsonl, .csv, .tsv or .parquet.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write: .jsonl, .csv or .tsv. Default: the terminal.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column to read, where it is not text or prompt.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's evaluation.batch_size.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, …")] = "auto",
) -> None:
    """Let a personalised model answer: labels with probabilities, or text.

    STATE is a site's folder or one of its state files.
    """
    from colora.client.artifacts.predict import predict_file, render, write_rows
    from colora.common.config.schema import DataSettings
    from colora.common.models.saved import read_saved_model

    columns = DataSettings(text=column or "text", prompt=column or "prompt")
    render([], out.suffix if out else ".jsonl")  # a wrong ending is told before the work
    rows, cut = predict_file(read_saved_model(state), source, columns, device=device, batch_size=batch_size)
    if out:
        write_rows(rows, out)
        typer.echo(f"{out}: {len(rows)} predictions")
    else:
        typer.echo(render(rows, ".jsonl"), nl=False)
    if cut:
        typer.echo(f"{cut} of {len(rows)} inputs were longer than the model's max_length and were cut", err=True)


@app.command()
def transfer(
    state: Annotated[Path, typer.Argument(show_default=False)],
    to: Annotated[str, typer.Option(help="The new base model: a hub id, a local folder, or asset:NAME.")],
    out: Annotated[Path, typer.Option(help="Folder to write; the same command goes on after an interruption.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: transfer.samples=100. Repeatable.")
    ] = None,
) -> None:
    """Move a personalised model to a new base model without its data.

    STATE is the folder of a site that prepared for this: transfer.prepare = true in the recipe of a run that has ended.
    """
    from rich.console import Console

    from colora.client.artifacts.transfer import transfer as move
    from colora.client.artifacts.transfer import transfer_plan
    from colora.client.artifacts.transfer_progress import TransferProgress
    from colora.common.models.saved import read_saved_model

    saved = read_saved_model(state)
    plan = transfer_plan(saved, to, tuple(set_ or []))
    try:
        with TransferProgress(Console()) as bar:
            done = move(saved, plan, out, watch=bar.on_progress, steps=bar.on_step)
    except KeyboardInterrupt:
        typer.echo("Stopped. The same command goes on with the texts that are written.", err=True)
        raise typer.Exit(STOPPED) from None
    typer.echo(f"{done.state}: learnt from {done.examples} written examples in {done.seconds:.0f} s")
    if done.examples < done.wanted:
        why = f"the generator's {plan.transfer.generator.max_calls} calls (transfer.generator.max_calls) were used up, or answers were empty"
        typer.echo(f"  of {done.wanted} wanted: {why}")
    if done.agreement is not None:
        typer.echo(f"  the new model answers {done.agreement:.0%} of them as the old one does")
    typer.echo(f"  colora export {out}, colora predict {out} and colora transfer {out} take it as any site's model")


@app.command()
def provision(
    sites: Annotated[Path, typer.Argument(show_default=False, metavar="SITES.toml")],
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("keys"),
    add: Annotated[bool, typer.Option("--add", help="Add the sites that the folder does not have yet.")] = False,
) -> None:
    """Make keys, certificates and site files for a coordinator and its sites.

    SITES.toml has a table [coordinator] with address = "host:port", and a table [[site]] with a name for every site.
    Nothing that exists is overwritten.
    """
    from colora.server.deployment.provisioning.provision import provision as write

    new = write(sites, out, add=add)
    if add:
        typer.echo(f"Added to {out}: {', '.join(new)}" if new else f"{out} has all these sites already")
    else:
        typer.echo(f"{out}: an authority, the coordinator's certificate, and keys for {', '.join(new)}")
    for name in new:
        typer.echo(f"  {out / 'sites' / name} goes to site {name}, which fills in its site.toml")
    if new and add:
        typer.echo(f"  {out / 'coordinator' / 'sites'} has their public keys, for the coordinator")
    elif new:
        typer.echo(f"  {out / 'coordinator'} goes to the coordinator")
        typer.echo(f"  {out / 'ca.key'} signs further sites (--add): keep it where neither of them is")


@app.command()
def status(
    run: Annotated[Path | None, typer.Argument(show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Show how a run or a site stands.

    RUN is a run folder (default: the newest below runs/), a site.toml or a site's state folder. Ends with 0 when all is
    well or the run is over, with 1 when something is down or stands still.
    """
    import json

    from rich.console import Console

    from colora.client.deployment.status import show_site, site_file, site_status
    from colora.common.errors import StateError
    from colora.server.deployment.status import is_run, newest_run, run_status, show_run

    place = newest_run(Path("runs")) if run is None else run
    site = None if is_run(place) else site_file(place)
    if site is None and not is_run(place):
        raise StateError("RUN", "a run folder, a site.toml or a site's state folder", place)
    found = site_status(site) if site else run_status(place)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))
    elif site:
        show_site(found, Console())
    else:
        show_run(found, Console())
    raise typer.Exit(0 if found.healthy else UNHEALTHY)


def find_recipe(name: str) -> Path:
    """A recipe by path, or by the name of one that comes with colora."""
    from colora.common.errors import ConfigError

    if Path(name).suffix == ".toml" or os.sep in name:
        return Path(name)
    shipped = {path.stem: path for folder in _recipe_folders() for path in sorted(folder.glob("*.toml"))}
    if name not in shipped:
        raise ConfigError("recipe", f"a .toml file or one of {', '.join(sorted(shipped))}", repr(name))
    return shipped[name]


def _recipe_folders() -> list[Path]:
    here = Path(__file__).resolve().parent
    return [folder for folder in (here / "recipes", here.parent / "recipes") if folder.is_dir()][:1]


def main() -> None:
    """Runs the command line: a user's mistake is one line and exit code 2, never a stack trace."""
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    try:
        app(standalone_mode=True)
    except Exception as error:
        from colora.common.errors import ColoraError

        if not isinstance(error, ColoraError):
            raise
        print(f"colora: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
