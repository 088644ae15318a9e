"""The ``colora`` command. Each file holds a group of commands; heavy imports wait until a command runs."""

# pyright: reportMissingImports=false
# (in a checkout the other packages lie beside this one, where a type checker does not look)

from __future__ import annotations

import os
import sys
from typing import Annotated

import click
import typer
from typer.core import TyperCommand

from . import compare, deploy, doctor, model, report, simulate, transfer, watch
from .exit_codes import BAD_INPUT

ENVIRONMENT = {  # defaults for this process and its children; a value that the user has set stays
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


class PlainCommand(TyperCommand):
    """A command with plain help. Typer escapes its brackets for Rich, even where Rich prints nothing."""

    def get_help(self, ctx: click.Context) -> str:
        """Return the help text without backslashes before brackets."""
        return super().get_help(ctx).replace("\\[", "[")


app = typer.Typer(
    help="Federated fine-tuning of foundation models in which every site keeps its own model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    simulate.simulate,
    compare.compare,
    deploy.server,
    deploy.client,
    deploy.provision,
    deploy.status,
    report.report,
    watch.watch,
    doctor.doctor,
    model.export,
    model.predict,
    model.personalize,
    transfer.transfer,
):
    app.command(cls=PlainCommand)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from colora import __version__

        typer.echo(f"colora {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Define the options of ``colora`` itself."""


def main() -> None:
    """Run the command line. A user's mistake prints one line and exits with code 2, without a traceback."""
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    try:
        app(standalone_mode=True)
    except Exception as error:
        from colora.common.errors import ColoraError

        if not isinstance(error, ColoraError):
            raise
        print(f"colora: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
