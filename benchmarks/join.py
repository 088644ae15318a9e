"""A new site joins a finished federation with its core and head alone; beside it the same site training alone.

The recipe runs with one site left out of all rounds; ``personalize`` then fits that site's core and head to the finished
checkpoint, on the same rows from which it also trains a LoRA of its own (method local): with as few steps, and with
as many as a member of the whole run takes. Every arm trains in one stretch. Mean ± standard deviation over seeds.

python benchmarks/join.py [RECIPE] [SITE] [SEEDS]     (demo, sci-2, 3)
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from colora.cli.recipes import find_recipe
from colora.client.personalize import personalize
from colora.client.trainer_service.session import TrainerSession
from colora.common.config.loader import load_recipe, load_site
from colora.common.config.schema import MethodSettings, Plan, Recipe, to_json
from colora.common.config.site_schema import SiteSettings
from colora.common.dataset import TASKS
from colora.common.methods import group_of
from colora.common.models.saved import SavedModel, read_saved_model
from colora.common.protocol.types import TrainRequest
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate

TEST = 256  # texts of the new site
BASE, SHARED, CLOSE = "base model, fitted head", "shared adapter, fitted head", "the simulation's closing order"
BARE = {BASE: "base", SHARED: "shared"}  # nothing but a logistic regression is fitted


@dataclass(frozen=True)
class Outcome:
    """What came of one arm at one seed. ``trained`` counts numbers by parameter group."""

    accuracy: float
    seconds: float = 0.0  # of training, without loading and measuring
    trained: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Stopwatch:
    """Watches a training: seconds from its start to its latest step."""

    began: float = 0.0
    seconds: float = 0.0

    def __call__(self, done: int, total: int) -> None:
        self.began = self.began if done else time.monotonic()
        self.seconds = time.monotonic() - self.began


def recipe_without(path: Path, site: str, seed: int) -> Recipe:
    """The recipe with ``site`` left out until all is trained, and measured at the end only."""
    recipe = load_recipe(path, (f"seed={seed}", "simulation.baseline=false", "evaluation.every=0"))
    recipe = dataclasses.replace(recipe, simulation=dataclasses.replace(recipe.simulation, threads=1))
    sites = tuple(
        dataclasses.replace(s, from_round=recipe.rounds + 1, data=dataclasses.replace(s.data, test=TEST))
        if s.name == site
        else s
        for s in recipe.site
    )
    return dataclasses.replace(recipe, site=sites)


def joined(site: SiteSettings, saved: SavedModel, steps: int) -> Outcome:
    """The site's core and head, fitted to the finished adapter."""
    watch = Stopwatch()
    found = personalize(site, saved, steps=steps, watch=watch)
    return Outcome(_primary(site, found.metrics), watch.seconds, found.trained)


def alone(site: SiteSettings, plan: Plan, steps: int) -> Outcome:
    """The site by itself: a LoRA and a head of its own."""
    train = dataclasses.replace(plan.train, final_steps=steps)
    plan = dataclasses.replace(plan, name=f"{plan.name}-alone", method=MethodSettings(name="local"), train=train)
    resident = TrainerSession(site)
    resident.start()
    plan = resident.accept(plan.name, to_json(plan))
    watch, counts = Stopwatch(), Counter[str]()
    order = TrainRequest(plan.name, plan.rounds + 1, "finalize", 0, to_json(plan), {}, evaluate=True)
    reply, _ = resident.answer(plan, order, watch)
    for key, parameter in resident.trainer(plan).parameters.items():
        counts[group_of(key)] += parameter.numel()
    return Outcome(_primary(site, reply.metrics), watch.seconds, counts)


def run(recipe: Recipe, name: str, folder: Path) -> dict[str, Outcome]:
    """All arms at one seed, by name."""
    board = summarize(simulate(recipe, folder, resume=False).events())
    site, saved = load_site(folder / "sites" / name / "site.toml"), read_saved_model(folder)
    row, few = board.rows[name], recipe.train.final_steps or recipe.train.steps_per_round
    found = {label: Outcome(row.metric(composition) or 0.0) for label, composition in BARE.items()}
    found[CLOSE] = Outcome(row.metric("personal") or 0.0)
    for steps in (few, recipe.total_steps):
        found[f"join-core, {steps} steps"] = joined(site, saved, steps)
    for steps in (few, recipe.total_steps):
        found[f"alone, {steps} steps"] = alone(site, saved.plan, steps)
    return found


def table_of(title: str, seeds: list[dict[str, Outcome]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what", no_wrap=True)
    for column in ("numbers trained", "s", "accuracy"):
        table.add_column(column, justify="right", no_wrap=True)
    for arm, first in seeds[0].items():
        accuracies = [outcomes[arm].accuracy for outcomes in seeds]
        numbers = " + ".join(f"{group} {count:,}" for group, count in sorted(first.trained.items()))
        seconds = statistics.mean(outcomes[arm].seconds for outcomes in seeds)
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        told = f"{seconds:.1f}" if first.trained else ""
        table.add_row(arm, numbers, told, f"{statistics.mean(accuracies):.3f} ± {spread:.3f}")
    return table


def main() -> None:
    given = sys.argv[1:]
    name, site, seeds = given + ["demo", "sci-2", "3"][len(given) :]
    found = []
    for seed in range(int(seeds)):
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(recipe_without(find_recipe(name), site, seed), site, Path(folder) / "run"))
        told = (f"{arm} {outcome.accuracy:.3f}" for arm, outcome in found[-1].items())
        print(f"seed {seed}: {'; '.join(told)}", flush=True)
    Console(width=120).print(table_of(f"{site} joins {name} when all is trained, {seeds} seeds", found))


def _primary(site: SiteSettings, metrics: Mapping[str, float]) -> float:
    return metrics[f"personal.{TASKS[site.data.task].primary_metric}"]


if __name__ == "__main__":
    main()
