"""The commands of a deployment: ``colora server``, ``client``, ``provision`` and ``status``."""

# pyright: reportMissingImports=false
# (in a checkout the other packages lie beside this one, where a type checker does not look)

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from .exit_codes import STOPPED, UNHEALTHY
from .recipes import find_recipe

COMPONENTS = ("trainer", "supernode")


def server(
    recipe: Annotated[str, typer.Argument(show_default=False)],
    keys: Annotated[Path | None, typer.Option(help="The coordinator's folder, as written by colora provision.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 9443,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/NAME.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Set a recipe key, for example train.lr=1e-3. Repeatable.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Number of rounds. A run can get more rounds, even after its end.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Run without TLS and keys. For trials on one machine.")
    ] = False,
    transfer_to: Annotated[
        str | None, typer.Option(help="Transfer the sites of RECIPE to this base model. They must have prepared it.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve metrics for Prometheus at this port of 127.0.0.1.")
    ] = None,
) -> None:
    """Run the coordinator of a federation.

    RECIPE is a .toml file or the name of a shipped recipe. Its [[site]] tables name the sites; their data is configured
    at the sites. Run the same command again after any interruption: it continues from the last completed round.
    """
    from rich.console import Console

    from colora.common.config.loader import load_recipe, with_base_model
    from colora.common.prometheus import serve_metrics
    from colora.server.deployment.supervisor import ServerJob, read_keys, run_server
    from colora.server.reporting.console import LiveDisplay
    from colora.server.reporting.report import print_report
    from colora.server.reporting.run_folder import RunFolder
    from colora.server.reporting.run_metrics import run_metrics

    _check_keys(keys, insecure=insecure)
    overrides = (*(set_ or ()), *([f"rounds={rounds}"] if rounds else ()))
    settings = load_recipe(find_recipe(recipe), overrides)
    settings = with_base_model(settings, transfer_to) if transfer_to else settings
    folder, console = out or Path("runs") / settings.name, Console()
    job = ServerJob(settings, folder, host, port, read_keys(keys) if keys else None)
    if metrics_port is not None:
        metrics_port = serve_metrics(metrics_port, run_metrics(folder))
        console.print(f"Metrics: http://127.0.0.1:{metrics_port}/metrics", highlight=False)
    with LiveDisplay(console) as display:
        for event in RunFolder(folder).events():
            display.summary.update(event)
        finished = run_server(job, display)
    if not finished:
        typer.echo("Stopped. Run the same command to continue from the last completed round.", err=True)
        raise typer.Exit(STOPPED)
    print_report(display.summary, folder, console)


def _check_keys(keys: Path | None, *, insecure: bool) -> None:
    from colora.common.errors import ConfigError

    if (keys is None) != insecure:
        raise ConfigError(
            "--keys",
            "a folder of keys, or --insecure for none",
            "both" if keys else "neither",
            message="--keys and --insecure exclude each other." if keys else "Neither --keys nor --insecure was given.",
            hint="Give --keys with the folder that colora provision wrote, or --insecure for a trial on one machine.",
        )


def client(
    site: Annotated[Path, typer.Argument(show_default=False, metavar="SITE.toml")],
    check: Annotated[bool, typer.Option("--check", help="Validate the setup and exit.")] = False,
    model: Annotated[str | None, typer.Option(help="With --check: the base model to check.")] = None,
    recipe: Annotated[str | None, typer.Option(help="With --check: compare this recipe with [allow].")] = None,
    component: Annotated[
        str | None, typer.Option(help="Run only one of the two processes: trainer or supernode. For containers.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve metrics for Prometheus at this port of 127.0.0.1.")
    ] = None,
) -> None:
    """Take part in a federation as one site.

    SITE.toml is the site file that colora provision wrote. The command runs the trainer and the SuperNode, and restarts
    them when they fail, until it is stopped.
    """
    from rich.console import Console

    from colora.common.errors import ConfigError

    console = Console()
    if component not in (None, *COMPONENTS):
        raise ConfigError(
            "--component",
            "trainer or supernode",
            repr(component),
            message=f"--component must be trainer or supernode, not {component!r}.",
        )
    if not check and (recipe or model):
        option = "--recipe" if recipe else "--model"
        message = f"{option} has an effect with --check only."
        raise ConfigError(option, "--check as well", "no --check", message=message, hint="Add --check.")
    if check:
        from colora.client.deployment.checks.preflight import preflight, print_checks

        path = find_recipe(recipe) if recipe else None
        raise typer.Exit(print_checks(preflight(site, model, component, path), console))  # type: ignore[arg-type]
    from colora.client.deployment.supervisor import run_site
    from colora.common.config.loader import load_site
    from colora.server.reporting.site_tracking import SiteTrackers

    def tell(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    with contextlib.nullcontext() if component == "supernode" else SiteTrackers(load_site(site), tell):
        run_site(site, tell, component, metrics_port)  # type: ignore[arg-type]


def provision(
    sites: Annotated[Path, typer.Argument(show_default=False, metavar="SITES.toml")],
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("keys"),
    add: Annotated[
        bool, typer.Option("--add", help="Add keys for the sites that the folder does not have yet.")
    ] = False,
) -> None:
    """Create keys, certificates and site files for a coordinator and its sites.

    SITES.toml has a table [coordinator] with address = "host:port", and one [[site]] table with a name per site.
    Existing files are never overwritten. With --add, roster.pub gets the new sites in every folder that is still there.
    """
    from colora.server.deployment.provisioning.provision import provision as write

    new = write(sites, out, add=add)
    if add:
        typer.echo(f"Added to {out}: {', '.join(new)}" if new else f"{out} already has keys for all these sites.")
    else:
        typer.echo(f"{out}: a certificate authority, the coordinator's certificate, and keys for {', '.join(new)}")
    for name in new:
        typer.echo(f"  {out / 'sites' / name}: send to site {name}, which completes its site.toml")
    if new and add:
        typer.echo(f"  {out / 'coordinator' / 'sites'}: the public keys, for the coordinator")
        typer.echo(f"  {out / 'roster.pub'}: for the coordinator and every site, if they use secure aggregation")
    elif new:
        typer.echo(f"  {out / 'coordinator'}: copy to the coordinator")
        typer.echo(f"  {out / 'ca.key'}: signs further sites (--add); keep it on neither the coordinator nor a site")


def status(
    run: Annotated[Path | None, typer.Argument(show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the status of a run or of a site.

    RUN is a run folder (default: the newest in runs/), a site.toml or a site's state folder. The exit code is 0 when
    the run is healthy or finished, and 1 when something needs a person: a service is down, the run makes no progress,
    or a site's last answer was an error.
    """
    import json

    from rich.console import Console

    from colora.client.deployment.status import show_site, site_file, site_status
    from colora.common.errors import StateError
    from colora.server.deployment.status import is_run, newest_run, run_status, show_run

    place = newest_run(Path("runs")) if run is None else run
    site = None if is_run(place) else site_file(place)
    if site is None and not is_run(place):
        raise StateError(
            "RUN",
            "a run folder, a site.toml or a site's state folder",
            place,
            message=f"{place} is neither a run folder nor a site.",
            hint="Give a run folder, a site.toml or a site's state folder.",
        )
    if site:
        at_site = site_status(site)
        typer.echo(json.dumps(at_site.as_dict(), indent=1)) if as_json else show_site(at_site, Console())
        raise typer.Exit(0 if at_site.healthy else UNHEALTHY)
    of_run = run_status(place)
    typer.echo(json.dumps(of_run.as_dict(), indent=1)) if as_json else show_run(of_run, Console())
    raise typer.Exit(0 if of_run.healthy else UNHEALTHY)
