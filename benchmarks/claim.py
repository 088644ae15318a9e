"""Does collaboration help? Compare methods on one recipe: mean ± standard deviation over seeds.

An arm is a method, or a method and the kind of a private adapter: ``colora``, ``colora+lora``, ``colora+multilora``.
All arms use the same rows in the same order at a given seed, so differences are paired by seed.

python benchmarks/claim.py [RECIPE] [SEEDS] [ARM …]     (newsgroups, 3, local fedit colora)
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from colora.cli.recipes import find_recipe
from colora.common.config.loader import load_recipe
from colora.common.config.schema import MethodSettings
from colora.server.reporting.summary import RunSummary, summarize
from colora.simulation.run import simulate

ARMS = ("local", "fedit", "colora")
Summaries = dict[str, list[RunSummary]]  # arm → one summary per seed


def run(recipe_path: Path, arm: str, seed: int, folder: Path) -> RunSummary:
    """Run one arm at one seed; it is evaluated at its end only."""
    fixed = ("simulation.baseline=false", "simulation.threads=1", "evaluation.every=0")
    recipe = load_recipe(recipe_path, (f"seed={seed}", *fixed))
    method, _, private = arm.partition("+")
    kind = dataclasses.replace(recipe.private, kind=private or "none")
    recipe = dataclasses.replace(recipe, method=MethodSettings(name=method), private=kind)
    return summarize(simulate(recipe, folder / f"{arm}-{seed}", resume=False).events())


def table_of(title: str, summaries: Summaries) -> Table:
    """Return a table with a row per site, a row for their mean, and the gain of each arm over the first."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("site", "base", *summaries):
        table.add_column(column, justify="left" if column == "site" else "right", no_wrap=True)
    first = next(iter(summaries.values()))
    rows: dict[str, Callable[[RunSummary, str], float | None]] = {
        site: lambda summary, mode, site=site: summary.rows[site].metric(mode) for site in first[0].rows
    }
    rows["mean"] = RunSummary.mean
    for name, metric_of in rows.items():
        cells = [_cell(metric_of(summary, "base") for summary in first)]
        cells += [_cell(metric_of(summary, "personal") for summary in arm) for arm in summaries.values()]
        table.add_row(name, *cells, end_section=name == "mean")
    alone = [_mean(summary) for summary in first]
    gains = [[_mean(summary) - a for summary, a in zip(arm, alone, strict=True)] for arm in summaries.values()]
    table.add_row(f"mean − {next(iter(summaries))}", "", *(_cell(gain) for gain in gains))
    return table


def main() -> None:
    arguments = sys.argv[1:]
    name, seeds = (arguments + ["newsgroups", "3"][len(arguments) :])[:2]
    summaries: Summaries = {arm: [] for arm in arguments[2:] or ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(int(seeds)):
            for arm, results in summaries.items():
                started = time.monotonic()
                results.append(run(find_recipe(name), arm, seed, Path(folder)))
                print(f"seed {seed} {arm}: {_mean(results[-1]):.3f}, {time.monotonic() - started:.0f} s", flush=True)
    Console(width=170).print(table_of(f"{name}, {seeds} seeds: the personal model's metric", summaries))


def _mean(summary: RunSummary) -> float:
    return summary.mean("personal") or 0.0


def _cell(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{statistics.mean(known):.3f} ± {statistics.stdev(known) if len(known) > 1 else 0:.3f}"


if __name__ == "__main__":
    main()
