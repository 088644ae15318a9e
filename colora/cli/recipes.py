"""Finding recipes: by path, or by the name of a recipe that comes with colora."""

# pyright: reportMissingImports=false
# (in a checkout the other packages lie beside this one, where a type checker does not look)

from __future__ import annotations

import os
from pathlib import Path


def find_recipe(name: str) -> Path:
    """Return the path of a recipe. ``name`` is a path, or the name of a shipped recipe. Raises ConfigError."""
    from colora.common.config.diagnostics import did_you_mean
    from colora.common.errors import ConfigError

    if Path(name).suffix == ".toml" or os.sep in name:
        return Path(name)
    shipped = {path.stem: path for folder in _recipe_folders() for path in sorted(folder.glob("*.toml"))}
    if name not in shipped:
        names = ", ".join(sorted(shipped))
        raise ConfigError(
            "recipe",
            f"a .toml file or one of {names}",
            repr(name),
            message=f"There is no recipe {name!r}.",
            hint=f"{did_you_mean(name, shipped)}Give the path of a .toml file, or one of {names}.",
        )
    return shipped[name]


def _recipe_folders() -> list[Path]:
    """In a wheel the recipes are inside the package, in a checkout beside it."""
    package = Path(__file__).resolve().parent.parent
    return [folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir()][:1]
