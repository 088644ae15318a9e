"""The command line itself: help, versions and what every command has in common."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from colora import __version__
from colora.cli import app

COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]


def said(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, words)
    return result.exit_code, result.output


def test_the_version_needs_no_command() -> None:
    assert said("--version") == (0, f"colora {__version__}\n")


def test_without_a_command_the_help_is_shown() -> None:
    _, page = said()
    assert page == said("-h")[1] == said("--help")[1]
    assert all(f"  {name} " in page for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_short_help_option_and_clean_help(name: str) -> None:
    code, page = said(name, "-h")
    assert (code, page) == said(name, "--help")
    assert page.startswith(f"Usage: root {name} ")
    assert "\\" not in page
