"""Results of the checks of a site, how they are printed, and the exit code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


FAILED = 2  # exit code
NAME_WIDTH = len("coordinator")  # the longest name of a check


class CheckFailed(Exception):
    """A check failed. The text says in one line what is wrong."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check: its name, whether it passed, and one line of detail."""

    name: str
    ok: bool
    detail: str


def print_checks(results: Iterable[CheckResult], console: Console) -> int:
    """Print one line per result as it comes, and a summary. Returns the exit code, which is 2 when a check failed."""
    from rich.text import Text

    count = failed = 0
    for result in results:
        mark = Text("ok    ", "green") if result.ok else Text("FAIL  ", "bold red")
        line = Text.assemble(mark, f"{result.name:<{NAME_WIDTH}}  {result.detail}")
        console.print(line, soft_wrap=True)
        count, failed = count + 1, failed + (not result.ok)
    summary = f"{failed} of {count} checks failed" if failed else "All checks passed"
    console.print(Text(summary), soft_wrap=True)
    return FAILED if failed else 0


def size(count: int) -> str:
    """Format a number of bytes with a decimal unit: 90 MB, 1.2 GB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    value = float(count)
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.1f} {units[0]}" if value < 10 and units[0] != "B" else f"{value:.0f} {units[0]}"
