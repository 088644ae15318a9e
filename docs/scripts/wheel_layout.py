"""A hook of mkdocs: the packages under the names that users import.

In a checkout ``common/`` stands beside ``colora/``; in the wheel it is ``colora/common/``. mkdocstrings reads sources
without importing them, so this makes the wheel's layout in ``build/docs`` out of links.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


def on_startup(**_: Any) -> None:
    """Called by mkdocs before it reads anything."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    places: dict[str, str] = project["tool"]["hatch"]["build"]["targets"]["wheel"]["sources"]
    package = ROOT / "build" / "docs" / "colora"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.iterdir():
        old.unlink()
    for source in (ROOT / "colora").iterdir():
        (package / source.name).symlink_to(source)
    for source, goal in places.items():
        (package.parent / goal).symlink_to(ROOT / source)
