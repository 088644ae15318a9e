"""A new site personalizes a finished federation's adapter, compared with training alone.

The recipe runs without one site. ``personalize`` then fits that site's core and head to the finished checkpoint. On the
same rows the site also trains its own LoRA (method ``local``). Both are run with the few steps of a final
personalization and with as many steps as a participant takes in the whole run. The table has the mean ± standard
deviation over seeds.

python benchmarks/join.py [RECIPE] [SITE] [SEEDS]     (newsgroups, sci-2, 3)
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

TEST = 256  # test texts of the new site
BASE, SHARED, FINAL = "base model, fitted head", "shared adapter, fitted head", "the simulation's final request"
PROBES = {BASE: "base", SHARED: "shared"}  # label → evaluation mode; only a logistic regression is fitted


@dataclass(frozen=True)
class Outcome:
    """The result of one arm at one seed. ``trained`` counts parameters by group."""

    accuracy: float
    seconds: float = 0.0  # of training, without loading and evaluation
    trained: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Stopwatch:
    """A step callback that measures the seconds from the first to the latest step."""

    started: float = 0.0
    seconds: float = 0.0

    def __call__(self, done: int, total: int) -> None:
        self.started = self.started if done else time.monotonic()
        self.seconds = time.monotonic() - self.started


def recipe_without(path: Path, site: str, seed: int) -> Recipe:
    """Return the recipe with ``site`` joining after the last round, and evaluation at the end only."""
    recipe = load_recipe(path, (f"seed={seed}", "simulation.baseline=false", "evaluation.every=0"))
    recipe = dataclasses.replace(recipe, simulation=dataclasses.replace(recipe.simulation, threads=1))
    sites = tuple(
        dataclasses.replace(s, from_round=recipe.rounds + 1, data=dataclasses.replace(s.data, test=TEST))
        if s.name == site
        else s
        for s in recipe.site
    )
    return dataclasses.replace(recipe, site=sites)


def personalized(site: SiteSettings, saved: SavedModel, steps: int) -> Outcome:
    """Fit the site's core and head to the finished adapter."""
    stopwatch = Stopwatch()
    result = personalize(site, saved, steps=steps, replace=True, on_step=stopwatch)
    return Outcome(_primary(site, result.metrics), stopwatch.seconds, result.trained)


def alone(site: SiteSettings, plan: Plan, steps: int) -> Outcome:
    """Train a LoRA and a head at the site alone."""
    train = dataclasses.replace(plan.train, final_steps=steps)
    plan = dataclasses.replace(plan, name=f"{plan.name}-alone", method=MethodSettings(name="local"), train=train)
    session = TrainerSession(site)
    session.start()
    plan = session.accept(plan.name, to_json(plan))
    stopwatch, counts = Stopwatch(), Counter[str]()
    request = TrainRequest(plan.name, plan.rounds + 1, "finalize", 0, to_json(plan), {}, evaluate=True)
    reply, _ = session.answer(plan, request, stopwatch)
    for key, parameter in session.trainer(plan).parameters.items():
        counts[group_of(key)] += parameter.numel()
    return Outcome(_primary(site, reply.metrics), stopwatch.seconds, counts)


def run(recipe: Recipe, name: str, folder: Path) -> dict[str, Outcome]:
    """Run all arms at one seed and return their outcomes by name."""
    summary = summarize(simulate(recipe, folder, resume=False).events())
    site, saved = load_site(folder / "sites" / name / "site.toml"), read_saved_model(folder)
    row = summary.rows[name]
    few, total = recipe.train.final_steps or recipe.train.steps_per_round(row.train), recipe.total_steps(row.train)
    outcomes = {label: Outcome(row.metric(mode) or 0.0) for label, mode in PROBES.items()}
    outcomes[FINAL] = Outcome(row.metric("personal") or 0.0)
    for steps in (few, total):
        outcomes[f"personalize, {steps} steps"] = personalized(site, saved, steps)
    for steps in (few, total):
        outcomes[f"alone, {steps} steps"] = alone(site, saved.plan, steps)
    return outcomes


def table_of(title: str, seeds: list[dict[str, Outcome]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for column in ("parameters trained", "s", "accuracy"):
        table.add_column(column, justify="right", no_wrap=True)
    for arm, first in seeds[0].items():
        accuracies = [outcomes[arm].accuracy for outcomes in seeds]
        numbers = " + ".join(f"{group} {count:,}" for group, count in sorted(first.trained.items()))
        seconds = statistics.mean(outcomes[arm].seconds for outcomes in seeds)
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        shown = f"{seconds:.1f}" if first.trained else ""
        table.add_row(arm, numbers, shown, f"{statistics.mean(accuracies):.3f} ± {spread:.3f}")
    return table


def main() -> None:
    given = sys.argv[1:]
    name, site, seeds = given + ["newsgroups", "sci-2", "3"][len(given) :]
    seed_outcomes = []
    for seed in range(int(seeds)):
        with tempfile.TemporaryDirectory() as folder:
            seed_outcomes.append(run(recipe_without(find_recipe(name), site, seed), site, Path(folder) / "run"))
        parts = (f"{arm} {outcome.accuracy:.3f}" for arm, outcome in seed_outcomes[-1].items())
        print(f"seed {seed}: {'; '.join(parts)}", flush=True)
    Console(width=120).print(table_of(f"{site} joins {name} after training, {seeds} seeds", seed_outcomes))


def _primary(site: SiteSettings, metrics: Mapping[str, float]) -> float:
    return metrics[f"personal.{TASKS[site.data.task].primary_metric}"]


if __name__ == "__main__":
    main()
