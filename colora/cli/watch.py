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
    run: Annotated[Path, typer.Argument(show_default=False, metavar="RUN")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on. Default: a free one.")] = 0,
) -> None:
    """Show the report of a run in a browser while the run goes on.

    RUN is a run folder. The page changes with the run. Only the address that this command prints shows it. Stop with
    Ctrl-C; the run is not affected.
    """
    import socket

    import uvicorn

    from colora.common.errors import ConfigError, StateError
    from colora.server.reporting.watch import make_app, new_token

    if not run.is_dir():
        message = f"{run} is not a run folder."
        raise StateError("RUN", "a run folder", run, message=message, hint="Give a run folder, for example runs/demo.")
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
