"""A measured quantity with its spread, and tables of such quantities, for all benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """Repeated measurements of one quantity. ``bar`` is the upper limit of its median; None: no limit."""

    what: str
    values: Sequence[float]
    unit: str = ""
    bar: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high


def show(title: str, figures: Sequence[Figure]) -> None:
    """Print median, quartiles, number of measurements and verdict of every figure."""
    rows = []
    for figure in figures:
        low, high = figure.quartiles
        verdict = "" if figure.bar is None else "met" if figure.median <= figure.bar else "MISSED"
        bar = "" if figure.bar is None else f"≤ {figure.bar:g} {figure.unit}".rstrip()
        median, spread = f"{figure.median:.3f} {figure.unit}".rstrip(), f"{low:.3f} … {high:.3f}"
        rows.append((figure.what, median, spread, str(len(figure.values)), bar, verdict))
    show_table(title, ("what", "median", "quartiles", "n", "bar", ""), rows)


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with a left-aligned first column and right-aligned numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return ratios of paired measurements."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]
