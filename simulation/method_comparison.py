"""Compares methods over seeds: each at the point of a grid that is best for it on held-out training rows."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.atomic_io import write_atomically
from ..common.config.schema import Recipe
from ..common.dataset import TASKS
from ..common.errors import ConfigError
from ..common.standard_error import mean_and_error
from ..server.reporting.page.build import write_page
from .cells import Cell, Point, Result, run_cell
from .comparison import paired_gain

Report = Callable[[Result, bool, int, int], None]  # result, whether it was run now, its number, number of cells


@dataclass(frozen=True)
class Comparison:
    """The results of one method over seeds, and how they differ from those of the first method.

    ``mean`` and ``gain`` are (value, standard error): over seeds or, with one seed, over sites. ``better`` and
    ``worse`` count sites, at every seed, whose difference is beyond two standard errors over their test rows.
    """

    results: list[Result]
    mean: tuple[float, float | None]
    gain: tuple[float, float | None]
    better: int
    worse: int

    @property
    def cell(self) -> Cell:
        """The cell of the first seed."""
        return self.results[0].cell


def points_of(grid: Sequence[str]) -> list[Point]:
    """Return all points of ``KEY=A,B`` entries. Raises ConfigError for an entry of another form."""
    axes = []
    for entry in grid:
        key, equals, values = entry.partition("=")
        if not key or not equals or not all(values.split(",")):
            raise ConfigError("--grid", "KEY=VALUE,VALUE", entry, message=f"--grid {entry} is not KEY=VALUE,VALUE.")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*axes))


class Grid:
    """Methods, points and seeds of one recipe, and the folder of their runs."""

    def __init__(
        self,
        recipe: Path,
        overrides: Sequence[str],
        arms: Sequence[str],
        points: Sequence[Point],
        seeds: Sequence[int],
        folder: Path,
    ) -> None:
        """Check the recipes of all cells. Raises ConfigError."""
        self.arms, self.points, self.seeds, self.folder = arms, points, seeds, folder
        tuned = points if len(points) > 1 else ()
        self._tuning = [Cell(arm, point, seed, tuning=True) for arm in arms for point in tuned for seed in seeds]
        self._recipe: Callable[[Cell], Recipe] = lambda cell: cell.recipe(recipe, overrides)
        for cell in (*self._tuning, *(Cell(arm, points[0], seeds[0]) for arm in arms)):
            self._recipe(cell)

    @property
    def size(self) -> int:
        """Number of cells."""
        return len(self._tuning) + len(self.arms) * len(self.seeds)

    def run(self, report: Report) -> list[Comparison]:
        """Run all cells that are not finished; return the methods' results in the order of ``arms``."""
        numbers = itertools.count(1)

        def run(cell: Cell) -> Result:
            result, ran = run_cell(cell, self._recipe(cell), self.folder)
            report(result, ran, next(numbers), self.size)
            return result

        tuned = [run(cell) for cell in self._tuning]
        chosen = {arm: self._best([r for r in tuned if r.cell.arm == arm]) for arm in self.arms}
        results = [[run(Cell(arm, chosen[arm], seed)) for seed in self.seeds] for arm in self.arms]
        return [_compared(each, results[0]) for each in results]

    def _best(self, tuned: Sequence[Result]) -> Point:
        """The point with the best mean over seeds; the first one without tuning."""

        def quality(point: Point) -> list[float]:
            found = [result.quality for result in tuned if result.cell.point == point]
            return [sum(values) / len(found) for values in zip(*found, strict=True)]

        return max(self.points, key=quality) if tuned else self.points[0]


def write_results(compared: Sequence[Comparison], folder: Path) -> None:
    """Write ``results.csv``, a row per method, seed and site, and ``report.html``, the runs of the first seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "settings", "seed", "site", "metric", "value", "gain", "standard_error"])
    for comparison in compared:
        for result, first in zip(comparison.results, compared[0].results, strict=True):
            settings = " ".join(result.cell.point)
            for site, value in result.metrics.items():
                gain, error = _site_gain(result, first, site)
                metric = TASKS[result.summary.rows[site].task].primary_metric
                writer.writerow([result.cell.arm, settings, result.cell.seed, site, metric, value, gain, error])
    write_atomically(folder / "results.csv", text.getvalue().encode(), lasting=False)
    write_page([comparison.results[0].run.path for comparison in compared], folder / "report.html")


def _compared(results: list[Result], first: list[Result]) -> Comparison:
    pairs = list(zip(results, first, strict=True))
    gains = [_gains(result, other) for result, other in pairs]
    over_seeds = len(results) > 1
    mean = mean_and_error([r.mean for r in results] if over_seeds else list(results[0].metrics.values()))
    gain = mean_and_error([sum(g) / len(g) for g in gains] if over_seeds else gains[0])
    clear = [_clear_gain(result, other, site) for result, other in pairs for site in result.metrics]
    return Comparison(results, mean, gain, sum(c > 0 for c in clear), sum(c < 0 for c in clear))


def _gains(result: Result, other: Result) -> list[float]:
    """The gain of every site that both have measured, positive if better."""
    both = [site for site in result.metrics if site in other.metrics]
    return [result.sign(site) * (result.metrics[site] - other.metrics[site]) for site in both]


def _site_gain(result: Result, other: Result, site: str) -> tuple[float | None, float | None]:
    """A site's gain and its standard error over test rows."""
    if site not in other.metrics:
        return None, None
    scores, others = result.row_scores(site), other.row_scores(site)
    if scores and len(scores) == len(others):
        return paired_gain(scores, others)
    return result.sign(site) * (result.metrics[site] - other.metrics[site]), None


def _clear_gain(result: Result, other: Result, site: str) -> int:
    """1 if a site's gain is beyond two standard errors, -1 if its loss is, otherwise 0."""
    gain, error = _site_gain(result, other, site)
    if gain is None or error is None or abs(gain) <= 2 * error:
        return 0
    return 1 if gain > 0 else -1


def seeds_of(text: str) -> list[int]:
    """Return the seeds of ``0-4`` or ``0,2,5``. Raises ConfigError."""
    return list(dict.fromkeys(_ranges(text)))


def _ranges(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(
                "--seeds", "0-4 or 0,2,5", text, message=f"--seeds {text} is not of the form 0-4 or 0,2,5."
            )
        yield from range(int(first), int(last or first) + 1)
