"""``runs/<federation>/``: what lies where, and whether a folder may be used for a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.config.loader import load_recipe
from ...common.config.schema import Recipe, to_dict
from ...common.errors import ConfigError, StateError
from .events import Event, read_events

STARTED = {"sites", "roster.json", "sites/data", "sites/site.toml", "logs", "server.lock", "flower"}


@dataclass(frozen=True)
class RunFolder:
    """``runs/<federation>/``: the recipe as it ran, events, checkpoints, sites, the baseline and the report."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def roster(self) -> Path:
        """Names of the sites in order, and the round that each joins in."""
        return self.path / "roster.json"

    @property
    def stop(self) -> Path:
        """A file that asks the coordinator to stop after the round."""
        return self.path / "stop"

    @property
    def baseline(self) -> Path:
        """The folder of the local-only federation."""
        return self.path / "baseline"

    def events(self) -> list[Event]:
        """What happened, the baseline's events marked ``baseline``."""
        own, base = (read_events(folder / "events.jsonl") for folder in (self.path, self.baseline))
        return own + [{**event, "baseline": True} for event in base]

    def check_new(self) -> None:
        """A new or empty folder, or one in which a start was cut off. Raises StateError."""
        wanted = "a new or empty folder"
        if self.recipe.exists():
            raise StateError(
                f"--out {self.path}", "a new folder, or --resume", f"a run of {load_recipe(self.recipe).name!r}"
            )
        if self.path.is_file():
            raise StateError(f"--out {self.path}", wanted, "a file")
        if self.path.exists() and not self._unfinished_start():
            raise StateError(f"--out {self.path}", wanted, "other files")

    def check_same(self, recipe: Recipe) -> None:
        """The folder holds this very recipe. Raises ConfigError with what differs."""
        there = load_recipe(self.recipe)
        if there.identity != recipe.identity:
            raise ConfigError(f"--resume {self.path}", "the recipe that the run began with", _difference(there, recipe))

    def _unfinished_start(self) -> bool:
        """A start that was killed while it wrote the sites' rows: nothing but those is there."""
        entries = {entry.name for entry in self.path.iterdir()} | {
            f"sites/{e.name}" for e in self.path.glob("sites/*/*")
        }
        return all(entry in STARTED or entry.startswith((".", "sites/.")) for entry in entries)


def _difference(there: Recipe, here: Recipe) -> str:
    a, b = _flat(to_dict(there)), _flat(to_dict(here))
    free = ("simulation", "description")  # as in Recipe.identity
    keys = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k) and not k.startswith(free))
    return ", ".join(f"{k} = {b.get(k)!r} instead of {a.get(k)!r}" for k in keys[:3])


def _flat(value: Any, path: str = "") -> dict[str, object]:
    """Values by dotted key; ``[[site]]`` tables by their names, and the list of names as ``site``."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        named = {table["name"]: table for table in value}
        return {path: list(named), **_flat(named, path)}
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}" if path else key).items()}
    return {path: value}
