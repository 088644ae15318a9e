"""Does collaboration help? Arms side by side on one recipe, over seeds: mean ± standard deviation over seeds.

An arm is a method, or a method and the kind of a private adapter: ``colora``, ``colora+lora``, ``colora+multilora``.
At one seed all arms have the same rows in the same order, so differences are taken seed by seed.

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
Boards = dict[str, list[RunSummary]]  # arm → a board a seed


def run(recipe_path: Path, arm: str, seed: int, folder: Path) -> RunSummary:
    """One arm at one seed, measured at the end only."""
    same = ("simulation.baseline=false", "simulation.threads=1", "evaluation.every=0")
    recipe = load_recipe(recipe_path, (f"seed={seed}", *same))
    method, _, private = arm.partition("+")
    kind = dataclasses.replace(recipe.private, kind=private or "none")
    recipe = dataclasses.replace(recipe, method=MethodSettings(name=method), private=kind)
    return summarize(simulate(recipe, folder / f"{arm}-{seed}", resume=False).events())


def table_of(title: str, boards: Boards) -> Table:
    """A row a site and one for their mean, a column an arm; then what each arm has over the first."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("site", "base", *boards):
        table.add_column(column, justify="left" if column == "site" else "right", no_wrap=True)
    first = next(iter(boards.values()))
    rows: dict[str, Callable[[RunSummary, str], float | None]] = {
        site: lambda board, composition, site=site: board.rows[site].metric(composition) for site in first[0].rows
    }
    rows["mean"] = RunSummary.mean
    for name, of in rows.items():
        cells = [_cell(of(board, "base") for board in first)]
        cells += [_cell(of(board, "personal") for board in mine) for mine in boards.values()]
        table.add_row(name, *cells, end_section=name == "mean")
    alone = [_mean(board) for board in first]
    gains = [[_mean(board) - a for board, a in zip(mine, alone, strict=True)] for mine in boards.values()]
    table.add_row(f"mean − {next(iter(boards))}", "", *(_cell(gain) for gain in gains))
    return table


def main() -> None:
    given = sys.argv[1:]
    name, seeds = (given + ["newsgroups", "3"][len(given) :])[:2]
    boards: Boards = {arm: [] for arm in given[2:] or ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(int(seeds)):
            for arm, mine in boards.items():
                started = time.monotonic()
                mine.append(run(find_recipe(name), arm, seed, Path(folder)))
                print(f"seed {seed} {arm}: {_mean(mine[-1]):.3f}, {time.monotonic() - started:.0f} s", flush=True)
    Console(width=170).print(table_of(f"{name}, {seeds} seeds: the personal model's metric", boards))


def _mean(board: RunSummary) -> float:
    return board.mean("personal") or 0.0


def _cell(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{statistics.mean(known):.3f} ± {statistics.stdev(known) if len(known) > 1 else 0:.3f}"


if __name__ == "__main__":
    main()
