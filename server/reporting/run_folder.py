"""The run folder ``runs/<federation>/``: its files, and checks that it can be used for a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from ...common.atomic_io import write_atomically
from ...common.config.field_types import NAME
from ...common.config.loader import load_recipe
from ...common.config.schema import Recipe, to_dict
from ...common.errors import ConfigError, StateError
from ...common.event_log import Event, EventLog, Listener
from ...common.json_files import parse_json
from ...common.protocol.limits import MAX_ROUND
from .events import read_events

# Files that may exist before the recipe, which is written last when a run is prepared. A run with [server.privacy] is
# repeated bit for bit with the noise.secret of the other run.
STARTED = {"noise.secret", "sites", "roster.json", "sites/data", "sites/site.toml", "logs", "server.lock", "flower"}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder: recipe, roster, events, checkpoints, sites, baseline and report."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The recipe with all overrides applied."""
        return self.path / "recipe.toml"

    @property
    def roster(self) -> Path:
        """The names of the sites in order, each with its first round, as JSON."""
        return self.path / "roster.json"

    @property
    def public_keys(self) -> Path:
        """A copy of the sites' public keys for secure aggregation, where the coordinator has them."""
        return self.path / "roster.pub"

    @property
    def stop(self) -> Path:
        """While this file exists, the coordinator stops after the current round."""
        return self.path / "stop"

    @property
    def baseline(self) -> Path:
        """The run folder of the local-only baseline."""
        return self.path / "baseline"

    def read_roster(self) -> list[tuple[str, int]]:
        """Return each site's name and first round, in order. Raises StateError if the file is missing or damaged."""
        try:
            entries = parse_json(self.roster.read_bytes(), lambda value: isinstance(value, list) and value != [])
            if not all(map(_is_entry, entries)):
                raise ValueError("an entry is not a name and a round")
            if len({site for site, _ in entries}) < len(entries):
                raise ValueError("a name is in it twice")
            return [(site, first) for site, first in entries]
        except (OSError, ValueError) as error:
            raise StateError(
                str(self.roster),
                'a JSON list of ["SITE", FIRST ROUND]',
                error,
                message=f"{self.roster} is missing or damaged: {error}.",
                hint='Restore it, or write a JSON list with one ["SITE", FIRST ROUND] per site, in the original order.',
            ) from None

    def events(self) -> list[Event]:
        """Return all events; the baseline's have ``baseline`` set to True."""
        main, baseline = (read_events(folder / "events.jsonl") for folder in (self.path, self.baseline))
        return main + [{**event, "baseline": True} for event in baseline]

    def check_new(self) -> None:
        """Check that the folder is new or empty, or that only a start was interrupted in it. Raises StateError."""
        where, expected, hint = f"--out {self.path}", "a new or empty folder", "Choose another --out."
        if self.recipe.exists():
            name = load_recipe(self.recipe).name
            raise StateError(
                where,
                "a new folder",
                f"a run of {name!r}",
                message=f"{where} already holds a run of {name!r}.",
                hint="Continue it with --resume, or choose another --out.",
            )
        if self.path.is_file():
            raise StateError(where, expected, "a file", message=f"{where} is a file, not a folder.", hint=hint)
        if self.path.exists() and not self._unfinished_start():
            raise StateError(where, expected, "other files", message=f"{where} contains other files.", hint=hint)

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the recipe. A folder with a recipe is a complete run folder."""
        write_atomically(self.recipe, tomli_w.dumps(to_dict(recipe)).encode())

    def resume(self, recipe: Recipe, listener: Listener | None = None) -> None:
        """Check that the folder holds a run of this recipe, and extend the run if the recipe has more rounds.

        Raises ConfigError, which names what differs.
        """
        stored = load_recipe(self.recipe)
        if recipe.rounds < stored.rounds:
            raise ConfigError(
                "rounds",
                f"at least {stored.rounds}",
                recipe.rounds,
                message=f"The run in {self.path} has {stored.rounds} rounds. It can be extended, but not shortened.",
                hint=f"Use --rounds with a number above {stored.rounds}, or choose another --out.",
            )
        if stored.identity != recipe.identity:
            difference = _difference(stored, recipe)
            raise ConfigError(
                f"--resume {self.path}",
                "the recipe that the run began with",
                difference,
                message=f"The recipe differs from that of the run in {self.path}: {difference}.",
                hint="Undo the change, or choose another --out.",
            )
        budgets = {"privacy": recipe.privacy, "server.privacy": recipe.server.privacy}
        budgeted = [table for table, settings in budgets.items() if settings and settings.epsilon is not None]
        if recipe.rounds > stored.rounds and budgeted:
            raise ConfigError(
                "rounds",
                f"{stored.rounds}, with {budgeted[0]}.epsilon",
                recipe.rounds,
                message=f"The privacy budget of the run in {self.path} is for {stored.rounds} rounds.",
                hint=f"A run whose recipe has {budgeted[0]}.noise_multiplier without epsilon can be extended.",
            )
        if recipe.rounds > stored.rounds and recipe.privacy.secure_aggregation and recipe.server.keep == "best":
            raise ConfigError(
                "rounds",
                f'{stored.rounds}, with privacy.secure_aggregation and server.keep = "best"',
                recipe.rounds,
                message=f"The run in {self.path} cannot be extended: it would train from a past round's adapter again.",
                hint='With secure aggregation, a run can be extended if its recipe has server.keep = "last".',
            )
        if recipe.rounds > stored.rounds:
            self.write_recipe(recipe)
            events = EventLog(self.path / "events.jsonl", listener)
            events.emit("extended", rounds=recipe.rounds, before=stored.rounds, inexact=recipe.rounds_matter)

    def _unfinished_start(self) -> bool:
        """Whether a run was interrupted while it was prepared, before its recipe was written."""
        entries = {entry.name for entry in self.path.iterdir()}
        entries |= {f"sites/{entry.name}" for entry in self.path.glob("sites/*/*")}
        return all(entry in STARTED or entry.startswith((".", "sites/.")) for entry in entries)


def _is_entry(entry: Any) -> bool:
    """Whether an entry of the roster is a name, which is also that of a folder, and a round."""
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    site, first = entry
    is_name = isinstance(site, str) and re.fullmatch(NAME, site) is not None
    return is_name and type(first) is int and 0 < first <= MAX_ROUND


def _difference(stored: Recipe, given: Recipe) -> str:
    """Describe the first three keys that differ and matter to a result."""
    old, new = _flat(to_dict(stored)), _flat(to_dict(given))
    ignored = ("simulation", "tracking", "description", "rounds")  # as in Recipe.identity
    keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and not k.startswith(ignored))
    return ", ".join(f"{k} = {_shown(new.get(k))} instead of {_shown(old.get(k))}" for k in keys[:3])


def _shown(value: object) -> str:
    return "unset" if value is None else repr(value)


def _flat(value: Any, path: str = "") -> dict[str, object]:
    """Flatten to values by dotted key; ``[[site]]`` tables are keyed by name, and ``site`` is the list of names."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        by_name = {table["name"]: table for table in value}
        return {path: list(by_name), **_flat(by_name, path)}
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{path}.{key}" if path else key).items()}
    return {path: value}
