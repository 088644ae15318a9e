"""What a look at a site found: one line each, and an exit code."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


FAILED = 2  # exit code


class CheckFailed(Exception):
    """What a person has to mend, in one line."""


@dataclass(frozen=True)
class CheckResult:
    """One line: what was looked at, whether it may stay so, and what is there."""

    name: str
    ok: bool
    detail: str


def print_checks(findings: Iterable[CheckResult], console: Console) -> int:
    """Prints one line a finding and what they add up to; the exit code is 2 where any failed."""
    from rich.text import Text

    findings = list(findings)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = Text("ok    ", "green") if finding.ok else Text("WRONG ", "bold red")
        line = Text.assemble(mark, f"{finding.name:<{width}}  {finding.detail}")
        console.print(line, soft_wrap=True)
    wrong = sum(not finding.ok for finding in findings)
    console.print(Text(f"{wrong} of {len(findings)} want mending" if wrong else "All is well"), soft_wrap=True)
    return FAILED if wrong else 0


def size(count: int) -> str:
    """Bytes as people say them: 90 MB, 1.2 GB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    value = float(count)
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.1f} {units[0]}" if value < 10 and units[0] != "B" else f"{value:.0f} {units[0]}"
