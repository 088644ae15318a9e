"""Does collaboration help? Compare methods on one recipe: mean ± standard deviation over seeds.

An arm is a method, a private adapter if it has one, and the recipe's keys that it changes: ``colora``, ``colora+lora``,
``local,train.lr=2e-3``. All arms use the same rows in the same order at a given seed, so differences are paired by
seed. Every result is appended to ``benchmarks/results/RECIPE.jsonl``; results that the file has are not run again.

python benchmarks/claim.py [RECIPE] [SEEDS] [ARM …]     (newsgroups, 3, local fedit colora)
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from colora.cli.recipes import find_recipe
from colora.common.config.loader import load_recipe
from colora.common.config.schema import MethodSettings
from colora.common.dataset import EVAL_MODES
from colora.server.reporting.summary import summarize
from colora.simulation.run import simulate

ARMS = ("local", "fedit", "colora")
RESULTS = Path(__file__).with_name("results")
Result = dict[str, Any]  # arm, seed, seconds, and sites: by site its primary metric of every model
Results = dict[str, list[Result]]  # arm → one result per seed


def run(recipe_path: Path, arm: str, seed: int, folder: Path) -> Result:
    """Run one arm at one seed; it is evaluated at its end only."""
    fixed = ("simulation.baseline=false", "simulation.threads=1", "evaluation.every=0")
    kind, *keys = arm.split(",")
    recipe = load_recipe(recipe_path, (f"seed={seed}", *fixed, *keys))
    method, _, private = kind.partition("+")
    changed = dataclasses.replace(recipe.private, kind=private or "none")
    recipe = dataclasses.replace(recipe, method=MethodSettings(name=method), private=changed)
    started = time.monotonic()
    summary = summarize(simulate(recipe, folder / f"{kind}-{seed}", resume=False).events())
    sites = {site: {mode: row.metric(mode) for mode in EVAL_MODES} for site, row in summary.rows.items()}
    return {"arm": arm, "seed": seed, "sites": sites, "seconds": round(time.monotonic() - started)}


def known_results(path: Path) -> dict[tuple[str, int], Result]:
    """Return the results in a file by arm and seed."""
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    return {(result["arm"], result["seed"]): result for result in results}


def mean_of(result: Result, mode: str = "personal") -> float:
    """Return the mean over sites."""
    return statistics.mean(site[mode] for site in result["sites"].values() if site[mode] is not None)


def table_of(title: str, results: Results) -> Table:
    """Return a table with a row per site, a row for their mean, and the gain of each arm over the first."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("site", "base", *results):
        table.add_column(column, justify="left" if column == "site" else "right", no_wrap=True)
    first = next(iter(results.values()))
    for site in first[0]["sites"]:
        cells = [_cell(r["sites"][site]["base"] for r in first)]
        table.add_row(site, *cells, *(_cell(r["sites"][site]["personal"] for r in arm) for arm in results.values()))
    means = [_cell(map(mean_of, arm)) for arm in results.values()]
    table.add_section()
    table.add_row("mean", _cell(mean_of(r, "base") for r in first), *means, end_section=True)
    gains = [[mean_of(r) - mean_of(a) for r, a in zip(arm, first, strict=True)] for arm in results.values()]
    table.add_row(f"mean − {next(iter(results))}", "", *map(_cell, gains))
    return table


def main() -> None:
    arguments = sys.argv[1:]
    name, seeds = (arguments + ["newsgroups", "3"][len(arguments) :])[:2]
    results: Results = {arm: [] for arm in arguments[2:] or ARMS}
    path = RESULTS / f"{Path(name).stem}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(int(seeds)):
            for arm, found in results.items():
                result = known_results(path).get((arm, seed))
                if result is None:
                    result = run(find_recipe(name), arm, seed, Path(folder) / arm.replace("/", "-"))
                    with path.open("a") as file:
                        file.write(json.dumps(result) + "\n")
                found.append(result)
                print(f"seed {seed} {arm}: {mean_of(result):.3f}, {result['seconds']} s", flush=True)
    Console(width=170).print(table_of(f"{name}, {seeds} seeds: the personal model's metric", results))


def _cell(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{statistics.mean(known):.3f} ± {statistics.stdev(known) if len(known) > 1 else 0:.3f}"


if __name__ == "__main__":
    main()
