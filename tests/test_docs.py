"""Every code block of the README and the documentation works, or says why it is not run.

``docs/extending/documentation.md`` describes what the kinds of blocks mean.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
import typer.main

from colora.cli import app
from colora.common.config.loader import load_site, recipe_from
from colora.server.deployment.provisioning.provision import read_plan
from docs.scripts.code_blocks import ROOT, Block, all_blocks, commands, whole_recipe, whole_site


def check_recipe(block: Block, folder: Path) -> None:
    recipe_from(whole_recipe(tomllib.loads(block.code)))


def check_site(block: Block, folder: Path) -> None:
    (folder / "site.toml").write_text(tomli_w.dumps(whole_site(tomllib.loads(block.code))))
    load_site(folder / "site.toml")


def check_sites(block: Block, folder: Path) -> None:
    (folder / "sites.toml").write_text(block.code)
    read_plan(folder / "sites.toml")


def check_python(block: Block, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", block.code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def check_commands(block: Block, folder: Path) -> None:
    """Parse every ``colora`` command with the command line's own parser, without running it."""
    group = typer.main.get_group(app)
    for name, *arguments in commands(block):
        command = group.commands[name]
        command.make_context(f"colora {name}", arguments)


CHECKS: dict[str, Callable[[Block, Path], None]] = {
    "recipe": check_recipe,
    "site": check_site,
    "sites": check_sites,
    "python": check_python,
    "bash": check_commands,
    "text": lambda block, folder: None,
}


@pytest.mark.parametrize("block", [b for b in all_blocks() if not b.not_run], ids=lambda b: b.name)
def test_a_code_block_works(block: Block, tmp_path: Path) -> None:
    CHECKS[block.kind](block, tmp_path)
