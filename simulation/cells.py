"""The cells of a comparison: one run for each method, point of a grid and seed. A finished cell is never run again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..common.config.loader import load_recipe
from ..common.config.rules import check_rules
from ..common.config.schema import (
    DataSettings,
    MethodSettings,
    PrivacySettings,
    PrivateSettings,
    Recipe,
    parse,
    to_dict,
)
from ..common.dataset import TASKS
from ..common.event_log import Event
from ..server.reporting.run_folder import RunFolder
from ..server.reporting.summary import RunSummary, summarize
from .comparison import row_scores
from .run import simulate

Point = tuple[str, ...]  # settings KEY=VALUE of one point of the grid
HELD_OUT = 0.25  # fraction of the training rows on which settings are chosen, unless the recipe names one


@dataclass(frozen=True)
class Cell:
    """One run. ``arm`` is a method, with a private adapter if there is one: ``colora``, ``colora+lora``.

    A ``tuning`` cell measures on rows that are held out of the training rows, and reads no test row.
    """

    arm: str
    point: Point
    seed: int
    tuning: bool = False

    @property
    def name(self) -> str:
        """The cell in words."""
        settings = f", {', '.join(self.point)}" if self.point else ""
        return f"{self.arm}{settings}, seed {self.seed}{', tuning' if self.tuning else ''}"

    @property
    def folder(self) -> Path:
        """The path of its run folder below the folder of all cells."""
        kind = "tuning" if self.tuning else "final"
        return Path(kind, self.arm, ",".join(self.point).replace("/", "-") or "recipe", f"seed-{self.seed}")

    def recipe(self, path: Path, overrides: Sequence[str]) -> Recipe:
        """Return the recipe of its run. Raises ConfigError."""
        fixed = (f"seed={self.seed}", "simulation.baseline=false")
        recipe = load_recipe(path, (*overrides, *self.point, *fixed))
        method, _, private = self.arm.partition("+")
        if method != recipe.method.name:
            recipe = dataclasses.replace(recipe, method=parse(MethodSettings, {"name": method}))
        if not recipe.row().shares:  # nothing is sent, so nothing is summed
            secure = {name: getattr(PrivacySettings(), name) for name in ("secure_aggregation", "min_sites")}
            recipe = dataclasses.replace(recipe, privacy=dataclasses.replace(recipe.privacy, **secure))
        if private:
            settings = parse(PrivateSettings, {**to_dict(recipe.private), "kind": private})
            recipe = dataclasses.replace(recipe, private=settings)
        check_rules(recipe)
        return _held_out(recipe) if self.tuning else recipe


@dataclass(frozen=True)
class Result:
    """What a finished cell measured."""

    cell: Cell
    run: RunFolder
    recipe: Recipe

    @cached_property
    def summary(self) -> RunSummary:
        """The run's summary."""
        return summarize(self.run.events())

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The primary metric of each site's final model."""
        found = {site: row.metric("personal") for site, row in self.summary.rows.items()}
        return {site: value for site, value in found.items() if value is not None}

    @property
    def mean(self) -> float:
        """The mean of the primary metric over sites."""
        return sum(self.metrics.values()) / len(self.metrics)

    @property
    def quality(self) -> tuple[float, float]:
        """Larger is better: the mean primary metric, and the mean loss for cells with equal ones."""
        signed = [self.sign(site) * value for site, value in self.metrics.items()]
        losses = [row.metrics.get("personal.loss") or 0.0 for row in self.summary.rows.values()]
        return sum(signed) / len(signed), -sum(losses) / len(losses)

    @property
    def bytes(self) -> int:
        """Bytes of all messages."""
        return sum(row.bytes_up + row.bytes_down for row in self.summary.rows.values())

    @property
    def seconds(self) -> float:
        """Seconds of work at all sites."""
        return sum(row.seconds for row in self.summary.rows.values())

    def sign(self, site: str) -> int:
        """-1 where a lower metric is better, otherwise 1."""
        return -1 if TASKS[self.summary.rows[site].task].lower_is_better else 1

    def row_scores(self, site: str) -> tuple[float, ...]:
        """The scores of a site's final model on each of its test rows; none for tasks without them."""
        return row_scores(self.run.path, site, self.recipe)


def run_cell(
    cell: Cell, recipe: Recipe, folder: Path, listener: Callable[[Event], None] | None = None
) -> tuple[Result, bool]:
    """Run a cell in ``folder`` or continue it there; return its result, and whether there was anything to run.

    Raises ConfigError if the folder holds a run of another recipe.
    """
    run = RunFolder(folder / cell.folder)
    if run.recipe.exists():
        run.resume(recipe)
        if any(event["event"] == "finished" for event in run.events()):
            return Result(cell, run, recipe), False
    return Result(cell, simulate(recipe, run.path, resume=True, listener=listener), recipe), True


def _held_out(recipe: Recipe) -> Recipe:
    """The recipe with held-out training rows in place of the test rows."""

    def held_out(data: DataSettings) -> DataSettings:
        fraction = data.validation_fraction or HELD_OUT
        return dataclasses.replace(data, evaluate_on="validation", validation_fraction=fraction)

    sites = tuple(dataclasses.replace(site, data=held_out(site.data)) for site in recipe.site)
    train = dataclasses.replace(recipe.train, fallback=None)
    server = dataclasses.replace(recipe.server, keep="last", patience=None)  # they need validation rows of their own
    return dataclasses.replace(recipe, data=held_out(recipe.data), site=sites, train=train, server=server)
