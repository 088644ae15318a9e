"""``colora watch``."""

# pyright: reportMissingImports=false
# (in a checkout the other packages lie beside this one, where a type checker does not look)

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

NICENESS = 10  # the run goes first


def watch(
    run: Annotated[Path | None, typer.Argument(show_default=False, metavar="[RUN]")] = None,
    site: Annotated[
        Path | None, typer.Option(help="Instead of RUN: a site.toml, for the federation that this site works for.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on. Default: a free one.")] = 0,
) -> None:
    """Show the report of a run in a browser while the run goes on.

    RUN is a run folder. With --site, the page shows what this site did and measured. The page changes with the run.
    Only the address that this command prints shows it. Stop with Ctrl-C; the run is not affected.
    """
    import socket

    import uvicorn

    from colora.common.errors import ConfigError
    from colora.server.reporting.watch import make_app, new_token

    run = _run_folder(run, site)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        message = f"Cannot listen on {host}:{port}: {error.strerror or error}."
        raise ConfigError("--port", "a free port", port, message=message, hint="Choose another --port.") from None
    os.nice(NICENESS)
    token, name = new_token(), f"[{host}]" if ":" in host else host
    typer.echo(f"Watching {run}: http://{name}:{listener.getsockname()[1]}/{token}/")
    config = uvicorn.Config(make_app(run, token), log_level="error", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


def _run_folder(run: Path | None, site: Path | None) -> Path:
    """Return the run folder to watch, or the site's state folder of the federation with the newest event."""
    from colora.common.config.loader import load_site
    from colora.common.errors import ConfigError, StateError

    if (run is None) == (site is None):
        found = "neither" if run is None else "both"
        message = "Give either RUN or --site." if run is None else "RUN and --site exclude each other."
        raise ConfigError("RUN", "a run folder, or --site with a site file", found, message=message)
    if run is not None:
        if not run.is_dir():
            message, hint = f"{run} is not a run folder.", "Give a run folder, for example runs/demo."
            raise StateError("RUN", "a run folder", run, message=message, hint=hint)
        return run
    settings = load_site(site)  # type: ignore[arg-type]
    logs = sorted(Path(settings.trainer.state).glob("*/events.jsonl"), key=lambda log: log.stat().st_mtime)
    if not logs:
        message = f"The site {settings.name} has not worked for a federation yet."
        hint = "Start colora client, and run this command when the federation has begun."
        raise StateError("--site", "a federation", "none", site=settings.name, message=message, hint=hint)
    return logs[-1].parent
