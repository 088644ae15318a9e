"""What the benchmarks share: a measured quantity with its spread, and one table of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """Repeated measurements of one thing; ``bar`` is the most that its median may be (None: shown only)."""

    what: str
    values: Sequence[float]
    unit: str = ""
    bar: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high


def show(title: str, figures: Sequence[Figure]) -> None:
    """Prints median, quartiles, number of measurements and verdict of every figure."""
    rows = []
    for figure in figures:
        low, high = figure.quartiles
        verdict = "" if figure.bar is None else "met" if figure.median <= figure.bar else "MISSED"
        bar = "" if figure.bar is None else f"≤ {figure.bar:g} {figure.unit}".rstrip()
        median, spread = f"{figure.median:.3f} {figure.unit}".rstrip(), f"{low:.3f} … {high:.3f}"
        rows.append((figure.what, median, spread, str(len(figure.values)), bar, verdict))
    show_table(title, ("what", "median", "quartiles", "n", "bar", ""), rows)


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints one table, the first column to the left and the numbers to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ratios of measurements that were taken side by side."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]
